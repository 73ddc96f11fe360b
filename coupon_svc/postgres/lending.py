"""What Redis is lent, as the shard's owner does it: Postgres notes first that codes are lent, then they are brought.

Every function that writes checks in its own transaction that the caller still owns the shard in this epoch.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Sequence
from typing import NamedTuple

import asyncpg

from coupon_svc.domain.books import Book
from coupon_svc.postgres.books import BOOK_COLUMNS, book_from_row
from coupon_svc.postgres.computed.ciphers import NO_CIPHERS, Ciphers
from coupon_svc.postgres.computed.lending import lend_numbers
from coupon_svc.postgres.database import one_row
from coupon_svc.postgres.shards import OwnedShard, require_owner

# Uploads and changes of a book lock its row for some milliseconds each. The owner queues for it: if it only skipped a
# locked row, it might never get it. It waits for QUEUE_MS at most, since other books wait meanwhile. Every transaction
# locks the shard's row last: one that held it while it waited would hold up every commit of the shard.
_LOCK_BOOK = "SELECT true FROM books WHERE book_id = $1 FOR UPDATE"
_QUEUE_FOR = "SELECT set_config('lock_timeout', $1, true)"
QUEUE_MS = 1000

LOADED_AT_ONCE = 100
_TO_LOAD = (
    f"SELECT {BOOK_COLUMNS} FROM books WHERE shard = ANY ($1) AND version > loaded_version LIMIT {LOADED_AT_ONCE}"
)
_BOOK_NOW = f"""
    SELECT {BOOK_COLUMNS}, loaded, (SELECT count(*) FROM lone_leases l WHERE l.book_id = books.book_id) AS lone
    FROM books WHERE book_id = $1
"""
_MARK_LOADED = "UPDATE books SET loaded = true, loaded_version = greatest(loaded_version, $2) WHERE book_id = $1"
_LEFT = """
    SELECT leased_upto, computed_unlent, total - lent - quarantined AS unlent,
           (SELECT count(*) FROM lone_leases l WHERE l.book_id = books.book_id) AS lone
    FROM books WHERE book_id = $1
"""
_NEXT_PLACES_END = """
    SELECT max(place) FROM (SELECT place FROM codes WHERE book_id = $1 AND place > $2 ORDER BY place LIMIT $3) b
"""
_CODES_AT = "SELECT code FROM codes WHERE book_id = $1 AND place > $2 AND place <= $3"
_COUNT_LENT = "UPDATE books SET leased_upto = $2, lent = lent + $3 WHERE book_id = $1"


class Lease(NamedTuple):
    """Codes that are lent to Redis now; how many of the book are not; and how many were lent alone and are on their way
    there beside these."""

    codes: list[str]
    unlent: int
    lone: int = 0


async def books_to_load(connection: asyncpg.Connection, shards: Sequence[int]) -> list[Book]:
    """Books whose newest version is not in Redis yet."""
    rows = await connection.fetch(_TO_LOAD, list(shards))
    return [book_from_row(row) for row in rows]


class BookNow(NamedTuple):
    """A book as it is now, whether it was ever brought to Redis, and how many of its codes were lent alone and are still
    on their way there."""

    book: Book
    loaded: bool
    lone: int


async def read_book_now(connection: asyncpg.Connection, book_id: str) -> BookNow:
    """The book as the ledger has it."""
    row = await one_row(connection, _BOOK_NOW, book_id)
    return BookNow(book_from_row(row), row["loaded"], row["lone"])


async def mark_loaded(
    connection: asyncpg.Connection, writer_id: str, owned: OwnedShard, book_id: str, version: int
) -> bool:
    """Note that Redis has this version of the book. From the first time on, a book that Redis lacks is lost, not new.

    False when the book's row cannot be had in time: ask again. Raises NotOwner.
    """
    async with connection.transaction():
        if not await _lock_book(connection, book_id):
            return False
        await connection.execute(_MARK_LOADED, book_id, version)
        await require_owner(connection, writer_id, owned)
    return True


async def lease_block(
    connection: asyncpg.Connection,
    writer_id: str,
    owned: OwnedShard,
    book_id: str,
    count: int,
    ciphers: Ciphers = NO_CIPHERS,
) -> Lease | None:
    """Lend the next `count` codes of the book's random order (a few more when places are alike, fewer at the end). Of a book
    with stored and computed codes, as many of each as if all had been shuffled together.

    None when the book's row cannot be had in time: ask again. Raises NotOwner.
    """
    async with connection.transaction():
        if not await _lock_book(connection, book_id):
            return None
        book = await one_row(connection, _LEFT, book_id)
        of_ranges = computed_share(count, book["unlent"] - book["computed_unlent"], book["computed_unlent"])
        lent = await lend_numbers(connection, book_id, of_ranges, ciphers) if of_ranges else []
        codes = await _lend_rows(connection, book_id, book["leased_upto"], count - of_ranges)
        if not lent and not codes:
            return Lease([], book["unlent"], book["lone"])
        await require_owner(connection, writer_id, owned)
    for part in lent:  # after the commit: nobody waits for the book while codes are computed
        codes += await part.codes()
    return Lease(codes, book["unlent"] - len(codes), book["lone"])


async def _lend_rows(connection: asyncpg.Connection, book_id: str, leased_upto: int, count: int) -> list[str]:
    """Lend the next `count` codes that are stored."""
    upto = await connection.fetchval(_NEXT_PLACES_END, book_id, leased_upto, count)
    if upto is None:
        return []
    rows = await connection.fetch(_CODES_AT, book_id, leased_upto, upto)
    await connection.execute(_COUNT_LENT, book_id, upto, len(rows))
    return [row["code"] for row in rows]


def computed_share(count: int, stored: int, computed: int) -> int:
    """How many of `count` codes are computed ones when that many of each are left and all were shuffled together."""
    if stored <= 0 or computed <= 0 or count >= stored + computed:
        return min(count, max(0, computed))
    draw = random.Random(secrets.randbits(128)).random
    left, share = computed, 0
    for drawn in range(count):
        if draw() * (stored + computed - drawn) < left:
            left, share = left - 1, share + 1
    return share


async def _lock_book(connection: asyncpg.Connection, book_id: str) -> bool:
    """Whether the book's row is this transaction's now."""
    if await connection.fetchval(f"{_LOCK_BOOK} SKIP LOCKED", book_id):
        return True
    try:
        async with connection.transaction():  # one of its own, so that the outer one outlives the refusal
            await connection.execute(_QUEUE_FOR, f"{QUEUE_MS}ms")
            await connection.execute(_LOCK_BOOK, book_id)
            await connection.execute(_QUEUE_FOR, "0")
    except asyncpg.LockNotAvailableError:
        return False
    return True
