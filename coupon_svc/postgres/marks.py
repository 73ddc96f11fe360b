"""Marks: where the ledger was, about once an hour. So the events of the last 24 hours are found by their position."""

from __future__ import annotations

from typing import NamedTuple

import asyncpg

from coupon_svc.domain.bounds import IDEMPOTENCY_MS

MARGIN_H = 1
"""More than the clocks of Redis, Postgres and the writer may differ by."""
_BEGIN_AT = f"now() - interval '{IDEMPOTENCY_MS} milliseconds' - interval '{MARGIN_H} hours'"
"""A mark from before this moment has every event with an idempotency record behind it."""

# Only while Redis decides in the epoch that the ledger is in: then every event that comes later stands behind the mark.
_NOTE = """
    INSERT INTO ledger_marks (shard, epoch, seq)
    SELECT shard, epoch, committed FROM shards
    WHERE owner = $1 AND epoch = certified_epoch AND stopped IS NULL AND NOT EXISTS
        (SELECT FROM ledger_marks m WHERE m.shard = shards.shard AND m.at > now() - interval '1 hour')
    ON CONFLICT DO NOTHING
"""
# The newest of those that are old enough to begin at stays, however long nothing was marked since.
_DROP = f"""
    DELETE FROM ledger_marks m USING shards
    WHERE shards.owner = $1 AND m.shard = shards.shard AND m.at < now() - interval '48 hours'
      AND EXISTS (SELECT FROM ledger_marks newer WHERE newer.shard = m.shard AND newer.at > m.at
                  AND newer.at < {_BEGIN_AT})
"""
_BEFORE = f"""
    SELECT epoch, seq FROM ledger_marks WHERE shard = $1 AND at < {_BEGIN_AT}
    ORDER BY at DESC LIMIT 1
"""


class Mark(NamedTuple):
    """A position of a shard."""

    epoch: int
    seq: int


async def note_marks(connection: asyncpg.Connection, writer_id: str) -> None:
    """Mark the writer's shards that have no mark of the last hour; drop marks that nobody begins at any more."""
    await connection.execute(_NOTE, writer_id)
    await connection.execute(_DROP, writer_id)


async def mark_of_a_day_ago(connection: asyncpg.Connection, shard: int) -> Mark:
    """A position behind which every event of the last 24 hours stands: the shard's first, when nothing was marked yet."""
    row = await connection.fetchrow(_BEFORE, shard)
    return Mark(0, 0) if row is None else Mark(*row)
