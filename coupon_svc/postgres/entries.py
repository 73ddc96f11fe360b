"""What the ledger has at a position: an entry, an event within one, or a dead letter."""

from __future__ import annotations

from collections.abc import Sequence

import asyncpg

from coupon_svc.domain.events import Entry
from coupon_svc.postgres.database import Database

ENTRY = f"SELECT {', '.join(Entry._fields[:-1])}, events AS body FROM entries"
ENTRIES_PAGE = 2_000
# Those of the seqs that lie within an entry.
WITHIN_ENTRIES = """
    SELECT asked.seq FROM unnest($3::bigint[]) AS asked (seq), LATERAL (
        SELECT seq, n FROM entries WHERE shard = $1 AND epoch = $2 AND entries.seq >= asked.seq ORDER BY seq LIMIT 1) e
    WHERE e.seq - e.n < asked.seq
"""
_KNOWN = f"""
    ({WITHIN_ENTRIES}
    UNION SELECT seq FROM old_events WHERE shard = $1 AND epoch = $2 AND seq = ANY ($3)
    UNION SELECT seq FROM late_events WHERE shard = $1 AND epoch = $2 AND seq = ANY ($3) AND recorded)
    EXCEPT SELECT seq FROM dead_letters WHERE shard = $1 AND epoch = $2 AND seq = ANY ($3)
"""
_ANYTHING_MISSING = "SELECT EXISTS (SELECT FROM dead_letters WHERE shard = $1 AND epoch = $2 AND code IS NULL)"
_FIRST_DEAD_LETTER = "SELECT min(seq) FROM dead_letters WHERE shard = $1 AND epoch = $2"
_FIND_TIPS = """
    SELECT shard, epoch, seq,
           CASE WHEN EXISTS (SELECT FROM dead_letters d WHERE d.shard = entries.shard AND d.epoch = entries.epoch
                             AND d.seq BETWEEN entries.seq - n + 1 AND entries.seq) THEN '' ELSE tip END AS tip
    FROM entries
    JOIN unnest($1::int[], $2::bigint[], $3::bigint[]) AS asked (shard, epoch, seq) USING (shard, epoch, seq)
"""


async def entry_ending_at(connection: asyncpg.Connection, shard: int, epoch: int, seq: int) -> Entry | None:
    """The entry of the ledger whose last event is at a position; None when it has none there."""
    row = await connection.fetchrow(f"{ENTRY} WHERE (shard, epoch, seq) = ($1, $2, $3)", shard, epoch, seq)
    return Entry(*row) if row is not None else None


async def known_seqs(connection: asyncpg.Connection, shard: int, epoch: int, seqs: Sequence[int]) -> set[int]:
    """Those of the seqs at which the ledger has an event."""
    return {row["seq"] for row in await connection.fetch(_KNOWN, shard, epoch, seqs)}


async def anything_missing(connection: asyncpg.Connection, shard: int, epoch: int) -> bool:
    """Whether there were events in the epoch of which not even the code is known: gone from the stream, or garbled."""
    return bool(await connection.fetchval(_ANYTHING_MISSING, shard, epoch))


async def first_dead_letter(connection: asyncpg.Connection, shard: int, epoch: int) -> int | None:
    """The seq of the first event of an epoch that the ledger could not take; None when there is none."""
    seq: int | None = await connection.fetchval(_FIRST_DEAD_LETTER, shard, epoch)
    return seq


async def find_tips(database: Database, asked: Sequence[tuple[int, int, int]]) -> dict[tuple[int, int, int], str]:
    """The tips of those entries that are there, by (shard, epoch, seq), with one statement. "" for an entry with an event
    that the ledger could not take: nobody may be told that it is durable. Raises LedgerUnavailable."""
    rows = await database.fetch(_FIND_TIPS, *(list(column) for column in zip(*asked, strict=True)))
    return {(row["shard"], row["epoch"], row["seq"]): row["tip"] for row in rows}
