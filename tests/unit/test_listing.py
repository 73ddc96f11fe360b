"""Where a list of a book's codes stands."""

from __future__ import annotations

import pytest

from coupon_svc.postgres.listing import CodesRange


@pytest.mark.parametrize(
    ("prefix", "after", "inside", "outside"),
    [
        ("", "", ["0", "~", "ZZ"], []),
        ("AB", "", ["AB", "AB-1", "AB~"], ["AA", "AC", "B"]),
        ("AB", "AB-1", ["AB-1-", "AB-2"], ["AB", "AB-1", "AC"]),
        ("AB", "A", ["AB"], ["A-"]),
    ],
)
def test_a_range_holds_what_begins_so_and_comes_after(
    prefix: str, after: str, inside: list[str], outside: list[str]
) -> None:
    first, beyond = CodesRange("bk", prefix, after).bounds
    assert all(first <= code < beyond for code in inside)
    assert not any(first <= code < beyond for code in outside)


@pytest.mark.parametrize(("after", "number"), [("", None), ("A-1", None), ("#0:0", (0, 0)), ("#12:345", (12, 345))])
def test_a_place_among_computed_codes_is_a_pattern_and_a_number(after: str, number: tuple[int, int] | None) -> None:
    assert CodesRange("bk", "", after).number == number
