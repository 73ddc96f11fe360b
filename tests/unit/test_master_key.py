"""Master keys: how they are written, and what they are called."""

from __future__ import annotations

import re

import pytest

from coupon_svc.domain.master_key import KEY_BYTES, InvalidMasterKey, MasterKeys, key_id, new_master_key

KEY = "nKy0e1grtvDfOC0_OKQOZkq4jsKWDfIFIHUwtIiXaaM="
"""As `new_master_key` makes one: always the same, since it names tests."""


def test_a_new_key_is_one_that_can_be_given() -> None:
    first, second = new_master_key(), new_master_key()
    assert first != second
    keys = MasterKeys.parse(f" {first} , {second}")
    assert keys.first in MasterKeys.parse(first)
    assert str(keys) == f"{keys.first}, {MasterKeys.parse(second).first}"


def test_the_id_of_a_key_is_the_same_everywhere() -> None:
    """It stands in the database."""
    assert key_id(bytes(KEY_BYTES)) == "f3ea6ce071e1"
    assert re.fullmatch("[0-9a-f]{12}", key_id(b"any"))


def test_a_sealed_secret_opens_for_the_same_name_alone() -> None:
    keys = MasterKeys.parse(new_master_key())
    sealed = keys.seal(keys.first, b"secret", "pattern 1")
    assert keys.open(keys.first, sealed, "pattern 1") == b"secret"
    with pytest.raises(InvalidMasterKey):
        keys.open(keys.first, sealed, "pattern 2")


@pytest.mark.parametrize("text", ["no key", "AAAA", KEY[:-4], f"{KEY},"])
def test_no_other_text_is_a_key_and_it_is_not_repeated(text: str) -> None:
    with pytest.raises(InvalidMasterKey) as raised:
        MasterKeys.parse(text)
    assert text not in str(raised.value)
