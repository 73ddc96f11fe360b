"""The writer: owns shards, and while it owns them persists their events, lends them codes and recovers them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import signal
from collections import Counter
from typing import Any

import uvloop

from coupon_svc.config import Settings
from coupon_svc.domain.events import is_event
from coupon_svc.ledger.database import LedgerUnavailable, bounded, open_connection
from coupon_svc.ledger.events import NotOwner
from coupon_svc.ledger.migrations import check_installation
from coupon_svc.ledger.processes import expired_processes, forget_processes, report_seen
from coupon_svc.ledger.recovery import HistoryForked, event_at, first_dead_letter, stopped_because, want_rebuild
from coupon_svc.ledger.shards import connection_name, owned_shards, release_shards, renew_writer, take_shards
from coupon_svc.loops import keep_running
from coupon_svc.store.owner import (
    CLOCKS_APART_MAX_MS,
    ClocksApart,
    OwnerStore,
    StoreLost,
    Suspect,
    clocks_apart,
    entry_digest,
)
from coupon_svc.store.scripts import Scripts
from coupon_svc.writer.clock import LedgerClock
from coupon_svc.writer.crash import crash_point
from coupon_svc.writer.lend import Lender
from coupon_svc.writer.persist import Persister
from coupon_svc.writer.recover import Recoverer
from coupon_svc.writer.shard import Shard
from coupon_svc.writer.upkeep import Upkeep

log = logging.getLogger(__name__)

RENEW_EVERY_S = 1.0
LOOK_EVERY_S = 0.05
STATEMENTS_TIMEOUT_S = 3.0
OPENED_AT_ONCE = 4

_CLOCK = "SELECT (extract(epoch FROM clock_timestamp()) * 1000)::bigint"


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
        self._clock = LedgerClock()
        self._persister = Persister(
            settings.database_url, self.writer_id, self._store, self._shards, self._lender.count_assigned, self._clock
        )
        self._recoverer = Recoverer(self.writer_id, self._store, settings.backlog_events_max)
        self._upkeep = Upkeep(settings.database_url, self.writer_id, self._shards)
        self._connections: dict[str, Any] = {}

    async def run(self, stop: asyncio.Event) -> None:
        """Work until `stop` is set; then hand the shards over, so that another writer need not wait."""
        parts = (
            self._keep_owning(),
            self._keep_open(),
            self._persister.run(),
            self._lender.run(),
            keep_running(self._upkeep.run),
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
            await asyncio.gather(*tasks, stopped, return_exceptions=True)
            with contextlib.suppress(LedgerUnavailable):
                connection = await self._connected("owning")
                await bounded(connection, release_shards(connection, self.writer_id), STATEMENTS_TIMEOUT_S)
            self._store.close()

    # --- owning

    async def _keep_owning(self) -> None:
        """Once a second: say that this writer lives, take what nobody owns, and show that the ledger is there."""
        while True:
            try:
                connection = await self._connected("owning")
                await bounded(connection, self._renew(connection), STATEMENTS_TIMEOUT_S)
                await self._show_alive(connection)
            except LedgerUnavailable as error:
                log.warning("postgres cannot be used: %s", error)
            except StoreLost as error:
                log.warning("redis cannot be used: %s", error)
            await asyncio.sleep(RENEW_EVERY_S)

    async def _renew(self, connection: Any) -> None:
        fair_share = await renew_writer(connection, self.writer_id)
        mine = {owned.shard: owned for owned in await owned_shards(connection, self.writer_id)}
        for lost in set(self._shards) - set(mine):
            log.warning("shard %02d has another owner now", lost)
            del self._shards[lost]
        for number, owned in mine.items():
            shard = self._shards.setdefault(number, Shard(owned))  # new when the reply to its taking was lost
            if owned.epoch > shard.owned.epoch:
                shard.opened_on = None  # somebody wants it recovered
        surplus = sorted(mine)[fair_share:]
        if surplus:
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

    async def _show_alive(self, connection: Any) -> None:
        await self._store.refresh_identity()
        self._clock.asked(await bounded(connection, connection.fetchval(_CLOCK), STATEMENTS_TIMEOUT_S))
        gone = await bounded(connection, expired_processes(connection), STATEMENTS_TIMEOUT_S)
        for shard in list(self._shards.values()):
            if shard.opened_on is None:
                continue
            if shard.opened_on != self._store.identity:
                shard.opened_on = None
                continue
            trim_seq, committed = shard.trim_seq(asyncio.get_running_loop().time()), shard.committed
            try:
                seq = await self._store.publish_position(
                    shard.term, committed, "seen",
                    entry=shard.entry, ledger_ms=self._clock.now_ms(), trim_seq=trim_seq,
                )  # fmt: skip
            except Suspect as error:
                log.warning("shard %02d is suspect: %s", shard.owned.shard, error)
                shard.clocks_were_apart = isinstance(error, ClocksApart)
                shard.opened_on = None
                continue
            if seq > committed and not await self._follows(shard, committed):
                log.error("shard %02d is suspect: event %d is not in the stream", shard.owned.shard, committed + 1)
                shard.opened_on = None
                continue
            owned = shard.owned  # as it is now: a recovery may come between two reports
            for process_id, seen in shard.answered_by_gone(gone, seq):
                work = report_seen(connection, process_id, [(owned.shard, owned.epoch, seen)])
                await bounded(connection, work, STATEMENTS_TIMEOUT_S)
        if gone:
            await bounded(connection, forget_processes(connection), STATEMENTS_TIMEOUT_S)

    # --- opening

    async def _keep_open(self) -> None:
        """Open every owned shard that is shut: take over what is in order, recover what is not. Several at once, each on a
        connection of its own: one that has to wait holds up no other. What was tried last is tried again last."""
        free = [f"opening {number}" for number in range(OPENED_AT_ONCE)]
        opening: set[int] = set()
        tried = Counter[int]()

        async def open_one(shard: Shard, name: str) -> None:
            number = shard.owned.shard
            try:
                await self._try_open(shard, name)
            finally:
                opening.remove(number)
                free.append(name)

        async with asyncio.TaskGroup() as tasks:
            while True:
                for number in sorted(set(self._shards) - opening, key=tried.__getitem__):
                    shard = self._shards[number]
                    if not free or shard.opened_on is not None or shard.stopped:
                        continue
                    tried[number] = max(tried.values(), default=0) + 1
                    opening.add(number)
                    tasks.create_task(open_one(shard, free.pop()))
                await asyncio.sleep(LOOK_EVERY_S)

    async def _try_open(self, shard: Shard, name: str) -> None:
        try:
            await self._open(shard, await self._connected(name))
        except (LedgerUnavailable, StoreLost) as error:
            log.warning("shard %02d has to wait: %s", shard.owned.shard, error)
            await asyncio.sleep(0.2)
        except ClocksApart:
            await asyncio.sleep(0.2)
        except (Suspect, NotOwner):
            log.warning("shard %02d has another owner", shard.owned.shard)
            await asyncio.sleep(0.2)
        except HistoryForked as error:
            log.critical("shard %02d is stopped: %s", shard.owned.shard, error)
            shard.stopped = True

    async def _open(self, shard: Shard, connection: Any) -> None:
        for owned in await bounded(connection, owned_shards(connection, self.writer_id), STATEMENTS_TIMEOUT_S):
            if owned.shard == shard.owned.shard:
                # As the ledger has it, whatever we thought.
                shard.owned, shard.committed, shard.chain, shard.entry = owned, owned.committed, owned.chain, ""
        identity = await self._store.connect()
        await self._compare_clocks(connection, shard)
        if reason := await bounded(connection, stopped_because(connection, shard.owned.shard), STATEMENTS_TIMEOUT_S):
            await self._store.shut_shard(shard.term)
            raise HistoryForked(reason)
        if shard.wants_recovery or not await self._in_order(shard, connection):
            shard.begin_epoch(await self._recoverer.recover(connection, shard.owned))
        try:
            await self._lender.settle(connection, shard)
        except Suspect:
            shard.wants_recovery = True  # a book is gone, or has no count of its redemptions
            raise
        shard.opened_on = identity

    async def _compare_clocks(self, connection: Any, shard: Shard) -> None:
        """Raises ClocksApart, with the shard shut, while Redis's clock cannot be trusted. What it dated meanwhile (ends of
        idempotency records and locks) is not kept."""
        ledger_ms: int = await bounded(connection, connection.fetchval(_CLOCK), STATEMENTS_TIMEOUT_S)
        apart_ms = await self._store.clock_ms() - ledger_ms
        apart = abs(apart_ms) > CLOCKS_APART_MAX_MS
        if apart or shard.clocks_were_apart:  # or they were a moment ago, and are together again
            await bounded(connection, want_rebuild(connection, shard.owned.shard), STATEMENTS_TIMEOUT_S)
            shard.wants_recovery = True
        if apart:
            if not shard.clocks_were_apart:
                log.critical("shard %02d is shut: %s", shard.owned.shard, clocks_apart(apart_ms))
            shard.clocks_were_apart = True
            await self._store.shut_shard(shard.term)
            raise ClocksApart(clocks_apart(apart_ms))

    async def _in_order(self, shard: Shard, connection: Any) -> bool:
        """Whether Redis is as the shard's last owner certified it, holds every event that the ledger has not, and has made
        none that the ledger could not take, and whether the last one that the ledger has is the one in the stream."""
        dead = first_dead_letter(connection, shard.owned.shard, shard.owned.epoch)
        if await bounded(connection, dead, STATEMENTS_TIMEOUT_S) is not None:
            return False
        try:
            seq = await self._store.open_shard(shard.term, shard.committed, self._settings.backlog_events_max)
        except Suspect:
            return False
        owned = shard.owned
        entry = await self._store.entry_at(owned.shard, owned.epoch, shard.committed)
        if entry is not None:
            work = event_at(connection, owned.shard, owned.epoch, shard.committed)
            if not is_event(entry, await bounded(connection, work, STATEMENTS_TIMEOUT_S)):
                log.error(
                    "shard %02d: the stream has another event at %d-%d", owned.shard, owned.epoch, shard.committed
                )
                return False
            shard.entry = entry_digest(entry)
        return await self._follows(shard, shard.committed, some=seq > shard.committed)

    async def _follows(self, shard: Shard, committed: int, *, some: bool = True) -> bool:
        """Whether the event after this one is in the stream, or, unless there must be `some`, none at all. A trimmed one
        shows only to who looks, or with the next; an entry by somebody's hand lets no script add its own any more."""
        following = await self._store.stream_after(shard.owned.shard, shard.owned.epoch, committed, count=1)
        return following[0][0] == f"{shard.owned.epoch}-{committed + 1}" if following else not some

    async def _connected(self, name: str) -> Any:
        connection = self._connections.get(name)
        if connection is None or connection.is_closed():
            connection = await open_connection(self._settings.database_url, connection_name(self.writer_id))
            work = check_installation(connection, self._settings.shards)
            self._store.installation = await bounded(connection, work, STATEMENTS_TIMEOUT_S)
            self._connections[name] = connection
        return connection


def run_writer(settings: Settings) -> None:
    """Run a writer until SIGTERM or SIGINT; then hand its shards over and return."""

    async def main() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        await Writer(settings).run(stop)

    uvloop.run(main())
