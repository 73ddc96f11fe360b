"""The Idempotency-Keys of the users of a list."""

from __future__ import annotations

import pytest

from coupon_svc.domain.lists import key_of_list, key_of_user
from coupon_svc.domain.outcomes import Refused
from coupon_svc.http.validation import parse_idempotency_key


@pytest.mark.parametrize("list_key", ["key", "key 1", "1", '"', "x" * 255])
def test_each_user_has_a_key_that_tells_its_list_and_that_no_caller_can_spell(list_key: str) -> None:
    keys = [key_of_user(list_key, index) for index in range(1_000)]
    assert len({*keys, list_key}) == 1_001
    for key in keys:
        assert key_of_list(key) == list_key
        with pytest.raises(Refused):
            parse_idempotency_key(key.encode())
        with pytest.raises(Refused):
            parse_idempotency_key(f'"{key}"'.encode())


def test_a_list_without_a_key_has_none_for_its_users() -> None:
    assert key_of_user("", 7) == ""
    assert key_of_list("key 1") is None
    assert key_of_list("") is None
