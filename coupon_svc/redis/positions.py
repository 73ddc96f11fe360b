"""How far the ledger is in each shard, and the requests that wait for it."""

from __future__ import annotations

import asyncio
import heapq
from itertools import count

from coupon_svc.domain.outcomes import Outcome, Refused

OVERDUE_S = 0.1


class Positions:
    """One commit of the writer wakes every request it serves; nothing is spent per request but a place in a heap."""

    def __init__(self, shards: int, wait_ms: int) -> None:
        self._wait_s = wait_ms / 1000
        self._committed = [(0, 0)] * shards
        self._waiting: list[list[tuple[int, int, int, float, asyncio.Future[None]]]] = [[] for _ in range(shards)]
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
        while waiting and waiting[0][:2] <= (epoch, seq):
            wanted_epoch, _, _, _, future = heapq.heappop(waiting)
            if future.done():
                continue
            if wanted_epoch == epoch:
                future.set_result(None)
            else:
                future.set_exception(Refused(Outcome.OUTCOME_UNKNOWN))

    async def wait(self, shard: int, epoch: int, seq: int) -> None:
        """Return once the ledger holds `seq` of `epoch`. Raises Refused(outcome_unknown) when the epoch is over
        before, or the wait takes too long."""
        known_epoch, known_seq = self._committed[shard]
        if known_epoch == epoch and known_seq >= seq:
            return
        if known_epoch > epoch:
            raise Refused(Outcome.OUTCOME_UNKNOWN)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        heapq.heappush(self._waiting[shard], (epoch, seq, next(self._tie), loop.time() + self._wait_s, future))
        await future

    def expire(self) -> bool:
        """End the waits that took too long. True when somebody has waited so long that a message may be lost."""
        now = asyncio.get_running_loop().time()
        overdue = False
        for shard, waiting in enumerate(self._waiting):
            waiting = [entry for entry in waiting if not entry[4].done()]
            for _, _, _, deadline, future in waiting:
                if deadline <= now:
                    future.set_exception(Refused(Outcome.OUTCOME_UNKNOWN))
                overdue = overdue or deadline - self._wait_s + OVERDUE_S <= now
            heapq.heapify(waiting)
            self._waiting[shard] = waiting
        return overdue
