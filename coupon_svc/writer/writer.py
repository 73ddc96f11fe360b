"""The writer: owns shards, and while it owns them persists their events, lends them codes and recovers them.

This module joins the writer's parts; each part is a loop in a module of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import signal

import uvloop

from coupon_svc.config import Settings
from coupon_svc.loops import keep_running
from coupon_svc.postgres.computed.ciphers import Ciphers, check_master_key
from coupon_svc.postgres.database import LedgerConnection, LedgerSession
from coupon_svc.postgres.errors import LedgerUnavailable
from coupon_svc.postgres.migrations import check_installation, known_migrations
from coupon_svc.postgres.shards import connection_name
from coupon_svc.redis.control import ShardControl
from coupon_svc.redis.scripts import Scripts
from coupon_svc.writer.clock import LedgerClock
from coupon_svc.writer.lend import Lender
from coupon_svc.writer.opening import Opener
from coupon_svc.writer.owning import Owning
from coupon_svc.writer.persist import Persister
from coupon_svc.writer.recover import Recoverer
from coupon_svc.writer.shard import Shard
from coupon_svc.writer.showing import Showing
from coupon_svc.writer.upkeep import Upkeep
from coupon_svc.writer.watching import Watching

log = logging.getLogger(__name__)

OPENED_AT_ONCE = 4


class Writer:
    """One writer process. Any number may run: each shard has one owner, and a stopped owner is taken over."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._known = known_migrations()
        self.writer_id = writer_id = "wr_" + secrets.token_hex(8)
        self.shards: dict[int, Shard] = {}
        self.store = store = ShardControl(settings.redis_url, settings.shards, Scripts())
        self._ciphers = ciphers = Ciphers(settings.master_key)
        url, shards, clock = settings.database_url, self.shards, LedgerClock()
        self.lender = Lender(url, writer_id, store, shards, settings.lease_codes_min, settings.lease_codes_max, ciphers)
        self.persister = Persister(url, writer_id, store, shards, self.lender.count_assigned, clock)
        self.upkeep = Upkeep(url, writer_id, shards, ciphers)
        self.owning = Owning(self._session(), writer_id, store, shards)
        self.watching = Watching(self._session())
        self.showing = Showing(
            self._session(), store, shards, clock, lambda: self.watching.gone, self.persister.show_away
        )
        self.opener = Opener(
            [self._session() for _ in range(OPENED_AT_ONCE)],
            writer_id,
            store,
            shards,
            Recoverer(writer_id, store, settings.backlog_events_max, ciphers),
            self.lender,
            settings.backlog_events_max,
        )

    async def run(self, stop: asyncio.Event) -> None:
        """Work until `stop` is set; then hand the shards over, so that another writer need not wait."""
        log.info("writer %s begins", self.writer_id)
        parts = (
            self.owning.keep_in_touch(),
            self.owning.keep_owning(),
            self.watching.run(),
            self.showing.run(),
            self.opener.run(),
            self.persister.run(),
            self.lender.run(),
            keep_running(self.upkeep.run),
        )
        tasks = [asyncio.create_task(part) for part in parts]
        stopped = asyncio.create_task(stop.wait())
        try:
            done, _ = await asyncio.wait([*tasks, stopped], return_when=asyncio.FIRST_COMPLETED)
            for task in done - {stopped}:
                task.result()  # a part that ended by itself has failed: let it be seen
        finally:
            for task in (*tasks, stopped):
                task.cancel()
            self._close_sessions()  # a statement that was cancelled would wait for a server that may be stopped
            await asyncio.gather(*tasks, stopped, return_exceptions=True)
            with contextlib.suppress(LedgerUnavailable):
                await self.owning.leave()
            self.close()

    def close(self) -> None:
        """End every connection at once."""
        self._close_sessions()
        self.store.close()

    def _close_sessions(self) -> None:
        parts = (self.owning, self.watching, self.showing, self.persister, self.lender, self.upkeep)
        for session in (*(part.session for part in parts), *self.opener.sessions):
            session.close()

    def _session(self) -> LedgerSession:
        return LedgerSession(
            self._settings.database_url, connection_name(self.writer_id), on_open=self._check_installation
        )

    async def _check_installation(self, connection: LedgerConnection) -> None:
        installation = await check_installation(connection, self._settings.shards, self._known)
        await check_master_key(connection, self._ciphers.keys)
        self.store.installation = installation


def run_writer(settings: Settings) -> None:
    """Run a writer until SIGTERM or SIGINT; then hand its shards over and return."""

    async def main() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        await Writer(settings).run(stop)

    uvloop.run(main())
