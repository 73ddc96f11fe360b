"""What a Redis says of itself and of the shards, read at one moment: what an API process compares before it believes it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from coupon_svc.redis.connection import Connection
from coupon_svc.redis.errors import ReplyError
from coupon_svc.redis.keys import ShardKeys
from coupon_svc.redis.meta import FORMAT, META_FIELDS, ShardMeta, parse_meta
from coupon_svc.redis.server import Identity, judge, read_info, refuses_writes
from coupon_svc.redis.shard_view import Certificate


class ServerReading(NamedTuple):
    """A server's identity, whether it takes writes, its clock, and the meta of each shard.

    A meta is None where a key of another type lies in its place: somebody put it there, and it is this shard's trouble
    alone.
    """

    identity: Identity
    refuses_writes: bool
    now_ms: int
    metas: list[ShardMeta | None]

    def certificate(self, shard: int) -> Certificate | None:
        """What certifies the shard for this server. None without it, or when a field was changed by hand."""
        meta = self.metas[shard]
        if meta is None or (meta.run_id, meta.replid) != (self.identity.run_id, self.identity.replid):
            return None
        if meta.format != FORMAT or meta.tip is None:
            return None
        if meta.epoch is None or meta.seq is None or meta.committed is None or meta.backlog_max is None:
            return None
        return Certificate(meta.epoch, meta.seq, meta.committed, meta.backlog_max)

    def ledger_unseen_s(self, shard: int) -> float:
        """Seconds since the ledger was seen last; infinite while the owner says that it is away."""
        meta = self.metas[shard]
        if meta is None or not meta.ledger_at_ms:
            return math.inf
        return max(0, self.now_ms - meta.ledger_at_ms) / 1000

    def owner_unheard_s(self, shard: int) -> float:
        """Seconds since the shard's owner wrote last."""
        meta = self.metas[shard]
        return math.inf if meta is None or meta.owner_at_ms is None else (self.now_ms - meta.owner_at_ms) / 1000


async def read_server(connection: Connection) -> ServerReading:
    """Ask the server who it is and what time it is. Raises StoreError, of which ServerUnfit is one."""
    info = await read_info(connection)
    identity = judge(info)
    seconds, microseconds = await connection.ask("TIME")
    return ServerReading(identity, refuses_writes(info), int(seconds) * 1000 + int(microseconds) // 1000, metas=[])


async def read_metas(connection: Connection, keys: Sequence[ShardKeys]) -> list[ShardMeta | None]:
    """Ask for the metas of all shards at one moment: they are asked for before this waits. Raises StoreError."""
    metas = [connection.send("HMGET", of_shard.meta, *META_FIELDS) for of_shard in keys]
    return [_meta(reply) for reply in [await meta for meta in metas]]


def _meta(reply: Sequence[str | None] | ReplyError) -> ShardMeta | None:
    if not isinstance(reply, ReplyError):
        return parse_meta(reply)
    if reply.word != "WRONGTYPE":
        raise reply
    return None
