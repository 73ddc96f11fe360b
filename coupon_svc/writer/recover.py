"""Recovery: makes Redis agree with the ledger again, whatever happened to it, and certifies it in a new epoch.

Nothing here asks what went wrong. Every recovery takes the same steps, each of which may be killed and run again:

1. the next epoch in Postgres: no batch of an older one can be committed any more, and API processes say what they saw;
2. the shard is shut in Redis;
3. what its stream still holds goes into the ledger, and what API processes report that it has lost;
4. codes that were lent and have no record go back to be dealt, or into quarantine when somebody may have been answered;
5. Redis is rebuilt from the ledger, or kept when it provably stands where the ledger stands; its pools are emptied;
6. Redis is certified.

docs/architecture.md ("Recovery") says why; its steps have the same numbers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import TypeVar

from coupon_svc.domain.books import Book
from coupon_svc.domain.bounds import IDEMPOTENCY_MS
from coupon_svc.domain.clock import now_ms
from coupon_svc.domain.events import (
    COUPON_ASSIGNED,
    COUPON_CONFIRMED,
    Entry,
    Event,
    MalformedEntry,
    events_of,
    parse_entry,
)
from coupon_svc.domain.holding import Holding
from coupon_svc.domain.lists import key_of_list
from coupon_svc.domain.position import Epoch, Position, Seq
from coupon_svc.postgres import draining, epochs, late_events, processes, quarantine, rebuild_source, settling
from coupon_svc.postgres.books import books_of_shard
from coupon_svc.postgres.computed.ciphers import NO_CIPHERS, Ciphers
from coupon_svc.postgres.database import LedgerConnection, LedgerRow, within
from coupon_svc.postgres.entries import anything_missing, first_dead_letter
from coupon_svc.postgres.epochs import NewEpoch, Verdict
from coupon_svc.postgres.errors import BookBusy, HistoryForked
from coupon_svc.postgres.events import Batch, DeadLetter, garbled_letter, unread_letters
from coupon_svc.postgres.marks import Mark, mark_of_a_day_ago
from coupon_svc.postgres.outstanding import account_piece, held_by_book
from coupon_svc.postgres.processes import gone_processes
from coupon_svc.postgres.settling import Settled
from coupon_svc.postgres.shards import OwnedShard
from coupon_svc.redis.codec import AssignRecord, ListRecord, RedeemRecord, StreamEntry, encode_book
from coupon_svc.redis.control import KEYS_PER_CALL_MAX, ShardControl, Term
from coupon_svc.redis.errors import WrongKeyType
from coupon_svc.redis.meta import ShardMeta
from coupon_svc.writer.crash import crash_point
from coupon_svc.writer.portion import Portion
from coupon_svc.writer.shard import term_of

T = TypeVar("T")

log = logging.getLogger(__name__)

STEP_TIMEOUT_S = 30.0
"""One step with Postgres. A recovery has many, and no bound of its own: it goes on as long as each of them ends."""
REPORTS_WAIT_S = 2.5
REPORTS_AGAIN_S = 0.2
SILENCE_REMEMBERED_S = 30.0
TELL_EVERY_S = 10.0
BOOK_WAIT_MS = 1000
AT_ONCE = 100


async def _step(connection: LedgerConnection, work: Awaitable[T]) -> T:
    """One step with Postgres, which ends in time or with the connection. Raises LedgerUnavailable."""
    async with within(connection, STEP_TIMEOUT_S):
        return await work


class Recoverer:
    """Recovers shards, any number at a time, each on a connection of its own."""

    def __init__(self, writer_id: str, store: ShardControl, backlog_max: int, ciphers: Ciphers = NO_CIPHERS) -> None:
        self._writer_id = writer_id
        self._store = store
        self._backlog_max = backlog_max
        self._ciphers = ciphers
        self._silent: dict[str, float] = {}
        """When API processes were last waited for in vain: one that is silent about a shard is silent about all."""

    async def recover(self, connection: LedgerConnection, owned: OwnedShard) -> OwnedShard:
        """Recover the shard and certify Redis for it. Returns the shard in its new epoch.

        Raises NotOwner, StoreError, LedgerUnavailable, ShardNotUsable: try again from the start; Fenced: a newer owner is at
        work; HistoryForked: the shard is stopped now, and a person must look.
        """
        # 1. The next epoch.
        begun = await _step(connection, epochs.begin_epoch(connection, self._writer_id, owned))
        crash_point("recover.begun")
        shard, term = begun.owned.shard, term_of(begun.owned)
        try:
            # 2. Shut.
            identity = await self._store.refresh_identity()
            meta = await self._store.read_meta(shard)
            await self._store.shut_shard(term)
            crash_point("recover.shut")
            if meta.newest_epoch >= begun.owned.epoch:
                raise HistoryForked(
                    f"redis knows of epoch {meta.newest_epoch}, the ledger was in {begun.owned.epoch - 1}: it went back"
                )
            # 3. Drain, and at the beginning of `_judge`, what was reported.
            accounted, stands = await self._drain(connection, begun, meta)
            crash_point("recover.drained")
            verdict, reports_added = begun.verdict, False
            if verdict is None:
                verdict, reports_added = await self._judge(connection, begun, accounted)
        except HistoryForked as error:
            await _step(connection, epochs.stop_shard(connection, shard, str(error)))
            raise
        crash_point("recover.judged")
        # 4. Settle, by the verdict.
        settled = await self._settle(connection, begun, verdict)
        crash_point("recover.settled")
        # 5. Rebuild or keep.
        books = await _step(connection, books_of_shard(connection, shard))
        held = await _step(connection, held_by_book(connection, shard))
        kept = stands and not reports_added and not begun.rebuild and await self._agrees(shard, held)
        if kept:
            await self._restore_rules(connection, term, books, held)
        else:
            await self._store.wipe_shard(term)
            crash_point("recover.wiped")
            await self._rebuild(connection, term, books, sum(held.values()))
        crash_point("recover.restored")
        # 6. Certify.
        owned = await _step(connection, epochs.mark_certified(connection, self._writer_id, begun))
        await self._store.certify_shard(term, identity, self._backlog_max)
        crash_point("recover.certified")
        log.info(
            "shard %02d is certified in epoch %d: redis was %s, %d codes go back to be dealt, %d are quarantined",
            shard, begun.owned.epoch, "kept" if kept else "rebuilt", settled.returned, settled.quarantined,
        )  # fmt: skip
        return owned

    async def _drain(self, connection: LedgerConnection, begun: NewEpoch, meta: ShardMeta) -> tuple[int, bool]:
        """What the stream holds and the ledger does not, into the ledger. Returns the seq up to which the ledger accounts
        for the live epoch, and whether this Redis stands just there."""
        shard, live = begun.owned.shard, begun.live_epoch
        accounted = await _step(connection, epochs.last_seq(connection, shard, live))
        if live in (meta.epoch, meta.was):
            await self._require_told(shard, live, accounted, meta.committed or 0)
        shut = await self._store.read_meta(shard)  # no script adds to it any more
        # The last event that a script made in the live epoch, where this Redis knows it.
        made = shut.seq if shut.was == live else None
        read, portion = Position(Epoch(0), Seq(0)), Portion()
        while entries := await self._stream_after(shard, read, portion.entries):
            portion.begin()
            ours = [entry for entry in entries if not _made_up(entry, begun, made)]
            for number, batch in _by_epoch(shard, ours, portion):
                if number == live:
                    accounted = await _step(connection, draining.drain(connection, self._writer_id, begun, batch))
                else:
                    late = late_events.take_late(connection, self._writer_id, begun, number, batch.events)
                    await _step(connection, late)
                read = Position(Epoch(number), Seq(batch.upto))
            if not portion.is_spent:
                read = entries[-1].position
            portion.committed(len(entries), all_of_it=read == entries[-1].position)
        dead = await _step(connection, first_dead_letter(connection, shard, live))
        if live:  # whoever still waits in that epoch is answered, up to what the ledger could not take
            await self._store.tell_position(shard, live, accounted if dead is None else min(accounted, dead - 1))
        _, tip = await _step(connection, epochs.end_of_epoch(connection, shard, live))
        # With another tip it is another history that has come as far. Of what an older version made no tip is known.
        same = tip is None or (shut.tip or "") == tip
        served = live > 0 and meta.epoch == live and shut.was == live
        stands = served and shut.seq == accounted and same and dead is None
        return accounted, stands

    async def _stream_after(self, shard: int, after: Position, count: int) -> list[StreamEntry]:
        """A key of another type in the stream's place holds nothing; it goes when the shard is certified."""
        try:
            return await self._store.stream_after(shard, after, count)
        except WrongKeyType:
            return []

    async def _require_told(self, shard: int, epoch: int, accounted: int, told: int) -> None:
        """Raises HistoryForked when the ledger had events that it lacks now and the stream has not kept: it went back."""
        while accounted < told:
            before = accounted
            for raw in await self._stream_after(shard, Position(Epoch(epoch), Seq(accounted)), AT_ONCE):
                with contextlib.suppress(MalformedEntry):
                    entry = parse_entry(*raw)
                    if (entry.epoch, entry.before) == (epoch, accounted):
                        accounted = entry.seq
            if accounted == before:
                raise HistoryForked(
                    f"the ledger had {told} events of epoch {epoch}, and lacks {accounted + 1}: it went back"
                )

    async def _judge(self, connection: LedgerConnection, begun: NewEpoch, accounted: int) -> tuple[Verdict, bool]:
        """What is to become of codes that were lent and have no record: written down before the first book is settled.
        Returns, too, whether reports have added to the ledger. Raises HistoryForked."""
        if not begun.live_epoch:
            return Verdict(0, lost=False), False
        lost, reports_added = False, False
        if await _step(connection, processes.may_have_answered_early(connection, begun.owned.shard)):
            lost, reports_added = await self._hear_reports(connection, begun, accounted)
        verdict = await _step(connection, settling.end_live_epoch(connection, self._writer_id, begun, lost=lost))
        return verdict, reports_added

    async def _hear_reports(self, connection: LedgerConnection, begun: NewEpoch, accounted: int) -> tuple[bool, bool]:
        """Take from the reports what Redis has lost. Returns whether an answer may still be without a record, and whether
        the reports have added to the ledger.

        No answer is without one when every API process that could have answered has reported, and the ledger has all that
        any of them saw.
        """
        shard, live = begun.owned.shard, begun.live_epoch
        silent = await self._wait_for_reports(connection, shard, live)
        if silent:
            log.warning("shard %02d: %d API processes cannot be asked what they have answered", shard, silent)
        before = accounted
        accounted = await self._enter_reported(connection, begun, before)
        missing = await _step(connection, anything_missing(connection, shard, live))
        seen = await _step(connection, processes.highest_seen(connection, shard, live))
        return silent > 0 or missing or seen > accounted, accounted > before

    async def _enter_reported(self, connection: LedgerConnection, begun: NewEpoch, accounted: int) -> int:
        """Enter what API processes have reported and the stream has lost. Returns up to which seq the ledger accounts for
        the live epoch then. Raises HistoryForked where a report is of another history than the ledger."""
        shard, live = begun.owned.shard, begun.live_epoch
        seq = await _step(connection, processes.contradicted(connection, shard, live, accounted))
        if seq is not None:
            raise HistoryForked(f"an API process has answered from another entry {live}-{seq} than the ledger has")
        portion = Portion()
        while entries := await _step(
            connection, processes.reported_entries(connection, shard, live, accounted, portion.entries)
        ):
            portion.begin()
            some: list[Entry] = []
            while len(some) < len(entries) and not portion.is_spent:
                some.append(entries[len(some)])
                portion.take(some[-1].n, len(some[-1].body))
            events = [event for entry in some for event in events_of(entry)]
            batch = Batch(shard, live, 0, accounted, some[-1].seq, some, events)
            log.info("shard %02d: redis has lost %d events; API processes have kept them", shard, len(events))
            accounted = await _step(connection, draining.drain(connection, self._writer_id, begun, batch))
            portion.committed(len(entries), all_of_it=len(some) == len(entries))
        return accounted

    async def _wait_for_reports(self, connection: LedgerConnection, shard: int, live: int) -> int:
        """Wait for the reports of processes that live, though not long for one that another shard has waited for in vain.
        Returns how many processes have not reported."""
        loop = asyncio.get_running_loop()
        begun = loop.time()
        while silent := set(await _step(connection, processes.silent_processes(connection, shard, live))):
            gone = set(await _step(connection, gone_processes(connection)))
            now = loop.time()
            patience = {process: self._patience(process, now) for process in silent - gone}
            if now - begun >= max(patience.values(), default=0.0):
                remembered = {one: at for one, at in self._silent.items() if now - at < SILENCE_REMEMBERED_S}
                self._silent = remembered | dict.fromkeys(patience, now)
                break
            await asyncio.sleep(0.05)
        return len(silent)

    def _patience(self, process: str, now: float) -> float:
        known_silent = now - self._silent.get(process, -SILENCE_REMEMBERED_S) < SILENCE_REMEMBERED_S
        return REPORTS_AGAIN_S if known_silent else REPORTS_WAIT_S

    async def _settle(self, connection: LedgerConnection, begun: NewEpoch, verdict: Verdict) -> Settled:
        """Settle book by book. One whose row somebody holds is asked again after the others, as long as it takes: nothing
        else would bring the shard any further."""
        shard, told_at = begun.owned.shard, asyncio.get_running_loop().time()
        returned = quarantined = 0
        books, wait_ms = await _step(connection, settling.books_to_settle(connection, shard)), 0
        while books:
            await _step(connection, epochs.still_recoverer(connection, self._writer_id, begun))
            busy = []
            for book_id in books:
                try:
                    settled = await self._settle_book(connection, begun, verdict, book_id, max(50, wait_ms))
                except BookBusy:
                    busy.append(book_id)
                else:
                    returned, quarantined = returned + settled.returned, quarantined + settled.quarantined
                    crash_point("recover.book_settled")
            now = asyncio.get_running_loop().time()
            if busy and now - told_at >= TELL_EVERY_S:
                told_at = now
                log.warning(
                    "shard %02d waits for %d books whose rows other transactions hold: %s, …", shard, len(busy), busy[0]
                )
            books, wait_ms = busy, BOOK_WAIT_MS
        await _step(connection, settling.mark_settled(connection, self._writer_id, begun, verdict))
        return Settled(returned, quarantined)

    async def _settle_book(
        self, connection: LedgerConnection, begun: NewEpoch, verdict: Verdict, book_id: str, wait_ms: int
    ) -> Settled:
        returned = quarantined = 0
        more = True
        while more:
            while await _step(connection, account_piece(connection, book_id, wait_ms, self._ciphers)):
                pass
            piece = settling.settle_piece(connection, self._writer_id, begun, verdict, book_id, wait_ms)
            settled, more = await _step(connection, piece)
            returned, quarantined = returned + settled.returned, quarantined + settled.quarantined
        return Settled(returned, quarantined)

    async def _agrees(self, shard: int, held: Mapping[str, int]) -> bool:
        """Whether every book in Redis has as many holders as the ledger, and no code is missing from its keys."""
        for some in _chunks(list(held), AT_ONCE):
            try:
                counts = await asyncio.gather(*(self._store.pool_counts(shard, book_id) for book_id in some))
            except WrongKeyType:
                return False
            for book_id, (in_pool, holders, lent) in zip(some, counts, strict=True):
                if holders != held[book_id] or in_pool + holders != lent:
                    return False
        return True

    async def _restore_rules(
        self, connection: LedgerConnection, term: Term, books: Sequence[Book], held: Mapping[str, int]
    ) -> None:
        """Of a Redis that is kept: empty pools, and the books' rules and quarantine as the ledger has them. Its counts of
        uses are right, unless an older version brought the book and left one out."""
        for some in _chunks(books, AT_ONCE):
            lent_counts = await self._store.lent_counts(term.shard, [book.book_id for book in some])
            restored = []
            for book, lent in zip(some, lent_counts, strict=True):
                uses = {} if lent is not None else (await self._walk_coupons(connection, book, _nowhere)).fields
                codes = await self._quarantine(connection, book)
                counts = {**uses, "lent": held[book.book_id], "quarantined": len(codes)}
                restored.append((book.book_id, _fields(book, **counts), codes))
            await asyncio.gather(*(self._store.restore_book(term, *book) for book in restored))

    async def _rebuild(self, connection: LedgerConnection, term: Term, books: Sequence[Book], total: int) -> None:
        """An empty shard as the ledger has it: books, coupons, Idempotency-Keys."""
        progress = _Progress(term.shard, total)
        for book in books:
            # Before the coupons: a code that a receipt brings back meanwhile is in one of the two, or in both.
            codes = await self._quarantine(connection, book)
            counts = await self._restore_coupons(connection, term, book, progress)
            fields = _fields(book, **counts.fields, quarantined=len(codes))
            await self._store.restore_book(term, book.book_id, fields, codes)
        crash_point("recover.coupons_restored")
        await self._restore_idem(connection, term, {book.book_id: book for book in books})

    async def _quarantine(self, connection: LedgerConnection, book: Book) -> list[str]:
        if not book.quarantined:
            return []
        return await _step(connection, quarantine.quarantined_codes(connection, book.book_id))

    async def _restore_coupons(
        self, connection: LedgerConnection, term: Term, book: Book, progress: _Progress
    ) -> _Counts:
        async def restore(rows: Sequence[LedgerRow]) -> None:
            for some in _chunks(rows, KEYS_PER_CALL_MAX):
                coupons = [(row["code"], _holding(row)) for row in some]
                await self._store.restore_coupons(term, book.tenant_id, book.book_id, coupons)
            progress.add(len(rows))

        return await self._walk_coupons(connection, book, restore)

    async def _walk_coupons(
        self, connection: LedgerConnection, book: Book, use: Callable[[Sequence[LedgerRow]], Awaitable[None]]
    ) -> _Counts:
        """Hand all coupons of a book to `use`, a page at a time, and count them on the way. A receipt may add one at any
        time: a statement that counts them would count others."""
        counts = _Counts(book.max_redemptions_per_code)
        rows = await _step(connection, rebuild_source.coupons_of_book(connection, book.book_id))
        while rows:
            await use(rows)
            counts.add(rows)
            after = rows[-1]["code"]
            rows = await _step(connection, rebuild_source.coupons_of_book(connection, book.book_id, after))
        return counts

    async def _restore_idem(self, connection: LedgerConnection, term: Term, books: Mapping[str, Book]) -> None:
        """The records of the last 24 hours, in one pass over the shard's events since then."""
        shard, since = term.shard, now_ms() - IDEMPOTENCY_MS
        mark = await _step(connection, mark_of_a_day_ago(connection, shard))
        await self._restore_keys(
            connection,
            term,
            books,
            await _step(connection, rebuild_source.late_idempotent_events(connection, shard, mark, since)),
        )
        for page_behind in (rebuild_source.old_idempotent_events, rebuild_source.idempotent_events):
            upto: Mark | None = mark
            while upto is not None:
                events, upto = await _step(connection, page_behind(connection, shard, upto, since))
                await self._restore_keys(connection, term, books, events)

    async def _restore_keys(
        self, connection: LedgerConnection, term: Term, books: Mapping[str, Book], events: Sequence[Event]
    ) -> None:
        by_book: dict[str, list[Event]] = {}
        for event in events:
            by_book.setdefault(event.book_id, []).append(event)
        for book_id, of_book in by_book.items():
            if book := books.get(book_id):  # else somebody put it into the stream by hand
                await self._restore_records(connection, term, book, of_book)

    async def _restore_records(
        self, connection: LedgerConnection, term: Term, book: Book, events: Sequence[Event]
    ) -> None:
        confirmed = [event.code for event in events if event.event == COUPON_CONFIRMED]
        coupons = {}
        if confirmed:
            coupons = await _step(connection, rebuild_source.coupons_named(connection, book.book_id, confirmed))
        now = now_ms()
        records = []
        for event in events:
            if event.event == COUPON_CONFIRMED and event.code not in coupons:
                continue  # its assign is a dead letter
            key, ttl_ms = str(event.idem), max(1, event.at_ms + IDEMPOTENCY_MS - now)
            records.append((key, _record(event, book, coupons).encode(), ttl_ms))
            if list_key := key_of_list(key):
                records.append((list_key, ListRecord(str(event.fingerprint)).encode(), ttl_ms))
        for some in _chunks(records, KEYS_PER_CALL_MAX):
            await self._store.restore_idem(term, book.tenant_id, book.book_id, some)


class _Counts:
    """What a book's hash counts of its coupons."""

    def __init__(self, most_uses: int | None) -> None:
        self._most_uses = most_uses
        self._held = self._uses = self._spent = 0

    def add(self, rows: Sequence[LedgerRow]) -> None:
        self._held += len(rows)
        self._uses += sum(row["uses"] for row in rows)
        if self._most_uses is not None:
            self._spent += sum(1 for row in rows if row["uses"] >= self._most_uses)

    @property
    def fields(self) -> dict[str, int]:
        return {"lent": self._held, "redeemed": self._spent, "partly_redeemed": self._uses - self._spent}


async def _nowhere(rows: Sequence[LedgerRow]) -> None:
    """Coupons that are only to be counted."""


class _Progress:
    """Says in the log now and then how far a large rebuild has come."""

    def __init__(self, shard: int, total: int) -> None:
        self._shard, self._total, self._done = shard, total, 0
        self._told_at = asyncio.get_running_loop().time()

    def add(self, coupons: int) -> None:
        self._done += coupons
        now = asyncio.get_running_loop().time()
        if now - self._told_at >= TELL_EVERY_S:
            self._told_at = now
            log.info("shard %02d: %d of %d coupons restored", self._shard, self._done, self._total)


def _chunks(things: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(things), size):
        yield things[start : start + size]


def _fields(book: Book, **counts: int) -> dict[str, str]:
    """A book's hash in Redis. Its pool is empty: whatever nobody holds is still to come, and not only what is not lent."""
    counts["unlent"] = max(0, book.total - counts["lent"] - counts["quarantined"])
    return {**encode_book(book), "version": str(book.version), **{name: str(count) for name, count in counts.items()}}


def _holding(row: LedgerRow) -> Holding:
    """Who holds a coupon of the ledger."""
    assigned = Position(row["epoch"], row["seq"])
    return Holding(assigned, assigned, row["uses"], row["assigned_at_ms"], row["user_id"])


def _made_up(entry: StreamEntry, begun: NewEpoch, made: int | None) -> bool:
    """Whether an entry was put into the stream by hand. It is, if the ledger never began its epoch; the meta was compared
    before, and knows of no newer one. It is, too, if it follows the last one that a script made in the live epoch. What is
    missing before it was never made, and may be more than could ever be noted. It goes with the stream when the shard is
    certified."""
    epoch, seq = entry.position
    if epoch < begun.owned.epoch and (made is None or epoch != begun.live_epoch or seq <= made):
        return False
    log.error("entry %s of the stream is none of the service's: it is passed over", entry.position)
    return True


def _by_epoch(shard: int, found: Sequence[StreamEntry], portion: Portion) -> list[tuple[int, Batch]]:
    """Stream entries, as many as the portion takes, as one batch for each epoch among them. Their generation is 0: nobody
    compares it."""
    parts: dict[int, tuple[list[Entry], list[Event], list[DeadLetter], list[int]]] = {}
    for raw in found:
        if portion.is_spent:
            break
        epoch, seq = raw.position
        entries, events, dead, seqs = parts.setdefault(epoch, ([], [], [], []))
        seqs.append(seq)
        try:
            entry = parse_entry(*raw)
        except MalformedEntry as error:
            portion.take(1, sum(map(len, raw.fields)))
            dead.append(garbled_letter(raw.position, raw.fields, str(error)))
            continue
        portion.take(entry.n, len(entry.body))
        entries.append(entry)
        try:
            events += events_of(entry)
        except MalformedEntry as error:
            dead += unread_letters(entry, str(error))
    return [
        (epoch, Batch(shard, epoch, 0, seqs[0] - 1, seqs[-1], entries, events, dead))
        for epoch, (entries, events, dead, seqs) in parts.items()
    ]


def _record(event: Event, book: Book, coupons: Mapping[str, tuple[Position, int]]) -> AssignRecord | RedeemRecord:
    """What is answered to a request whose event the ledger has, when it comes again. `coupons`: as `coupons_named`."""
    position, most, fingerprint = event.position, book.max_redemptions_per_code, str(event.fingerprint)
    if event.event == COUPON_ASSIGNED:
        return AssignRecord(fingerprint, event.code, event.at_ms, position, position, book.ack, most)
    uses = event.uses or 0
    left = None if most is None else most - uses
    if event.event == COUPON_CONFIRMED:
        assigned, at_ms = coupons[event.code]
        return AssignRecord(fingerprint, event.code, at_ms, assigned, position, book.ack, left, already_yours=True)
    return RedeemRecord(fingerprint, event.user_id, event.at_ms, position, uses, left)
