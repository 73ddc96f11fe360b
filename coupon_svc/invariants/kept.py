"""What callers were answered, held against the ledger: each answer is kept there, and nothing is that nobody asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from coupon_svc.domain.position import Position, parse_shard_position
from coupon_svc.invariants.answers import Book, Coupon, History
from coupon_svc.invariants.check import Check
from coupon_svc.postgres.database import LedgerConnection

_COUPONS = """
    SELECT code, user_id, uses, epoch, seq, shard FROM coupons JOIN books USING (book_id) WHERE book_id = $1
"""
_QUARANTINED = "SELECT code FROM quarantine WHERE book_id = $1"
_REDEMPTIONS = "SELECT r.*, shard FROM redemptions r JOIN books USING (book_id) WHERE book_id = $1"
# From the first on: the key is (shard, epoch, seq).
_EVENTS = """
    SELECT shard, epoch, seq, event, code, idem FROM events WHERE shard = $1 AND (epoch, seq) >= ($2, $3) AND book_id = $4
"""


class KeptCheck(Check):
    """What must hold of the ledger, given what callers were answered."""

    COUPON = "P2", "a coupon that was answered is not in the ledger"
    QUARANTINED = "P1", "the record of a coupon that was answered is lost, and its code is not in quarantine"
    USER = "P1", "a coupon is another user's in the ledger than was answered"
    POSITION = "P2", "a coupon's position in the ledger is not the one that was answered"
    CODES_PER_USER = "P3", "a user has more codes in the ledger than the book allows"
    COUPON_ASKED = "P5", "a coupon is in the ledger that nobody had asked for"
    REDEMPTION = "P2", "a redemption that was answered is not in the ledger"
    REDEMPTION_SAME = "P2", "a redemption is not in the ledger as it was answered"
    USES_MAX = "P3", "a code has more redemptions in the ledger than its book allows"
    REDEMPTION_ASKED = "P5", "a redemption is in the ledger that nobody had asked for"
    EVENT = "P2", "an event that was answered as durable is not in the ledger"
    ONE_EFFECT = "P5", "an Idempotency-Key has two effects in the ledger"


class BookRows(NamedTuple):
    """What the ledger has of a book."""

    coupons: Mapping[str, Any]
    """By code."""
    quarantined: Collection[str]
    redemptions: Sequence[Any] = ()
    events: Sequence[Any] = ()
    """From the first on that was answered as durable."""


class Compared(NamedTuple):
    """What was found of a book, each with how often; and how many records were lost that may be: their codes are in
    quarantine."""

    found: Counter[KeptCheck]
    lost: int


async def read_coupons(connection: LedgerConnection, book_id: str) -> BookRows:
    """A book's coupons, and which of its codes are in quarantine."""
    coupons = {row["code"]: row for row in await connection.fetch(_COUPONS, book_id)}
    return BookRows(coupons, {row["code"] for row in await connection.fetch(_QUARANTINED, book_id)})


async def read_rows(connection: LedgerConnection, book_id: str, answered: Mapping[str, Coupon]) -> BookRows:
    """All that the ledger has of a book, as far as it is compared with these answers."""
    rows = await read_coupons(connection, book_id)
    events: Sequence[Any] = ()
    if positions := _durable_positions(answered):
        shard, oldest = min(parse_shard_position(position) for position in positions)
        events = await connection.fetch(_EVENTS, shard, *oldest, book_id)
    return rows._replace(redemptions=await connection.fetch(_REDEMPTIONS, book_id), events=events)


def compare(
    history: History,
    book: Book,
    answered: Mapping[str, Coupon],
    rows: BookRows,
    *,
    given_up: Collection[str] = (),
    uncounted: Collection[str] = (),
) -> Compared:
    """Hold what was answered of a book, by code, against its rows.

    An operator gave the records of `given_up` codes up: they may be lost like those of an ack = redis book. Those of
    `uncounted` codes were lost and came back: they are nobody's surplus, nor the second effect of a key.
    """
    found, lost = _coupons(book, answered, rows, given_up)
    found += _surplus(history, book, rows, uncounted)
    found += _redemptions(history, book, answered, rows)
    kept = {code: coupon for code, coupon in answered.items() if code not in given_up}
    found += _events(kept, rows, uncounted)
    return Compared(found, lost)


def _coupons(
    book: Book, answered: Mapping[str, Coupon], rows: BookRows, given_up: Collection[str]
) -> tuple[Counter[KeptCheck], int]:
    found: Counter[KeptCheck] = Counter()
    lost = 0
    for code, coupon in answered.items():
        row = rows.coupons.get(code)
        if row is None:
            may_be_lost = book.ack == "redis" and not coupon.durable and not coupon.redemptions
            if not may_be_lost and code not in given_up:
                found[KeptCheck.COUPON] += 1
            elif code not in rows.quarantined:
                found[KeptCheck.QUARANTINED] += 1
            else:
                lost += 1
        elif row["user_id"] != coupon.user_id:
            found[KeptCheck.USER] += 1
        elif _position(row) != coupon.position and code not in given_up:
            found[KeptCheck.POSITION] += 1
    return found, lost


def _surplus(history: History, book: Book, rows: BookRows, uncounted: Collection[str]) -> Counter[KeptCheck]:
    found: Counter[KeptCheck] = Counter()
    held = Counter(row["user_id"] for code, row in rows.coupons.items() if code not in uncounted)
    for user_id, number in held.items():
        if book.max_codes_per_user is not None and number > book.max_codes_per_user:
            found[KeptCheck.CODES_PER_USER] += 1
        mine = (book.book_id, user_id)
        if number > history.held[mine] + history.unknown_assigns[mine]:
            found[KeptCheck.COUPON_ASKED] += 1
    return found


def _redemptions(history: History, book: Book, answered: Mapping[str, Coupon], rows: BookRows) -> Counter[KeptCheck]:
    found: Counter[KeptCheck] = Counter()
    by_use = {(row["code"], row["uses"]): row for row in rows.redemptions}
    for code, coupon in answered.items():
        for uses, redeemed in coupon.redemptions.items():
            row = by_use.get((code, uses))
            if row is None:
                found[KeptCheck.REDEMPTION] += 1
            elif row["user_id"] != coupon.user_id or _position(row) != redeemed.position:
                found[KeptCheck.REDEMPTION_SAME] += 1
    for code, spent in Counter(code for code, _ in by_use).items():
        if book.max_redemptions_per_code is not None and spent > book.max_redemptions_per_code:
            found[KeptCheck.USES_MAX] += 1
        told = len(answered[code].redemptions) if code in answered else 0
        if spent > told + history.unknown_redeems[code]:
            found[KeptCheck.REDEMPTION_ASKED] += 1
    return found


def _events(answered: Mapping[str, Coupon], rows: BookRows, uncounted: Collection[str]) -> Counter[KeptCheck]:
    """Every durable effect has its event, and every Idempotency-Key one effect of a kind."""
    there = {_position(row) for row in rows.events}
    keys = Counter((row["event"], row["idem"]) for row in rows.events if row["idem"] and row["code"] not in uncounted)
    found: Counter[KeptCheck] = Counter()
    found[KeptCheck.EVENT] = sum(position not in there for position in _durable_positions(answered))
    found[KeptCheck.ONE_EFFECT] = sum(number > 1 for number in keys.values())
    return found


def _durable_positions(answered: Mapping[str, Coupon]) -> list[str]:
    positions = [redeemed.position for coupon in answered.values() for redeemed in coupon.redemptions.values()]
    return positions + [coupon.position for coupon in answered.values() if coupon.durable]


def _position(row: Any) -> str:
    return Position(row["epoch"], row["seq"]).in_shard(row["shard"])
