"""Shows Redis that the ledger is there, and reports for API processes that are gone."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping

from coupon_svc.domain.reports import Report
from coupon_svc.postgres.database import LedgerConnection, LedgerSession, within
from coupon_svc.postgres.errors import LedgerUnavailable
from coupon_svc.postgres.processes import report_seen
from coupon_svc.redis.control import ShardControl
from coupon_svc.redis.errors import StoreError, WrongServer
from coupon_svc.writer.clock import LedgerClock, ledger_clock_ms
from coupon_svc.writer.opening import next_event_is_there
from coupon_svc.writer.shard import Hole, Shard

log = logging.getLogger(__name__)

SHOW_EVERY_S = 1.0
STATEMENTS_TIMEOUT_S = 3.0


class Showing:
    """Tells every open shard once a second how far the ledger is. Looks at the same time whether the shard is still fit."""

    def __init__(
        self,
        session: LedgerSession,
        store: ShardControl,
        shards: Mapping[int, Shard],
        clock: LedgerClock,
        gone: Callable[[], list[str]],
        show_away: Callable[[], Awaitable[None]],
    ) -> None:
        self.session = session
        self._store = store
        self._shards = shards
        self._clock = clock
        self._gone = gone
        self._show_away = show_away

    async def run(self) -> None:
        """Show until cancelled."""
        while True:
            try:
                await self.show(await self.session.connection())
            except LedgerUnavailable as error:
                log.warning("postgres cannot be used: %s", error)
                await self._show_away()  # and that there is an owner: reads go on
            except StoreError as error:
                log.warning("redis cannot be used: %s", error)
            await asyncio.sleep(SHOW_EVERY_S)

    async def show(self, connection: LedgerConnection) -> None:
        """Show it to every open shard, once. Raises StoreError, LedgerUnavailable."""
        async with within(connection, STATEMENTS_TIMEOUT_S):
            self._clock.asked(await ledger_clock_ms(connection))
        await self._store.connect()
        gone = self._gone()  # as found before any seq is read: they can have seen nothing beyond it
        for shard in list(self._shards.values()):
            if not shard.is_open:
                continue
            term = shard.term
            try:
                await self._show_shard(connection, shard, gone)
            except (LedgerUnavailable, StoreError):
                raise
            except Exception as error:
                shard.report(term, error)

    async def _show_shard(self, connection: LedgerConnection, shard: Shard, gone: list[str]) -> None:
        """Tell one shard that the ledger is there, and report for API processes that are gone.

        Raises StoreError, LedgerUnavailable; ShardNotUsable and Hole, which are about this shard alone.
        """
        if shard.identity != self._store.identity:
            raise WrongServer("another Redis answers than the one that is certified")
        term, committed, tip = shard.term, shard.committed, shard.tip
        trim_seq = shard.trim_seq(asyncio.get_running_loop().time())
        seq = await self._store.publish_position(
            term, committed, "seen", tip=tip, ledger_ms=self._clock.now_ms(), trim_seq=trim_seq
        )
        if seq > committed and not await next_event_is_there(self._store, term, committed, tip):
            raise Hole(f"event {committed + 1} is not in the stream")
        for process_id, seen in shard.answered_by_gone(gone, seq):
            async with within(connection, STATEMENTS_TIMEOUT_S):
                await report_seen(connection, process_id, [Report(term.shard, term.epoch, seen)])
