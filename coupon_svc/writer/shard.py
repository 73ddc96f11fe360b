"""What a writer knows of a shard it owns."""

from __future__ import annotations

from collections import deque

from coupon_svc.domain.books import Ack
from coupon_svc.postgres.shards import OwnedShard
from coupon_svc.redis.control import Term
from coupon_svc.redis.server import Identity

TRIM_KEPT_S = 60.0


class Pool:
    """The codes of one book that Redis has and nobody holds, as counted from the events."""

    __slots__ = ("ack", "block", "in_pool", "refilled_at", "unlent")

    def __init__(self, ack: Ack, block: int) -> None:
        self.ack = ack
        self.in_pool = 0
        self.unlent = 0
        self.block = block
        self.refilled_at = 0.0

    def wants_refill(self) -> bool:
        return self.unlent > 0 and self.in_pool <= self.block // 2


def term_of(owned: OwnedShard) -> Term:
    """What the owner of a shard writes to Redis with."""
    return Term(owned.shard, owned.epoch, owned.generation)


class Shard:
    """One owned shard: where the ledger is, which Redis is certified for it, and its books' pools."""

    def __init__(self, owned: OwnedShard) -> None:
        self.owned = owned
        self.committed = owned.committed
        self.chain = owned.chain
        """The hash of the last row, the one at `committed`; the two are only ever set together."""
        self.entry = ""
        """The digest of the stream's entry at `committed`, "" where it is not known; set together with it, too."""
        self.opened_on: Identity | None = None
        """The Redis that is certified for this shard; None while none is."""
        self.wants_recovery = False
        """Something was found amiss that taking the shard over again would not mend."""
        self.clocks_were_apart = False
        """What Redis dated in this epoch may have ended by a wrong clock."""
        self.stopped = False
        """Its history contradicts itself: nothing is persisted any more until a person has looked."""
        self.pools: dict[str, Pool] = {}
        self._gone: dict[str, int] = {}
        self._marks: deque[tuple[float, int]] = deque()

    @property
    def term(self) -> Term:
        return term_of(self.owned)

    def begin_epoch(self, owned: OwnedShard) -> None:
        """It was recovered: nothing that was known of its last epoch is of use in this one."""
        self.owned = owned
        self.committed, self.chain, self.entry = 0, owned.chain, ""
        self.wants_recovery = self.clocks_were_apart = False
        self.pools.clear()
        self._gone.clear()
        self._marks.clear()

    def answered_by_gone(self, gone: list[str], seq: int) -> list[tuple[str, int]]:
        """API processes that are gone and all of whose answers the ledger has by now, each with the seq it can have seen.

        `seq` is the shard's, read after they were found gone: they can have seen nothing beyond it.
        """
        self._gone = {process: self._gone.get(process, seq) for process in gone}
        return [(process, seen) for process, seen in self._gone.items() if seen <= self.committed]

    def mark(self, now: float) -> None:
        """Remember where the ledger is at this moment."""
        if not self._marks or now - self._marks[-1][0] >= 1.0:
            self._marks.append((now, self.committed))

    def trim_seq(self, now: float) -> int:
        """Events below this seq have been in the ledger for a minute; 0 when there are none yet."""
        seq = 0
        while self._marks and now - self._marks[0][0] >= TRIM_KEPT_S:
            seq = self._marks.popleft()[1]
        return seq
