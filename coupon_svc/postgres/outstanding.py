"""Which codes were lent to Redis and have no coupon, told without a look at every code that was ever lent.

A lent code has a coupon, or it is in `outstanding_codes` or `lone_leases`. Otherwise its place is in (`accounted_upto`,
`leased_upto`] of its book, or its number between the same marks of a range. What is done here is true whoever owns the
shard, and needs no ownership.
"""

from __future__ import annotations

from collections.abc import Sequence

import asyncpg

from coupon_svc.postgres.computed.ciphers import NO_CIPHERS, Ciphers
from coupon_svc.postgres.computed.lending import account_numbers
from coupon_svc.postgres.database import one_row
from coupon_svc.postgres.errors import BookBusy
from coupon_svc.postgres.lending import Lease

PIECE = 5_000
"""Codes per transaction."""

# Scalar subqueries, here and in `settling`: a join or EXISTS may be planned as a hash of all the book's coupons, for each
# piece anew.

# Codes of book $1 that are lent and have no coupon, once all leased places are accounted for.
OUTSTANDING = """
    SELECT named.code FROM (
        SELECT code FROM outstanding_codes WHERE book_id = $1 UNION SELECT code FROM lone_leases WHERE book_id = $1) named
    JOIN books ON books.book_id = $1
    WHERE (SELECT place FROM codes WHERE codes.tenant_id = books.tenant_id AND codes.code = named.code)
          BETWEEN 0 AND leased_upto
      AND (SELECT true FROM coupons WHERE coupons.book_id = $1 AND coupons.code = named.code) IS NULL
"""
_NEXT = """
    SELECT max(place) AS upto, count(*) AS codes FROM (
        SELECT place FROM codes WHERE book_id = $1 AND place > $2 AND place <= $3 ORDER BY place LIMIT $4) piece
"""
_NAME = """
    INSERT INTO outstanding_codes SELECT book_id, code FROM codes
    WHERE book_id = $1 AND place > $2 AND place <= $3
      AND (SELECT true FROM coupons WHERE coupons.book_id = $1 AND coupons.code = codes.code) IS NULL
    ON CONFLICT DO NOTHING
"""
_ACCOUNT = """
    UPDATE books SET accounted_upto = $3,
                     accounted = CASE WHEN leased_upto = $3 AND computed_total = 0 THEN lent
                                      ELSE least(lent, accounted + $4) END
    WHERE book_id = $1 AND accounted_upto = $2
"""
_COUNT_ACCOUNTED = "UPDATE books SET accounted = least(lent, accounted + $2) WHERE book_id = $1"
_PRUNE = """
    WITH page AS MATERIALIZED (
        SELECT code FROM outstanding_codes WHERE book_id = $1 AND code > $2 ORDER BY code LIMIT $3),
    pruned AS (
        DELETE FROM outstanding_codes o USING page WHERE o.book_id = $1 AND o.code = page.code
        AND (SELECT true FROM coupons WHERE coupons.book_id = $1 AND coupons.code = page.code))
    SELECT max(code) AS last, count(*) AS codes FROM page
"""


async def account_piece(
    connection: asyncpg.Connection, book_id: str, wait_ms: int = 1000, ciphers: Ciphers = NO_CIPHERS
) -> bool:
    """Move the book's `accounted_upto`, or that of a range, up by about PIECE codes. Returns whether there is more to do.
    Raises BookBusy."""
    try:
        async with connection.transaction():
            await limit_wait(connection, wait_ms)
            book = await one_row(
                connection, "SELECT accounted_upto, leased_upto FROM books WHERE book_id = $1", book_id
            )
            if book["accounted_upto"] == book["leased_upto"]:
                numbers = await account_numbers(connection, book_id, PIECE, ciphers)
                if numbers:
                    await connection.execute(_COUNT_ACCOUNTED, book_id, numbers)
                return numbers is not None
            piece = await one_row(connection, _NEXT, book_id, *book, PIECE)
            upto = piece["upto"] if piece["codes"] == PIECE else book["leased_upto"]
            await connection.execute(_NAME, book_id, book["accounted_upto"], upto)
            # Last, since it locks the row. Should somebody have been faster, the rows above are out of date, and no harm.
            await connection.execute(_ACCOUNT, book_id, book["accounted_upto"], upto, piece["codes"])
    except asyncpg.LockNotAvailableError:
        raise BookBusy from None
    return True


async def books_to_account(connection: asyncpg.Connection, shards: Sequence[int], at_least: int) -> list[str]:
    """Books of these shards of which at least so many codes were lent since they were accounted for."""
    rows = await connection.fetch(
        "SELECT book_id FROM books WHERE shard = ANY ($1) AND lent - accounted >= $2 AND (leased_upto > accounted_upto"
        " OR EXISTS (SELECT FROM code_ranges r WHERE r.book_id = books.book_id AND r.lent_upto > r.accounted_upto))",
        list(shards),
        at_least,
    )
    return [row["book_id"] for row in rows]


async def books_with_outstanding(connection: asyncpg.Connection, shards: Sequence[int]) -> list[str]:
    """Books of these shards that have rows in `outstanding_codes`."""
    rows = await connection.fetch(
        "SELECT book_id FROM books WHERE shard = ANY ($1)"
        " AND EXISTS (SELECT FROM outstanding_codes o WHERE o.book_id = books.book_id)",
        list(shards),
    )
    return [row["book_id"] for row in rows]


async def prune_piece(connection: asyncpg.Connection, book_id: str, after: str) -> str | None:
    """Drop those of the next PIECE rows after a code that have a coupon by now. Returns the last code looked at; None at
    the end."""
    row = await one_row(connection, _PRUNE, book_id, after, PIECE)
    return row["last"] if row["codes"] == PIECE else None


async def outstanding_lease(connection: asyncpg.Connection, book_id: str) -> Lease:
    """Every code that Redis was lent and the ledger has not seen assigned, once all leased places are accounted for.
    Redis skips those it knows of."""
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        rows = await connection.fetch(OUTSTANDING, book_id)
        unlent = await connection.fetchval("SELECT total - lent - quarantined FROM books WHERE book_id = $1", book_id)
    return Lease([row["code"] for row in rows], unlent)


async def held_by_book(connection: asyncpg.Connection, shard: int) -> dict[str, int]:
    """How many coupons each book of the shard has that was ever brought to Redis, once all leased places are accounted for:
    what was lent, less what is outstanding."""
    rows = await connection.fetch(
        f"SELECT b.book_id, b.lent - (SELECT count(*) FROM ({OUTSTANDING.replace('$1', 'b.book_id')}) o) AS held"
        " FROM books b WHERE shard = $1 AND loaded",
        shard,
    )
    return {row["book_id"]: row["held"] for row in rows}


async def limit_wait(connection: asyncpg.Connection, wait_ms: int) -> None:
    """Within a transaction: give a lock up after so many ms (LockNotAvailableError)."""
    await connection.execute(f"SET LOCAL lock_timeout = {int(wait_ms)}")
