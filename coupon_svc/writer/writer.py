"""The writer: owns shards, and while it owns them persists their events and lends them codes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from typing import Any

from coupon_svc.config import Settings
from coupon_svc.ledger.database import LedgerUnavailable, bounded, open_connection
from coupon_svc.ledger.migrations import check_shards
from coupon_svc.ledger.shards import begin_first_epoch, owned_shards, release_shards, renew_writer, take_shards
from coupon_svc.store.owner import OwnerStore, StoreLost, Suspect
from coupon_svc.store.scripts import Scripts
from coupon_svc.writer.crash import crash_point
from coupon_svc.writer.lend import Lender
from coupon_svc.writer.persist import Persister
from coupon_svc.writer.shard import Shard

log = logging.getLogger(__name__)

RENEW_EVERY_S = 1.0
STATEMENTS_TIMEOUT_S = 3.0


class Writer:
    """One writer process. Any number may run: each shard has one owner, and a stopped owner is taken over."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.writer_id = "wr_" + secrets.token_hex(8)
        self._shards: dict[int, Shard] = {}
        self._store = OwnerStore(settings.redis_url, settings.shards, Scripts())
        self._lender = Lender(
            settings.database_url,
            self.writer_id,
            self._store,
            self._shards,
            settings.lease_codes_min,
            settings.lease_codes_max,
        )
        self._persister = Persister(
            settings.database_url, self.writer_id, self._store, self._shards, self._lender.count_assigned
        )
        self._connection: Any = None

    async def run(self, stop: asyncio.Event) -> None:
        """Work until `stop` is set; then hand the shards over, so that another writer need not wait."""
        tasks = [asyncio.create_task(part) for part in (self._own(), self._persister.run(), self._lender.run())]
        stopped = asyncio.create_task(stop.wait())
        try:
            done, _ = await asyncio.wait([*tasks, stopped], return_when=asyncio.FIRST_COMPLETED)
            for task in done - {stopped}:
                task.result()  # a part that ended by itself has failed: let it be seen
        finally:
            for task in (*tasks, stopped):
                task.cancel()
            await asyncio.gather(*tasks, stopped, return_exceptions=True)
            with contextlib.suppress(LedgerUnavailable):
                connection = await self._connected()
                await bounded(connection, release_shards(connection, self.writer_id), STATEMENTS_TIMEOUT_S)
            self._store.close()

    async def _own(self) -> None:
        """Renew, take what nobody owns, open what is shut, and show every second that the ledger is there."""
        while True:
            try:
                connection = await self._connected()
                await bounded(connection, self._renew(connection), STATEMENTS_TIMEOUT_S)
                for shard in list(self._shards.values()):
                    if shard.opened_on is None or shard.opened_on != self._store.identity:
                        await self._open(connection, shard)
                    else:
                        await self._store.publish_position(
                            shard.term, shard.committed, trim_seq=shard.trim_seq(asyncio.get_running_loop().time())
                        )
            except LedgerUnavailable as error:
                log.warning("postgres cannot be used: %s", error)
            except StoreLost as error:
                log.warning("redis cannot be used: %s", error)
                await asyncio.sleep(0.1)
                continue
            except Suspect:
                log.warning("a shard has changed hands or is suspect")
                for shard in self._shards.values():
                    shard.opened_on = None
                await asyncio.sleep(0.1)
                continue
            await asyncio.sleep(RENEW_EVERY_S)

    async def _renew(self, connection: Any) -> None:
        pids = [pid for pid in (self._persister.backend_pid, self._lender.backend_pid) if pid is not None]
        fair_share = await renew_writer(connection, self.writer_id, [*pids, connection.get_server_pid()])
        mine = {owned.shard: owned for owned in await owned_shards(connection, self.writer_id)}
        for lost in set(self._shards) - set(mine):
            log.warning("shard %02d has another owner now", lost)
            del self._shards[lost]
        if len(mine) > fair_share:
            surplus = sorted(mine)[fair_share:]
            await release_shards(connection, self.writer_id, surplus)
            for number in surplus:
                self._shards.pop(number, None)
        elif len(mine) < fair_share:
            taken = await take_shards(connection, self.writer_id, fair_share - len(mine))
            for owned in taken:
                self._shards[owned.shard] = Shard(owned)
            if taken:
                log.info("took %d shards", len(taken))
                crash_point("own.taken")
        for number, owned in mine.items():
            shard = self._shards.get(number)
            if shard is not None and shard.opened_on is None:
                shard.owned, shard.committed = owned, owned.committed  # as the ledger has it, whatever we thought

    async def _open(self, connection: Any, shard: Shard) -> None:
        """Certify Redis for a shard, if it is what the ledger knows. Otherwise the shard stays shut."""
        shard.opened_on = None
        identity = await self._store.connect()
        fresh = shard.owned.epoch == 0
        if fresh:
            begun = await bounded(
                connection, begin_first_epoch(connection, shard.owned, self.writer_id), STATEMENTS_TIMEOUT_S
            )
            if begun is None:
                return
            shard.owned = begun
        # An epoch that has no event yet may have died between Postgres and Redis: that is as good as fresh.
        fresh = fresh or (shard.owned.epoch == 1 and shard.owned.committed == 0)
        try:
            await self._store.open_shard(shard.term, shard.committed, self._settings.backlog_events_max, fresh=fresh)
            crash_point("own.opened")
            shard.opened_on = identity
            await bounded(connection, self._lender.settle(connection, shard), 10 * STATEMENTS_TIMEOUT_S)
        except Suspect as error:
            shard.opened_on = None
            log.error(
                "shard %02d: this Redis is not what the ledger knows (%s); it stays shut: recovery is needed",
                shard.owned.shard,
                error,
            )

    async def _connected(self) -> Any:
        if self._connection is None or self._connection.is_closed():
            self._connection = await open_connection(self._settings.database_url, "coupon-writer")
            await check_shards(self._connection, self._settings.shards)
        return self._connection
