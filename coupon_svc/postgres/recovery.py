"""What the ledger does when a shard is recovered: begins an epoch, takes in what the stream still holds, and settles the
codes of which nobody knows. Every step may be killed and run again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import asyncpg

from coupon_svc.domain.books import Ack
from coupon_svc.domain.chain import CHAIN_START, chain_hash
from coupon_svc.domain.events import (
    COUPON_ASSIGNED,
    COUPON_CONFIRMED,
    COUPON_REDEEMED,
    Entry,
    Event,
    MalformedEntry,
    events_of,
)
from coupon_svc.domain.position import Epoch, Position, Seq
from coupon_svc.postgres.catalogue import ROUND, random_places
from coupon_svc.postgres.computed import numbers_to_account
from coupon_svc.postgres.database import one_row
from coupon_svc.postgres.errors import BookBusy, HistoryForked, NotOwner
from coupon_svc.postgres.events import (
    DATA_ERRORS,
    Batch,
    DeadLetter,
    contradicts,
    dead_letter,
    write_batch,
    write_events,
)
from coupon_svc.postgres.marks import Mark
from coupon_svc.postgres.outstanding import PIECE, limit_wait
from coupon_svc.postgres.shards import OwnedShard

EPOCH_CHANNEL = "coupon_epoch"
"""NOTIFY channel on which API processes hear that an epoch has begun: they answer nothing of the older one any more."""

MISSING = "missing from the stream"

_BEGIN_EPOCH = """
    UPDATE shards SET epoch = epoch + 1
    WHERE shard = $1 AND owner = $2 AND generation = $3 AND epoch = $4 AND stopped IS NULL
    RETURNING shard, epoch, committed, generation, chain, tip, certified_epoch, settled_epoch, rebuild, settling_epoch,
              settling_lost
"""
# The next codes of a book that may have no record. `lost`: the code is lent and has no coupon. `dead`: the epoch that is
# being settled has a dead letter of it. Dead letters of an epoch before were judged when that one was settled.
_NAMED = """
    SELECT named.code,
           (SELECT place FROM codes WHERE tenant_id = $2 AND codes.code = named.code) BETWEEN 0 AND $3
               AND (SELECT true FROM coupons WHERE coupons.book_id = $1 AND coupons.code = named.code) IS NULL AS lost,
           (SELECT count(*) FROM dead_letters d WHERE d.book_id = $1 AND d.code = named.code
               AND d.shard = $4 AND d.epoch = $5) > 0 AS dead
    FROM (SELECT code FROM outstanding_codes WHERE book_id = $1 UNION SELECT code FROM lone_leases WHERE book_id = $1
          ORDER BY code LIMIT $6) named
"""
_TO_SETTLE = """
    SELECT book_id FROM books WHERE shard = $1 AND lent > 0 AND (leased_upto > accounted_upto OR NOT loaded
        OR EXISTS (SELECT FROM code_ranges r WHERE r.book_id = books.book_id AND r.lent_upto > r.accounted_upto)
        OR EXISTS (SELECT FROM outstanding_codes o WHERE o.book_id = books.book_id)
        OR EXISTS (SELECT FROM lone_leases l WHERE l.book_id = books.book_id))
"""
_MOVE = """
    UPDATE codes SET place = moved.place FROM unnest($2::text[], $3::bigint[]) AS moved (code, place)
    WHERE tenant_id = $1 AND codes.code = moved.code
"""
_LATE_HEAD = """
    INSERT INTO late_heads AS known (shard, links, chain) VALUES ($1, 0, $2)
    ON CONFLICT (shard) DO UPDATE SET links = known.links RETURNING links, chain
"""
_NOTE_LATE = """
    INSERT INTO late_events (shard, link, recorded, chain, epoch, seq, event, book_id, code, user_id, at_ms, uses,
                             reference, metadata, idem, fingerprint)
    VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16)
"""
_ENTRY = f"SELECT {', '.join(Entry._fields[:-1])}, events AS body FROM entries"
# Those of the seqs that lie within an entry.
_WITHIN_ENTRIES = """
    SELECT asked.seq FROM unnest($3::bigint[]) AS asked (seq), LATERAL (
        SELECT seq, n FROM entries WHERE shard = $1 AND epoch = $2 AND entries.seq >= asked.seq ORDER BY seq LIMIT 1) e
    WHERE e.seq - e.n < asked.seq
"""
_KNOWN = f"""
    ({_WITHIN_ENTRIES}
    UNION SELECT seq FROM old_events WHERE shard = $1 AND epoch = $2 AND seq = ANY ($3)
    UNION SELECT seq FROM late_events WHERE shard = $1 AND epoch = $2 AND seq = ANY ($3) AND recorded)
    EXCEPT SELECT seq FROM dead_letters WHERE shard = $1 AND epoch = $2 AND seq = ANY ($3)
"""
# By position alone, however few of them count: so each page is read in the same time. The page's last position comes with
# it, in a row of nulls where none of its events counts.
_OLD_IDEMPOTENT_EVENTS = """
    WITH page AS MATERIALIZED (
        SELECT event, book_id, epoch, seq, code, user_id, at_ms, uses, idem, fingerprint FROM old_events
        WHERE shard = $1 AND (epoch, seq) > ($2, $3) ORDER BY epoch, seq LIMIT $5)
    SELECT page.*, last.epoch AS last_epoch, last.seq AS last_seq
    FROM (SELECT epoch, seq FROM page ORDER BY epoch DESC, seq DESC LIMIT 1) last
    LEFT JOIN page ON idem IS NOT NULL AND at_ms > $4
    ORDER BY page.epoch, page.seq
"""
# By position alone, as before; bodies only of those in which a key is looked for.
_KEYED_ENTRIES = f"""
    SELECT {", ".join(Entry._fields[:-1])}, CASE WHEN keyed AND at_ms > $5 THEN events END AS body FROM entries
    WHERE shard = $1 AND (epoch, seq) > ($2, $3) ORDER BY epoch, seq LIMIT $4
"""
# What came late stands at an old position, whenever it was decided.
_LATE_IDEMPOTENT_EVENTS = """
    SELECT event, book_id, epoch, seq, code, user_id, at_ms, uses, idem, fingerprint FROM late_events
    WHERE shard = $1 AND recorded AND (epoch, seq) <= ($2, $3) AND idem IS NOT NULL AND at_ms > $4 ORDER BY epoch, seq
"""
_COUPONS = """
    SELECT code, user_id, assigned_at_ms, uses, epoch, seq FROM coupons
    WHERE book_id = $1 AND code > $2 ORDER BY code LIMIT $3
"""
_COUPONS_NAMED = "SELECT code, assigned_at_ms, epoch, seq FROM coupons WHERE book_id = $1 AND code = ANY ($2)"
PAGE = 5_000
"""Rows per statement of what Redis is rebuilt from."""
EVENTS_PAGE = 20_000
ENTRIES_PAGE = 2_000


class Verdict(NamedTuple):
    """What is to become of the codes that were lent in an epoch and have no record. It is come to once."""

    epoch: int
    """0: no epoch is to be settled, and nobody can have been answered."""
    lost: bool
    """Somebody may have been answered, and the record be lost."""


class NewEpoch(NamedTuple):
    """A shard at the beginning of its recovery.

    `live_epoch` is the one in which Redis decided last, and whose codes are not settled yet; 0 when there is none. Events
    of any other epoch are late.
    """

    owned: OwnedShard
    live_epoch: int
    rebuild: bool
    """An operator asked that nothing in Redis be kept."""
    verdict: Verdict | None = None
    """Of a recovery that did not get to the end of its settlement."""


class Settled(NamedTuple):
    """How many codes went back to be dealt, and how many into quarantine."""

    returned: int
    quarantined: int


async def begin_epoch(connection: asyncpg.Connection, writer_id: str, owned: OwnedShard) -> NewEpoch:
    """Step 1: the next epoch. From its commit on, no batch of an older one can be committed.

    Raises NotOwner; HistoryForked when the shard was stopped before.
    """
    async with connection.transaction():
        row = await connection.fetchrow(_BEGIN_EPOCH, owned.shard, writer_id, owned.generation, owned.epoch)
        if row is None:
            reason = await stopped_because(connection, owned.shard)
            raise HistoryForked(reason) if reason else NotOwner
        await connection.execute("SELECT pg_notify($1, $2)", EPOCH_CHANNEL, str(owned.shard))
    live = row["certified_epoch"] if row["certified_epoch"] > row["settled_epoch"] else 0
    verdict = Verdict(row["settling_epoch"], row["settling_lost"]) if row["settling_epoch"] else None
    return NewEpoch(OwnedShard(**{name: row[name] for name in OwnedShard._fields}), live, row["rebuild"], verdict)


async def last_seq(connection: asyncpg.Connection, shard: int, epoch: int) -> int:
    """The seq up to which the ledger knows an epoch, 0 for nothing."""
    seq, _ = await end_of_epoch(connection, shard, epoch)
    return seq


async def end_of_epoch(connection: asyncpg.Connection, shard: int, epoch: int) -> tuple[int, str | None]:
    """The seq up to which the ledger accounts for an epoch, and the tip of the entry there. None for a tip that is not
    known: what stands before it is missing, or an older version wrote it."""
    row = await connection.fetchrow(
        "SELECT seq, tip FROM epochs WHERE shard = $1 AND epoch = $2"
        " UNION ALL SELECT committed, tip FROM shards WHERE shard = $1 AND epoch = $2",
        shard,
        epoch,
    )
    return (row["seq"], row["tip"]) if row is not None else (0, "")


async def entry_ending_at(connection: asyncpg.Connection, shard: int, epoch: int, seq: int) -> Entry | None:
    """The entry of the ledger whose last event is at a position; None when it has none there."""
    row = await connection.fetchrow(f"{_ENTRY} WHERE (shard, epoch, seq) = ($1, $2, $3)", shard, epoch, seq)
    return Entry(*row) if row is not None else None


async def known_seqs(connection: asyncpg.Connection, shard: int, epoch: int, seqs: Sequence[int]) -> set[int]:
    """Those of the seqs at which the ledger has an event."""
    return {row["seq"] for row in await connection.fetch(_KNOWN, shard, epoch, seqs)}


async def drain(connection: asyncpg.Connection, writer_id: str, begun: NewEpoch, batch: Batch) -> int:
    """Step 3: entries of the live epoch into the ledger, though it is over. Those that the ledger has must be the same;
    those that are missing before or among them are noted as dead letters.

    `dead` of the batch are entries of which nothing can be read. Returns the seq up to which the ledger accounts for the
    epoch. Raises HistoryForked, NotOwner.
    """
    shard, epoch = begun.owned.shard, batch.epoch
    async with connection.transaction():
        chain = await require_recoverer(connection, writer_id, begun.owned)
        last, tip = await end_of_epoch(connection, shard, epoch)
        known = [entry for entry in batch.entries if entry.seq <= last]
        await _require_same(connection, shard, epoch, known)
        new = [entry for entry in batch.entries if entry.seq > last]
        reached, dead = last, [letter for letter in batch.dead if letter.seq > last]
        noted = {letter.seq for letter in dead}
        for entry in new:
            if entry.before < reached:
                raise HistoryForked(f"entry {epoch}-{entry.seq} differs from the one in the ledger")
            if entry.before == reached and tip is not None and entry.after != tip:
                raise HistoryForked(f"entry {epoch}-{entry.seq} differs from the one in the ledger: it follows another")
            dead += [DeadLetter(seq, b"", MISSING) for seq in range(reached + 1, entry.before + 1) if seq not in noted]
            reached, tip = entry.seq, entry.tip
        if batch.upto > reached:
            dead += [DeadLetter(seq, b"", MISSING) for seq in range(reached + 1, batch.upto + 1) if seq not in noted]
            reached, tip = batch.upto, None
        first = new[0].before if new else last
        events = [event for event in batch.events if event.seq > first]
        if dead or await anything_missing(connection, shard, epoch):
            events, orphans = await _without_orphans(connection, events)
            dead += orphans
        head = await _write_all(connection, batch._replace(entries=new, events=events, dead=dead, chain=chain))
        await connection.execute("UPDATE shards SET chain = $2 WHERE shard = $1", shard, head)
        await connection.execute(
            "INSERT INTO epochs VALUES ($1, $2, $3, $4) ON CONFLICT (shard, epoch) DO UPDATE SET seq = $3, tip = $4",
            shard,
            epoch,
            reached,
            tip,
        )
    return reached


async def _require_same(connection: asyncpg.Connection, shard: int, epoch: int, entries: Sequence[Entry]) -> None:
    """Raises HistoryForked unless the ledger has these very entries. One of an older version may stand there as an event."""
    seqs = [entry.seq for entry in entries]
    rows = await connection.fetch(f"{_ENTRY} WHERE shard = $1 AND epoch = $2 AND seq = ANY ($3)", shard, epoch, seqs)
    recorded = {row["seq"]: Entry(*row) for row in rows}
    rows = await connection.fetch(
        "SELECT seq, event, book_id, code, user_id FROM old_events WHERE shard = $1 AND epoch = $2 AND seq = ANY ($3)",
        shard,
        epoch,
        seqs,
    )
    old = {row["seq"]: (row["event"], row["book_id"], row["code"], row["user_id"]) for row in rows}
    # What is neither is a dead letter, unless it lies within an entry that ends elsewhere.
    rows = await connection.fetch(_WITHIN_ENTRIES, shard, epoch, seqs)
    within = {row["seq"] for row in rows}
    for entry in entries:
        if entry.seq in old:
            same = [(e.event, e.book_id, e.code, e.user_id) for e in events_of(entry)] == [old[entry.seq]]
        else:
            same = recorded[entry.seq] == entry if entry.seq in recorded else entry.seq not in within
        if not same:
            raise HistoryForked(f"entry {epoch}-{entry.seq} differs from the one in the ledger")


async def _write_all(connection: asyncpg.Connection, batch: Batch) -> bytes:
    """Write a batch, what follows from each event alone when together it cannot be; what the ledger cannot take becomes a
    dead letter.

    Returns the hash of the last entry. Raises HistoryForked for an event that contradicts the ledger.
    """
    try:
        async with connection.transaction():
            return await write_batch(connection, batch)
    except DATA_ERRORS:
        pass
    dead = list(batch.dead)
    for event in batch.events:
        try:
            async with connection.transaction():
                await write_events(connection, batch.shard, [event])
        except DATA_ERRORS as error:
            if contradicts(error):
                raise HistoryForked(f"event {batch.epoch}-{event.seq} contradicts the ledger") from None
            dead.append(dead_letter(event, type(error).__name__))
    return await write_batch(connection, batch._replace(events=(), dead=dead))


async def _without_orphans(
    connection: asyncpg.Connection, events: Sequence[Event]
) -> tuple[list[Event], list[DeadLetter]]:
    """Events without those that redeem or confirm a coupon whose assignment or earlier redemption is lost, and these as
    dead letters.

    Nobody was told that such a redemption succeeded: it stood behind the lost event, and waited for the ledger.
    """
    follow = [event for event in events if event.event != COUPON_ASSIGNED]
    rows = await connection.fetch(
        "SELECT book_id, code, uses FROM coupons JOIN unnest($1::text[], $2::text[]) AS asked (book_id, code)"
        " USING (book_id, code)",
        [event.book_id for event in follow],
        [event.code for event in follow],
    )
    uses = {(row["book_id"], row["code"]): row["uses"] for row in rows}
    good, orphans = [], []
    for event in events:
        coupon = (event.book_id, event.code)
        if event.event == COUPON_ASSIGNED:
            uses[coupon] = 0
        elif event.event == COUPON_REDEEMED and uses.get(coupon, -1) + 1 == event.uses:
            uses[coupon] = event.uses
        elif event.event == COUPON_CONFIRMED and uses.get(coupon) == event.uses:
            pass
        else:
            orphans.append(dead_letter(event, "follows a lost event"))
            continue
        good.append(event)
    return good, orphans


async def anything_missing(connection: asyncpg.Connection, shard: int, epoch: int) -> bool:
    """Whether there were events in the epoch of which not even the code is known: gone from the stream, or garbled."""
    return bool(
        await connection.fetchval(
            "SELECT EXISTS (SELECT FROM dead_letters WHERE shard = $1 AND epoch = $2 AND code IS NULL)",
            shard,
            epoch,
        )
    )


async def first_dead_letter(connection: asyncpg.Connection, shard: int, epoch: int) -> int | None:
    """The seq of the first event of an epoch that the ledger could not take; None when there is none."""
    seq: int | None = await connection.fetchval(
        "SELECT min(seq) FROM dead_letters WHERE shard = $1 AND epoch = $2", shard, epoch
    )
    return seq


async def may_have_answered_early(connection: asyncpg.Connection, shard: int) -> bool:
    """Whether a book of the shard answers before the ledger knows, and has codes lent."""
    return bool(
        await connection.fetchval(
            "SELECT EXISTS (SELECT FROM books WHERE shard = $1 AND ack = 'redis' AND lent > 0)", shard
        )
    )


async def take_late(
    connection: asyncpg.Connection, writer_id: str, begun: NewEpoch, epoch: int, events: Sequence[Event]
) -> None:
    """Events of a settled epoch: kept apart; one that assigned a code which is in quarantine since the same epoch gives it
    to its user."""
    notes: list[tuple[Event, bool]] = []
    async with connection.transaction():
        await require_recoverer(connection, writer_id, begun.owned)
        shard, seqs = begun.owned.shard, [event.seq for event in events]
        # Each by itself: a receipt may have brought back the record of a position beyond others that are still lost.
        known = await known_seqs(connection, shard, epoch, seqs)
        rows = await connection.fetch(
            "SELECT seq FROM dead_letters WHERE shard = $1 AND epoch = $2 AND seq = ANY ($3)", shard, epoch, seqs
        )
        known |= {row["seq"] for row in rows}
        rows = await connection.fetch("SELECT seq FROM late_events WHERE shard = $1 AND epoch = $2", shard, epoch)
        noted = {row["seq"] for row in rows}
        for event in events:
            if event.seq in known:
                continue
            if event.event == COUPON_ASSIGNED and await release(
                connection, event.book_id, event.code, epoch, "late_event"
            ):
                await connection.execute("UPDATE books SET lent = lent + 1 WHERE book_id = $1", event.book_id)
                await connection.execute(
                    "UPDATE codes SET place = 0 WHERE book_id = $1 AND code = $2", event.book_id, event.code
                )
                notes.append((event, True))
            elif event.seq not in noted:
                notes.append((event, False))
        await note_late(connection, shard, notes)


async def note_late(connection: asyncpg.Connection, shard: int, notes: Sequence[tuple[Event, bool]]) -> None:
    """Add events to the shard's log of late ones, each with whether what follows from it is to be recorded.

    The last thing of a transaction: it holds the shard's `late_heads` until the commit.
    """
    if not notes:
        return
    row = await one_row(connection, _LATE_HEAD, shard, CHAIN_START)
    links, head = row["links"], row["chain"]
    for event, recorded in notes:
        links += 1
        head = chain_hash(head, shard, event.epoch, (links, recorded, event.record))
        await connection.execute(_NOTE_LATE, shard, links, recorded, head, *event)
        if recorded:
            await write_events(connection, shard, [event])
    await connection.execute("UPDATE late_heads SET links = $2, chain = $3 WHERE shard = $1", shard, links, head)


async def release(connection: asyncpg.Connection, book_id: str, code: str, epoch: int, decision: str) -> bool:
    """Take a code that was lent in `epoch` out of the quarantine and note why. The caller says what it is then.

    False when it is not in quarantine since that epoch: a record of an older one says nothing about who was given the code
    when it was dealt again.
    """
    done = await connection.execute(
        "DELETE FROM quarantine WHERE book_id = $1 AND code = $2 AND epoch = $3", book_id, code, epoch
    )
    if done != "DELETE 1":
        return False
    await connection.execute("UPDATE books SET quarantined = quarantined - 1 WHERE book_id = $1", book_id)
    await connection.execute(
        "INSERT INTO quarantine_decisions (book_id, code, decision) VALUES ($1, $2, $3)", book_id, code, decision
    )
    return True


async def end_live_epoch(connection: asyncpg.Connection, writer_id: str, begun: NewEpoch, *, lost: bool) -> Verdict:
    """Step 4: the live epoch is over for the ledger, and what is to become of its codes is written down.

    From this commit on every event of the epoch is late, on whichever Redis it turns up. The books are settled one after
    the other then; a recovery that takes over half-way may stand before another Redis, and would judge otherwise. Raises
    NotOwner.
    """
    async with connection.transaction():
        await require_recoverer(connection, writer_id, begun.owned)
        await connection.execute(
            "UPDATE shards SET settled_epoch = certified_epoch, settling_epoch = $2, settling_lost = $3 WHERE shard = $1",
            begun.owned.shard,
            begun.live_epoch,
            lost,
        )
    return Verdict(begun.live_epoch, lost)


async def books_to_settle(connection: asyncpg.Connection, shard: int) -> list[str]:
    """The books that may have codes which were lent and have no record."""
    return [row["book_id"] for row in await connection.fetch(_TO_SETTLE, shard)]


async def settle_piece(
    connection: asyncpg.Connection, writer_id: str, begun: NewEpoch, verdict: Verdict, book_id: str, wait_ms: int
) -> tuple[Settled, bool]:
    """What becomes of codes of one book that were lent and have no record, at most PIECE of them. Whether there are more.

    Of a book with `ack = ledger` nobody was answered, and so it is when it was shown that nothing was lost: the codes go
    back to be dealt. Otherwise somebody may have been answered: they are quarantined.

    A recovery that dies half-way leaves books settled and others not. The next one goes on with the same verdict.

    Does nothing before all places are accounted for (`account_piece`). The book's row comes first and the shard's last:
    a transaction that waits for a book holds up no commit. Raises BookBusy, NotOwner.
    """
    shard, epoch = begun.owned.shard, verdict.epoch
    try:
        async with connection.transaction():
            await limit_wait(connection, wait_ms)
            book = await one_row(
                connection,
                "SELECT tenant_id, ack, leased_upto, places_upto, accounted_upto FROM books WHERE book_id = $1 FOR UPDATE",
                book_id,
            )
            if book["accounted_upto"] < book["leased_upto"] or await numbers_to_account(connection, book_id):
                return Settled(0, 0), True
            rows = await connection.fetch(_NAMED, book_id, book["tenant_id"], book["leased_upto"], shard, epoch, PIECE)
            lost = [row for row in rows if row["lost"]]
            keep_back = book["ack"] == Ack.REDIS and verdict.lost
            held = [row["code"] for row in lost if row["dead"] or keep_back]
            back = [row["code"] for row in lost if not (row["dead"] or keep_back)]
            upto = book["places_upto"]
            if back and book["leased_upto"] == upto:  # no place is left in this round
                upto += ROUND
            places = random_places(len(back), book["leased_upto"], upto)
            await connection.execute(_MOVE, book["tenant_id"], back, places)
            await connection.execute(_MOVE, book["tenant_id"], held, [-1] * len(held))
            await connection.execute(
                "INSERT INTO quarantine (book_id, code, shard, epoch) SELECT $1, unnest($2::text[]), $3, $4",
                book_id, held, shard, epoch,
            )  # fmt: skip
            await connection.execute(
                "UPDATE books SET lent = lent - $2, accounted = lent - $2, quarantined = quarantined + $3,"
                " places_upto = $4, loaded = true WHERE book_id = $1",
                book_id, len(lost), len(held), upto,
            )  # fmt: skip
            # In this order: rows of the first become rows of the second.
            for table in ("lone_leases", "outstanding_codes"):
                await connection.execute(
                    f"DELETE FROM {table} WHERE book_id = $1 AND code = ANY ($2)",
                    book_id,
                    [row["code"] for row in rows],
                )
            await require_recoverer(connection, writer_id, begun.owned)
    except asyncpg.LockNotAvailableError:
        raise BookBusy from None
    return Settled(len(back), len(held)), len(rows) == PIECE


async def mark_settled(connection: asyncpg.Connection, writer_id: str, begun: NewEpoch, verdict: Verdict) -> None:
    """All books of the shard are settled. Raises NotOwner."""
    shard = begun.owned.shard
    async with connection.transaction():
        await require_recoverer(connection, writer_id, begun.owned)
        await connection.execute(
            "UPDATE shards SET settled_epoch = certified_epoch, settling_epoch = 0 WHERE shard = $1", shard
        )
        await connection.execute("DELETE FROM api_reports WHERE shard = $1 AND epoch < $2", shard, verdict.epoch)
        await connection.execute("DELETE FROM reported_entries WHERE shard = $1 AND epoch <= $2", shard, verdict.epoch)


async def still_recoverer(connection: asyncpg.Connection, writer_id: str, begun: NewEpoch) -> None:
    """Raises NotOwner when another writer or another epoch has taken over."""
    async with connection.transaction():
        await require_recoverer(connection, writer_id, begun.owned)


async def mark_certified(connection: asyncpg.Connection, writer_id: str, begun: NewEpoch) -> OwnedShard:
    """The last word before Redis is certified: from now on it may decide in this epoch. Returns the shard as it is now.

    Raises NotOwner.
    """
    async with connection.transaction():
        chain = await require_recoverer(connection, writer_id, begun.owned)
        await connection.execute(
            "UPDATE shards SET certified_epoch = epoch, rebuild = false WHERE shard = $1", begun.owned.shard
        )
    return begun.owned._replace(chain=chain)


async def stopped_because(connection: asyncpg.Connection, shard: int) -> str | None:
    """Why the shard was stopped; None when it is not."""
    reason: str | None = await connection.fetchval("SELECT stopped FROM shards WHERE shard = $1", shard)
    return reason


async def want_rebuild(connection: asyncpg.Connection, shard: int) -> None:
    """The shard's next recovery, whoever makes it, keeps nothing that is in Redis."""
    await connection.execute("UPDATE shards SET rebuild = true WHERE shard = $1", shard)


async def stop_shard(connection: asyncpg.Connection, shard: int, reason: str) -> None:
    """Nothing of the shard is persisted or recovered until a person has cleared `stopped`."""
    await connection.execute("UPDATE shards SET stopped = $2 WHERE shard = $1", shard, reason)


async def require_recoverer(connection: asyncpg.Connection, writer_id: str, owned: OwnedShard) -> bytes:
    """Raises NotOwner unless this writer owns the shard in this generation and epoch; holds it until the commit.

    Returns the hash of the shard's last row.
    """
    chain: bytes | None = await connection.fetchval(
        "SELECT chain FROM shards WHERE shard = $1 AND owner = $2 AND generation = $3 AND epoch = $4 FOR UPDATE",
        owned.shard, writer_id, owned.generation, owned.epoch,
    )  # fmt: skip
    if chain is None:
        raise NotOwner
    return chain


# --- what Redis is rebuilt from


async def quarantined_codes(connection: asyncpg.Connection, book_id: str) -> list[str]:
    """The codes of a book that are in quarantine."""
    rows = await connection.fetch("SELECT code FROM quarantine WHERE book_id = $1", book_id)
    return [row["code"] for row in rows]


async def coupons_named(
    connection: asyncpg.Connection, book_id: str, codes: Sequence[str]
) -> dict[str, tuple[Position, int]]:
    """By code: where each of these coupons was assigned, and when in Unix milliseconds."""
    rows = await connection.fetch(_COUPONS_NAMED, book_id, codes)
    return {row["code"]: (Position(Epoch(row["epoch"]), Seq(row["seq"])), row["assigned_at_ms"]) for row in rows}


async def coupons_of_book(connection: asyncpg.Connection, book_id: str, after: str = "") -> list[asyncpg.Record]:
    """The next PAGE coupons of a book behind a code: code, user_id, assigned_at_ms, uses, epoch, seq."""
    return list(await connection.fetch(_COUPONS, book_id, after, PAGE))


class EventsPage(NamedTuple):
    """Events that carry an Idempotency-Key, and up to which position that is all of them; None at the end."""

    events: list[Event]
    upto: Mark | None


async def late_idempotent_events(connection: asyncpg.Connection, shard: int, upto: Mark, since_ms: int) -> list[Event]:
    """Events up to a position that came late and carry an Idempotency-Key, oldest first."""
    return [_event(row) for row in await connection.fetch(_LATE_IDEMPOTENT_EVENTS, shard, *upto, since_ms)]


async def old_idempotent_events(connection: asyncpg.Connection, shard: int, after: Mark, since_ms: int) -> EventsPage:
    """As `idempotent_events`, of those that older versions wrote. They all stand before the first entry."""
    rows = await connection.fetch(_OLD_IDEMPOTENT_EVENTS, shard, *after, since_ms, EVENTS_PAGE)
    if not rows:
        return EventsPage([], None)
    events = [_event(row) for row in rows if row["idem"] is not None]
    return EventsPage(events, Mark(rows[0]["last_epoch"], rows[0]["last_seq"]))


async def idempotent_events(connection: asyncpg.Connection, shard: int, after: Mark, since_ms: int) -> EventsPage:
    """Events of a shard behind a position that carry an Idempotency-Key and are younger than `since_ms`, a page of them.

    Oldest first: of two with the same key (the first was lost for a while) the later one is what the key answers.
    """
    rows = await connection.fetch(_KEYED_ENTRIES, shard, *after, ENTRIES_PAGE, since_ms)
    if not rows:
        return EventsPage([], None)
    dead = await connection.fetch(
        "SELECT epoch, seq FROM dead_letters WHERE shard = $1 AND (epoch, seq) > ($2, $3)", shard, *after
    )
    passed_over = {(row["epoch"], row["seq"]) for row in dead}
    events = [
        event
        for row in rows
        if row["body"] is not None
        for event in _readable(Entry(*row))
        if event.idem is not None and event.position not in passed_over
    ]
    return EventsPage(events, Mark(rows[-1]["epoch"], rows[-1]["seq"]))


def _readable(entry: Entry) -> list[Event]:
    try:
        return events_of(entry)
    except MalformedEntry:
        return []


def _event(row: asyncpg.Record) -> Event:
    return Event(
        row["epoch"], row["seq"], row["event"], row["book_id"], row["code"], row["user_id"], row["at_ms"], row["uses"],
        idem=row["idem"], fingerprint=row["fingerprint"],
    )  # fmt: skip


# --- who may have been answered


async def silent_processes(connection: asyncpg.Connection, shard: int, epoch: int) -> list[str]:
    """API processes that could have answered in an epoch and have not said what they saw of it."""
    rows = await connection.fetch(
        "SELECT process_id FROM api_processes p WHERE NOT EXISTS"
        " (SELECT FROM api_reports r WHERE r.process_id = p.process_id AND r.shard = $1 AND r.epoch = $2)",
        shard,
        epoch,
    )
    return [row["process_id"] for row in rows]


async def reported_entries(connection: asyncpg.Connection, shard: int, epoch: int, behind: int) -> list[Entry]:
    """What API processes have reported and the ledger lacks: the next entries of an epoch that end behind a seq."""
    rows = await connection.fetch(
        "SELECT epoch, seq, n, after, tip, at_ms, events AS body FROM reported_entries"
        " WHERE shard = $1 AND epoch = $2 AND seq > $3 ORDER BY seq LIMIT $4",
        shard,
        epoch,
        behind,
        ENTRIES_PAGE,
    )
    return [Entry(*row) for row in rows]


async def contradicted(connection: asyncpg.Connection, shard: int, epoch: int, accounted: int) -> int | None:
    """The seq of an entry that an API process has reported and that the ledger does not have, though it accounts for the
    epoch up to there; None when there is none. One that is noted as missing contradicts nothing."""
    seq: int | None = await connection.fetchval(
        "SELECT min(seq) FROM reported_entries r WHERE shard = $1 AND epoch = $2 AND seq <= $3"
        " AND NOT EXISTS (SELECT FROM entries e"
        " WHERE (e.shard, e.epoch, e.seq, e.tip) = (r.shard, r.epoch, r.seq, r.tip))"
        " AND NOT EXISTS (SELECT FROM dead_letters d"
        " WHERE (d.shard, d.epoch, d.seq) = (r.shard, r.epoch, r.seq) AND d.code IS NULL)",
        shard,
        epoch,
        accounted,
    )
    return seq


async def highest_seen(connection: asyncpg.Connection, shard: int, epoch: int) -> int:
    """The highest seq of an epoch that any API process has answered from, of those that reported."""
    seq = await connection.fetchval(
        "SELECT max(seen_seq) FROM api_reports WHERE shard = $1 AND epoch = $2", shard, epoch
    )
    return seq or 0
