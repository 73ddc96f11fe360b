"""Events of epochs that were settled before: their log, and the two ways in which one of them brings a code back. A stream
turns up that holds them, or a user shows a receipt."""

from __future__ import annotations

from collections.abc import Sequence

import asyncpg

from coupon_svc.domain.chain import CHAIN_START, chain_hash
from coupon_svc.domain.events import COUPON_ASSIGNED, Event
from coupon_svc.domain.receipts import Receipt
from coupon_svc.postgres.database import one_row
from coupon_svc.postgres.entries import known_seqs
from coupon_svc.postgres.epochs import NewEpoch
from coupon_svc.postgres.events import write_events
from coupon_svc.postgres.quarantine import release
from coupon_svc.postgres.shards import require_recoverer

_DEAD_LETTERS_AT = "SELECT seq FROM dead_letters WHERE shard = $1 AND epoch = $2 AND seq = ANY ($3)"
_NOTED = "SELECT seq FROM late_events WHERE shard = $1 AND epoch = $2"
_LATE_HEAD = """
    INSERT INTO late_heads AS known (shard, links, chain) VALUES ($1, 0, $2)
    ON CONFLICT (shard) DO UPDATE SET links = known.links RETURNING links, chain
"""
_NOTE_LATE = """
    INSERT INTO late_events (shard, link, recorded, chain, epoch, seq, event, book_id, code, user_id, at_ms, uses,
                             reference, metadata, idem, fingerprint)
    VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16)
"""


async def take_late(
    connection: asyncpg.Connection, writer_id: str, begun: NewEpoch, epoch: int, events: Sequence[Event]
) -> None:
    """Events of a settled epoch: kept apart; one that assigned a code which is in quarantine since the same epoch gives it
    to its user."""
    notes: list[tuple[Event, bool]] = []
    async with connection.transaction():
        await require_recoverer(connection, writer_id, begun.owned)
        shard, seqs = begun.owned.shard, [event.seq for event in events]
        # Each by itself: a receipt may have brought back the record of a position beyond others that are still lost.
        known = await known_seqs(connection, shard, epoch, seqs)
        rows = await connection.fetch(_DEAD_LETTERS_AT, shard, epoch, seqs)
        known |= {row["seq"] for row in rows}
        rows = await connection.fetch(_NOTED, shard, epoch)
        noted = {row["seq"] for row in rows}
        for event in events:
            if event.seq in known:
                continue
            if event.event == COUPON_ASSIGNED and await release(
                connection, event.book_id, event.code, epoch, "late_event"
            ):
                await _count_as_lent(connection, event.book_id, event.code)
                notes.append((event, True))
            elif event.seq not in noted:
                notes.append((event, False))
        await note_late(connection, shard, notes)


async def redeem_receipt(connection: asyncpg.Connection, shard: int, book_id: str, code: str, receipt: Receipt) -> bool:
    """Bring a lost record back: the ledger has the assignment then, at its own position. Within a transaction.

    False when the code is neither in quarantine since the receipt's epoch nor this user's. False, too, when the ledger has
    another event at the receipt's position: an operator has to say which of the two histories is true.
    """
    await connection.execute("SELECT FROM books WHERE book_id = $1 FOR UPDATE", book_id)
    epoch, seq = receipt.position
    if not await known_seqs(connection, shard, epoch, [seq]) and await release(
        connection, book_id, code, epoch, "receipt"
    ):
        await _count_as_lent(connection, book_id, code)
        event = Event(epoch, seq, COUPON_ASSIGNED, book_id, code, receipt.user_id, receipt.at_ms)
        await note_late(connection, shard, [(event, True)])
        return True
    holder = await connection.fetchval("SELECT user_id FROM coupons WHERE book_id = $1 AND code = $2", book_id, code)
    return bool(holder == receipt.user_id)


async def _count_as_lent(connection: asyncpg.Connection, book_id: str, code: str) -> None:
    """Of a code that came out of the quarantine: it has a holder, and is never dealt again."""
    await connection.execute("UPDATE books SET lent = lent + 1 WHERE book_id = $1", book_id)
    await connection.execute("UPDATE codes SET place = 0 WHERE book_id = $1 AND code = $2", book_id, code)


async def note_late(connection: asyncpg.Connection, shard: int, notes: Sequence[tuple[Event, bool]]) -> None:
    """Add events to the shard's log of late ones, each with whether what follows from it is to be recorded.

    The last thing of a transaction: it holds the shard's `late_heads` until the commit.
    """
    if not notes:
        return
    row = await one_row(connection, _LATE_HEAD, shard, CHAIN_START)
    links, head = row["links"], row["chain"]
    for event, recorded in notes:
        links += 1
        head = chain_hash(head, shard, event.epoch, (links, recorded, event.record))
        await connection.execute(_NOTE_LATE, shard, links, recorded, head, *event)
        if recorded:
            await write_events(connection, shard, [event])
    await connection.execute("UPDATE late_heads SET links = $2, chain = $3 WHERE shard = $1", shard, links, head)
