"""From the streams into the ledger: read what follows the ledger's own position, commit it, tell how far it got."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from coupon_svc.domain.books import Ack
from coupon_svc.domain.errors import CouponError
from coupon_svc.domain.events import (
    COUPON_ASSIGNED,
    COUPON_REDEEMED,
    Entry,
    Event,
    MalformedEntry,
    events_of,
    parse_entry,
)
from coupon_svc.postgres.database import LedgerSession
from coupon_svc.postgres.epochs import stop_shard
from coupon_svc.postgres.errors import LedgerUnavailable, NotOwner
from coupon_svc.postgres.events import (
    DATA_ERRORS,
    Batch,
    DeadLetter,
    commit_batches,
    contradicts,
    dead_letter,
    first_data_error,
    prepare_commits,
    unread_letters,
)
from coupon_svc.postgres.shards import connection_name
from coupon_svc.redis.codec import StreamEntry
from coupon_svc.redis.control import Published, ShardControl, Term
from coupon_svc.redis.errors import ShardNotUsable, StoreError
from coupon_svc.writer.clock import LedgerClock
from coupon_svc.writer.crash import crash_point
from coupon_svc.writer.portion import Portion
from coupon_svc.writer.shard import Hole, Shard, Unrecorded
from coupon_svc.writer.telling import tell_positions

log = logging.getLogger(__name__)

COMMIT_TIMEOUT_S = 5.0
BLOCK_MS = 200
PACE_S = 0.02
"""A commit costs the same for one event as for fifty: while nobody waits for the ledger, there are at most 50 a second."""
ENOUGH_EVENTS = 500
"""A batch of so many is not waited for."""
HEAD_CHANGED = "the last hash of its chain was changed: `coupon-svc verify` shows what else was"


class Rewritten(CouponError):
    """The next entry of the stream follows another one than the ledger has: it is of another history."""


class Committed(NamedTuple):
    """A batch that is in the ledger, and the hash of its last entry."""

    batch: Batch
    head: bytes


class Persister:
    """The writer's main loop. `shards` is shared with `Owning`, which adds and removes entries."""

    def __init__(
        self,
        url: str,
        writer_id: str,
        store: ShardControl,
        shards: Mapping[int, Shard],
        on_assigned: Callable[[Shard, str, int], None],
        clock: LedgerClock,
    ) -> None:
        self.session = LedgerSession(url, connection_name(writer_id), on_open=prepare_commits)
        self._writer_id = writer_id
        self._store = store
        self._shards = shards
        self._on_assigned = on_assigned
        self._clock = clock
        self._portion = Portion()

    async def run(self) -> None:
        """Persist until cancelled. Trouble with Redis or Postgres is told, waited out, and never loses an event."""
        while True:
            try:
                await self.turn()
            except StoreError as error:
                self._portion.failed()
                log.warning("redis cannot be used: %s", error)
                await asyncio.sleep(0.2)
            except LedgerUnavailable as error:
                self._portion.failed()
                log.warning("postgres cannot be used: %s", error)
                await self.show_away()
                await asyncio.sleep(0.2)

    async def turn(self) -> None:
        """One batch of all shards that have events. Raises StoreError, LedgerUnavailable."""
        open_shards = {n: s for n, s in self._shards.items() if s.is_open}
        terms = {n: s.term for n, s in open_shards.items()}
        if not open_shards:
            await asyncio.sleep(0.05)
            return
        try:
            entries = await self._store.read_events(
                {n: s.position for n, s in open_shards.items()}, BLOCK_MS, self._portion.entries
            )
        except ShardNotUsable:
            await self._shut_unreadable(open_shards)
            return
        batches = []
        self._portion.begin()
        for number, shard_entries in entries.items():
            try:
                batches.append(following_batch(open_shards[number], shard_entries, self._portion))
            except Exception as error:
                open_shards[number].report(terms[number], error)
        if not batches:
            return
        crash_point("persist.read")
        read_at = asyncio.get_running_loop().time()
        committed = await self._commit(batches)
        await self._publish([(open_shards[one.batch.shard], *one) for one in committed])
        crash_point("persist.published")
        most = max(map(len, entries.values()))
        more_waits = most >= self._portion.entries
        self._portion.committed(most, all_of_it=all(len(one.entries) == len(entries[one.shard]) for one in batches))
        if more_waits or self._portion.is_spent:
            return
        if sum(len(batch.events) for batch in batches) < ENOUGH_EVENTS and not self._waited_for(batches):
            await asyncio.sleep(read_at + PACE_S - asyncio.get_running_loop().time())

    async def _shut_unreadable(self, open_shards: Mapping[int, Shard]) -> None:
        """Shut shards whose stream cannot be read: one is enough to fail the command that reads all. Raises StoreError."""
        for number, shard in open_shards.items():
            term = shard.term
            try:
                await self._store.stream_after(number, shard.position, count=1)
            except ShardNotUsable as error:
                shard.report(term, error)

    def _waited_for(self, batches: Sequence[Batch]) -> bool:
        """Whether a caller waits for one of these events; if so, others are likely to follow."""
        for batch in batches:
            pools = self._shards[batch.shard].pools if batch.shard in self._shards else {}
            for event in batch.events:
                pool = pools.get(event.book_id)
                if event.event == COUPON_REDEEMED or pool is None or pool.ack is Ack.LEDGER:
                    return True
        return False

    async def _commit(self, batches: list[Batch]) -> list[Committed]:
        """Commit the batches together, or each by itself when a row of one cannot be stored. Returns those that are in the
        ledger. Raises LedgerUnavailable, StoreError."""
        try:
            return await self._transact(batches)
        except DATA_ERRORS:
            return [done for batch in batches for done in await self._commit_alone(batch)]

    async def _commit_alone(self, batch: Batch) -> list[Committed]:
        """Commit what the ledger can take of one batch. What is wrong with it is its own shard's trouble, and no other's."""
        try:
            return await self._transact([batch])
        except DATA_ERRORS:
            healthy = await self._without_poison(batch)
            return [] if healthy is None else await self._transact([healthy])

    async def _transact(self, batches: Sequence[Batch]) -> list[Committed]:
        """One round trip. What becomes of one shard touches no other. Raises LedgerUnavailable, one of DATA_ERRORS."""
        crash_point("persist.written")
        async with self.session.work(COMMIT_TIMEOUT_S) as connection:
            outcomes, heads = await commit_batches(connection, self._writer_id, batches)
        crash_point("persist.committed")
        done = []
        for batch in batches:
            if outcomes[batch.shard] == "moved":
                done.append(Committed(batch, heads[batch.shard]))
            elif outcomes[batch.shard] == "edited":
                await self._stop(batch, HEAD_CHANGED)
            else:
                log.warning(
                    "a batch of shard %02d is thrown away: it has another owner, epoch or position", batch.shard
                )
                self._report(batch, NotOwner())
        return done

    def _report(self, batch: Batch, error: Exception) -> None:
        if (shard := self._shards.get(batch.shard)) is not None:
            shard.report(term_of_batch(batch), error)

    async def _without_poison(self, batch: Batch) -> Batch | None:
        """The batch with the events that the ledger cannot take moved to its dead letters.

        None, and the shard is stopped, when an event contradicts the ledger: history has forked, and a person must look.
        """
        good: list[Event] = []
        dead: list[DeadLetter] = list(batch.dead)
        rest: list[Sequence[Event]] = [batch.events]
        while rest:
            part = rest.pop()
            tried = batch._replace(events=[*good, *part], dead=())
            async with self.session.work(COMMIT_TIMEOUT_S) as connection:
                error = await first_data_error(connection, self._writer_id, tried)
            if error is None:
                good += part
            elif len(part) > 1:
                half = len(part) // 2
                rest += (part[half:], part[:half])
            elif contradicts(error):
                await self._stop(batch, f"event {batch.epoch}-{part[0].seq} contradicts the ledger")
                return None
            else:
                log.error("event %d of shard %02d goes to the dead letters", part[0].seq, batch.shard)
                dead.append(dead_letter(part[0], type(error).__name__))
        return batch._replace(events=good, dead=dead)

    async def _stop(self, batch: Batch, reason: str) -> None:
        """History has forked: nothing of the shard is decided or persisted until a person has looked."""
        shard = self._shards.get(batch.shard)
        if shard is not None:
            shard.stopped(reason)
        try:
            async with self.session.work(COMMIT_TIMEOUT_S) as connection:
                await stop_shard(connection, batch.shard, reason)
            with contextlib.suppress(ShardNotUsable):
                await self._store.shut_shard(term_of_batch(batch))
        except (LedgerUnavailable, StoreError):
            if shard is not None:
                shard.stop_failed()
            raise

    async def _publish(self, committed: Sequence[tuple[Shard, Batch, bytes]]) -> None:
        """Tell of a commit, with one message: of each shard its batch, and the hash of the last entry. Raises StoreError."""
        now = asyncio.get_running_loop().time()
        told = [
            (shard, published)
            for shard, batch, head in committed
            if (published := self._advance(shard, batch, head, now)) is not None
        ]
        if told:
            await tell_positions(self._store, self._clock, told, "committed")

    def _advance(self, shard: Shard, batch: Batch, head: bytes, now: float) -> Published | None:
        """Take note of what is committed. What is to be told of it; None when there is nothing."""
        term = term_of_batch(batch)
        if not shard.advanced(term, batch.upto, head, batch.last_tip):
            return None
        if batch.dead:
            # Nobody may be told that these are durable. The shard is recovered: whoever waits learns that the outcome is
            # unknown, and what Redis shows of them goes.
            shard.report(term, Unrecorded(f"the ledger could not take {len(batch.dead)} events"))
            return None
        # Before the positions are told, which may fail: a pool that is thought fuller than it is runs dry, and is never
        # refilled.
        assigned: dict[str, int] = {}
        for event in batch.events:
            if event.event == COUPON_ASSIGNED:
                assigned[event.book_id] = assigned.get(event.book_id, 0) + 1
        for book_id, number in assigned.items():
            self._on_assigned(shard, book_id, number)
        shard.mark(now)
        return Published(term, batch.upto, batch.last_tip, [entry.tip for entry in batch.entries], shard.trim_seq(now))

    async def show_away(self) -> None:
        """Let Redis refuse at once what would wait for the ledger."""
        open_shards = [shard for shard in self._shards.values() if shard.is_open]
        if open_shards:
            told = [(one, Published(one.term, one.committed, one.tip)) for one in open_shards]
            with contextlib.suppress(StoreError):
                await tell_positions(self._store, self._clock, told, "away")


def term_of_batch(batch: Batch) -> Term:
    """The term in which the batch's events were read."""
    return Term(batch.shard, batch.epoch, batch.generation)


def following_batch(shard: Shard, found: Sequence[StreamEntry], portion: Portion) -> Batch:
    """The entries of a stream that follow the shard's position, up to the first that does not follow the one before it, or
    until the portion is spent.

    Raises Hole, or Rewritten, when that is the first of all. Whoever opens the shard looks at the next entry alone, and
    would find nothing amiss behind a good one.
    """
    entries: list[Entry] = []
    events: list[Event] = []
    dead: list[DeadLetter] = []
    upto, tip = shard.position, shard.tip
    for raw in found:
        try:
            entry = parse_entry(*raw)
            if (entry.epoch, entry.before) != upto:
                raise Hole(f"event {upto.next} is missing, {raw.position} came instead")
            if entry.after != tip:
                raise Rewritten(f"entry {raw.position} does not follow the one that the ledger has")
        except (Hole, Rewritten, MalformedEntry):
            if entries:
                break
            raise
        upto, tip = raw.position, entry.tip
        entries.append(entry)
        try:
            events += events_of(entry)
        except MalformedEntry as error:
            dead += unread_letters(entry, str(error))
        portion.take(entry.n, len(entry.body))
        if portion.is_spent:
            break
    owned = shard.owned
    return Batch(
        owned.shard,
        owned.epoch,
        owned.generation,
        shard.committed,
        upto.seq,
        entries,
        events,
        dead,
        shard.tip,
        shard.chain,
    )
