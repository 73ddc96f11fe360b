"""Tells Redis how far the ledger is in some shards, with one message; what is amiss with one of them shuts that one."""

from __future__ import annotations

from collections.abc import Sequence

from coupon_svc.redis.control import LedgerSeen, Published, ShardControl
from coupon_svc.redis.errors import StoreError
from coupon_svc.writer.clock import LedgerClock
from coupon_svc.writer.shard import Shard


async def tell_positions(
    store: ShardControl, clock: LedgerClock, told: Sequence[tuple[Shard, Published]], ledger: LedgerSeen
) -> list[tuple[Shard, Published, int]]:
    """Publish positions. Returns those of the shards that are in order, each with the shard's seq. Raises StoreError."""
    try:
        clock_ms = clock.now_ms() if ledger != "away" else None
        seen = await store.publish_positions([published for _, published in told], ledger, clock_ms)
    except StoreError:
        raise
    except Exception as error:
        for shard, published in told:
            shard.report(published.term, error)
        return []
    fit = []
    for (shard, published), one in zip(told, seen, strict=True):
        if isinstance(one, Exception):
            shard.report(published.term, one)
        else:
            fit.append((shard, published, one))
    return fit
