"""Walks the hash chains of a shard's ledger: shows that no row was edited, removed, added or moved since it was written.

A shard has two: over its positions, and over its late events. The first begins with what older versions wrote (`old_events`
and `dead_letters` together) and goes on with `entries`. What is hashed is said in coupon_svc/domain/chain.py. A page of each
table is in memory at a time, and the places of what does not fit.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from operator import itemgetter
from typing import Any

import msgspec

from coupon_svc.domain.chain import CHAIN_START, chain_hash
from coupon_svc.domain.events import ENTRY_RECORD_FIELDS, RECORD_FIELDS
from coupon_svc.domain.position import Epoch, Position, Seq, parse_shard_position
from coupon_svc.invariants.check import Check
from coupon_svc.postgres.database import LedgerConnection, one_row
from coupon_svc.postgres.events import DeadLetter

PAGE = 2_000
PROGRESS_ROWS = 50_000

Place = tuple[int, ...]

# Events that came late have their hash in the other chain.
_EVENTS = f"""
    SELECT {", ".join(RECORD_FIELDS)}, epoch,
           chain, CASE WHEN chain IS NULL THEN EXISTS (SELECT FROM late_events l WHERE recorded
                       AND (l.shard, l.epoch, l.seq) = (e.shard, e.epoch, e.seq)) ELSE false END AS late
    FROM old_events e WHERE shard = $1 ORDER BY epoch, seq
"""
# Since there are entries, dead letters are notes, and no rows of the chain. Only the time tells them from those that were
# written before there was a chain.
_DEAD_LETTERS = """
    SELECT seq, fields, reason, book_id, code, epoch, chain, false AS late
    FROM dead_letters WHERE shard = $1 AND (
        chain IS NOT NULL OR at < (SELECT at FROM schema_migrations WHERE name = '0012_entries'))
    ORDER BY epoch, seq
"""
_ENTRIES = """
    SELECT epoch, seq, n, after, tip, at_ms, events AS body, chain, false AS late
    FROM entries WHERE shard = $1 ORDER BY epoch, seq
"""
_LATE_EVENTS = f"""
    SELECT {", ".join(RECORD_FIELDS)}, epoch,
           chain, link, recorded
    FROM late_events WHERE shard = $1 ORDER BY link
"""
_event_record = itemgetter(*RECORD_FIELDS)
_letter_record = itemgetter(*DeadLetter._fields)
_entry_record = itemgetter(*ENTRY_RECORD_FIELDS)
"""What is hashed of a row."""
_ENDS = """
    SELECT shards.chain, late_heads.chain AS late_chain FROM shards LEFT JOIN late_heads USING (shard) WHERE shard = $1
"""


class ChainCheck(Check):
    """What must hold of a chain; {} is a place in it, or which chain it is."""

    MISFIT = "P2", "a row of the ledger is not as it was written, or one before it was removed; the first is {}"
    UNHASHED = "P2", "a row of the ledger carries no hash, and did not come late; the first is {}"
    NOT_LAST = (
        "P2",
        "the last hash of the {} is not that of their last row: rows were removed at the end, or it was edited",
    )
    GONE = "P2", "the {} do not run through the hash of an earlier report, that of {}: history was written anew"


class Head(msgspec.Struct, frozen=True):
    """Where a shard's chains end. Kept elsewhere, it shows later that nothing before it was written anew."""

    shard: int
    position: str | None
    """Of the last row with a hash, e.g. `07:1-912`; None when there is none."""
    chain: str
    late_events: int
    late_chain: str
    unhashed: int = 0
    """Rows from before there was a chain: nothing is shown of them."""


class History(msgspec.Struct):
    """What the walk of one shard found: where its chains end, and in words what does not fit, each with how often."""

    head: Head
    findings: list[tuple[str, int]]


async def walk_history(
    connection: LedgerConnection, shard: int, earlier: Head | None = None, progress: Callable[[int], None] | None = None
) -> History:
    """Compute both chains of a shard anew, as they are at one moment. `progress` is told the number of rows so far."""
    positions = _Chain("positions", shard, lambda at: _position(at).in_shard(shard))
    late = _Chain("late events", shard, lambda at: f"late event {at[0]} of shard {shard:02d}")
    if earlier is not None and earlier.position is not None:
        _, position = parse_shard_position(earlier.position)
        positions.seek(position, earlier.chain)
    if earlier is not None and earlier.late_events:
        late.seek((earlier.late_events,), earlier.late_chain)
    rows = 0
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        ends = await one_row(connection, _ENDS, shard)
        async for row, record in _by_position(connection, shard):
            if not row["late"]:
                positions.add((row["epoch"], row["seq"]), row["epoch"], record, row["chain"])
            rows += 1
            if progress is not None and rows % PROGRESS_ROWS == 0:
                progress(rows)
        async for row in _rows(connection, _LATE_EVENTS, shard):
            late.add((row["link"],), row["epoch"], (row["link"], row["recorded"], _event_record(row)), row["chain"])
    head = Head(
        shard,
        positions.name(positions.last) if positions.last else None,
        positions.hash.hex(),
        late.last[0] if late.last else 0,
        late.hash.hex(),
        positions.unhashed + late.unhashed,
    )
    found = positions.findings(ends["chain"]) + late.findings(ends["late_chain"] or CHAIN_START)
    return History(head, found)


class _Chain:
    """One chain as it is walked. `name` puts a place in it into words."""

    def __init__(self, what: str, shard: int, name: Callable[[Place], str]) -> None:
        self.name = name
        self.hash = CHAIN_START
        self.last: Place | None = None
        self.unhashed = 0
        self._what = what
        self._shard = shard
        self._misfits: list[Place] = []
        self._bare: list[Place] = []
        self._sought: tuple[Place, str] | None = None

    def seek(self, place: Place, known: str) -> None:
        """The chain is to run through this hash at this place."""
        self._sought = (place, known)

    def add(self, at: Place, epoch: int, record: Sequence[Any], written: bytes | None) -> None:
        """The next row, with the hash that it carries. After one that does not fit, the next is measured by it."""
        if written is None:
            if self.last is None:
                self.unhashed += 1
            else:
                self._bare.append(at)
            return
        if written != chain_hash(self.hash, self._shard, epoch, record):
            self._misfits.append(at)
        self.hash, self.last = written, at
        if self._sought == (at, written.hex()):
            self._sought = None

    def findings(self, end: bytes) -> list[tuple[str, int]]:
        """What does not fit, given the hash that the shard's row says is the last."""
        misfits, bare = (self._misfits, ChainCheck.MISFIT), (self._bare, ChainCheck.UNHASHED)
        amiss = sorted((places, check) for places, check in (misfits, bare) if places)
        found = [(check.format(self.name(places[0])), len(places)) for places, check in amiss]
        if self.hash != end:
            found.append((ChainCheck.NOT_LAST.format(self._what), 1))
        if self._sought is not None:
            found.append((ChainCheck.GONE.format(self._what, self.name(self._sought[0])), 1))
        return found


def _position(at: Place) -> Position:
    epoch, seq = at
    return Position(Epoch(epoch), Seq(seq))


async def _by_position(connection: LedgerConnection, shard: int) -> AsyncIterator[tuple[Any, tuple[Any, ...]]]:
    """The rows of the chain, each with what is hashed of it, in the order of their positions."""
    dead = _rows(connection, _DEAD_LETTERS, shard)
    letter = await anext(dead, None)
    async for event in _rows(connection, _EVENTS, shard):
        while letter is not None and (letter["epoch"], letter["seq"]) < (event["epoch"], event["seq"]):
            yield letter, _letter_record(letter)
            letter = await anext(dead, None)
        yield event, _event_record(event)
    while letter is not None:
        yield letter, _letter_record(letter)
        letter = await anext(dead, None)
    async for entry in _rows(connection, _ENTRIES, shard):
        yield entry, _entry_record(entry)


async def _rows(connection: LedgerConnection, statement: str, shard: int) -> AsyncIterator[Any]:
    cursor = await connection.cursor(statement, shard)
    while page := await cursor.fetch(PAGE):
        for row in page:
            yield row
