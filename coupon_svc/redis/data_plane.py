"""The API's way to Redis: one verified connection that carries calls, one that hears how far the ledger is.

No operation is sent before the server was verified: its run_id and replid are those that the shard's owner certified. A
shard that is not certified, or that a reply calls `suspect`, is shut until it is certified again; requests for it
are refused with `recovering` and never with a wrong answer.

What was seen of a shard is kept here (coupon_svc/redis/shard_view.py): each reply and each message raises it before
anything else can run, so no caller can forget to.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Coroutine, Sequence
from time import monotonic
from typing import Any

from coupon_svc.domain.bounds import LEDGER_UNSEEN_MAX_MS
from coupon_svc.domain.clock import boot_s
from coupon_svc.domain.outcomes import Outcome, Refused
from coupon_svc.domain.reports import Report
from coupon_svc.domain.shards import book_shard
from coupon_svc.loops import keep_running
from coupon_svc.redis.connection import Connection, connect
from coupon_svc.redis.contract import Reply
from coupon_svc.redis.dispatcher import Dispatcher, Plane
from coupon_svc.redis.errors import NotSent, StoreError
from coupon_svc.redis.keys import ShardKeys, positions_channel
from coupon_svc.redis.listener import PositionListener
from coupon_svc.redis.scripts import Scripts
from coupon_svc.redis.server import drop_other_libraries, load_library, load_scripts
from coupon_svc.redis.shard_view import Seen, ShardView, ViewState
from coupon_svc.redis.verification import ServerReading, read_metas, read_server
from coupon_svc.redis.waiters import DurabilityWaiters

log = logging.getLogger(__name__)

VERIFY_EVERY_S = 1.0
TICK_S = 0.05
LEDGER_UNSEEN_MAX_S = LEDGER_UNSEEN_MAX_MS / 1000
"""A ledger that was not seen for so long is behind: operations refuse what would wait for it (lua/include/room.lua)."""
OWNER_UNHEARD_MAX_S = 15.0
"""A Redis to which no owner has spoken for so long may be one that another has replaced."""


class DataPlane:
    """Runs operations on the Redis at `url`. `start` it before use and `stop` it after."""

    def __init__(self, url: str, shards: int, scripts: Scripts) -> None:
        self._url = url
        self._shards = shards
        self._scripts = scripts
        self._dispatcher = Dispatcher(
            scripts, Plane(lambda: self._connection, self._load_again, self._doubt, self._suspect)
        )
        self._installation: str | None = None
        self._stranger: str | None = None
        self._joined = asyncio.Event()
        self.waiters = DurabilityWaiters(shards)
        self.views = [ShardView(shard, ShardKeys(shard, shards)) for shard in range(shards)]
        self._connection: Connection | None = None
        self._listener = PositionListener(url, self.on_position)
        self._verify_wanted = False
        self.refuses_writes = False
        """Redis answers, and takes no writes until it can write its file again."""
        self._early_until = 0.0
        self._tasks: list[asyncio.Task[None]] = []

    def join(self, installation: str) -> None:
        """From now on shards that are certified for this installation are opened. Its id comes from Postgres."""
        self._installation = installation
        self._joined.set()

    async def start(self) -> None:
        """Begin to connect; returns at once. Until a shard is certified its requests are refused."""
        loops = (self._keep_connected, self._keep_verified, self._keep_listening, self._tick)
        self._tasks = [asyncio.create_task(keep_running(loop)) for loop in loops]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._listener.close()
        if self._connection:
            self._connection.abort()

    # --- what is known

    @property
    def connected(self) -> bool:
        return self._connection is not None

    def view_of_book(self, book_id: str) -> ShardView:
        """The shard in which a book of this id lives, if there is one. Raises Refused(book_not_found) for what is no book's
        id."""
        shard = book_shard(book_id, self._shards)
        if shard is None:
            raise Refused(Outcome.BOOK_NOT_FOUND)
        return self.views[shard]

    def backlog(self, view: ShardView) -> int:
        """Events of the shard that the ledger had not, as far as this process knows."""
        epoch, committed = self.waiters.committed(view.shard)
        return max(0, view.seen.seq - committed) if epoch == view.epoch else 0

    # --- answering before the ledger knows

    def register_until(self, until_s: float) -> None:
        """Until then (by `boot_s`) this process is registered, and may answer before the ledger knows; 0.0: not at all."""
        self._early_until = until_s

    def may_answer_early(self, view: ShardView, epoch: int) -> bool:
        """Whether an answer of an `ack = redis` book may leave before the ledger knows its event, made in `epoch`."""
        return epoch >= view.epoch_min and boot_s() < self._early_until

    def epoch_began(self, shard: int, epoch: int, live: int) -> Report | None:
        """Postgres is in `epoch`; as `ShardView.epoch_began`. Returns what is to be reported of the older one."""
        view = self.views[shard]
        seen = view.epoch_began(epoch, live)
        if seen is None:
            return None
        return Report(shard, *seen, view.made_entries() if seen.epoch == view.epoch else [])

    def reports(self) -> list[Report]:
        """What is to be reported of each shard that was ever open, when this process ends."""
        return [Report(view.shard, *view.seen, view.made_entries()) for view in self.views if view.epoch]

    # --- running operations

    def call(
        self, name: str, view: ShardView, until: float = math.inf, /, **parameters: Any
    ) -> Coroutine[Any, Any, Reply]:
        """Run an operation in a shard, with its parameters by name (coupon_svc/redis/calls.py). It is sent before `until`
        (by the monotonic clock), or refused with store_unavailable.

        Returns its reply, whatever the outcome, with the fields that the header of the operation lists (lua/operations/), as
        Redis sent them: times and most numbers are texts. But `position` is (assigned, last), `holders` are Holdings, and
        `entry` is the EntryId of the event that the operation made. Raises Refused: recovering, store_unavailable,
        backlog_full (memory is out), or outcome_unknown when it was sent and nothing is known of it; for an operation that
        only reads that is store_unavailable, too. And internal_error, for a fault of ours.
        """
        return self._dispatcher.run(name, view, parameters, until)

    async def doubt(self, view: ShardView) -> None:
        """Keys of the shard are missing: let nobody decide anything there until its owner has recovered it."""
        self._doubt(view, "counts")

    def _doubt(self, view: ShardView, why: str) -> None:
        """Something is wrong with the shard, in a word of the reply `suspect`: let nobody decide anything there, and shut it
        here."""
        if view.state is ViewState.SUSPECT:
            return  # as the reply of another operation, or of another section, has said before
        if why == "counts":
            log.error("keys of shard %02d are missing from redis: it is to be recovered", view.shard)
            self._send_doubt(view, view.seen_seq)
        else:
            # Damage of another kind; or Redis may have gone back behind what was seen here. A process that has seen less
            # would not notice, so the shard is put in doubt for all. As of seq 0, since the fence refuses `doubt_shard`
            # itself with more than Redis has. In another epoch, on another server or with a torn meta this does nothing.
            self._send_doubt(view, 0)
        self._suspect(view)

    def _send_doubt(self, view: ShardView, seen_seq: int) -> None:
        """Nobody tells the owner: it finds the epoch changed when it writes next, within a second
        (coupon_svc/writer/showing.py). No reply is read, so the script is loaded each time: the server may have lost it.
        Should this fail, whatever finds the damage next says so again."""
        if self._connection is not None:
            script = self._scripts["doubt_shard"]
            command = script.pack(meta=view.keys.meta, epoch=view.epoch, seen_seq=seen_seq)
            with contextlib.suppress(NotSent):
                self._connection.submit(("SCRIPT", "LOAD", script.source), lambda _: None)
                self._connection.submit(command, lambda _: None)

    async def _load_again(self) -> None:
        """The server does not know our scripts: it may be another one. Verify it, and load only where a shard is open."""
        with contextlib.suppress(StoreError):
            if self._connection:
                await self.verify(self._connection)
                if any(view.is_open for view in self.views):
                    await self._load(self._connection)

    async def _load(self, connection: Connection) -> None:
        await load_scripts(connection, self._scripts)
        await load_library(connection, self._scripts.library)

    def _suspect(self, view: ShardView) -> None:
        view.suspect()
        self._verify_wanted = True

    # --- knowing whom one speaks to

    async def _keep_connected(self) -> None:
        first = True
        while True:
            connection = None
            try:
                connection = await connect(self._url, "coupon-api")
                await self.verify(connection)
                await self._load(connection)
                if first:  # once: two versions that did so each time would never end it
                    await drop_other_libraries(connection, self._scripts.library)
                    first = False
                self.use(connection)
                await connection.closed
            except StoreError as error:
                log.warning("redis cannot be used: %s", error)
            finally:
                self._connection = None
                if connection is not None:
                    connection.abort()  # one that was refused must not stay open beside the next
                for view in self.views:
                    view.disconnect()
            await asyncio.sleep(0.1)

    def use(self, connection: Connection) -> None:
        """Send over this connection from now on: its server was verified, and has our scripts."""
        self._connection = connection

    async def verify(self, connection: Connection) -> None:
        """Ask the server who it is, and open the shards that are certified for it; shut the others."""
        reading = await read_server(connection)
        self.refuses_writes = reading.refuses_writes
        # As of the question: a message may outrun the reply, and tell of what was made after it.
        seen = [view.seen for view in self.views]
        metas = await read_metas(connection, [view.keys for view in self.views])
        reading = reading._replace(metas=metas)
        gone_back = [view for view in self.views if self._judge(view, reading, seen[view.shard])]
        for view in gone_back:  # after the loop: awaiting in it would make what was read of the other shards stale
            self._send_doubt(view, 0)  # as of seq 0: the fence would refuse what was seen here

    def _judge(self, view: ShardView, reading: ServerReading, seen: Seen) -> bool:
        """Open or shut a shard by what was read. Returns whether Redis has gone back behind what was `seen`."""
        view.heard_of_ledger(reading.ledger_unseen_s(view.shard))
        certificate = reading.certificate(view.shard) if self._is_ours(reading, view.shard) else None
        if certificate is None:
            view.refuse()
            return False
        gone_back = certificate.epoch == seen.epoch and certificate.seq < seen.seq
        if gone_back:
            # Only this process knows: it has seen a higher seq. The owner compares Redis with the ledger, which may be
            # further behind still.
            log.error("shard %02d has gone back behind what was seen: it is to be recovered", view.shard)
        if reading.owner_unheard_s(view.shard) > OWNER_UNHEARD_MAX_S and boot_s() > self._early_until:
            view.refuse()  # cut off from Postgres, this process cannot learn that the shard lives on elsewhere
            return gone_back
        view.certify(certificate, seen)
        if view.is_open:
            view.forget(certificate.committed)
            self.waiters.advance(view.shard, view.epoch, certificate.committed)
        return gone_back

    def _is_ours(self, reading: ServerReading, shard: int) -> bool:
        """Whether the shard's keys are this installation's. Until Postgres has said which that is, none are."""
        meta = reading.metas[shard]
        if self._installation is None or meta is None:
            return False
        if meta.installation not in (None, self._installation, self._stranger):
            self._stranger = meta.installation  # told once, and not for every shard each second
            log.critical(
                "shard %02d in this Redis belongs to installation %s, and the database to installation %s: check"
                " COUPON_REDIS_URL and COUPON_DATABASE_URL",
                shard, meta.installation, self._installation,
            )  # fmt: skip
        return meta.installation == self._installation

    async def _tick(self) -> None:
        """End what waits too long, and see that positions are heard."""
        while True:
            await asyncio.sleep(TICK_S)
            self._listener.ping()
            self._dispatcher.refuse_late()
            if self.waiters.expire():
                self._verify_wanted = True

    async def _keep_verified(self) -> None:
        """Verify again: soon while a shard is shut or somebody waits for a position that should have been told by now,
        otherwise once a second."""
        verified_at = monotonic()
        while True:
            await asyncio.sleep(TICK_S)
            connection = self._connection
            if connection is None:
                continue
            soon = self._verify_wanted or not all(view.is_open for view in self.views)
            if soon or monotonic() - verified_at >= VERIFY_EVERY_S:
                self._verify_wanted = False
                try:
                    await self.verify(connection)
                except StoreError:
                    connection.abort()
                verified_at = monotonic()

    # --- hearing how far the ledger is

    async def _keep_listening(self) -> None:
        await self._joined.wait()
        assert self._installation is not None
        await self._listener.listen(positions_channel(self._installation))

    def on_position(self, shard: int, epoch: int, committed: int, tips: Sequence[str] = ()) -> None:
        """A message says what the ledger holds, and that is so whatever becomes of this Redis. It is no certificate: that an
        epoch is over is learnt from Postgres or a certified Redis alone."""
        view = self.views[shard]
        if epoch == view.epoch:
            # First: what this process makes from now on lies above what the ledger has, or its call is refused. An event
            # at a position that was committed before is another one: keys of a moment ago were put back.
            view.observe(epoch, committed)
            view.forget(committed)
            self.waiters.advance(shard, epoch, committed)
        elif epoch > view.epoch:
            self._verify_wanted = True
        self.waiters.hear(tips)  # after what it says of the shard: who waits goes on at once
