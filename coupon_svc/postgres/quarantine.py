"""Codes that may have been given away before records were lost: how they come back, by receipt or by an operator."""

from __future__ import annotations

from typing import NamedTuple

import asyncpg

from coupon_svc.domain.events import COUPON_ASSIGNED, Event
from coupon_svc.domain.receipts import Receipt
from coupon_svc.postgres.catalogue import ROUND, random_places
from coupon_svc.postgres.recovery import EPOCH_CHANNEL, known_seqs, note_late, release


class QuarantinedBook(NamedTuple):
    """A book with codes in quarantine, since when the oldest of them."""

    book_id: str
    name: str
    codes: int
    since: object


async def redeem_receipt(connection: asyncpg.Connection, shard: int, book_id: str, code: str, receipt: Receipt) -> bool:
    """Bring a lost record back: the ledger has the assignment then, at its own position. Within a transaction.

    False when the code is not in quarantine since the receipt's epoch and not this user's either, and when the ledger has
    another event at the receipt's position: which of the two histories is true is for an operator to say.
    """
    await connection.execute("SELECT FROM books WHERE book_id = $1 FOR UPDATE", book_id)
    if not await known_seqs(connection, shard, receipt.epoch, [receipt.seq]) and await release(
        connection, book_id, code, receipt.epoch, "receipt"
    ):
        await connection.execute("UPDATE books SET lent = lent + 1 WHERE book_id = $1", book_id)
        await connection.execute("UPDATE codes SET place = 0 WHERE book_id = $1 AND code = $2", book_id, code)
        event = Event(receipt.epoch, receipt.seq, COUPON_ASSIGNED, book_id, code, receipt.user_id, receipt.at_ms)
        await note_late(connection, shard, [(event, True)])
        return True
    holder = await connection.fetchval("SELECT user_id FROM coupons WHERE book_id = $1 AND code = $2", book_id, code)
    return bool(holder == receipt.user_id)


async def quarantined_books(connection: asyncpg.Connection) -> list[QuarantinedBook]:
    """Every book with codes in quarantine."""
    rows = await connection.fetch(
        "SELECT book_id, name, count(*) AS codes, min(at) AS since FROM quarantine JOIN books USING (book_id)"
        " GROUP BY book_id, name ORDER BY min(at)"
    )
    return [QuarantinedBook(*row) for row in rows]


async def deal_again(connection: asyncpg.Connection, book_id: str, codes: list[str] | None = None) -> int:
    """An operator's override, which the ledger records: quarantined codes go back to be dealt, though somebody may hold
    them. All of the book's without a list. Returns how many; the shard is recovered to bring them to Redis."""
    async with connection.transaction():
        book = await connection.fetchrow(
            "SELECT shard, tenant_id, leased_upto, places_upto FROM books WHERE book_id = $1 FOR UPDATE", book_id
        )
        if book is None:
            return 0
        rows = await connection.fetch(
            "SELECT code, epoch FROM quarantine WHERE book_id = $1 AND ($2::text[] IS NULL OR code = ANY ($2))",
            book_id,
            codes,
        )
        upto = book["places_upto"] + (ROUND if book["places_upto"] == book["leased_upto"] else 0)
        places = random_places(len(rows), book["leased_upto"], upto)
        for row, place in zip(rows, places, strict=True):
            await release(connection, book_id, row["code"], row["epoch"], "dealt_again")
            await connection.execute(
                "UPDATE codes SET place = $3 WHERE tenant_id = $1 AND code = $2", book["tenant_id"], row["code"], place
            )
        await connection.execute("UPDATE books SET places_upto = $2 WHERE book_id = $1", book_id, upto)
        if rows:
            await want_recovery(connection, [book["shard"]])
        return len(rows)


async def want_recovery(connection: asyncpg.Connection, shards: list[int] | None, *, rebuild: bool = False) -> int:
    """Have the owners of these shards (all without a list) recover them. Returns how many. With `rebuild`, Redis is
    rebuilt from the ledger even where it seems to agree with it."""
    async with connection.transaction():
        done = await connection.execute(
            "UPDATE shards SET epoch = epoch + 1, rebuild = rebuild OR $2"
            " WHERE stopped IS NULL AND ($1::int[] IS NULL OR shard = ANY ($1))",
            shards,
            rebuild,
        )
        await connection.execute("SELECT pg_notify($1, '')", EPOCH_CHANNEL)
    return int(done.removeprefix("UPDATE "))
