"""Who owns which shard. A writer lives while its row is renewed; a shard belongs to one writer at a time.

What renews, takes or gives up waits for no lock on a shard's row: each piece of a recovery holds it, and a writer that
waited would miss its own renewal. What is locked is taken or given up at the next turn. `require_owner` and
`require_recoverer` do wait, within a transaction that works for the shard.
"""

from __future__ import annotations

from typing import NamedTuple

import asyncpg

from coupon_svc.postgres.database import one_row
from coupon_svc.postgres.errors import NotOwner

WRITER_TTL_S = 4

_RENEW = """
    INSERT INTO writers (writer_id) VALUES ($1) ON CONFLICT (writer_id) DO UPDATE SET beat = nextval('beats')
"""
_COUNTS = "SELECT (SELECT count(*) FROM writers) AS writers, (SELECT count(*) FROM shards) AS shards"
_ORPHANS = """
    SELECT shard, owner FROM shards WHERE NOT EXISTS (SELECT FROM writers WHERE writer_id = owner) ORDER BY random() LIMIT $1
"""
# An owner that no longer renews its row may be paused half-way through a transaction that holds the row we want.
_END_OWNER = """
    SELECT pg_terminate_backend(pid) FROM pg_stat_activity
    WHERE application_name = $2 AND NOT EXISTS (SELECT FROM writers WHERE writer_id = $1)
"""
_TAKE = """
    UPDATE shards SET owner = $2, generation = generation + 1
    WHERE shard = (SELECT shard FROM shards WHERE shard = $1
                   AND NOT EXISTS (SELECT FROM writers WHERE writer_id = owner) FOR UPDATE SKIP LOCKED)
    RETURNING shard, epoch, committed, generation, chain, tip
"""
_CHAIN_IF_OWNER = "SELECT chain FROM shards WHERE shard = $1 AND owner = $2 AND generation = $3 AND epoch = $4"
_RELEASE = """
    UPDATE shards SET owner = NULL
    WHERE shard IN (SELECT shard FROM shards WHERE owner = $1 AND ($2::int[] IS NULL OR shard = ANY ($2))
                    FOR UPDATE SKIP LOCKED)
"""
_OWNED = "SELECT shard, epoch, committed, generation, chain, tip FROM shards WHERE owner = $1 ORDER BY shard"


class OwnedShard(NamedTuple):
    """A shard as its owner read it last: when it took, opened or recovered it. `committed`, `chain` and `tip` are out of
    date after the next commit."""

    shard: int
    epoch: int
    committed: int
    generation: int
    chain: bytes
    """The hash of the last entry (coupon_svc/domain/chain.py)."""
    tip: str
    """Of the last entry of the epoch, "" before the first."""


def connection_name(writer_id: str) -> str:
    """What a writer calls its connections, so that whoever takes over can end them."""
    return f"coupon-writer {writer_id}"


async def renew_writer(connection: asyncpg.Connection, writer_id: str) -> None:
    """Say that this writer lives. One that somebody has counted as gone begins anew, with the shards that are still its
    own."""
    await connection.execute(_RENEW, writer_id)


async def writer_beats(connection: asyncpg.Connection) -> dict[str, int]:
    """Every writer's beat, to be watched."""
    return {row["writer_id"]: row["beat"] for row in await connection.fetch("SELECT writer_id, beat FROM writers")}


async def drop_writer(connection: asyncpg.Connection, writer_id: str, beat: int) -> bool:
    """Count a writer as gone, unless it has been renewed since it was seen with this beat. Its shards may be taken then."""
    done = await connection.execute("DELETE FROM writers WHERE writer_id = $1 AND beat = $2", writer_id, beat)
    return bool(done == "DELETE 1")


async def fair_share(connection: asyncpg.Connection) -> int:
    """How many shards each writer should own: an equal part, rounded up."""
    counts = await one_row(connection, _COUNTS)
    return int(-(-counts["shards"] // max(1, counts["writers"])))


async def take_shards(connection: asyncpg.Connection, writer_id: str, most: int) -> tuple[list[OwnedShard], bool]:
    """Take up to `most` shards whose owner is gone. Their generation grows, which shuts the old owner out.

    Returns them, and whether some could not be had yet: somebody holds their rows.
    """
    orphans = await connection.fetch(_ORPHANS, most)
    for owner in {orphan["owner"] for orphan in orphans} - {None}:
        await connection.execute(_END_OWNER, owner, connection_name(owner))
    taken = []
    for orphan in orphans:
        row = await connection.fetchrow(_TAKE, orphan["shard"], writer_id)
        if row is not None:
            taken.append(OwnedShard(*row))
    return taken, len(taken) < len(orphans)


async def owned_shards(connection: asyncpg.Connection, writer_id: str) -> list[OwnedShard]:
    """The shards this writer owns now."""
    rows = await connection.fetch(_OWNED, writer_id)
    return [OwnedShard(*row) for row in rows]


async def release_shards(connection: asyncpg.Connection, writer_id: str, shards: list[int]) -> bool:
    """Give these shards up for others to take at once. False when some could not be yet: somebody holds their rows."""
    done = await connection.execute(_RELEASE, writer_id, shards)
    return bool(done == f"UPDATE {len(shards)}")


async def leave(connection: asyncpg.Connection, writer_id: str) -> None:
    """Give up all shards and the writer's own row. A shard whose row somebody holds has an owner that is gone then, and so
    is free as well."""
    await connection.execute("DELETE FROM writers WHERE writer_id = $1", writer_id)
    await connection.execute(_RELEASE, writer_id, None)


async def require_owner(connection: asyncpg.Connection, writer_id: str, owned: OwnedShard) -> None:
    """Raises NotOwner unless this writer owns the shard in this generation and epoch, which stays so until the commit."""
    if await _chain_if_owner(connection, "FOR SHARE", writer_id, owned) is None:
        raise NotOwner


async def require_recoverer(connection: asyncpg.Connection, writer_id: str, owned: OwnedShard) -> bytes:
    """As `require_owner`, and holds the shard's row alone, to change it. Returns the hash of the shard's last entry."""
    chain = await _chain_if_owner(connection, "FOR UPDATE", writer_id, owned)
    if chain is None:
        raise NotOwner
    return chain


async def _chain_if_owner(connection: asyncpg.Connection, lock: str, writer_id: str, owned: OwnedShard) -> bytes | None:
    identity = (owned.shard, writer_id, owned.generation, owned.epoch)
    chain: bytes | None = await connection.fetchval(f"{_CHAIN_IF_OWNER} {lock}", *identity)
    return chain
