"""A book's codes in their order, a bounded part at a time. Each statement reads one range of an index, and what belongs to
the codes in it by primary key. Stored codes come first, in the order of their bytes; then computed ones, in that of their
numbers, whether or not they have a row by now."""

from __future__ import annotations

from typing import NamedTuple

import asyncpg

from coupon_svc.domain.codes import CodeStatus
from coupon_svc.domain.position import Position
from coupon_svc.postgres.computed.ciphers import Ciphers
from coupon_svc.postgres.computed.reading import codes_by_number
from coupon_svc.postgres.database import one_row

LOOKED_AT_MAX = 2_000
"""How many codes are looked at with one statement for those of one status, or with a prefix, at most."""
_END = "\x7f"
"""Above every symbol of a code."""
_NEXT = "\x01"
"""Below every symbol of a code: a code with this behind it is below the next code."""

_ALL = """
    SELECT code, true AS candidate FROM codes
    WHERE book_id = $1 AND code >= $2 AND code < $3 AND place >= -1 AND NOT computed ORDER BY code LIMIT $4
"""
# LATERAL with LIMIT: whatever the planner believes, it looks each code up, and never reads all coupons of the book.
_AVAILABLE = """
    SELECT looked_at.code, place >= 0 AND held IS NULL AS candidate
    FROM (SELECT code, place FROM codes
          WHERE book_id = $1 AND code >= $2 AND code < $3 AND place >= -1 AND NOT computed
          ORDER BY code LIMIT $4) AS looked_at
    LEFT JOIN LATERAL (SELECT true AS held FROM coupons c
                       WHERE c.book_id = $1 AND c.code = looked_at.code LIMIT 1) AS holder ON true
    ORDER BY looked_at.code
"""
_HELD = """
    SELECT code, $5::int IS NULL OR uses < $5 AS candidate FROM coupons
    WHERE book_id = $1 AND code >= $2 AND code < $3 ORDER BY code LIMIT $4
"""
_REDEEMED = """
    SELECT code, uses >= $5 AS candidate FROM coupons
    WHERE book_id = $1 AND code >= $2 AND code < $3 ORDER BY code LIMIT $4
"""
# Where a code has one use, few redeemed codes are found among many assigned ones.
_REDEEMED_ONCE = """
    SELECT code, true AS candidate FROM redemptions
    WHERE book_id = $1 AND code >= $2 AND code < $3 ORDER BY code LIMIT $4
"""
_QUARANTINED = """
    SELECT code, true AS candidate FROM quarantine
    WHERE book_id = $1 AND code >= $2 AND code < $3 ORDER BY code LIMIT $4
"""


# Those of the codes that nobody holds.
_FREE = """
    SELECT code FROM unnest($2::text[]) AS code
    WHERE (SELECT true FROM coupons c WHERE c.book_id = $1 AND c.code = code.code) IS NULL
      AND (SELECT true FROM quarantine q WHERE q.book_id = $1 AND q.code = code.code) IS NULL
"""
_FIRST_NUMBER = "#0:0"


class CodesRange(NamedTuple):
    """Codes of a book that begin with `prefix` and come after `after`, "" for all. That is a code, or `#pattern:number` for
    the computed codes from a number on."""

    book_id: str
    prefix: str = ""
    after: str = ""

    @property
    def bounds(self) -> tuple[str, str]:
        """The first text that may be in it, and the first that is beyond it."""
        return max(self.prefix, self.after + _NEXT if self.after else ""), self.prefix + _END

    @property
    def number(self) -> tuple[int, int] | None:
        """The pattern and number from which on computed codes are listed; None where stored codes still are."""
        if not self.after.startswith("#"):
            return None
        pattern_id, _, number = self.after[1:].partition(":")
        return int(pattern_id), int(number)


class LookedAt(NamedTuple):
    """Codes that may be of the wanted status by what the ledger knows, each with the `after` behind it; and where to go on,
    None at the end."""

    candidates: dict[str, str]
    last: str | None


async def look_at_codes(
    connection: asyncpg.Connection,
    of: CodesRange,
    status: CodeStatus | None,
    redemptions_max: int | None,
    limit: int,
    ciphers: Ciphers,
) -> LookedAt:
    """The next codes of a book. With a status at most LOOKED_AT_MAX are looked at, and any number may be candidates. Without
    one there are at most `limit` candidates. There are fewer at the end, and where few computed codes begin with the prefix.
    `redemptions_max` is the book's, None for no limit."""
    if of.number is None:
        stored = await _look_at_stored(connection, of, status, redemptions_max, limit)
        if stored.last is not None or status not in (None, "available"):
            return stored
        of = of._replace(after=_FIRST_NUMBER)
        limit -= 0 if status else len(stored.candidates)
        if limit == 0:  # the page is full: whether there are computed codes, the next one shows
            more = await codes_by_number(connection, of.book_id, (0, 0), of.prefix, 1, ciphers)
            return stored._replace(last=of.after if more else None)
        computed = await _look_at_computed(connection, of, status, limit, ciphers)
        return LookedAt(stored.candidates | computed.candidates, computed.last)
    return await _look_at_computed(connection, of, status, limit, ciphers)


async def _look_at_computed(
    connection: asyncpg.Connection, of: CodesRange, status: CodeStatus | None, limit: int, ciphers: Ciphers
) -> LookedAt:
    assert of.number is not None
    looked_at_max = LOOKED_AT_MAX if status or of.prefix else limit
    page = await codes_by_number(connection, of.book_id, of.number, of.prefix, looked_at_max, ciphers)
    if page is None:
        return LookedAt({}, None)
    candidates = {code: f"#{page.pattern_id}:{number + 1}" for number, code in page.codes}
    if status:
        free = {row["code"] for row in await connection.fetch(_FREE, of.book_id, list(candidates))}
        candidates = {code: after for code, after in candidates.items() if code in free}
    elif len(candidates) > limit:
        candidates = dict(list(candidates.items())[:limit])
        return LookedAt(candidates, list(candidates.values())[-1])
    return LookedAt(candidates, f"#{page.next[0]}:{page.next[1]}" if page.next else None)


async def _look_at_stored(
    connection: asyncpg.Connection,
    of: CodesRange,
    status: CodeStatus | None,
    redemptions_max: int | None,
    limit: int,
) -> LookedAt:
    if status == "redeemed" and redemptions_max is None:
        return LookedAt({}, None)  # a use is always left
    statement = _statement(status, redemptions_max)
    looked_at_max = LOOKED_AT_MAX if status else limit + 1
    uses = (redemptions_max,) if statement in (_HELD, _REDEEMED) else ()
    rows = await connection.fetch(statement, of.book_id, *of.bounds, looked_at_max, *uses)
    candidates = [row["code"] for row in rows if row["candidate"]]
    last = rows[-1]["code"] if len(rows) == looked_at_max else None
    if status is None and len(candidates) > limit:
        candidates.pop()
        last = candidates[-1]
    return LookedAt({code: code for code in candidates}, last)


def _statement(status: CodeStatus | None, redemptions_max: int | None) -> str:
    if status is None:
        return _ALL
    if status == "available":
        return _AVAILABLE
    if status == "quarantined":
        return _QUARANTINED
    if status == "redeemed":
        return _REDEEMED_ONCE if redemptions_max == 1 else _REDEEMED
    return _HELD


# --- as of a position

ROWS_PER_PAGE = 1_000

# Which codes there are, by what is wanted. Each reads one range of one index.
_FROM_CODES = """
    SELECT code, place = -1 AS quarantined FROM codes
    WHERE book_id = $1 AND code >= $2 AND code < $3 AND place >= -1 AND NOT computed ORDER BY code LIMIT $4
"""
_FROM_COUPONS = """
    SELECT code, false AS quarantined FROM coupons
    WHERE book_id = $1 AND code >= $2 AND code < $3 ORDER BY code LIMIT $4
"""
_FROM_QUARANTINE = """
    SELECT code, true AS quarantined FROM quarantine
    WHERE book_id = $1 AND code >= $2 AND code < $3 ORDER BY code LIMIT $4
"""
_FROM_NUMBERS = """
    SELECT code, (SELECT true FROM quarantine q WHERE q.book_id = $1 AND q.code = code.code) IS NOT NULL AS quarantined
    FROM unnest($2::text[]) AS code
"""
# What came after the position is as if it were not there. The newest use that counts is the first from above.
_AS_OF = """
    SELECT looked_at.code, quarantined, user_id, assigned_at_ms, coalesce(used, 0) AS used
    FROM ({looked_at}) AS looked_at
    LEFT JOIN LATERAL (SELECT user_id, assigned_at_ms, uses FROM coupons c
                       WHERE c.book_id = $1 AND c.code = looked_at.code AND (epoch, seq) <= ({epoch}, {seq}) LIMIT 1
                      ) AS holder ON true
    LEFT JOIN LATERAL (SELECT r.uses AS used FROM redemptions r
                       WHERE holder.uses > 0 AND r.book_id = $1 AND r.code = looked_at.code
                         AND (epoch, seq) <= ({epoch}, {seq})
                       ORDER BY r.uses DESC LIMIT 1) AS spent ON true
    ORDER BY looked_at.code
"""


class CodeAsOf(NamedTuple):
    """A code as it was at a position: who held it, and how many of its uses were made. Quarantined: as it is now."""

    code: str
    quarantined: bool
    user_id: str | None
    assigned_at_ms: int | None
    used: int


async def ledger_position(connection: asyncpg.Connection, shard: int) -> Position:
    """Up to where the ledger has the events of a shard."""
    return Position(*await one_row(connection, "SELECT epoch, committed FROM shards WHERE shard = $1", shard))


async def codes_as_of(
    connection: asyncpg.Connection, of: CodesRange, position: Position, status: CodeStatus | None, ciphers: Ciphers
) -> tuple[list[CodeAsOf], str | None]:
    """The next codes of a book as they were at `position`, about ROWS_PER_PAGE, and the `after` behind them; None at the
    end. All of `status` are among them, and others may be."""
    if of.number is not None:
        return await _computed_as_of(connection, of, of.number, position, ciphers)
    looked_at = _FROM_CODES
    if status in ("assigned", "redeemed"):
        looked_at = _FROM_COUPONS
    elif status == "quarantined":
        looked_at = _FROM_QUARANTINE
    statement = _AS_OF.format(looked_at=looked_at, epoch="$5", seq="$6")
    rows = await connection.fetch(statement, of.book_id, *of.bounds, ROWS_PER_PAGE, position.epoch, position.seq)
    codes = [CodeAsOf(*row) for row in rows]
    if len(codes) == ROWS_PER_PAGE:
        return codes, codes[-1].code
    return codes, _FIRST_NUMBER if looked_at is _FROM_CODES else None


async def _computed_as_of(
    connection: asyncpg.Connection, of: CodesRange, number: tuple[int, int], position: Position, ciphers: Ciphers
) -> tuple[list[CodeAsOf], str | None]:
    page = await codes_by_number(connection, of.book_id, number, of.prefix, ROWS_PER_PAGE, ciphers)
    if page is None:
        return [], None
    statement = _AS_OF.format(looked_at=_FROM_NUMBERS, epoch="$3", seq="$4")
    listed = [code for _, code in page.codes]
    rows = await connection.fetch(statement, of.book_id, listed, position.epoch, position.seq)
    by_code = {row["code"]: CodeAsOf(*row) for row in rows}
    return [by_code[code] for code in listed], f"#{page.next[0]}:{page.next[1]}" if page.next else None
