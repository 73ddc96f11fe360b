"""Which entries the ledger holds, for requests that missed the message of their commit."""

from __future__ import annotations

from collections.abc import Sequence

from coupon_svc.postgres.database import Database

_FIND_TIPS = """
    SELECT shard, epoch, seq,
           CASE WHEN EXISTS (SELECT FROM dead_letters d WHERE d.shard = entries.shard AND d.epoch = entries.epoch
                             AND d.seq BETWEEN entries.seq - n + 1 AND entries.seq) THEN '' ELSE tip END AS tip
    FROM entries
    JOIN unnest($1::int[], $2::bigint[], $3::bigint[]) AS asked (shard, epoch, seq) USING (shard, epoch, seq)
"""


async def find_tips(database: Database, asked: Sequence[tuple[int, int, int]]) -> dict[tuple[int, int, int], str]:
    """The tips of those entries that are there, by (shard, epoch, seq), with one statement. "" for an entry with an event
    that the ledger could not take: nobody may be told that it is durable. Raises LedgerUnavailable."""
    rows = await database.fetch(_FIND_TIPS, *(list(column) for column in zip(*asked, strict=True)))
    return {(row["shard"], row["epoch"], row["seq"]): row["tip"] for row in rows}
