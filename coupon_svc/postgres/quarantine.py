"""Codes that may have been given away before records were lost: which they are, and how they leave the quarantine."""

from __future__ import annotations

from typing import NamedTuple

import asyncpg

from coupon_svc.postgres.epochs import want_recovery
from coupon_svc.postgres.lend_order import ROUND, random_places

_BOOKS = """
    SELECT book_id, name, count(*) AS codes, min(at) AS since FROM quarantine JOIN books USING (book_id)
    GROUP BY book_id, name ORDER BY min(at)
"""
_TAKE_OUT = "DELETE FROM quarantine WHERE book_id = $1 AND code = $2 AND epoch = $3"
_NOTE_DECISION = "INSERT INTO quarantine_decisions (book_id, code, decision) VALUES ($1, $2, $3)"
_LOCK_BOOK = "SELECT shard, tenant_id, leased_upto, places_upto FROM books WHERE book_id = $1 FOR UPDATE"
_NAMED = "SELECT code, epoch FROM quarantine WHERE book_id = $1 AND ($2::text[] IS NULL OR code = ANY ($2))"
_PLACE = "UPDATE codes SET place = $3 WHERE tenant_id = $1 AND code = $2"


class QuarantinedBook(NamedTuple):
    """A book with codes in quarantine, since when the oldest of them."""

    book_id: str
    name: str
    codes: int
    since: object


async def quarantined_books(connection: asyncpg.Connection) -> list[QuarantinedBook]:
    """Every book with codes in quarantine."""
    return [QuarantinedBook(*row) for row in await connection.fetch(_BOOKS)]


async def quarantined_codes(connection: asyncpg.Connection, book_id: str) -> list[str]:
    """The codes of a book that are in quarantine."""
    rows = await connection.fetch("SELECT code FROM quarantine WHERE book_id = $1", book_id)
    return [row["code"] for row in rows]


async def release(connection: asyncpg.Connection, book_id: str, code: str, epoch: int, decision: str) -> bool:
    """Take a code that was lent in `epoch` out of the quarantine and note why. The caller says what it is then.

    False when it is not in quarantine since that epoch: a record of an older one says nothing about who was given the code
    when it was dealt again.
    """
    done = await connection.execute(_TAKE_OUT, book_id, code, epoch)
    if done != "DELETE 1":
        return False
    await connection.execute("UPDATE books SET quarantined = quarantined - 1 WHERE book_id = $1", book_id)
    await connection.execute(_NOTE_DECISION, book_id, code, decision)
    return True


async def deal_again(connection: asyncpg.Connection, book_id: str, codes: list[str] | None = None) -> int:
    """An operator's override, which the ledger records: quarantined codes go back to be dealt, though somebody may hold
    them. All of the book's without a list. Returns how many; the shard is recovered to bring them to Redis."""
    async with connection.transaction():
        book = await connection.fetchrow(_LOCK_BOOK, book_id)
        if book is None:
            return 0
        rows = await connection.fetch(_NAMED, book_id, codes)
        upto = book["places_upto"] + (ROUND if book["places_upto"] == book["leased_upto"] else 0)
        places = random_places(len(rows), book["leased_upto"], upto)
        for row, place in zip(rows, places, strict=True):
            await release(connection, book_id, row["code"], row["epoch"], "dealt_again")
            await connection.execute(_PLACE, book["tenant_id"], row["code"], place)
        await connection.execute("UPDATE books SET places_upto = $2 WHERE book_id = $1", book_id, upto)
        if rows:
            await want_recovery(connection, [book["shard"]])
        return len(rows)
