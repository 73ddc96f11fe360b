"""Opens shards that this writer owns: takes over what is in order, and has everything else recovered."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Mapping, Sequence

from coupon_svc.domain.bounds import CLOCKS_APART_MAX_MS
from coupon_svc.domain.errors import error_location
from coupon_svc.domain.events import Entry, MalformedEntry, parse_entry
from coupon_svc.domain.position import Epoch, Position, Seq
from coupon_svc.postgres.database import LedgerConnection, LedgerSession, within
from coupon_svc.postgres.entries import entry_ending_at, first_dead_letter
from coupon_svc.postgres.epochs import stop_shard, stopped_because, want_rebuild
from coupon_svc.postgres.errors import HistoryForked, LedgerUnavailable, NotOwner
from coupon_svc.postgres.shards import OwnedShard, owned_shards
from coupon_svc.redis.codec import StreamEntry
from coupon_svc.redis.control import ShardControl, Term, clocks_apart
from coupon_svc.redis.errors import ClocksApart, Fenced, ShardNotUsable, StoreError
from coupon_svc.redis.meta import ShardMeta
from coupon_svc.writer.clock import ledger_clock_ms
from coupon_svc.writer.lend import Lender
from coupon_svc.writer.recover import Recoverer
from coupon_svc.writer.shard import ImpossibleTransition, Shard, Shut

log = logging.getLogger(__name__)

LOOK_EVERY_S = 0.05
TRY_AGAIN_S = 0.2
STATEMENTS_TIMEOUT_S = 3.0


class Opener:
    """Takes shards from `Shut` to `Open`, several at once, each on a session of its own: one that has to wait holds up no
    other."""

    def __init__(
        self,
        sessions: Sequence[LedgerSession],
        writer_id: str,
        store: ShardControl,
        shards: Mapping[int, Shard],
        recoverer: Recoverer,
        lender: Lender,
        backlog_max: int,
    ) -> None:
        self.sessions = sessions
        self._writer_id = writer_id
        self._store = store
        self._shards = shards
        self._recoverer = recoverer
        self._lender = lender
        self._backlog_max = backlog_max

    async def run(self) -> None:
        """Open every shard that is shut, until cancelled. What was tried last is tried again last."""
        free = list(self.sessions)
        under_way: set[int] = set()
        tried = Counter[int]()

        async def open_one(shard: Shard, session: LedgerSession) -> None:
            number = shard.number
            try:
                if not await self.try_to_open(shard, session):
                    await asyncio.sleep(TRY_AGAIN_S)
            finally:
                under_way.remove(number)
                free.append(session)

        async with asyncio.TaskGroup() as tasks:
            while True:
                shut = [n for n, one in self._shards.items() if isinstance(one.state, Shut) and n not in under_way]
                for number in sorted(shut, key=tried.__getitem__)[: len(free)]:
                    shard = self._shards[number]
                    tried[number] = max(tried.values(), default=0) + 1
                    under_way.add(number)
                    tasks.create_task(open_one(shard, free.pop()))
                await asyncio.sleep(LOOK_EVERY_S)

    async def try_to_open(self, shard: Shard, session: LedgerSession) -> bool:
        """Open one shard that is shut, or say why not. Whatever goes wrong with it holds up no other. False when it is to be
        tried again after a moment."""
        if not isinstance(shard.state, Shut):
            return True
        try:
            await self._attempt(shard, session)
        except ImpossibleTransition as error:  # it was stopped meanwhile, and released again
            log.error("shard %02d moved while it was being opened: %s", shard.number, error)
        return not isinstance(shard.state, Shut)

    async def _attempt(self, shard: Shard, session: LedgerSession) -> None:
        """Take the shard from `Shut` to whatever state it can be brought to."""
        shard.opening_begins()
        try:
            await self._open(shard, await session.connection())
        except (LedgerUnavailable, StoreError) as error:
            shard.opening_failed(f"it has to wait: {error}")
        except (Fenced, NotOwner):
            shard.opening_failed("it has another owner")
        except ClocksApart as error:
            shard.opening_failed(str(error), level=logging.DEBUG)  # it was told already
        except ShardNotUsable as error:
            shard.opening_failed(str(error), recover=True)
        except HistoryForked as error:
            shard.stopped(str(error))
        except Exception as error:
            where = f"{type(error).__name__} at {error_location(error)}"
            shard.opening_failed(where, recover=True, level=logging.ERROR)

    async def _open(self, shard: Shard, connection: LedgerConnection) -> None:
        number = shard.number
        # Should another server answer before the end, this one is not what `Showing` finds, and the shard is shut again.
        identity = await self._store.connect()
        # First what Redis knows, then the ledger: a generation that another writer drew meanwhile is in both.
        meta = await self._store.read_meta(number)
        async with within(connection, STATEMENTS_TIMEOUT_S):
            mine = await owned_shards(connection, self._writer_id)
            reason = await stopped_because(connection, number)
        owned = next((one for one in mine if one.shard == number), None)
        if owned is None:
            raise NotOwner
        shard.found_in_ledger(owned)
        if reason is None and (reason := went_back(owned, meta)):
            async with within(connection, STATEMENTS_TIMEOUT_S):
                await stop_shard(connection, number, reason)
        if reason is not None:
            epoch, generation = max(owned.epoch, meta.newest_epoch), max(owned.generation, meta.generation or 0)
            await self._store.shut_shard(Term(number, epoch, generation))
            raise HistoryForked(reason)
        await self._compare_clocks(connection, shard)
        if amiss := shard.recovery_wanted or await self._amiss(shard, connection):
            shard.recovery_begins(amiss)
            shard.recovered(await self._recoverer.recover(connection, shard.owned))
        await self._lender.bring_outstanding_of_shard(connection, shard)
        shard.opened(identity)

    async def _compare_clocks(self, connection: LedgerConnection, shard: Shard) -> None:
        """Raises ClocksApart, with the shard shut, while Redis's clock cannot be trusted. What it dated meanwhile (ends of
        idempotency records and locks) is not kept."""
        async with within(connection, STATEMENTS_TIMEOUT_S):
            ledger_ms = await ledger_clock_ms(connection)
        apart_ms = await self._store.clock_ms() - ledger_ms
        apart = abs(apart_ms) > CLOCKS_APART_MAX_MS
        if apart or shard.clocks_were_apart:  # or they were a moment ago, and are together again
            async with within(connection, STATEMENTS_TIMEOUT_S):
                await want_rebuild(connection, shard.number)
            is_news = shard.found_clocks_apart()
            if apart:
                if is_news:
                    log.critical("shard %02d is shut: %s", shard.number, clocks_apart(apart_ms))
                await self._store.shut_shard(shard.term)
                raise ClocksApart(clocks_apart(apart_ms))

    async def _amiss(self, shard: Shard, connection: LedgerConnection) -> str | None:
        """Why Redis is not as the shard's last owner certified it, in words; None when it is, and is opened then.

        It must hold every event that the ledger has not, and must have made none that the ledger could not take. Where the
        ledger ends, its entry must be the ledger's.
        """
        number, epoch, committed = shard.number, shard.owned.epoch, shard.committed
        async with within(connection, STATEMENTS_TIMEOUT_S):
            dead = await first_dead_letter(connection, number, epoch)
        if dead is not None:
            return f"the ledger could not take event {shard.position._replace(seq=Seq(dead))}"
        try:
            seq = await self._store.open_shard(shard.term, committed, shard.tip, self._backlog_max)
        except ShardNotUsable as error:
            return str(error)
        entry = await self._store.entry_at(number, shard.position)
        if entry is not None:
            async with within(connection, STATEMENTS_TIMEOUT_S):
                recorded = await entry_ending_at(connection, number, epoch, committed)
            if not is_entry(entry, recorded):
                return f"the stream has another entry at {shard.position}"
        if not await next_event_is_there(self._store, shard.term, committed, shard.tip, required=seq > committed):
            return f"the stream does not go on with event {shard.position.next}"
        return None


async def next_event_is_there(
    store: ShardControl, term: Term, committed: int, tip: str, *, required: bool = True
) -> bool:
    """Whether the entry after this one is in the stream and follows it, or none at all unless one is `required`. If it was
    trimmed, only a look or the next event shows that. If a hand-made entry stands there, no script can add its own any more,
    and none that follows another one is ever committed."""
    following = await store.stream_after(term.shard, Position(Epoch(term.epoch), Seq(committed)), count=1)
    if not following:
        return not required
    try:
        entry = parse_entry(*following[0])
    except MalformedEntry:
        return False
    return (entry.epoch, entry.before, entry.after) == (term.epoch, committed, tip)


def is_entry(found: StreamEntry, recorded: Entry | None) -> bool:
    """Whether the stream has the entry that the ledger has."""
    try:
        return recorded is not None and parse_entry(*found) == recorded
    except MalformedEntry:
        return False


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
