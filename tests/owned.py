"""A writer's shard that is open, for tests of what works on it."""

from __future__ import annotations

from coupon_svc.postgres.shards import OwnedShard
from coupon_svc.redis.server import Identity
from coupon_svc.writer.shard import Shard


def open_shard(owned: OwnedShard, identity: Identity) -> Shard:
    """A shard that was taken as `owned` and is open on the Redis of this identity."""
    shard = Shard(owned)
    shard.opening_begins()
    shard.opened(identity)
    return shard


def recovered_shard(owned: OwnedShard, after: OwnedShard, identity: Identity) -> Shard:
    """A shard that was taken as `owned`, recovered, and is open in the epoch of `after`."""
    shard = Shard(owned)
    shard.opening_begins()
    shard.recovery_begins("a test")
    shard.recovered(after)
    shard.opened(identity)
    return shard
