"""The epochs of a shard: one begins with each recovery and is certified at its end; and the shard may be stopped."""

from __future__ import annotations

from typing import NamedTuple

import asyncpg

from coupon_svc.postgres.errors import HistoryForked, NotOwner
from coupon_svc.postgres.shards import OwnedShard, require_recoverer

EPOCH_CHANNEL = "coupon_epoch"
"""NOTIFY channel on which API processes hear that an epoch has begun: they answer nothing of the older one any more."""
# Where `epoch` changes, the trigger `an_epoch_ends` does the rest (sql/0012_entries.sql, sql/0017_epochs_begin_at_zero.sql).
# The old epoch's `committed` and `tip` become its row in `epochs`, and the new one begins at 0 and "".
_BEGIN_EPOCH = """
    UPDATE shards SET epoch = epoch + 1
    WHERE shard = $1 AND owner = $2 AND generation = $3 AND epoch = $4 AND stopped IS NULL
    RETURNING shard, epoch, committed, generation, chain, tip, certified_epoch, settled_epoch, rebuild, settling_epoch,
              settling_lost
"""
# An epoch that is over has a row in `epochs`; the one that a shard is in stands in `shards`.
_END_OF_EPOCH = """
    SELECT seq, tip FROM epochs WHERE shard = $1 AND epoch = $2
    UNION ALL SELECT committed, tip FROM shards WHERE shard = $1 AND epoch = $2
"""
_CERTIFY = "UPDATE shards SET certified_epoch = epoch, rebuild = false WHERE shard = $1"
_WANT_RECOVERY = """
    UPDATE shards SET epoch = epoch + 1, rebuild = rebuild OR $2
    WHERE stopped IS NULL AND ($1::int[] IS NULL OR shard = ANY ($1))
"""


class Verdict(NamedTuple):
    """What is to become of the codes that were lent in an epoch and have no record. It is come to once."""

    epoch: int
    """0: no epoch is to be settled, and nobody can have been answered."""
    lost: bool
    """Somebody may have been answered, and the record be lost."""


class NewEpoch(NamedTuple):
    """A shard at the beginning of its recovery.

    `live_epoch` is the one in which Redis decided last, and whose codes are not settled yet; 0 when there is none. It has
    just ended; drain and reports are about it alone, and events of any other epoch are late.
    """

    owned: OwnedShard
    live_epoch: int
    rebuild: bool
    """Nothing in Redis is kept: an operator has asked for that, or the clocks were apart."""
    verdict: Verdict | None = None
    """Of a recovery that did not get to the end of its settlement."""


async def begin_epoch(connection: asyncpg.Connection, writer_id: str, owned: OwnedShard) -> NewEpoch:
    """Step 1: the next epoch. From its commit on, no batch of an older one can be committed.

    Raises NotOwner; HistoryForked when the shard was stopped before.
    """
    async with connection.transaction():
        row = await connection.fetchrow(_BEGIN_EPOCH, owned.shard, writer_id, owned.generation, owned.epoch)
        if row is None:
            reason = await stopped_because(connection, owned.shard)
            raise HistoryForked(reason) if reason else NotOwner
        await connection.execute("SELECT pg_notify($1, $2)", EPOCH_CHANNEL, str(owned.shard))
    live = row["certified_epoch"] if row["certified_epoch"] > row["settled_epoch"] else 0
    verdict = Verdict(row["settling_epoch"], row["settling_lost"]) if row["settling_epoch"] else None
    return NewEpoch(OwnedShard(**{name: row[name] for name in OwnedShard._fields}), live, row["rebuild"], verdict)


async def last_seq(connection: asyncpg.Connection, shard: int, epoch: int) -> int:
    """The seq up to which the ledger knows an epoch, 0 for nothing."""
    seq, _ = await end_of_epoch(connection, shard, epoch)
    return seq


async def end_of_epoch(connection: asyncpg.Connection, shard: int, epoch: int) -> tuple[int, str | None]:
    """The seq up to which the ledger accounts for an epoch, and the tip of the entry there. None for a tip that is not
    known: what stands before it is missing, or an older version wrote it."""
    row = await connection.fetchrow(_END_OF_EPOCH, shard, epoch)
    return (row["seq"], row["tip"]) if row is not None else (0, "")


async def still_recoverer(connection: asyncpg.Connection, writer_id: str, begun: NewEpoch) -> None:
    """Raises NotOwner when another writer or another epoch has taken over."""
    async with connection.transaction():
        await require_recoverer(connection, writer_id, begun.owned)


async def mark_certified(connection: asyncpg.Connection, writer_id: str, begun: NewEpoch) -> OwnedShard:
    """The last word before Redis is certified: from now on it may decide in this epoch. Returns the shard as it is now.

    Raises NotOwner.
    """
    async with connection.transaction():
        chain = await require_recoverer(connection, writer_id, begun.owned)
        await connection.execute(_CERTIFY, begun.owned.shard)
    return begun.owned._replace(chain=chain)


async def stopped_because(connection: asyncpg.Connection, shard: int) -> str | None:
    """Why the shard was stopped; None when it is not."""
    reason: str | None = await connection.fetchval("SELECT stopped FROM shards WHERE shard = $1", shard)
    return reason


async def want_rebuild(connection: asyncpg.Connection, shard: int) -> None:
    """The shard's next recovery, whoever makes it, keeps nothing that is in Redis."""
    await connection.execute("UPDATE shards SET rebuild = true WHERE shard = $1", shard)


async def stop_shard(connection: asyncpg.Connection, shard: int, reason: str) -> None:
    """Nothing of the shard is persisted or recovered until a person has cleared `stopped`."""
    await connection.execute("UPDATE shards SET stopped = $2 WHERE shard = $1", shard, reason)


async def want_recovery(connection: asyncpg.Connection, shards: list[int] | None, *, rebuild: bool = False) -> int:
    """Have the owners of these shards (all without a list) recover them. Returns how many. With `rebuild`, Redis is
    rebuilt from the ledger even where it seems to agree with it."""
    async with connection.transaction():
        done = await connection.execute(_WANT_RECOVERY, shards, rebuild)
        await connection.execute("SELECT pg_notify($1, '')", EPOCH_CHANNEL)
    return int(done.removeprefix("UPDATE "))
