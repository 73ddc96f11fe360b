"""The API's way to Redis: one verified connection that runs scripts, one that hears how far the ledger is.

No script runs before the server was verified: its run_id and replid are those that the shard's owner certified. A
shard that is not certified, or whose script answers `suspect`, is shut until it is certified again; requests for it
are refused with `recovering` and never with a wrong answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Sequence

from coupon_svc.domain.clock import boot_s
from coupon_svc.domain.outcomes import Outcome, Refused
from coupon_svc.loops import keep_running
from coupon_svc.redis.connection import Connection, Reply, connect, replies_within
from coupon_svc.redis.errors import NotSent, OutcomeUnknown, ReplyError, StoreError
from coupon_svc.redis.keys import ShardKeys, positions_channel
from coupon_svc.redis.meta import META_FIELDS, ShardMeta, parse_meta
from coupon_svc.redis.positions import Positions
from coupon_svc.redis.scripts import Scripts
from coupon_svc.redis.server import judge, load_scripts, read_info, refuses_writes

log = logging.getLogger(__name__)

REPLY_TIMEOUT_S = 2.0
VERIFY_EVERY_S = 1.0
TICK_S = 0.05
PING_EVERY_S = 1.0
LEDGER_UNSEEN_MAX_S = 3.0
"""A ledger that was not seen for so long is behind: the scripts refuse what would wait for it (lua/include/room.lua)."""
OWNER_UNHEARD_MAX_S = 15.0
"""A Redis to which no owner has spoken for so long may be one that another has replaced."""


class ShardView:
    """What this process knows of a shard: the epoch it is certified in, and the highest seq it has seen of it."""

    __slots__ = ("backlog_max", "certified", "epoch", "epoch_min", "keys", "ledger_unseen_s", "seen_seq")

    def __init__(self, keys: ShardKeys) -> None:
        self.keys = keys
        self.certified = False
        self.epoch = 0
        self.epoch_min = 0
        """Older epochs are over, whatever a Redis says: the ledger has begun this one."""
        self.seen_seq = 0
        self.backlog_max = 0
        self.ledger_unseen_s = math.inf
        """How long ago the ledger was seen last, by Redis's clock and when this process asked last."""

    def enter(self, epoch: int) -> None:
        """Go on in a newer epoch."""
        self.epoch, self.seen_seq = epoch, 0


class Store:
    """Runs scripts on the Redis at `url`. `start` it before use and `stop` it after."""

    def __init__(self, url: str, shards: int, positions: Positions, scripts: Scripts) -> None:
        self._url = url
        self._scripts = scripts
        self._installation: str | None = None
        self._stranger: str | None = None
        self._joined = asyncio.Event()
        self.positions = positions
        self.views = [ShardView(ShardKeys(shard, shards)) for shard in range(shards)]
        self._connection: Connection | None = None
        self._listener: Connection | None = None
        self._pinged_at = 0.0
        self._verify_wanted = False
        self.refuses_writes = False
        """Redis answers, and takes no writes until it can write its file again."""
        self.answer_early_until = 0.0
        """Until then (by `boot_s`) this process is registered, and may answer before the ledger knows."""
        self._tasks: list[asyncio.Task[None]] = []

    def join(self, installation: str) -> None:
        """From now on shards that are certified for this installation are opened. Its id comes from Postgres."""
        self._installation = installation
        self._joined.set()

    async def start(self) -> None:
        """Begin to connect; returns at once. Until a shard is certified its requests are refused."""
        loops = (self._keep_connected, self._keep_listening, self._watch)
        self._tasks = [asyncio.create_task(keep_running(loop)) for loop in loops]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for connection in (self._connection, self._listener):
            if connection:
                connection.abort()

    @property
    def connected(self) -> bool:
        return self._connection is not None

    def backlog(self, shard: int) -> int:
        """Events of the shard that the ledger had not, as far as this process knows."""
        view = self.views[shard]
        epoch, committed = self.positions.committed(shard)
        return max(0, view.seen_seq - committed) if epoch == view.epoch else 0

    def may_answer_early(self, view: ShardView, epoch: int) -> bool:
        """Whether an answer of an `ack = redis` book may leave before the ledger knows its event, made in `epoch`."""
        return epoch >= view.epoch_min and boot_s() < self.answer_early_until

    def end_epochs(self, shard: int, epoch: int, live: int) -> list[tuple[int, int]]:
        """The ledger is in `epoch`: nothing of an older one is answered early from now on. `live` is the epoch in which
        Redis decided last and which is not settled, 0 for none: the only one about which a recovery asks.

        Returns (epoch, highest seq seen) of what is to be reported: `live`, once it is over.
        """
        view = self.views[shard]
        if epoch <= view.epoch_min:
            return []
        view.epoch_min = epoch
        if view.epoch < epoch:
            view.certified = False
        # No newer epoch was entered than `live`: the next one is certified when this one is settled.
        return [(live, view.seen_seq if view.epoch == live else 0)] if 0 < live < epoch else []

    # --- running scripts

    async def run(
        self, name: str, shard: int, keys: Sequence[str], args: Sequence[str | int], *, sure: bool = False
    ) -> Reply:
        """Run a script in a shard: `keys` follow the shard's meta, `args` follow epoch and seen seq.

        Returns the reply, a list that begins with its outcome word. Raises Refused: recovering, store_unavailable,
        backlog_full (memory is out), or outcome_unknown when the script was sent and nothing came back; with `sure`
        (a script that only reads) that is store_unavailable, too.
        """
        view = self.views[shard]
        script = self._scripts[name]
        for _ in range(2):  # a second time only after NOSCRIPT, which is the promise that nothing ran
            if self._connection is None:
                raise Refused(Outcome.STORE_UNAVAILABLE)
            if not view.certified:
                raise Refused(Outcome.RECOVERING)
            epoch = view.epoch
            try:
                reply = await self._connection.send(
                    "EVALSHA", script.sha, len(keys) + 1, view.keys.meta, *keys, epoch, view.seen_seq, *args
                )
            except NotSent:
                raise Refused(Outcome.STORE_UNAVAILABLE) from None
            except OutcomeUnknown:
                raise Refused(Outcome.STORE_UNAVAILABLE if sure else Outcome.OUTCOME_UNKNOWN) from None
            if not isinstance(reply, ReplyError):
                if reply[0] == "suspect":
                    if reply[1:] == ["counts"]:
                        await self.doubt(shard)
                    else:
                        # If Redis went back behind what was seen here, a process that saw nothing must not be believed
                        # for another moment. In any other epoch, history or state this does nothing.
                        await self._doubt(shard, 0)
                    self._suspect(view, shard)
                    raise Refused(Outcome.RECOVERING)
                if epoch != view.epoch:  # it was over before we came to read the reply, which says nothing any more
                    raise Refused(Outcome.RECOVERING if sure else Outcome.OUTCOME_UNKNOWN)
                return reply
            await self._explain(reply, view, shard)
        raise Refused(Outcome.RECOVERING)

    async def _explain(self, error: ReplyError, view: ShardView, shard: int) -> None:
        """Turn an error reply into a refusal; returns only when the script is loaded now and may be sent again."""
        word = error.word
        if word == "NOSCRIPT":
            with contextlib.suppress(StoreError):
                if self._connection:
                    await self._verify(self._connection)
                    if view.certified:
                        await load_scripts(self._connection, self._scripts)
            return
        if word == "OOM":
            raise Refused(Outcome.BACKLOG_FULL)
        if word in ("READONLY", "MASTERDOWN"):
            self._suspect(view, shard)
            raise Refused(Outcome.RECOVERING)
        if word in ("LOADING", "BUSY", "MISCONF", "NOREPLICAS", "CLUSTERDOWN", "TRYAGAIN"):
            raise Refused(Outcome.STORE_UNAVAILABLE)
        log.error("a script failed in shard %02d: %s", shard, word)
        raise Refused(Outcome.INTERNAL_ERROR)

    async def doubt(self, shard: int) -> None:
        """Keys of the shard are missing: let nobody decide anything there until its owner has recovered it."""
        log.error("keys of shard %02d are missing from redis: it is to be recovered", shard)
        await self._doubt(shard, self.views[shard].seen_seq)

    async def _doubt(self, shard: int, seen_seq: int) -> None:
        view = self.views[shard]
        if self._connection is not None:
            with contextlib.suppress(StoreError):
                script = self._scripts["doubt_shard"]
                await self._connection.send("EVALSHA", script.sha, 1, view.keys.meta, view.epoch, seen_seq)

    def _suspect(self, view: ShardView, shard: int) -> None:
        if view.certified:
            log.warning("shard %02d is suspect; it is shut until its owner has certified it again", shard)
        view.certified = False
        self._verify_wanted = True

    # --- knowing whom one speaks to

    async def _keep_connected(self) -> None:
        while True:
            connection = None
            try:
                connection = await connect(self._url, "coupon-api")
                async with replies_within(REPLY_TIMEOUT_S):  # nobody watches it yet
                    await self._verify(connection)
                    await load_scripts(connection, self._scripts)
                self._connection = connection
                await connection.closed
            except StoreError as error:
                log.warning("redis cannot be used: %s", error)
            finally:
                self._connection = None
                if connection is not None:
                    connection.abort()  # one that was refused must not stay open beside the next
                for view in self.views:
                    view.certified = False
            await asyncio.sleep(0.1)

    async def _verify(self, connection: Connection) -> None:
        """Ask the server who it is, and open the shards that are certified for it; shut the others."""
        info = await read_info(connection)
        identity, self.refuses_writes = judge(info), refuses_writes(info)
        seconds, microseconds = await connection.ask("TIME")
        now_ms = int(seconds) * 1000 + int(microseconds) // 1000
        # As of now: a message may outrun the reply, and tell of what was made after it.
        seen = [(view.epoch, view.seen_seq) for view in self.views]
        metas = [connection.send("HMGET", view.keys.meta, *META_FIELDS) for view in self.views]
        gone_back = []
        replies = [await meta for meta in metas]
        for shard, (view, reply) in enumerate(zip(self.views, replies, strict=True)):
            view.certified = False
            if isinstance(reply, ReplyError):
                if reply.word == "WRONGTYPE":
                    continue  # somebody put another key there, and that is this shard's trouble alone
                raise reply
            meta = parse_meta(reply)
            view.ledger_unseen_s = math.inf if not meta.ledger_at_ms else max(0, now_ms - meta.ledger_at_ms) / 1000
            if (meta.run_id, meta.replid) != (identity.run_id, identity.replid) or not self._ours(shard, meta):
                continue
            epoch, seq, committed = meta.epoch, meta.seq, meta.committed
            if epoch is None or seq is None or committed is None or meta.backlog_max is None:
                continue
            if epoch == seen[shard][0] and seq < seen[shard][1]:
                # Only who has seen more can tell; its owner, who looks at what the ledger has, may find nothing amiss.
                log.error("shard %02d has gone back behind what was seen: it is to be recovered", shard)
                gone_back.append(shard)
            unheard_s = math.inf if meta.owner_at_ms is None else (now_ms - meta.owner_at_ms) / 1000
            if unheard_s > OWNER_UNHEARD_MAX_S and boot_s() > self.answer_early_until:
                # Cut off from Postgres, this process cannot learn that the shard lives on elsewhere.
                continue
            if epoch >= max(view.epoch, view.epoch_min) and (epoch, seq) >= seen[shard]:
                view.certified = True
                if epoch > view.epoch:
                    view.enter(epoch)
                view.seen_seq = max(view.seen_seq, seq, committed)
                view.backlog_max = meta.backlog_max
                self.positions.advance(shard, view.epoch, committed)
        for shard in gone_back:  # last: what was read of the other shards would be old by the time of a reply
            await self._doubt(shard, 0)

    def _ours(self, shard: int, meta: ShardMeta) -> bool:
        """Whether the shard's keys are this installation's. Until Postgres has said which that is, none are."""
        if self._installation is None:
            return False
        if meta.installation not in (None, self._installation, self._stranger):
            self._stranger = meta.installation  # told once, and not sixteen times a second
            log.critical(
                "shard %02d in this Redis belongs to installation %s, and the database to installation %s: check"
                " COUPON_REDIS_URL and COUPON_DATABASE_URL",
                shard, meta.installation, self._installation,
            )  # fmt: skip
        return meta.installation == self._installation

    async def _watch(self) -> None:
        """End what waits too long, and verify again: soon while a shard is shut or somebody waits for a position that
        should have been told by now, otherwise once a second."""
        loop = asyncio.get_running_loop()
        verified_at = loop.time()
        while True:
            await asyncio.sleep(TICK_S)
            connection = self._connection
            self._watch_listener(loop.time())
            overdue = self.positions.expire()
            if connection is None:
                continue
            if connection.stalled_for() > REPLY_TIMEOUT_S:
                log.warning("redis does not answer; the connection is given up")
                connection.abort()
                continue
            soon = overdue or self._verify_wanted or not all(view.certified for view in self.views)
            if soon or loop.time() - verified_at >= VERIFY_EVERY_S:
                self._verify_wanted = False
                try:
                    async with replies_within(REPLY_TIMEOUT_S):  # one that carries nothing must not stop this loop
                        await self._verify(connection)
                except StoreError:
                    connection.abort()
                verified_at = loop.time()

    # --- hearing how far the ledger is

    def _watch_listener(self, now: float) -> None:
        """Give up a listener that carries nothing: positions would be found out by asking alone, for good."""
        listener = self._listener
        if listener is None:
            return
        if listener.stalled_for() > REPLY_TIMEOUT_S:
            listener.abort()
        elif now - self._pinged_at >= PING_EVERY_S:
            self._pinged_at = now
            with contextlib.suppress(NotSent):
                listener.send("PING").add_done_callback(self._on_pong)

    def _on_pong(self, pong: asyncio.Future[Reply]) -> None:
        """A message that was on its way before the answer to PING came in its place."""
        if not pong.cancelled() and pong.exception() is None:
            self._on_message(pong.result())

    async def _keep_listening(self) -> None:
        await self._joined.wait()
        assert self._installation is not None
        channel = positions_channel(self._installation)
        while True:
            try:
                self._listener = listener = await connect(self._url, "coupon-api-positions", self._on_message)
                await listener.ask("SUBSCRIBE", channel)
                await listener.closed
            except StoreError:
                pass
            self._listener = None
            await asyncio.sleep(0.2)

    def _on_message(self, message: Reply) -> None:
        if isinstance(message, ReplyError) or message[0] != "message":
            return
        shard, epoch, committed = map(int, message[2].split())
        view = self.views[shard]
        # A message says what the ledger holds, and that is so whatever becomes of this Redis. It is no certificate: that
        # an epoch is over is learnt from Postgres or a certified Redis alone.
        if epoch == view.epoch:
            # First: what this process makes from now on lies above what the ledger has, or its script is refused. An event
            # at a position that was committed before is another one: keys of a moment ago were put back.
            view.seen_seq = max(view.seen_seq, committed)
            self.positions.advance(shard, epoch, committed)
        elif epoch > view.epoch:
            self._verify_wanted = True
