"""Asks Postgres for what a message of a commit should have told: whether the ledger holds the entry of a request that waits.

A message is lost when its subscription breaks. Requests that have waited too long are asked for together, with one
statement, and a few times per second at most.
"""

from __future__ import annotations

import asyncio

from coupon_svc.loops import keep_running
from coupon_svc.postgres.database import Database
from coupon_svc.postgres.entries import find_tips
from coupon_svc.postgres.errors import LedgerUnavailable
from coupon_svc.redis.waiters import DurabilityWaiters

ASK_EVERY_S = 0.2


class MissedMessages:
    """Runs in the background of an API process; `start` and `stop` it with the data plane."""

    def __init__(self, waiters: DurabilityWaiters, database: Database) -> None:
        self._waiters = waiters
        self._database = database
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._task = asyncio.create_task(keep_running(self._run))

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(ASK_EVERY_S)
            await self.ask()

    async def ask(self) -> None:
        """Ask for every entry that is overdue now. Where Postgres is away, its requests go on waiting."""
        asked = self._waiters.unheard()
        if not asked:
            return
        try:
            found = await find_tips(self._database, [(entry.shard, entry.epoch, entry.seq) for entry in asked])
        except LedgerUnavailable:
            return
        self._waiters.learn(asked, found)
