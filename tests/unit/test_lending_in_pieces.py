"""A block of codes is lent in pieces, and other books have their turn in between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from coupon_svc.domain.books import Ack, Book
from coupon_svc.postgres import lending
from coupon_svc.postgres.lending import BookNow, Lease
from coupon_svc.postgres.shards import OwnedShard
from coupon_svc.redis.control import ShardControl, Term
from coupon_svc.redis.scripts import Scripts
from coupon_svc.redis.server import Identity
from coupon_svc.writer import lend
from coupon_svc.writer.lend import CODES_PER_LEASE_MAX, Lender
from coupon_svc.writer.pool import Pool
from tests.books import A_BOOK
from tests.owned import open_shard

LARGE, SMALL = "bk_00large", "bk_00small"
PIECE = CODES_PER_LEASE_MAX
NO_LEDGER: Any = None


def book(book_id: str, unlent: int) -> Book:
    return msgspec.structs.replace(A_BOOK, book_id=book_id, total=unlent)


class Stores(ShardControl):
    """Postgres and Redis with some books: how many codes of each are not lent yet, and how many are in the pool."""

    def __init__(self, unlent: dict[str, int]) -> None:
        super().__init__("redis://127.0.0.1:1", 1, Scripts())
        self.unlent = unlent
        self.in_pool = dict.fromkeys(unlent, 0)
        self.leases: list[tuple[str, int]] = []

    async def load_codes(self, term: Term, book_id: str, codes: Sequence[str], kept_back: int) -> int:
        self.in_pool[book_id] += len(codes)
        return self.in_pool[book_id]

    async def read_book_now(self, _: Any, book_id: str) -> BookNow:
        return BookNow(book(book_id, self.unlent[book_id]), True, lone=0)

    async def lease_block(self, _: Any, writer_id: str, owned: OwnedShard, book_id: str, count: int, *__: Any) -> Lease:
        count = min(count, self.unlent[book_id])
        self.unlent[book_id] -= count
        self.leases.append((book_id, count))
        return Lease(["CODE"] * count, self.unlent[book_id])


def lender_of(stores: Stores, block: int, monkeypatch: pytest.MonkeyPatch) -> Lender:
    """A lender that sees all books low for the first time, and lends blocks of this size."""
    shard = open_shard(OwnedShard(0, 1, 0, 1, bytes(32), ""), Identity("run", "replid"))
    lender = Lender("", "wr", stores, {0: shard}, block, block)
    for book_id in stores.unlent:
        shard.pools[book_id] = Pool(Ack.REDIS, block)
        lender.look_at(shard, book_id)

    async def nothing(*_: Any) -> Any:
        return {}

    monkeypatch.setattr(lending, "read_book_now", stores.read_book_now)
    monkeypatch.setattr(lending, "lease_block", stores.lease_block)
    monkeypatch.setattr(lending, "books_to_load", nothing)
    monkeypatch.setattr(lend, "lone_leases", nothing)
    return lender


async def lend_all(lender: Lender) -> None:
    while lender._work.is_set():
        lender._work.clear()
        await lender.turn(NO_LEDGER)


async def test_a_large_block_comes_in_pieces_with_the_other_books_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    stores = Stores({LARGE: 10 * PIECE, SMALL: 7})
    await lend_all(lender_of(stores, 2 * PIECE + 5, monkeypatch))
    assert stores.leases == [(LARGE, PIECE), (SMALL, 7), (LARGE, PIECE), (LARGE, 5)]
    assert stores.in_pool == {LARGE: 2 * PIECE + 5, SMALL: 7}


async def test_a_block_ends_with_the_last_code_of_the_book(monkeypatch: pytest.MonkeyPatch) -> None:
    stores = Stores({LARGE: PIECE + 1})
    await lend_all(lender_of(stores, 3 * PIECE, monkeypatch))
    assert stores.leases == [(LARGE, PIECE), (LARGE, 1)]
