"""Draining: what a stream still holds of an epoch that is over goes into the ledger. It may be killed and run again."""

from __future__ import annotations

from collections.abc import Sequence

import asyncpg

from coupon_svc.domain.events import COUPON_ASSIGNED, COUPON_CONFIRMED, COUPON_REDEEMED, Entry, Event, events_of
from coupon_svc.postgres.entries import ENTRY, WITHIN_ENTRIES, anything_missing
from coupon_svc.postgres.epochs import NewEpoch, end_of_epoch
from coupon_svc.postgres.errors import HistoryForked
from coupon_svc.postgres.events import (
    DATA_ERRORS,
    Batch,
    DeadLetter,
    contradicts,
    dead_letter,
    write_batch,
    write_events,
)
from coupon_svc.postgres.shards import require_recoverer

MISSING = "missing from the stream"

_END_EPOCH_AT = """
    INSERT INTO epochs VALUES ($1, $2, $3, $4) ON CONFLICT (shard, epoch) DO UPDATE SET seq = $3, tip = $4
"""
_OLD_EVENTS = """
    SELECT seq, event, book_id, code, user_id FROM old_events WHERE shard = $1 AND epoch = $2 AND seq = ANY ($3)
"""
_USES = """
    SELECT book_id, code, uses FROM coupons
    JOIN unnest($1::text[], $2::text[]) AS asked (book_id, code) USING (book_id, code)
"""


async def drain(connection: asyncpg.Connection, writer_id: str, begun: NewEpoch, batch: Batch) -> int:
    """Step 3: entries of the live epoch, which has just ended, into the ledger. Those that the ledger has must be the same;
    those that are missing before or among them are noted as dead letters.

    `dead` of the batch are entries of which nothing can be read. Returns the seq up to which the ledger accounts for the
    epoch. Raises HistoryForked, NotOwner.
    """
    shard, epoch = begun.owned.shard, batch.epoch
    async with connection.transaction():
        chain = await require_recoverer(connection, writer_id, begun.owned)
        before, tip = await end_of_epoch(connection, shard, epoch)
        known = [entry for entry in batch.entries if entry.seq <= before]
        await _require_same(connection, shard, epoch, known)
        new = [entry for entry in batch.entries if entry.seq > before]
        accounted, dead = before, [letter for letter in batch.dead if letter.seq > before]
        noted = {letter.seq for letter in dead}
        for entry in new:
            if entry.before < accounted:
                raise HistoryForked(f"entry {epoch}-{entry.seq} differs from the one in the ledger")
            if entry.before == accounted and tip is not None and entry.after != tip:
                raise HistoryForked(f"entry {epoch}-{entry.seq} differs from the one in the ledger: it follows another")
            dead += [
                DeadLetter(seq, b"", MISSING) for seq in range(accounted + 1, entry.before + 1) if seq not in noted
            ]
            accounted, tip = entry.seq, entry.tip
        if batch.upto > accounted:
            dead += [DeadLetter(seq, b"", MISSING) for seq in range(accounted + 1, batch.upto + 1) if seq not in noted]
            accounted, tip = batch.upto, None
        first = new[0].before if new else before
        events = [event for event in batch.events if event.seq > first]
        if dead or await anything_missing(connection, shard, epoch):
            events, orphans = await _without_orphans(connection, events)
            dead += orphans
        head = await _write_all(connection, batch._replace(entries=new, events=events, dead=dead, chain=chain))
        await connection.execute("UPDATE shards SET chain = $2 WHERE shard = $1", shard, head)
        await connection.execute(_END_EPOCH_AT, shard, epoch, accounted, tip)
    return accounted


async def _require_same(connection: asyncpg.Connection, shard: int, epoch: int, entries: Sequence[Entry]) -> None:
    """Raises HistoryForked unless the ledger has these very entries. One of an older version may stand there as an event."""
    seqs = [entry.seq for entry in entries]
    rows = await connection.fetch(f"{ENTRY} WHERE shard = $1 AND epoch = $2 AND seq = ANY ($3)", shard, epoch, seqs)
    recorded = {row["seq"]: Entry(*row) for row in rows}
    rows = await connection.fetch(_OLD_EVENTS, shard, epoch, seqs)
    old = {row["seq"]: (row["event"], row["book_id"], row["code"], row["user_id"]) for row in rows}
    # What is neither is a dead letter, unless it lies within an entry that ends elsewhere.
    rows = await connection.fetch(WITHIN_ENTRIES, shard, epoch, seqs)
    within = {row["seq"] for row in rows}
    for entry in entries:
        if entry.seq in old:
            same = [(e.event, e.book_id, e.code, e.user_id) for e in events_of(entry)] == [old[entry.seq]]
        else:
            same = recorded[entry.seq] == entry if entry.seq in recorded else entry.seq not in within
        if not same:
            raise HistoryForked(f"entry {epoch}-{entry.seq} differs from the one in the ledger")


async def _write_all(connection: asyncpg.Connection, batch: Batch) -> bytes:
    """Write a batch, what follows from each event alone when together it cannot be; what the ledger cannot take becomes a
    dead letter.

    Returns the hash of the last entry. Raises HistoryForked for an event that contradicts the ledger.
    """
    try:
        async with connection.transaction():
            return await write_batch(connection, batch)
    except DATA_ERRORS:
        pass
    dead = list(batch.dead)
    for event in batch.events:
        try:
            async with connection.transaction():
                await write_events(connection, batch.shard, [event])
        except DATA_ERRORS as error:
            if contradicts(error):
                raise HistoryForked(f"event {batch.epoch}-{event.seq} contradicts the ledger") from None
            dead.append(dead_letter(event, type(error).__name__))
    return await write_batch(connection, batch._replace(events=(), dead=dead))


async def _without_orphans(
    connection: asyncpg.Connection, events: Sequence[Event]
) -> tuple[list[Event], list[DeadLetter]]:
    """Events without those that redeem or confirm a coupon whose assignment or earlier redemption is lost, and these as
    dead letters.

    Nobody was told that such a redemption succeeded: it stood behind the lost event, and waited for the ledger.
    """
    follow = [event for event in events if event.event != COUPON_ASSIGNED]
    rows = await connection.fetch(_USES, [event.book_id for event in follow], [event.code for event in follow])
    uses = {(row["book_id"], row["code"]): row["uses"] for row in rows}
    good, orphans = [], []
    for event in events:
        coupon = (event.book_id, event.code)
        if event.event == COUPON_ASSIGNED:
            uses[coupon] = 0
        elif event.event == COUPON_REDEEMED and uses.get(coupon, -1) + 1 == event.uses:
            uses[coupon] = event.uses
        elif event.event == COUPON_CONFIRMED and uses.get(coupon) == event.uses:
            pass
        else:
            orphans.append(dead_letter(event, "follows a lost event"))
            continue
        good.append(event)
    return good, orphans
