"""How far the ledger is in each shard, and the requests that wait for it."""

from __future__ import annotations

import heapq
from itertools import count
from time import monotonic
from typing import NamedTuple

from coupon_svc.domain.outcomes import Outcome, Refused
from coupon_svc.hot import Slot

OVERDUE_S = 0.1
"""A position is published within milliseconds of its commit. A request that has waited this long may have missed the
message."""


class _Waiter(NamedTuple):
    epoch: int
    seq: int
    tie: int
    overdue_at: float
    until: float
    slot: Slot[None]


class DurabilityWaiters:
    """One commit of the writer wakes every request it serves; a request that waits costs one entry in a heap.

    Times are those of the monotonic clock, in seconds. Who is woken goes on at once, and may come to wait again.
    """

    def __init__(self, shards: int) -> None:
        self._committed = [(0, 0)] * shards
        self._waiting: list[list[_Waiter]] = [[] for _ in range(shards)]
        self._tie = count()

    def committed(self, shard: int) -> tuple[int, int]:
        """(epoch, seq) up to which the ledger is known to be."""
        return self._committed[shard]

    def advance(self, shard: int, epoch: int, seq: int) -> None:
        """The ledger is at `seq` of `epoch`. Whoever waits for an older epoch learns that the outcome is unknown."""
        if (epoch, seq) <= self._committed[shard]:
            return
        self._committed[shard] = (epoch, seq)
        waiting = self._waiting[shard]
        while waiting and (waiting[0].epoch, waiting[0].seq) <= (epoch, seq):
            waiter = heapq.heappop(waiting)
            if waiter.epoch == epoch:
                waiter.slot.set_result(None)
            else:
                waiter.slot.set_exception(Refused(Outcome.OUTCOME_UNKNOWN))

    async def wait(self, shard: int, epoch: int, seq: int, until: float) -> None:
        """Return once the ledger holds `seq` of `epoch`.

        Raises Refused(outcome_unknown) when the epoch ends before that, or at `until`.
        """
        known_epoch, known_seq = self._committed[shard]
        if known_epoch == epoch and known_seq >= seq:
            return
        if known_epoch > epoch:
            raise Refused(Outcome.OUTCOME_UNKNOWN)
        slot = Slot[None]()
        overdue_at = monotonic() + OVERDUE_S
        heapq.heappush(self._waiting[shard], _Waiter(epoch, seq, next(self._tie), overdue_at, until, slot))
        await slot

    def expire(self) -> bool:
        """End the waits whose time is over. True when somebody has waited so long that a message may be lost."""
        now = monotonic()
        overdue = False
        late: list[_Waiter] = []
        for shard, waiting in enumerate(self._waiting):
            late += [waiter for waiter in waiting if waiter.until <= now]
            self._waiting[shard] = waiting = [w for w in waiting if w.until > now and not w.slot.done()]
            heapq.heapify(waiting)
            overdue = overdue or any(waiter.overdue_at <= now for waiter in waiting)
        for waiter in late:
            waiter.slot.set_exception(Refused(Outcome.OUTCOME_UNKNOWN))
        return overdue or bool(late)
