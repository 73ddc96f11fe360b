"""How this process is: whether it should be sent requests, and what it knows of each shard."""

from __future__ import annotations

import msgspec

from coupon_svc.domain.outcomes import Outcome
from coupon_svc.redis.data_plane import LEDGER_UNSEEN_MAX_S, DataPlane


class ShardHealth(msgspec.Struct, frozen=True):
    """A shard, as this process knows it."""

    shard: int
    is_open: bool
    backlog_events: int
    """Events that the ledger has not."""
    backlog_full: bool
    ledger_unseen_s: float
    """Seconds since the ledger was seen last; infinite while it is away."""


class Health:
    """Asks nobody: it tells what is known already."""

    def __init__(self, plane: DataPlane) -> None:
        self._plane = plane

    def shards(self) -> list[ShardHealth]:
        """Every shard, in order."""
        shards = []
        for view in self._plane.views:
            backlog = self._plane.backlog(view)
            full = backlog >= view.backlog_max
            shards.append(ShardHealth(view.shard, view.is_open, backlog, full, view.ledger_unseen_s))
        return shards

    def why_unready(self) -> Outcome | None:
        """Why this process should be sent no requests, if there is a reason."""
        if not self._plane.connected or self._plane.refuses_writes:
            return Outcome.STORE_UNAVAILABLE
        shards = self.shards()
        if not all(shard.is_open for shard in shards):
            return Outcome.RECOVERING
        if any(shard.backlog_full for shard in shards):
            return Outcome.BACKLOG_FULL
        if any(shard.ledger_unseen_s > LEDGER_UNSEEN_MAX_S for shard in shards):
            return Outcome.LEDGER_BEHIND
        return None
