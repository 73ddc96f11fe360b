"""Shows Redis that the ledger is there, and reports for API processes that are gone."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping

from coupon_svc.domain.reports import Report
from coupon_svc.postgres.database import LedgerConnection, LedgerSession, within
from coupon_svc.postgres.errors import LedgerUnavailable
from coupon_svc.postgres.processes import report_seen
from coupon_svc.redis.control import Published, ShardControl, Term
from coupon_svc.redis.errors import StoreError, WrongServer
from coupon_svc.writer.clock import LedgerClock, ledger_clock_ms
from coupon_svc.writer.opening import next_event_is_there
from coupon_svc.writer.shard import Hole, Shard
from coupon_svc.writer.telling import tell_positions

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
        self._shown: dict[Term, int] = {}
        """Where the ledger was in each shard when it was shown last."""

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
        now = asyncio.get_running_loop().time()
        told = []
        for shard in list(self._shards.values()):
            if not shard.is_open:
                continue
            if shard.identity == self._store.identity:  # which `Owning.keep_in_touch` asks for anew, once a second
                told.append((shard, Published(shard.term, shard.committed, shard.tip, (), shard.trim_seq(now))))
            else:
                shard.report(shard.term, WrongServer("another Redis answers than the one that is certified"))
        if not told:
            return
        before, self._shown = self._shown, {shown.term: shown.committed for _, shown in told}
        for shard, shown, seq in await tell_positions(self._store, self._clock, told, "seen"):
            try:
                # What the persister goes on with is there, and it looks at each entry.
                if seq > shown.committed == before.get(shown.term):
                    await self._require_next_event(shown)
                if shard.term == shown.term:  # else it was recovered meanwhile
                    await self._report_gone(connection, shard, seq, gone)
            except (LedgerUnavailable, StoreError):
                raise
            except Exception as error:
                shard.report(shown.term, error)

    async def _require_next_event(self, shown: Published) -> None:
        """Raises Hole when the stream does not go on where the ledger is, StoreError."""
        if not await next_event_is_there(self._store, shown.term, shown.committed, shown.tip):
            raise Hole(f"event {shown.committed + 1} is not in the stream")

    async def _report_gone(self, connection: LedgerConnection, shard: Shard, seq: int, gone: list[str]) -> None:
        """Report for API processes that are gone what they can have seen of the shard, which is at `seq`. Raises
        LedgerUnavailable."""
        for process_id, seen in shard.answered_by_gone(gone, seq):
            async with within(connection, STATEMENTS_TIMEOUT_S):
                await report_seen(connection, process_id, [Report(shard.number, shard.term.epoch, seen)])
