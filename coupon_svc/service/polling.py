"""One poll for all requests that wait for the same thing of a book: for its codes, or for the book itself.

If each repeated its operation by itself, a thousand callers at an empty pool would leave little of Redis and of this process
to the others. So they stand in line: from time to time the first one runs its operation. Once one is decided, it wakes two
more, and so does each of those. So the line moves as fast as codes arrive.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from time import monotonic
from typing import NamedTuple

from coupon_svc.domain.outcomes import Outcome, Refused
from coupon_svc.hot import Slot
from coupon_svc.redis.contract import Reply
from coupon_svc.service.durability import PATIENCE_S

FIRST_PAUSE_S = 0.004
PAUSE_MAX_S = 0.1
WOKEN_BY_ONE = 2

Run = Callable[[], Awaitable[Reply]]
"""Runs a request's operation once more."""
Ask = Callable[[float], Awaitable[bool]]
"""Whether what is waited for was there before, so that it has been lost if it is not there now; asked on behalf of the
request that began at this time. May raise what all who wait are to be told."""


class _Waiter(NamedTuple):
    begun: float
    woken: Slot[bool]


class Poll:
    """The line at one book. `for_outcome` is what Redis replies there as long as there is something to wait for."""

    def __init__(self, for_outcome: str, too_long: Outcome, ask: Ask | None = None) -> None:
        self._for_outcome = for_outcome
        self._too_long = too_long
        self._ask = ask
        self._line: deque[_Waiter] = deque()
        self._members = 0
        """Requests that are in line, or run their operations."""
        self._pause = FIRST_PAUSE_S
        self._task: asyncio.Task[None] | None = None

    @property
    def is_over(self) -> bool:
        """Whether nobody is in line or runs its operation."""
        return not self._members

    @property
    def _somebody_runs(self) -> bool:
        return self._members > len(self._line)

    async def wait(self, run: Run, begun: float) -> tuple[Reply, bool]:
        """Stand in line until `run` replies something else; or until that reply means that what was waited for is lost: then
        True comes with it.

        `begun` is when the request began, by the monotonic clock. Raises Refused(`too_long`) PATIENCE_S later; and what
        `run` and `ask` raise.
        """
        self._members += 1
        try:
            return await self._stand(run, begun)
        finally:
            self._members -= 1

    async def _stand(self, run: Run, begun: float) -> tuple[Reply, bool]:
        again = False
        while True:
            if monotonic() >= begun + PATIENCE_S:
                raise Refused(self._too_long)
            waiter = _Waiter(begun, Slot())
            self._line.appendleft(waiter) if again else self._line.append(waiter)
            if self._task is None or self._task.done():
                self._task = asyncio.create_task(self._keep_waking())
            was_there = await waiter.woken
            decided = True
            try:
                reply = await run()
                decided = reply.outcome != self._for_outcome
            finally:
                if decided:  # also by an exception
                    self._pause = FIRST_PAUSE_S
                    self._wake(WOKEN_BY_ONE)
            if decided or was_there:
                return reply, not decided
            again = True

    async def _keep_waking(self) -> None:
        while not self.is_over:
            if self._somebody_runs:
                await asyncio.sleep(FIRST_PAUSE_S)
            else:
                await self._wake_one()
            self._end_late()

    async def _wake_one(self) -> None:
        was_there = False
        if self._ask is not None:
            try:
                was_there = await self._ask(self._line[0].begun)
            except Exception as error:  # whatever it is, nobody may be left waiting
                self._end(error)
                return
        if not was_there:
            await asyncio.sleep(self._pause)
            self._pause = min(1.5 * self._pause, PAUSE_MAX_S)
        self._end_late()
        self._wake(1, was_there=was_there)

    def _wake(self, number: int, *, was_there: bool = False) -> None:
        while self._line and number:
            waiter = self._line.popleft()
            if not waiter.woken.done():
                number -= 1
                waiter.woken.set_result(was_there)

    def _end_late(self) -> None:
        """Nobody waits longer than PATIENCE_S. They came in about the order in which they began."""
        latest = monotonic() - PATIENCE_S
        while self._line and self._line[0].begun <= latest:
            self._line.popleft().woken.set_exception(Refused(self._too_long))

    def _end(self, error: Exception) -> None:
        line, self._line = self._line, deque()
        for waiter in line:
            # Each raises one of its own: a shared exception would collect the traces of all.
            waiter.woken.set_exception(Refused(error.outcome) if isinstance(error, Refused) else error)
