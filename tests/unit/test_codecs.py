"""What Redis keeps comes back as it was: holdings, books. Idempotency records: tests/scripts/test_recovery.py."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coupon_svc.domain.books import Ack, Book, BookStatus
from coupon_svc.domain.holding import Holding, ListedCoupon, format_positions, parse_positions
from coupon_svc.domain.position import Position
from coupon_svc.redis.codec import decode_stored_book, encode_book
from tests.unit.test_position import positions

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
times = st.integers(0, 2**53)
limits = st.none() | st.integers(0, 2**31 - 1)
acks = st.sampled_from(Ack)

holdings = st.builds(Holding, positions, positions, st.integers(0, 2**31 - 1), times, texts)
books = st.builds(
    Book,
    book_id=texts,
    tenant_id=st.integers(1, 2**31),
    name=texts,
    max_codes_per_user=limits,
    max_redemptions_per_code=limits,
    lock_ttl_seconds=st.integers(1, 86_400),
    starts_at_ms=st.none() | times,
    expires_at_ms=st.none() | times,
    ack=acks,
    metadata=st.just(msgspec.Raw(b'{"a":1}')),
    status=st.sampled_from(BookStatus),
    created_at_ms=times,
    version=st.integers(1, 2**31),
    total=st.integers(0, 10**6),
    lent=st.integers(0, 10**6),
    quarantined=st.integers(0, 10**6),
)


@given(holdings)
def test_a_holding_comes_back_from_its_text(holding: Holding) -> None:
    assert Holding.parse(holding.format()) == holding


def test_a_listed_coupon_comes_back_from_its_text_and_is_in_the_range_of_its_book() -> None:
    listed = ListedCoupon("bk_00aaaaaaaaaaaaaaaa", "A-1+B@C.D_E~F")
    text = listed.format()
    assert ListedCoupon.parse(text) == listed
    low, high = ListedCoupon.range(listed.book_id)
    assert low[0] + high[0] == "[("
    assert low[1:] <= text < high[1:]
    assert ListedCoupon.range("bk_00aaaaaaaaaaaaaaab")[0][1:] > text
    assert ListedCoupon.range(None) == ("-", "+")
    assert ListedCoupon.range(None, text) == (f"({text}", "+")


@given(positions, positions)
def test_the_positions_of_a_coupon_come_back_from_their_text(assigned: Position, last: Position) -> None:
    assert parse_positions(format_positions(assigned, last)) == (assigned, last)


def test_the_text_of_a_holding_is_the_one_that_scripts_write() -> None:
    fresh = Holding.parse("4-1 0 1700000000000 a user: {x}")
    assert (fresh.assigned, fresh.last, fresh.uses) == (Position.parse("4-1"), Position.parse("4-1"), 0)
    assert fresh.user_id == "a user: {x}"
    redeemed = Holding.parse("4-1/4-17 2 1700000000000 ann")
    assert (redeemed.assigned, redeemed.last, redeemed.uses) == (Position.parse("4-1"), Position.parse("4-17"), 2)


@pytest.mark.parametrize(
    "text", ["", "4-1", "4-1 0 1", "4-1 x 1 ann", "4 0 1 ann", "4-1/ 0 1 ann", "4-1 0  ann", "/4-1 0 1 ann"]
)
def test_no_other_text_is_a_holding(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        Holding.parse(text)


@given(books)
def test_a_book_comes_back_from_its_hash(book: Book) -> None:
    fields = encode_book(book)
    assert decode_stored_book(fields["stored"]) == book
    assert all(type(value) is str for value in fields.values())


@given(books)
def test_what_is_unlimited_is_the_empty_text_in_a_books_hash(book: Book) -> None:
    fields = encode_book(book)
    for name in ("starts_at_ms", "expires_at_ms", "max_redemptions_per_code", "max_codes_per_user"):
        value = getattr(book, name)
        assert fields[name] == ("" if value is None else str(value))
    assert fields["lock_ttl_ms"] == str(book.lock_ttl_seconds * 1000)
