"""Who owns which shard. A writer lives while its row is renewed; a shard belongs to one writer at a time."""

from __future__ import annotations

from typing import NamedTuple

import asyncpg

WRITER_TTL_S = 5

_RENEW = f"""
    INSERT INTO writers (writer_id, expires_at) VALUES ($1, now() + interval '{WRITER_TTL_S} seconds')
    ON CONFLICT (writer_id) DO UPDATE SET expires_at = excluded.expires_at
"""
_COUNTS = """
    SELECT (SELECT count(*) FROM writers WHERE expires_at > now()) AS writers, (SELECT count(*) FROM shards) AS shards
"""
_ORPHANS = """
    SELECT shards.shard, shards.owner FROM shards LEFT JOIN writers ON writers.writer_id = shards.owner
    WHERE writers.writer_id IS NULL OR writers.expires_at <= now()
    ORDER BY random() LIMIT $1
"""
# An owner that no longer renews its row may be paused half-way through a transaction that holds the row we want.
_END_OWNER = """
    SELECT pg_terminate_backend(pid) FROM pg_stat_activity, writers
    WHERE writer_id = $1 AND expires_at <= now() AND application_name = $2
"""
_TAKE = """
    UPDATE shards SET owner = $2, generation = generation + 1
    WHERE shard = $1 AND NOT EXISTS (SELECT FROM writers WHERE writer_id = shards.owner AND expires_at > now())
    RETURNING shard, epoch, committed, generation, chain
"""


class OwnedShard(NamedTuple):
    """A shard as its owner found it when it took it."""

    shard: int
    epoch: int
    committed: int
    generation: int
    chain: bytes
    """The hash of the last row (coupon_svc/domain/chain.py)."""


def connection_name(writer_id: str) -> str:
    """What a writer calls its connections, so that whoever takes over can end them."""
    return f"coupon-writer {writer_id}"


async def renew_writer(connection: asyncpg.Connection, writer_id: str) -> int:
    """Say that this writer lives. Returns how many shards it should own: an equal part, rounded up."""
    await connection.execute(_RENEW, writer_id)
    counts = await connection.fetchrow(_COUNTS)
    return int(-(-counts["shards"] // max(1, counts["writers"])))


async def take_shards(connection: asyncpg.Connection, writer_id: str, most: int) -> list[OwnedShard]:
    """Take up to `most` shards whose owner is gone. Their generation grows, which shuts the old owner out."""
    taken = []
    for orphan in await connection.fetch(_ORPHANS, most):
        await connection.execute(_END_OWNER, orphan["owner"], connection_name(orphan["owner"] or ""))
        row = await connection.fetchrow(_TAKE, orphan["shard"], writer_id)
        if row is not None:
            taken.append(OwnedShard(*row))
    return taken


async def owned_shards(connection: asyncpg.Connection, writer_id: str) -> list[OwnedShard]:
    """The shards this writer owns now."""
    rows = await connection.fetch(
        "SELECT shard, epoch, committed, generation, chain FROM shards WHERE owner = $1 ORDER BY shard", writer_id
    )
    return [OwnedShard(*row) for row in rows]


async def release_shards(connection: asyncpg.Connection, writer_id: str, shards: list[int] | None = None) -> None:
    """Give shards up (all of them, and the writer's own row, without a list) for others to take at once."""
    await connection.execute(
        "UPDATE shards SET owner = NULL WHERE owner = $1 AND ($2::int[] IS NULL OR shard = ANY ($2))", writer_id, shards
    )
    if shards is None:
        await connection.execute("DELETE FROM writers WHERE writer_id = $1", writer_id)
