"""Which shards this writer owns: it renews its row, takes its share, and gives all up while it cannot reach Redis."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time

from coupon_svc.postgres.database import LedgerConnection, LedgerSession
from coupon_svc.postgres.errors import LedgerUnavailable
from coupon_svc.postgres.liveness import Watch
from coupon_svc.postgres.shards import (
    WRITER_TTL_S,
    drop_writer,
    fair_share,
    leave,
    owned_shards,
    release_shards,
    renew_writer,
    take_shards,
    writer_beats,
)
from coupon_svc.redis.control import ShardControl
from coupon_svc.redis.errors import StoreError
from coupon_svc.writer.crash import crash_point
from coupon_svc.writer.shard import Shard

log = logging.getLogger(__name__)

RENEW_EVERY_S = 1.0
TAKE_AGAIN_S = 0.1
OUT_OF_TOUCH_S = 3.0
"""A writer that has not reached Redis for so long gives its shards up. Less than WRITER_TTL_S: others need not wait for
that."""
REACH_AGAIN_S = 0.2
STATEMENTS_TIMEOUT_S = 3.0


class Owning:
    """Adds shards to `shards` and removes them; no other part of the writer does."""

    def __init__(self, session: LedgerSession, writer_id: str, store: ShardControl, shards: dict[int, Shard]) -> None:
        self.session = session
        self._writer_id = writer_id
        self._store = store
        self._shards = shards
        self._writers = Watch(WRITER_TTL_S)
        self._reached_at = -OUT_OF_TOUCH_S
        """By the loop's clock, when Redis answered last."""
        self._back_in_touch = asyncio.Event()
        self._holds = False
        """Whether Postgres may have shards, or a row, of this writer."""

    async def keep_in_touch(self) -> None:
        """Once a second: ask Redis who it is. A writer that cannot reach it can do nothing for a shard."""
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

    async def keep_owning(self) -> None:
        """Once a second: say that this writer lives, and take what nobody owns; give all of it up while Redis cannot be
        reached. Nothing here waits for Redis or for the row of a shard: the renewal would come late."""
        while True:
            pause_s = RENEW_EVERY_S
            self._back_in_touch.clear()
            try:
                async with self.session.work(STATEMENTS_TIMEOUT_S) as connection:
                    if not self._in_touch():
                        await self._stand_back(connection)
                    elif not await self.renew(connection):
                        pause_s = TAKE_AGAIN_S
            except LedgerUnavailable as error:
                log.warning("postgres cannot be used: %s", error)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._back_in_touch.wait()

    async def leave(self) -> None:
        """Hand all shards over: another writer need not wait until this one counts as gone. Raises LedgerUnavailable."""
        async with self.session.work(STATEMENTS_TIMEOUT_S) as connection:
            await leave(connection, self._writer_id)

    async def _stand_back(self, connection: LedgerConnection) -> None:
        """Give everything up, once: another writer may reach Redis. Raises LedgerUnavailable."""
        if self._shards:
            log.error("redis cannot be reached: %d shards are given up", len(self._shards))
            self._shards.clear()
        if self._holds:
            await leave(connection, self._writer_id)
            self._holds = False

    async def renew(self, connection: LedgerConnection) -> bool:
        """Say that this writer lives, and own its share. False when rows of shards could not be had: try again soon."""
        self._holds = True
        await renew_writer(connection, self._writer_id)
        await self._count_writers(connection)
        share = await fair_share(connection)
        owned = await owned_shards(connection, self._writer_id)
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
                shard.superseded()
        if surplus:
            return await release_shards(connection, self._writer_id, surplus)
        if len(kept) == share:
            return True
        taken, more = await take_shards(connection, self._writer_id, share - len(kept))
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
            if writer_id != self._writer_id and await drop_writer(connection, writer_id, beat):
                log.warning("writer %s is gone", writer_id)
