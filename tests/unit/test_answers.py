"""Books and codes as callers see them."""

from __future__ import annotations

import msgspec
import pytest

from coupon_svc.http.books import book_answer
from coupon_svc.http.coupons import code_answer
from coupon_svc.service.books import LiveBook
from coupon_svc.service.reading import CodeRead, Coupon
from tests.books import A_BOOK

BOOK = A_BOOK.book_id


def test_the_states_of_a_book_add_up() -> None:
    live = LiveBook(A_BOOK, total=20, held=9, redeemed=4, quarantined=3, redemptions=6)
    answer = book_answer(live)
    codes = answer.codes
    assert (codes.total, codes.available, codes.assigned, codes.redeemed, codes.quarantined) == (20, 8, 5, 4, 3)
    assert (answer.redemptions, answer.starts_at, answer.expires_at) == (6, None, None)


def test_the_times_of_a_book_are_rfc_3339_in_utc() -> None:
    book = msgspec.structs.replace(A_BOOK, starts_at_ms=0, expires_at_ms=1_500)
    answer = book_answer(LiveBook(book, total=0, held=0, redeemed=0, quarantined=0, redemptions=0))
    assert (answer.starts_at, answer.expires_at) == ("1970-01-01T00:00:00.000Z", "1970-01-01T00:00:01.500Z")


@pytest.mark.parametrize(("quarantined", "status"), [(False, "available"), (True, "quarantined")])
def test_a_code_that_nobody_is_known_to_hold_has_all_its_uses(quarantined: bool, status: str) -> None:
    answer = code_answer(CodeRead("A-1", BOOK, "paused", 3, None, quarantined))
    assert (answer.status, answer.book_status, answer.user_id, answer.assigned_at) == (status, "paused", None, None)
    assert (answer.redemptions_used, answer.redemptions_left, answer.locked_until) == (0, 3, None)


@pytest.mark.parametrize(("until_ms", "until"), [(None, None), (1_500, "1970-01-01T00:00:01.500Z")])
def test_a_coupon_is_told_with_its_holder_and_its_lock(until_ms: int | None, until: str | None) -> None:
    status = "assigned" if until is None else "locked"
    coupon = Coupon("A-1", BOOK, "ann", status, 0, 1, None, until_ms)  # type: ignore[arg-type]
    answer = code_answer(CodeRead("A-1", BOOK, "active", None, coupon, quarantined=False))
    assert (answer.status, answer.book_status, answer.user_id) == (status, "active", "ann")
    assert (answer.redemptions_used, answer.redemptions_left, answer.locked_until) == (1, None, until)
