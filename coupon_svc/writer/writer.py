"""The writer: owns shards, and while it owns them persists their events, lends them codes and recovers them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import signal
import time
from collections import Counter

import uvloop

from coupon_svc.config import Settings
from coupon_svc.domain.bounds import CLOCKS_APART_MAX_MS
from coupon_svc.domain.errors import error_location
from coupon_svc.domain.events import is_event
from coupon_svc.loops import keep_running
from coupon_svc.postgres.database import LedgerConnection, LedgerSession, within
from coupon_svc.postgres.errors import HistoryForked, LedgerUnavailable, NotOwner
from coupon_svc.postgres.liveness import Watch
from coupon_svc.postgres.migrations import check_installation
from coupon_svc.postgres.processes import (
    PROCESS_TTL_S,
    count_as_gone,
    forget_processes,
    gone_processes,
    process_beats,
    report_seen,
)
from coupon_svc.postgres.recovery import event_at, first_dead_letter, stop_shard, stopped_because, want_rebuild
from coupon_svc.postgres.shards import (
    WRITER_TTL_S,
    OwnedShard,
    connection_name,
    drop_writer,
    fair_share,
    leave,
    owned_shards,
    release_shards,
    renew_writer,
    take_shards,
    writer_beats,
)
from coupon_svc.redis.control import ShardControl, Term, clocks_apart, entry_digest
from coupon_svc.redis.errors import ClocksApart, Fenced, ShardNotUsable, StoreError
from coupon_svc.redis.meta import ShardMeta
from coupon_svc.redis.scripts import Scripts
from coupon_svc.writer.clock import LedgerClock
from coupon_svc.writer.crash import crash_point
from coupon_svc.writer.lend import Lender
from coupon_svc.writer.persist import Persister
from coupon_svc.writer.recover import Recoverer
from coupon_svc.writer.shard import Shard
from coupon_svc.writer.upkeep import Upkeep

log = logging.getLogger(__name__)

RENEW_EVERY_S = 1.0
TAKE_AGAIN_S = 0.1
OUT_OF_TOUCH_S = 3.0
"""Who has not reached Redis for so long gives its shards up. Less than WRITER_TTL_S: others need not wait for that."""
REACH_AGAIN_S = 0.2
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
        self._store = ShardControl(settings.redis_url, settings.shards, Scripts())
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
        self._owning, self._watching, self._showing = self._session(), self._session(), self._session()
        self._opening = [self._session() for _ in range(OPENED_AT_ONCE)]
        self._writers = Watch(WRITER_TTL_S)
        self._processes = Watch(PROCESS_TTL_S)
        self._gone: list[str] = []
        """API processes that are gone."""
        self._reached_at = -OUT_OF_TOUCH_S
        """By the loop's clock, when Redis answered last."""
        self._back_in_touch = asyncio.Event()
        self._holds = False
        """Whether Postgres may have shards, or a row, of this writer."""

    async def run(self, stop: asyncio.Event) -> None:
        """Work until `stop` is set; then hand the shards over, so that another writer need not wait."""
        log.info("writer %s begins", self.writer_id)
        parts = (
            self._keep_in_touch(),
            self._keep_owning(),
            self._keep_watching(),
            self._keep_shown(),
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
            self._close_sessions()  # a statement that was cancelled would wait for a server that may be stopped
            await asyncio.gather(*tasks, stopped, return_exceptions=True)
            with contextlib.suppress(LedgerUnavailable):
                async with self._owning.work(STATEMENTS_TIMEOUT_S) as connection:
                    await leave(connection, self.writer_id)
            self.close()

    def close(self) -> None:
        """End every connection at once."""
        self._close_sessions()
        self._store.close()

    def _close_sessions(self) -> None:
        parts = (self._persister.session, self._lender.session, self._upkeep.session)
        for session in (self._owning, self._watching, self._showing, *self._opening, *parts):
            session.close()

    def _session(self) -> LedgerSession:
        return LedgerSession(
            self._settings.database_url, connection_name(self.writer_id), on_open=self._check_installation
        )

    async def _check_installation(self, connection: LedgerConnection) -> None:
        self._store.installation = await check_installation(connection, self._settings.shards)

    # --- owning

    async def _keep_in_touch(self) -> None:
        """Once a second: ask Redis who it is. Who cannot reach it can do nothing for a shard."""
        while True:
            if not self._store.installation:  # Postgres has not said yet whose keys are ours
                await asyncio.sleep(REACH_AGAIN_S)
                continue
            try:
                await self._store.refresh_identity()
            except StoreError as error:
                log.warning("redis cannot be used: %s", error)
                await asyncio.sleep(REACH_AGAIN_S)
                continue
            if not self._in_touch():
                self._back_in_touch.set()
            self._reached_at = asyncio.get_running_loop().time()
            await asyncio.sleep(RENEW_EVERY_S)

    def _in_touch(self) -> bool:
        return asyncio.get_running_loop().time() - self._reached_at < OUT_OF_TOUCH_S

    async def _keep_owning(self) -> None:
        """Once a second: say that this writer lives, and take what nobody owns; give all of it up while Redis cannot be
        reached. Nothing here waits for Redis or for the row of a shard: the renewal would come late."""
        while True:
            pause_s = RENEW_EVERY_S
            self._back_in_touch.clear()
            try:
                async with self._owning.work(STATEMENTS_TIMEOUT_S) as connection:
                    if not self._in_touch():
                        await self._stand_back(connection)
                    elif not await self._renew(connection):
                        pause_s = TAKE_AGAIN_S
            except LedgerUnavailable as error:
                log.warning("postgres cannot be used: %s", error)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._back_in_touch.wait()

    async def _stand_back(self, connection: LedgerConnection) -> None:
        """Give everything up, once: another writer may reach Redis. Raises LedgerUnavailable."""
        if self._shards:
            log.error("redis cannot be reached: %d shards are given up", len(self._shards))
            self._shards.clear()
        if self._holds:
            await leave(connection, self.writer_id)
            self._holds = False

    async def _renew(self, connection: LedgerConnection) -> bool:
        """Say that this writer lives, and own its share. False when rows of shards could not be had: try again soon."""
        self._holds = True
        await renew_writer(connection, self.writer_id)
        await self._count_writers(connection)
        share = await fair_share(connection)
        owned = await owned_shards(connection, self.writer_id)
        kept, surplus = {one.shard: one for one in owned[:share]}, [one.shard for one in owned[share:]]
        for number in set(self._shards) - set(kept):
            if number not in surplus:
                log.warning("shard %02d has another owner now", number)
            del self._shards[number]
        for number, one in kept.items():
            shard = self._shards.get(number)
            if shard is None or shard.owned.generation != one.generation:
                self._shards[number] = Shard(one)  # the reply to its taking was lost, or an operator has adopted it
            elif one.epoch > shard.owned.epoch:
                shard.opened_on, shard.stopped = None, False  # somebody wants it recovered
        if surplus:
            return await release_shards(connection, self.writer_id, surplus)
        if len(kept) == share:
            return True
        taken, more = await take_shards(connection, self.writer_id, share - len(kept))
        for one in taken:
            self._shards[one.shard] = Shard(one)
        if taken:
            log.info("took %d shards", len(taken))
            crash_point("own.taken")
        return not more

    async def _count_writers(self, connection: LedgerConnection) -> None:
        """Count writers as gone that have not renewed their row for long enough."""
        asked_at = time.monotonic()
        beats = await writer_beats(connection)
        for writer_id, beat in self._writers.look(beats, asked_at, time.monotonic()):
            if writer_id != self.writer_id and await drop_writer(connection, writer_id, beat):
                log.warning("writer %s is gone", writer_id)

    # --- watching and showing

    async def _keep_watching(self) -> None:
        """Once a second: count API processes as gone that have not renewed their row for long enough. Apart from the rest,
        so that a lock on their rows holds up nothing else."""
        while True:
            try:
                async with self._watching.work(STATEMENTS_TIMEOUT_S) as connection:
                    await self._count_processes(connection)
            except LedgerUnavailable as error:
                log.warning("postgres cannot be used: %s", error)
            await asyncio.sleep(RENEW_EVERY_S)

    async def _count_processes(self, connection: LedgerConnection) -> None:
        asked_at = time.monotonic()
        beats = await process_beats(connection)
        for process_id, beat in self._processes.look(beats, asked_at, time.monotonic()):
            if await count_as_gone(connection, process_id, beat):
                log.warning("API process %s is gone", process_id)
        if self._gone:
            await forget_processes(connection)
        self._gone = await gone_processes(connection)

    async def _keep_shown(self) -> None:
        """Once a second: show Redis that the ledger is there, and report for API processes that are gone."""
        while True:
            try:
                await self._show_alive(await self._showing.connection())
            except LedgerUnavailable as error:
                log.warning("postgres cannot be used: %s", error)
                await self._persister.show_away()  # and that there is an owner: reads go on
            except StoreError as error:
                log.warning("redis cannot be used: %s", error)
            await asyncio.sleep(RENEW_EVERY_S)

    async def _show_alive(self, connection: LedgerConnection) -> None:
        async with within(connection, STATEMENTS_TIMEOUT_S):
            self._clock.asked(await connection.fetchval(_CLOCK))
        await self._store.connect()
        gone = self._gone  # as found before any seq is read: they can have seen nothing beyond it
        for shard in list(self._shards.values()):
            if shard.opened_on is None:
                continue
            try:
                await self._show_shard(connection, shard, gone)
            except (LedgerUnavailable, StoreError):
                raise
            except Exception as error:
                log.error(
                    "shard %02d is suspect: %s at %s", shard.owned.shard, type(error).__name__, error_location(error)
                )
                shard.opened_on = None

    async def _show_shard(self, connection: LedgerConnection, shard: Shard, gone: list[str]) -> None:
        """Tell one shard that the ledger is there, and report for who is gone. Raises StoreError, LedgerUnavailable."""
        if shard.opened_on != self._store.identity:
            shard.opened_on = None
            return
        trim_seq, committed = shard.trim_seq(asyncio.get_running_loop().time()), shard.committed
        try:
            seq = await self._store.publish_position(
                shard.term, committed, "seen",
                entry=shard.entry, ledger_ms=self._clock.now_ms(), trim_seq=trim_seq,
            )  # fmt: skip
        except ShardNotUsable as error:
            log.warning("shard %02d is suspect: %s", shard.owned.shard, error)
            shard.clocks_were_apart = isinstance(error, ClocksApart)
            shard.opened_on = None
            return
        if seq > committed and not await self._follows(shard, committed):
            log.error("shard %02d is suspect: event %d is not in the stream", shard.owned.shard, committed + 1)
            shard.opened_on = None
            return
        owned = shard.owned  # as it is now: a recovery may come between two reports
        for process_id, seen in shard.answered_by_gone(gone, seq):
            async with within(connection, STATEMENTS_TIMEOUT_S):
                await report_seen(connection, process_id, [(owned.shard, owned.epoch, seen)])

    # --- opening

    async def _keep_open(self) -> None:
        """Open every owned shard that is shut: take over what is in order, recover what is not. Several at once, each on a
        connection of its own: one that has to wait holds up no other. What was tried last is tried again last."""
        free = list(self._opening)
        opening: set[int] = set()
        tried = Counter[int]()

        async def open_one(shard: Shard, session: LedgerSession) -> None:
            number = shard.owned.shard
            try:
                await self._try_open(shard, session)
            finally:
                opening.remove(number)
                free.append(session)

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

    async def _try_open(self, shard: Shard, session: LedgerSession) -> None:
        """Open one shard, or say why it has to wait. Whatever goes wrong with it holds up no other."""
        number = shard.owned.shard
        try:
            await self._open(shard, await session.connection())
            return
        except (LedgerUnavailable, StoreError) as error:
            log.warning("shard %02d has to wait: %s", number, error)
        except (Fenced, NotOwner):
            log.warning("shard %02d has another owner", number)
        except ClocksApart:
            pass  # it was told already
        except ShardNotUsable as error:
            log.warning("shard %02d is suspect, and to be recovered: %s", number, error)
            shard.wants_recovery = True
        except HistoryForked as error:
            log.critical("shard %02d is stopped: %s", number, error)
            shard.stopped = True
            return
        except Exception as error:
            log.error("shard %02d cannot be opened: %s at %s", number, type(error).__name__, error_location(error))
            shard.wants_recovery = True
        await asyncio.sleep(0.2)

    async def _open(self, shard: Shard, connection: LedgerConnection) -> None:
        number = shard.owned.shard
        identity = await self._store.connect()
        # First what Redis knows, then the ledger: a generation that another writer drew meanwhile is in both.
        meta = await self._store.read_meta(number)
        async with within(connection, STATEMENTS_TIMEOUT_S):
            mine = await owned_shards(connection, self.writer_id)
            reason = await stopped_because(connection, number)
        owned = next((one for one in mine if one.shard == number), None)
        if owned is None:
            raise NotOwner
        # As the ledger has it, whatever we thought.
        shard.owned, shard.committed, shard.chain, shard.entry = owned, owned.committed, owned.chain, ""
        if reason is None and (reason := went_back(owned, meta)):
            async with within(connection, STATEMENTS_TIMEOUT_S):
                await stop_shard(connection, number, reason)
        if reason is not None:
            epoch, generation = max(owned.epoch, meta.newest_epoch), max(owned.generation, meta.generation or 0)
            await self._store.shut_shard(Term(number, epoch, generation))
            raise HistoryForked(reason)
        await self._compare_clocks(connection, shard)
        if shard.wants_recovery or not await self._in_order(shard, connection):
            shard.begin_epoch(await self._recoverer.recover(connection, shard.owned))
        await self._lender.settle(connection, shard)
        shard.opened_on = identity

    async def _compare_clocks(self, connection: LedgerConnection, shard: Shard) -> None:
        """Raises ClocksApart, with the shard shut, while Redis's clock cannot be trusted. What it dated meanwhile (ends of
        idempotency records and locks) is not kept."""
        async with within(connection, STATEMENTS_TIMEOUT_S):
            ledger_ms: int = await connection.fetchval(_CLOCK)
        apart_ms = await self._store.clock_ms() - ledger_ms
        apart = abs(apart_ms) > CLOCKS_APART_MAX_MS
        if apart or shard.clocks_were_apart:  # or they were a moment ago, and are together again
            async with within(connection, STATEMENTS_TIMEOUT_S):
                await want_rebuild(connection, shard.owned.shard)
            shard.wants_recovery = True
        if apart:
            if not shard.clocks_were_apart:
                log.critical("shard %02d is shut: %s", shard.owned.shard, clocks_apart(apart_ms))
            shard.clocks_were_apart = True
            await self._store.shut_shard(shard.term)
            raise ClocksApart(clocks_apart(apart_ms))

    async def _in_order(self, shard: Shard, connection: LedgerConnection) -> bool:
        """Whether Redis is as the shard's last owner certified it, holds every event that the ledger has not, and has made
        none that the ledger could not take, and whether the last one that the ledger has is the one in the stream."""
        async with within(connection, STATEMENTS_TIMEOUT_S):
            if await first_dead_letter(connection, shard.owned.shard, shard.owned.epoch) is not None:
                return False
        try:
            seq = await self._store.open_shard(shard.term, shard.committed, self._settings.backlog_events_max)
        except ShardNotUsable:
            return False
        owned = shard.owned
        entry = await self._store.entry_at(owned.shard, owned.epoch, shard.committed)
        if entry is not None:
            async with within(connection, STATEMENTS_TIMEOUT_S):
                recorded = await event_at(connection, owned.shard, owned.epoch, shard.committed)
            if not is_event(entry, recorded):
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


def went_back(owned: OwnedShard, meta: ShardMeta) -> str | None:
    """In words, when Redis knows of a later owner or recovery than the ledger, read after it, has ever had."""
    if (meta.generation or 0) > owned.generation:
        return (
            f"redis knows of generation {meta.generation} of the shard's owners, the ledger of {owned.generation}:"
            " it went back"
        )
    if meta.newest_epoch > owned.epoch:
        return f"redis knows of epoch {meta.newest_epoch}, the ledger was in {owned.epoch}: it went back"
    return None


def run_writer(settings: Settings) -> None:
    """Run a writer until SIGTERM or SIGINT; then hand its shards over and return."""

    async def main() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        await Writer(settings).run(stop)

    uvloop.run(main())
