"""A book's rules, as far as they need no store."""

from __future__ import annotations

import msgspec
import pytest

from coupon_svc.domain.books import InvalidPeriod, check_period
from tests.books import A_BOOK


def test_what_is_neither_lent_nor_in_quarantine_is_still_to_be_lent() -> None:
    assert msgspec.structs.replace(A_BOOK, total=10, lent=4, quarantined=1).unlent == 5


@pytest.mark.parametrize("period", [(None, None), (5, None), (None, 5), (5, 6)])
def test_a_book_ends_after_it_begins(period: tuple[int | None, int | None]) -> None:
    check_period(*period)


@pytest.mark.parametrize("period", [(5, 5), (6, 5)])
def test_a_book_that_would_end_before_it_begins_is_refused(period: tuple[int, int]) -> None:
    with pytest.raises(InvalidPeriod):
        check_period(*period)
