"""Which book has a code: questions to Postgres, many in one statement, and at a pace for whoever guesses.

A code that was never issued cannot be told from memory alone: another process may have added it a moment ago, and have
answered so. So each "there is none" rests on a statement that began after it was asked for. What is saved is their number.

Two statements are under way at most, one per lane. The quick lane asks at once. Questions of a tenant that has missed often
recently take the paced lane. It sends PACED_PER_S statements per second for all such tenants together. So its guesses
delay nobody else, and its own customers wait 1 / PACED_PER_S longer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from time import monotonic

from coupon_svc.postgres.errors import LedgerUnavailable
from coupon_svc.service.budgets import Budget

PACED_PER_S = 20
MISSES_PER_S = 20
"""Misses per second that leave a tenant in the quick lane for good: mistyped codes."""
MISSES_FREE = 100
"""Misses at once that do. A tenant that missed more is back when it has missed less for a second or so."""
CODES_PER_STATEMENT_MAX = 500
WAITING_MAX = 5_000
"""Codes of a tenant that wait in one lane."""

Asked = tuple[int, str]
"""A tenant and a code."""
Find = Callable[[Collection[Asked]], Awaitable[dict[Asked, str]]]
"""The books of those that exist, with one statement."""


class Questions:
    """The questions of one process. `find` asks the ledger; it may raise anything."""

    def __init__(self, find: Find) -> None:
        self._find = find
        self._quick = _Lane(self._ask, pause_s=0.0)
        self._paced = _Lane(self._ask, pause_s=1 / PACED_PER_S)
        self._misses = Budget(MISSES_PER_S, MISSES_FREE)

    def ask(self, tenant_id: int, code: str) -> asyncio.Future[str | None]:
        """The id of the book that has the code, or None; what `find` raises, when it raises. Whoever waits shields it: it is
        shared with all who ask for the same code now.

        Raises LedgerUnavailable when too many codes of the tenant wait already.
        """
        guesses = self._misses.wait_s(tenant_id) > 0
        return (self._paced if guesses else self._quick).ask(tenant_id, code)

    async def _ask(self, asked: Collection[Asked]) -> dict[Asked, str]:
        found = await self._find(asked)
        for tenant_id, _ in set(asked) - found.keys():
            self._misses.spend(tenant_id)
        return found


class _Lane:
    """Codes that wait to be asked for, by tenant, and the task that asks for them with one statement at a time."""

    def __init__(self, find: Find, pause_s: float) -> None:
        self._find = find
        self._pause_s = pause_s
        """From the begin of one statement to that of the next."""
        self._waiting: dict[int, dict[str, asyncio.Future[str | None]]] = {}
        self._asking: asyncio.Task[None] | None = None
        self._begun_at = -pause_s

    def ask(self, tenant_id: int, code: str) -> asyncio.Future[str | None]:
        waiting = self._waiting.setdefault(tenant_id, {})
        future = waiting.get(code)
        if future is None:
            if len(waiting) >= WAITING_MAX:
                raise LedgerUnavailable("too many codes are being looked up")
            future = waiting[code] = asyncio.get_running_loop().create_future()
            if self._asking is None or self._asking.done():
                self._asking = asyncio.create_task(self._ask())
        return future

    async def _ask(self) -> None:
        """Ask for what waits, until nothing does any more."""
        while self._waiting:
            await asyncio.sleep(max(0.0, self._begun_at + self._pause_s - monotonic()))
            self._begun_at = monotonic()
            asked = self._take()
            try:
                found = await self._find(asked.keys())
            except Exception as error:  # whatever it is, nobody may be left waiting
                for future in asked.values():
                    if not future.done():
                        future.set_exception(error)
                        future.exception()  # it may be that nobody waits any more
                continue
            for key, future in asked.items():
                if not future.done():
                    future.set_result(found.get(key))

    def _take(self) -> dict[Asked, asyncio.Future[str | None]]:
        """The codes of the next statement: as many of each tenant, the oldest first."""
        each = max(1, CODES_PER_STATEMENT_MAX // len(self._waiting))
        taken: dict[Asked, asyncio.Future[str | None]] = {}
        for tenant_id in list(self._waiting)[:CODES_PER_STATEMENT_MAX]:
            waiting = self._waiting.pop(tenant_id)
            for code in list(waiting)[:each]:
                taken[tenant_id, code] = waiting.pop(code)
            if waiting:  # behind all others, who come first next time
                self._waiting[tenant_id] = waiting
        return taken
