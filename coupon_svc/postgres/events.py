"""Batches of events into the ledger: the events, what follows from them, and the shard's position, in one transaction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import asyncpg
import msgspec

from coupon_svc.domain.chain import CHAIN_START, chain_hash
from coupon_svc.domain.codes import normalise_code
from coupon_svc.domain.events import COUPON_ASSIGNED, COUPON_REDEEMED, Event
from coupon_svc.domain.position import Position
from coupon_svc.postgres.errors import Contradiction, LedgerEdited, NotOwner

DATA_ERRORS = (
    Contradiction,
    asyncpg.DataError,  # 22, and what asyncpg itself cannot encode
    asyncpg.IntegrityConstraintViolationError,  # 23
    asyncpg.ProgramLimitExceededError,  # 54
    OverflowError,  # what asyncpg's COPY says to a number beyond its column
)
"""Errors that are the fault of a row, not of the server: trying again changes nothing."""


def contradicts(error: Exception) -> bool:
    """Whether one of DATA_ERRORS says that an event contradicts the ledger: it repeats what may happen only once, or gives
    a code to somebody else. Any other is about the event alone."""
    return isinstance(error, Contradiction | asyncpg.UniqueViolationError)


_ADVANCE = """
    UPDATE shards SET committed = batch.upto, chain = batch.head
    FROM unnest($2::int[], $3::bigint[], $4::bigint[], $5::bigint[], $6::bigint[], $7::bytea[], $8::bytea[])
         AS batch (shard, epoch, generation, committed, upto, chain, head)
    WHERE shards.shard = batch.shard AND shards.epoch = batch.epoch AND shards.generation = batch.generation
      AND shards.committed = batch.committed AND shards.chain = batch.chain AND shards.owner = $1
      AND shards.stopped IS NULL
"""
_EDITED = """
    SELECT shard FROM shards
    JOIN unnest($2::int[], $3::bigint[], $4::bigint[], $5::bigint[], $6::bytea[])
         AS batch (shard, epoch, generation, committed, chain) USING (shard, epoch, generation, committed)
    WHERE shards.chain <> batch.chain AND owner = $1 AND stopped IS NULL
"""
_SPEND = """
    UPDATE coupons SET uses = spent.uses
    FROM (SELECT book_id, code, user_id, max(uses) AS uses
          FROM unnest($1::text[], $2::text[], $3::int[], $4::text[]) AS u (book_id, code, uses, user_id)
          GROUP BY book_id, code, user_id) AS spent
    WHERE coupons.book_id = spent.book_id AND coupons.code = spent.code AND coupons.user_id = spent.user_id
      AND coupons.uses < spent.uses
"""
_SPENT_BY_ANOTHER = """
    SELECT EXISTS (SELECT FROM unnest($1::text[], $2::text[], $3::text[]) AS u (book_id, code, user_id)
                   JOIN coupons USING (book_id, code) WHERE coupons.user_id <> u.user_id)
"""
_EVENT_COLUMNS = ("shard", *Event._fields, "chain")
_COUPON_COLUMNS = ("book_id", "code", "user_id", "assigned_at_ms", "epoch", "seq")
_REDEMPTION_COLUMNS = (
    "book_id", "code", "uses", "user_id", "redeemed_at_ms", "reference", "metadata", "epoch", "seq",
)  # fmt: skip


class DeadLetter(NamedTuple):
    """An event that the ledger cannot take: its fields as JSON, the reason, and its code where that can be told."""

    seq: int
    fields: bytes
    reason: str
    book_id: str | None = None
    code: str | None = None


def dead_letter(event: Event, reason: str) -> DeadLetter:
    """An event that the ledger cannot take, with its book and code unless it is they that are wrong with it."""
    known = event.book_id.isascii() and event.book_id.isprintable() and normalise_code(event.code) == event.code
    book_id, code = (event.book_id, event.code) if known else (None, None)
    return DeadLetter(event.seq, msgspec.json.encode(event.record), reason, book_id, code)


def garbled_letter(position: Position, fields: Sequence[str], reason: str) -> DeadLetter:
    """A stream entry that is no event of ours, with its book and code where they can be told."""
    values = dict(zip(fields[::2], fields[1::2], strict=False))
    letter = dead_letter(Event(*position, "", values.get("book", ""), values.get("code", ""), "", 0), reason)
    return letter._replace(fields=msgspec.json.encode(fields))


class Batch(NamedTuple):
    """Events of one shard that follow the ledger's position `committed` without a hole, up to `upto`.

    `events` may lack some of them: those stand in `dead`, with the reason why the ledger cannot take them. `chain` is the
    hash of the row before the first (coupon_svc/domain/chain.py).
    """

    shard: int
    epoch: int
    generation: int
    committed: int
    upto: int
    events: Sequence[Event]
    dead: Sequence[DeadLetter] = ()
    chain: bytes = CHAIN_START


async def write_batches(connection: asyncpg.Connection, writer_id: str, batches: Sequence[Batch]) -> dict[int, bytes]:
    """Write the batches of several shards within the caller's transaction: all of it is to be committed, or nothing.

    Returns each shard's last hash. Raises NotOwner when a shard was taken over, has a new epoch, or is not where its batch
    begins; LedgerEdited; one of DATA_ERRORS when a row cannot be stored.
    """
    linked = [link_batch(batch) for batch in sorted(batches, key=lambda batch: batch.shard)]
    shards, epochs, generations, committed, upto, chains = (
        [getattr(one.batch, name) for one in linked]
        for name in ("shard", "epoch", "generation", "committed", "upto", "chain")
    )
    begins = (shards, epochs, generations, committed)
    advanced = await connection.execute(_ADVANCE, writer_id, *begins, upto, chains, [one.head for one in linked])
    if advanced != f"UPDATE {len(linked)}":
        edited = await connection.fetch(_EDITED, writer_id, *begins, chains)
        raise LedgerEdited([row["shard"] for row in edited]) if edited else NotOwner
    await write_linked(connection, linked)
    return {one.batch.shard: one.head for one in linked}


class Linked(NamedTuple):
    """A batch as its rows in `events` and `dead_letters`, each with its hash, and the last of these."""

    batch: Batch
    rows: Sequence[tuple[Any, ...]]
    dead: Sequence[tuple[Any, ...]]
    head: bytes
    chains: Sequence[bytes] = ()
    """The hash of each event of the batch."""


def link_batch(batch: Batch) -> Linked:
    """Give each row of the batch its hash, in the order of the positions."""
    shard, epoch, head = batch.shard, batch.epoch, batch.chain
    records: Sequence[Event | DeadLetter] = batch.events
    if batch.dead:
        records = sorted((*batch.events, *batch.dead), key=lambda record: record.seq)
    rows: list[tuple[Any, ...]] = []
    dead: list[tuple[Any, ...]] = []
    chains: list[bytes] = []
    for record in records:
        if type(record) is Event:
            head = chain_hash(head, shard, epoch, record.record)
            rows.append((shard, *record, head))
            chains.append(head)
        else:
            head = chain_hash(head, shard, epoch, record)
            dead.append((shard, epoch, *record, head))
    return Linked(batch, rows, dead, head, chains)


def unlinked(batch: Batch) -> Linked:
    """The batch as rows without a hash: late events, which stand in the chain of `late_events`."""
    return Linked(batch, [(batch.shard, *event, None) for event in batch.events], (), batch.chain)


async def write_linked(connection: asyncpg.Connection, linked: Sequence[Linked]) -> None:
    """The rows of batches and what follows from them, without a look at positions: that is the caller's to do."""
    batches = [one.batch for one in linked]
    rows = [row for one in linked for row in one.rows]
    if rows:
        await connection.copy_records_to_table("events", records=rows, columns=_EVENT_COLUMNS)
    assigned = [
        (event.book_id, event.code, event.user_id, event.at_ms, event.epoch, event.seq)
        for batch in batches
        for event in batch.events
        if event.event == COUPON_ASSIGNED
    ]
    if assigned:
        await connection.copy_records_to_table("coupons", records=assigned, columns=_COUPON_COLUMNS)
    redemptions = [event for batch in batches for event in batch.events if event.event == COUPON_REDEEMED]
    if redemptions:
        redeemed = [
            (e.book_id, e.code, e.uses, e.user_id, e.at_ms, e.reference, e.metadata, e.epoch, e.seq)
            for e in redemptions
        ]
        await connection.copy_records_to_table("redemptions", records=redeemed, columns=_REDEMPTION_COLUMNS)
        books, codes = [event.book_id for event in redemptions], [event.code for event in redemptions]
        uses, users = [event.uses for event in redemptions], [event.user_id for event in redemptions]
        done = await connection.execute(_SPEND, books, codes, uses, users)
        if done != f"UPDATE {len(set(zip(books, codes, strict=True)))}" and await connection.fetchval(
            _SPENT_BY_ANOTHER, books, codes, users
        ):
            raise Contradiction
    dead = [row for one in linked for row in one.dead]
    if dead:
        await connection.executemany(
            "INSERT INTO dead_letters (shard, epoch, seq, fields, reason, book_id, code, chain)"
            " VALUES ($1, $2, $3, $4, $5, $6, $7, $8)",
            dead,
        )


async def first_data_error(connection: asyncpg.Connection, writer_id: str, batch: Batch) -> Exception | None:
    """Try a batch and undo it: what the ledger would say to it, or None when it would take it."""
    transaction = connection.transaction()
    await transaction.start()
    try:
        await write_batches(connection, writer_id, [batch])
    except DATA_ERRORS as error:
        refusal: Exception = error
        return refusal
    finally:
        await transaction.rollback()
    return None
