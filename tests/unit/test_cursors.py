"""A cursor is readable by its installation alone, and good for its list alone."""

from __future__ import annotations

from base64 import urlsafe_b64decode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coupon_svc.domain.outcomes import Outcome, Refused
from coupon_svc.http.cursors import Cursors

CURSORS = Cursors(lambda: b"s" * 32)
ANOTHER_INSTALLATION = Cursors(lambda: b"t" * 32)


@given(st.integers(0, 2**40), st.text(max_size=80), st.text(max_size=80))
def test_a_cursor_says_where_the_page_ended(number: int, text: str, list_name: str) -> None:
    cursor = CURSORS.seal(list_name, number, text)
    assert CURSORS.open(list_name, cursor) == (number, text)
    assert CURSORS.seal(list_name, number, text) == cursor


def test_a_cursor_shows_no_code() -> None:
    cursor = CURSORS.seal("coupons", 3, "bk_0812345678:SUMMER-9SJG")
    assert b"SUMMER" not in urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4))
    assert "SUMMER" not in cursor


@pytest.mark.parametrize(
    ("cursors", "list_name", "change"),
    [
        (CURSORS, "coupons of another", ""),
        (ANOTHER_INSTALLATION, "coupons", ""),
        (CURSORS, "coupons", "A"),
        (CURSORS, "coupons", "é"),
    ],
)
def test_a_cursor_of_another_list_or_installation_or_changed_is_refused(
    cursors: Cursors, list_name: str, change: str
) -> None:
    cursor = change + CURSORS.seal("coupons", 3, "bk_0812345678:SUMMER-9SJG")
    with pytest.raises(Refused) as refused:
        cursors.open(list_name, cursor)
    assert refused.value.outcome is Outcome.INVALID_REQUEST


@pytest.mark.parametrize("text", ["", "A", "AAAA", "WzEsImEiXQ", "a" * 400, "%00"])
def test_what_is_no_cursor_is_refused(text: str) -> None:
    with pytest.raises(Refused) as refused:
        CURSORS.open("coupons", text)
    assert refused.value.outcome is Outcome.INVALID_REQUEST


def test_without_the_secret_there_are_no_cursors() -> None:
    with pytest.raises(Refused) as refused:
        Cursors(lambda: None).seal("coupons", 3, "x")
    assert refused.value.outcome is Outcome.STORE_UNAVAILABLE
