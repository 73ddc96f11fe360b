"""Recovery: makes Redis agree with the ledger again, whatever happened to it, and certifies it in a new epoch.

Nothing here asks what went wrong. Every recovery takes the same steps, each of which may be killed and run again:

1. the next epoch in Postgres: no batch of an older one can be committed any more, and API processes say what they saw;
2. the shard is shut in Redis, and what its stream still holds goes into the ledger;
3. codes that were lent and have no record go back to be dealt, or into quarantine when somebody may have been answered;
4. Redis is rebuilt from the ledger, or kept when it provably stands where the ledger stands; its pools are emptied;
5. Redis is certified.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

import msgspec

from coupon_svc.domain.books import Book
from coupon_svc.domain.clock import now_ms
from coupon_svc.domain.events import COUPON_ASSIGNED, MalformedEvent, parse_entry_id, parse_event
from coupon_svc.ledger import recovery
from coupon_svc.ledger.books import books_of_shard
from coupon_svc.ledger.events import Batch, DeadLetter, garbled_letter
from coupon_svc.ledger.recovery import HistoryForked, NewEpoch
from coupon_svc.ledger.shards import OwnedShard
from coupon_svc.store.meta import ShardMeta
from coupon_svc.store.owner import KEYS_PER_CALL_MAX, OwnerStore, Term
from coupon_svc.writer.crash import crash_point
from coupon_svc.writer.rules import book_fields
from coupon_svc.writer.shard import term_of

log = logging.getLogger(__name__)

REPORTS_WAIT_S = 2.5
IDEMPOTENCY_MS = 24 * 3600 * 1000


class Recoverer:
    """Recovers one shard at a time, on the connection it is given."""

    def __init__(self, writer_id: str, store: OwnerStore, backlog_max: int) -> None:
        self._writer_id = writer_id
        self._store = store
        self._backlog_max = backlog_max

    async def recover(self, connection: Any, owned: OwnedShard) -> OwnedShard:
        """Recover the shard and certify Redis for it. Returns the shard in its new epoch.

        Raises NotOwner, StoreLost, LedgerUnavailable: try again from the start; Suspect: a newer owner is at work;
        HistoryForked: the shard is stopped now, and a person must look.
        """
        begun = await recovery.begin_epoch(connection, self._writer_id, owned)
        crash_point("recover.begun")
        shard, term = begun.owned.shard, term_of(begun.owned)
        try:
            identity = await self._store.refresh_identity()
            meta = await self._store.read_meta(shard)
            await self._store.shut_shard(term)
            crash_point("recover.shut")
            if meta.newest_epoch >= begun.owned.epoch:
                raise HistoryForked(
                    f"redis knows of epoch {meta.newest_epoch}, the ledger was in {begun.owned.epoch - 1}: it went back"
                )
            drained, whole = await self._drain(connection, begun, meta)
        except HistoryForked as error:
            log.critical("shard %02d is stopped: %s", shard, error)
            await recovery.stop_shard(connection, shard, str(error))
            raise
        crash_point("recover.drained")
        nothing_lost = await self._nothing_lost(connection, begun, drained)
        settled = await recovery.settle(connection, self._writer_id, begun, nothing_lost=nothing_lost)
        crash_point("recover.settled")
        kept = whole and not begun.rebuild and await self._agrees(connection, shard)
        if not kept:
            await self._store.wipe_shard(term)
            crash_point("recover.wiped")
        await self._restore(connection, term, keep_coupons=kept)
        crash_point("recover.restored")
        owned = await recovery.mark_certified(connection, self._writer_id, begun)
        await self._store.certify_shard(term, identity, self._backlog_max)
        crash_point("recover.certified")
        log.info(
            "shard %02d is certified in epoch %d: redis was %s, %d codes go back to be dealt, %d are quarantined",
            shard, begun.owned.epoch, "kept" if kept else "rebuilt", settled.returned, settled.quarantined,
        )  # fmt: skip
        return owned

    async def _drain(self, connection: Any, begun: NewEpoch, meta: ShardMeta) -> tuple[int, bool]:
        """What the stream holds and the ledger does not, into the ledger. Returns the seq up to which the ledger accounts
        for the live epoch, and whether this Redis stands just there."""
        shard, live = begun.owned.shard, begun.live_epoch
        reached = await recovery.last_seq(connection, shard, live)
        if live in (meta.epoch, meta.was):
            await self._require_told(shard, live, reached, meta.committed or 0)
        now = await self._store.read_meta(shard)  # it is shut: no script adds to it any more
        made = now.seq if now.was == live else None
        epoch, seq = 0, 0
        while entries := await self._store.stream_after(shard, epoch, seq):
            for number, batch in _by_epoch(shard, [entry for entry in entries if not _made_up(entry, begun, made)]):
                if number == live:
                    reached = await recovery.drain(connection, self._writer_id, begun, batch)
                else:
                    await recovery.take_late(connection, self._writer_id, begun, number, batch.events)
            epoch, seq = parse_entry_id(entries[-1][0])
        dead = await recovery.first_dead_letter(connection, shard, live)
        if live:  # whoever still waits in that epoch is answered, up to what the ledger could not take
            await self._store.tell_position(shard, live, reached if dead is None else min(reached, dead - 1))
        stands = live > 0 and meta.epoch == live and meta.seq == reached and dead is None
        return reached, stands

    async def _require_told(self, shard: int, epoch: int, reached: int, told: int) -> None:
        """Raises HistoryForked when the ledger had events that it lacks now and the stream has not kept: it went back."""
        while reached < told:
            before = reached
            for entry_id, _ in await self._store.stream_after(shard, epoch, reached):
                if parse_entry_id(entry_id) == (epoch, reached + 1):
                    reached += 1
            if reached == before:
                raise HistoryForked(
                    f"the ledger had {told} events of epoch {epoch}, and lacks {reached + 1}: it went back"
                )

    async def _nothing_lost(self, connection: Any, begun: NewEpoch, drained: int) -> bool:
        """Whether every API process that could have answered in the live epoch has said that the ledger has it all."""
        shard, live = begun.owned.shard, begun.live_epoch
        if not live or not await recovery.may_have_answered_early(connection, shard):
            return True
        if await recovery.anything_missing(connection, shard, live):
            return False
        deadline = asyncio.get_running_loop().time() + REPORTS_WAIT_S
        while silent := await recovery.silent_processes(connection, shard, live):
            if asyncio.get_running_loop().time() >= deadline:
                log.warning("shard %02d: %d API processes cannot be asked what they have answered", shard, len(silent))
                return False
            await asyncio.sleep(0.05)
        return await recovery.highest_seen(connection, shard, live) <= drained

    async def _agrees(self, connection: Any, shard: int) -> bool:
        """Whether every book in Redis has as many holders as the ledger, and no code is missing from its keys."""
        for book in await books_of_shard(connection, shard):
            in_pool, held, lent = await self._store.pool_counts(shard, book.book_id)
            in_ledger, *_ = await recovery.count_coupons(connection, book)
            if held != in_ledger or in_pool + held != lent:
                return False
        return True

    async def _restore(self, connection: Any, term: Term, *, keep_coupons: bool) -> None:
        for book in await books_of_shard(connection, term.shard):
            held, spent, uses = await recovery.count_coupons(connection, book)
            quarantined = await recovery.quarantined_codes(connection, book.book_id)
            counters = {
                "lent": held,
                "redeemed": spent,
                "partly_redeemed": uses - spent,
                "quarantined": len(quarantined),
            }
            fields = {**book_fields(book), "version": str(book.version), **{k: str(v) for k, v in counters.items()}}
            await self._store.restore_book(term, book.book_id, fields, quarantined)
            if not keep_coupons:
                await self._restore_coupons(connection, term, book)
                await self._restore_idem(connection, term, book)

    async def _restore_coupons(self, connection: Any, term: Term, book: Book) -> None:
        chunk: list[tuple[str, str, str]] = []
        async with connection.transaction():
            async for row in recovery.coupons_of_book(connection, book.book_id):
                holder = f"{row['epoch']}-{row['seq']} {row['uses']} {row['assigned_at_ms']} {row['user_id']}"
                chunk.append((row["code"], row["user_id"], holder))
                if len(chunk) == KEYS_PER_CALL_MAX:
                    await self._store.restore_coupons(term, book.tenant_id, book.book_id, chunk)
                    chunk = []
        if chunk:
            await self._store.restore_coupons(term, book.tenant_id, book.book_id, chunk)

    async def _restore_idem(self, connection: Any, term: Term, book: Book) -> None:
        now = now_ms()
        rows = await recovery.idempotent_events(connection, term.shard, book.book_id, now - IDEMPOTENCY_MS)
        records = [(str(row["idem"]), _record(row, book), max(1, row["at_ms"] + IDEMPOTENCY_MS - now)) for row in rows]
        for start in range(0, len(records), KEYS_PER_CALL_MAX):
            await self._store.restore_idem(
                term, book.tenant_id, book.book_id, records[start : start + KEYS_PER_CALL_MAX]
            )


def _made_up(entry: Sequence[Any], begun: NewEpoch, made: int | None) -> bool:
    """Whether an entry was put into the stream by hand: one of an epoch that the ledger never began (the meta, which knows
    of none that is newer, was compared before), or one of the live epoch that follows the last one that a script made in
    it. What is missing before it was never made, and may be more than could ever be noted. It goes with the stream when the
    shard is certified."""
    epoch, seq = parse_entry_id(entry[0])
    if epoch < begun.owned.epoch and (made is None or epoch != begun.live_epoch or seq <= made):
        return False
    log.error("entry %d-%d of the stream is none of the service's: it is passed over", epoch, seq)
    return True


def _by_epoch(shard: int, entries: Sequence[Sequence[Any]]) -> list[tuple[int, Batch]]:
    """Stream entries as one batch for each epoch among them."""
    parts: dict[int, tuple[list[Any], list[DeadLetter], list[int]]] = {}
    for entry_id, fields in entries:
        epoch, seq = parse_entry_id(entry_id)
        events, dead, seqs = parts.setdefault(epoch, ([], [], []))
        seqs.append(seq)
        try:
            events.append(parse_event(seq, fields))
        except MalformedEvent as error:
            dead.append(garbled_letter(seq, fields, str(error)))
    return [
        (epoch, Batch(shard, epoch, 0, seqs[0] - 1, seqs[-1], events, dead))
        for epoch, (events, dead, seqs) in parts.items()
    ]


def _record(row: Any, book: Book) -> str:
    """An idempotency record as the scripts keep it."""
    position = f"{row['epoch']}-{row['seq']}"
    most = book.max_redemptions_per_code
    if row["event"] == COUPON_ASSIGNED:
        left = "" if most is None else str(most)
        answer = [row["fingerprint"], row["code"], str(row["at_ms"]), position, book.ack.value, left]
    else:
        left = "" if most is None else str(most - row["uses"])
        answer = [row["fingerprint"], row["user_id"], str(row["at_ms"]), position, str(row["uses"]), left]
    return msgspec.json.encode(answer).decode()
