"""What becomes of the codes that were lent in an epoch and have no record, once that epoch is over: the verdict, then book
after book. Every step may be killed and run again."""

from __future__ import annotations

from typing import NamedTuple

import asyncpg

from coupon_svc.domain.books import Ack
from coupon_svc.postgres.computed.lending import numbers_to_account
from coupon_svc.postgres.database import one_row
from coupon_svc.postgres.epochs import NewEpoch, Verdict
from coupon_svc.postgres.errors import BookBusy
from coupon_svc.postgres.lend_order import ROUND, random_places
from coupon_svc.postgres.outstanding import PIECE, limit_wait
from coupon_svc.postgres.shards import require_recoverer

_NOTE_VERDICT = """
    UPDATE shards SET settled_epoch = certified_epoch, settling_epoch = $2, settling_lost = $3 WHERE shard = $1
"""
_END_SETTLEMENT = "UPDATE shards SET settled_epoch = certified_epoch, settling_epoch = 0 WHERE shard = $1"
_LOCK_BOOK = """
    SELECT tenant_id, ack, leased_upto, places_upto, accounted_upto FROM books WHERE book_id = $1 FOR UPDATE
"""
# The next codes of a book that may have no record. `unrecorded`: the code is lent and has no coupon. `dead`: the epoch that
# is being settled has a dead letter of it. Dead letters of an epoch before were judged when that one was settled.
_NAMED = """
    SELECT named.code,
           (SELECT place FROM codes WHERE tenant_id = $2 AND codes.code = named.code) BETWEEN 0 AND $3
               AND (SELECT true FROM coupons WHERE coupons.book_id = $1 AND coupons.code = named.code) IS NULL AS unrecorded,
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
_QUARANTINE = "INSERT INTO quarantine (book_id, code, shard, epoch) SELECT $1, unnest($2::text[]), $3, $4"
_COUNT_SETTLED = """
    UPDATE books SET lent = lent - $2, accounted = lent - $2, quarantined = quarantined + $3, places_upto = $4, loaded = true
    WHERE book_id = $1
"""


class Settled(NamedTuple):
    """How many codes went back to be dealt, and how many into quarantine."""

    returned: int
    quarantined: int


async def end_live_epoch(connection: asyncpg.Connection, writer_id: str, begun: NewEpoch, *, lost: bool) -> Verdict:
    """Step 4: the live epoch is over for the ledger, and what is to become of its codes is written down.

    From this commit on every event of the epoch is late, on whichever Redis it turns up. The books are settled one after
    the other then; a recovery that takes over half-way may stand before another Redis, and would judge otherwise. Raises
    NotOwner.
    """
    async with connection.transaction():
        await require_recoverer(connection, writer_id, begun.owned)
        await connection.execute(_NOTE_VERDICT, begun.owned.shard, begun.live_epoch, lost)
    return Verdict(begun.live_epoch, lost)


async def books_to_settle(connection: asyncpg.Connection, shard: int) -> list[str]:
    """The books that may have codes which were lent and have no record."""
    return [row["book_id"] for row in await connection.fetch(_TO_SETTLE, shard)]


async def settle_piece(
    connection: asyncpg.Connection, writer_id: str, begun: NewEpoch, verdict: Verdict, book_id: str, wait_ms: int
) -> tuple[Settled, bool]:
    """What becomes of codes of one book that were lent and have no record, at most PIECE of them. Whether there are more.

    Of a book with `ack = ledger` nobody was answered, and so it is when it was shown that nothing was lost: the codes go
    back to be dealt. Otherwise somebody may have been answered: they are quarantined. So is a code of which the epoch has a
    dead letter, in either kind of book.

    A recovery that dies half-way leaves books settled and others not. The next one goes on with the same verdict.

    Does nothing before all places are accounted for (`account_piece`). The book's row comes first and the shard's last:
    a transaction that waits for a book holds up no commit. Raises BookBusy, NotOwner.
    """
    shard, epoch = begun.owned.shard, verdict.epoch
    try:
        async with connection.transaction():
            await limit_wait(connection, wait_ms)
            book = await one_row(connection, _LOCK_BOOK, book_id)
            if book["accounted_upto"] < book["leased_upto"] or await numbers_to_account(connection, book_id):
                return Settled(0, 0), True
            rows = await connection.fetch(_NAMED, book_id, book["tenant_id"], book["leased_upto"], shard, epoch, PIECE)
            unrecorded = [row for row in rows if row["unrecorded"]]
            may_be_answered = book["ack"] == Ack.REDIS and verdict.lost
            to_quarantine = [row["code"] for row in unrecorded if row["dead"] or may_be_answered]
            to_deal = [row["code"] for row in unrecorded if not (row["dead"] or may_be_answered)]
            upto = book["places_upto"]
            if to_deal and book["leased_upto"] == upto:  # no place is left in this round
                upto += ROUND
            places = random_places(len(to_deal), book["leased_upto"], upto)
            await connection.execute(_MOVE, book["tenant_id"], to_deal, places)
            await connection.execute(_MOVE, book["tenant_id"], to_quarantine, [-1] * len(to_quarantine))
            await connection.execute(_QUARANTINE, book_id, to_quarantine, shard, epoch)
            await connection.execute(_COUNT_SETTLED, book_id, len(unrecorded), len(to_quarantine), upto)
            # In this order: a trigger makes the rows of the first rows of the second (`lone_leases_stay_outstanding`).
            for table in ("lone_leases", "outstanding_codes"):
                await connection.execute(
                    f"DELETE FROM {table} WHERE book_id = $1 AND code = ANY ($2)",
                    book_id,
                    [row["code"] for row in rows],
                )
            await require_recoverer(connection, writer_id, begun.owned)
    except asyncpg.LockNotAvailableError:
        raise BookBusy from None
    return Settled(len(to_deal), len(to_quarantine)), len(rows) == PIECE


async def mark_settled(connection: asyncpg.Connection, writer_id: str, begun: NewEpoch, verdict: Verdict) -> None:
    """All books of the shard are settled. Raises NotOwner."""
    shard = begun.owned.shard
    async with connection.transaction():
        await require_recoverer(connection, writer_id, begun.owned)
        await connection.execute(_END_SETTLEMENT, shard)
        # What was seen of the epoch is a row a process, and stays until the next one is settled. What was reported of its
        # entries is in the ledger by now, and may be much.
        await connection.execute("DELETE FROM api_reports WHERE shard = $1 AND epoch < $2", shard, verdict.epoch)
        await connection.execute("DELETE FROM reported_entries WHERE shard = $1 AND epoch <= $2", shard, verdict.epoch)
