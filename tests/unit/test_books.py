"""A book's rules, as far as they need no store."""

from __future__ import annotations

import msgspec
import pytest

from coupon_svc.domain.books import Ack, Book, BookStatus, InvalidPeriod, check_period

BOOK = Book(
    book_id="bk_00" + "a" * 16,
    tenant_id=1,
    name="b",
    max_codes_per_user=None,
    max_redemptions_per_code=1,
    lock_ttl_seconds=60,
    starts_at_ms=None,
    expires_at_ms=None,
    ack=Ack.LEDGER,
    metadata=msgspec.Raw(b"{}"),
    status=BookStatus.ACTIVE,
    created_at_ms=1,
    version=1,
    total=10,
    lent=4,
    quarantined=1,
)


def test_what_is_neither_lent_nor_in_quarantine_is_still_to_be_lent() -> None:
    assert BOOK.unlent == 5


@pytest.mark.parametrize("period", [(None, None), (5, None), (None, 5), (5, 6)])
def test_a_book_ends_after_it_begins(period: tuple[int | None, int | None]) -> None:
    check_period(*period)


@pytest.mark.parametrize("period", [(5, 5), (6, 5)])
def test_a_book_that_would_end_before_it_begins_is_refused(period: tuple[int, int]) -> None:
    with pytest.raises(InvalidPeriod):
        check_period(*period)
