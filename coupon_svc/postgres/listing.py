"""A book's codes in their order, a bounded part at a time: each statement reads one range of an index, and what belongs to
the codes in it by primary key."""

from __future__ import annotations

from typing import NamedTuple

import asyncpg

from coupon_svc.domain.codes import CodeStatus
from coupon_svc.domain.position import Position
from coupon_svc.postgres.database import one_row

LOOKED_AT_MAX = 2_000
"""How many codes one page of one status looks at, at most."""
_END = "\x7f"
"""Above every symbol of a code."""
_NEXT = "\x01"
"""Below every symbol of a code: a code with this behind it is below the next code."""

_ALL = """
    SELECT code, true AS candidate FROM codes
    WHERE book_id = $1 AND code >= $2 AND code < $3 AND place >= -1 ORDER BY code LIMIT $4
"""
# LATERAL with LIMIT: whatever the planner believes, it looks each code up, and never reads all coupons of the book.
_AVAILABLE = """
    SELECT looked_at.code, place >= 0 AND held IS NULL AS candidate
    FROM (SELECT code, place FROM codes
          WHERE book_id = $1 AND code >= $2 AND code < $3 AND place >= -1 ORDER BY code LIMIT $4) AS looked_at
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


class CodesRange(NamedTuple):
    """Codes of a book that begin with `prefix` and come after `after`, in the order of their bytes; "" for all."""

    book_id: str
    prefix: str = ""
    after: str = ""

    @property
    def bounds(self) -> tuple[str, str]:
        """The first text that may be in it, and the first that is beyond it."""
        return max(self.prefix, self.after + _NEXT if self.after else ""), self.prefix + _END


class LookedAt(NamedTuple):
    """Codes that may be of the wanted status by what the ledger knows, and where to go on; `last` is None at the end."""

    candidates: list[str]
    last: str | None


async def look_at_codes(
    connection: asyncpg.Connection,
    of: CodesRange,
    status: CodeStatus | None,
    redemptions_max: int | None,
    limit: int,
) -> LookedAt:
    """The next codes of a book. With a status at most LOOKED_AT_MAX are looked at, and any number may be candidates; without
    one there are `limit` candidates but at the end. `redemptions_max` is the book's, None for no limit."""
    if status == "redeemed" and redemptions_max is None:
        return LookedAt([], None)  # a use is always left
    statement = _statement(status, redemptions_max)
    looked_at_max = LOOKED_AT_MAX if status else limit + 1
    uses = (redemptions_max,) if statement in (_HELD, _REDEEMED) else ()
    rows = await connection.fetch(statement, of.book_id, *of.bounds, looked_at_max, *uses)
    candidates = [row["code"] for row in rows if row["candidate"]]
    if status is None and len(candidates) > limit:
        candidates.pop()
        return LookedAt(candidates, candidates[-1])
    return LookedAt(candidates, rows[-1]["code"] if len(rows) == looked_at_max else None)


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
    WHERE book_id = $1 AND code >= $2 AND code < $3 AND place >= -1 ORDER BY code LIMIT $4
"""
_FROM_COUPONS = """
    SELECT code, false AS quarantined FROM coupons
    WHERE book_id = $1 AND code >= $2 AND code < $3 ORDER BY code LIMIT $4
"""
_FROM_QUARANTINE = """
    SELECT code, true AS quarantined FROM quarantine
    WHERE book_id = $1 AND code >= $2 AND code < $3 ORDER BY code LIMIT $4
"""
# What came after the position is as if it were not there. The newest use that counts is the first from above.
_AS_OF = """
    SELECT looked_at.code, quarantined, user_id, assigned_at_ms, coalesce(used, 0) AS used
    FROM ({looked_at}) AS looked_at
    LEFT JOIN LATERAL (SELECT user_id, assigned_at_ms, uses FROM coupons c
                       WHERE c.book_id = $1 AND c.code = looked_at.code AND (epoch, seq) <= ($5, $6) LIMIT 1
                      ) AS holder ON true
    LEFT JOIN LATERAL (SELECT r.uses AS used FROM redemptions r
                       WHERE holder.uses > 0 AND r.book_id = $1 AND r.code = looked_at.code AND (epoch, seq) <= ($5, $6)
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
    connection: asyncpg.Connection, of: CodesRange, position: Position, status: CodeStatus | None
) -> list[CodeAsOf]:
    """The next ROWS_PER_PAGE codes of a book as they were at `position`; none at the end. All of `status` are among them,
    and others may be."""
    looked_at = _FROM_CODES
    if status in ("assigned", "redeemed"):
        looked_at = _FROM_COUPONS
    elif status == "quarantined":
        looked_at = _FROM_QUARANTINE
    statement = _AS_OF.format(looked_at=looked_at)
    rows = await connection.fetch(statement, of.book_id, *of.bounds, ROWS_PER_PAGE, position.epoch, position.seq)
    return [CodeAsOf(*row) for row in rows]
