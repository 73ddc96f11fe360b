"""Code rows: how they come into a book, get their places, and are found.

Functions that write take a connection within a transaction of the caller's. They lock the book's row."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import asyncpg

from coupon_svc.domain.books import Book, BookStatus
from coupon_svc.domain.outcomes import Outcome, Refused
from coupon_svc.postgres.books import BOOK_COLUMNS, book_from_row, tell_owner
from coupon_svc.postgres.computed.ciphers import NO_CIPHERS, Ciphers
from coupon_svc.postgres.computed.rows import books_of_computed, shut_out_issued
from coupon_svc.postgres.database import Database, one_row
from coupon_svc.postgres.errors import TakeTurns
from coupon_svc.postgres.lend_order import ROUND, places_end, random_places, spread_factor

PIECE_CODES = 2_000
"""How many codes one transaction adds at most: it holds the row of their book, and whoever changes or lends waits for it."""
_INSERT_CODES = """
    INSERT INTO codes (tenant_id, code, book_id, place)
    SELECT $1, code, $2, place FROM unnest($3::text[], $4::bigint[]) AS new (code, place)
    ORDER BY code
    ON CONFLICT DO NOTHING
    RETURNING code
"""
LOCK_BOOK = """
    SELECT shard, status, total - lent - quarantined - computed_unlent AS unlent, leased_upto, places_upto FROM books
    WHERE book_id = $1
    FOR UPDATE
"""
_COUNT_IN = f"""
    UPDATE books SET total = total + $2, version = version + (CASE WHEN $2 > 0 THEN 1 ELSE 0 END),
                     leased_upto = $3, places_upto = $4, guess_probability = greatest(guess_probability, $5)
    WHERE book_id = $1 RETURNING {BOOK_COLUMNS}
"""
# By the range, not by the codes: to look a list of codes up, Postgres may choose to read all that the tenant has.
_PLACE_CODES = """
    UPDATE codes SET place = ($4::bigint[])[place - $2 + 1] WHERE book_id = $1 AND place >= $2 AND place < $2 + $3::bigint
"""
# Keeps their order, so nobody's chance changes; and codes that are added now come between them.
_SPREAD_CODES = "UPDATE codes SET place = $2 + (place - $2) * $3 WHERE book_id = $1 AND place > $2"
_BOOKS_OF = "SELECT code, book_id FROM codes WHERE tenant_id = $1 AND code = ANY ($2) AND place >= -1"
_FIND_CODES = """
    SELECT tenant_id, code, book_id FROM codes
    JOIN unnest($1::int[], $2::text[]) AS asked (tenant_id, code) USING (tenant_id, code)
    WHERE place >= -1 -- others are of an upload that may still come to nothing
"""
TAKEN = "SELECT code FROM codes WHERE tenant_id = $1 AND code = ANY ($2)"


async def insert_codes(
    connection: asyncpg.Connection,
    tenant_id: int,
    book_id: str,
    codes: Collection[str],
    ciphers: Ciphers = NO_CIPHERS,
    *,
    tell: bool = True,
) -> tuple[Book, dict[str, str]]:
    """Add up to PIECE_CODES codes to a book, and `tell` its owner so; those that the tenant has already, in any book, are
    left out.

    Returns the book as it is then, and the codes that were left out with the books that have them. Raises
    Refused(book_closed); TakeTurns when one of them belongs to an upload that may still come to nothing.
    """
    span = await open_span(connection, book_id)
    if span.status is BookStatus.CLOSED:
        raise Refused(Outcome.BOOK_CLOSED)
    inserted = await insert_rows(connection, tenant_id, book_id, codes, span.places(len(codes)), ciphers)
    left_out = [code for code in codes if code not in inserted]
    taken = await books_of(connection, tenant_id, left_out, ciphers)
    if len(taken) < len(left_out):
        raise TakeTurns
    return await count_in(connection, span, len(inserted), tell=tell), taken


async def insert_rows(
    connection: asyncpg.Connection,
    tenant_id: int,
    book_id: str,
    codes: Collection[str],
    places: Sequence[int],
    ciphers: Ciphers = NO_CIPHERS,
) -> set[str]:
    """Codes with their places, in the codes' order, so that two statements never wait for each other. Returns those that
    the tenant did not have, neither stored nor computed. Within a transaction."""
    issued = await shut_out_issued(connection, tenant_id, codes, ciphers)
    placed = [(code, place) for code, place in zip(codes, places, strict=True) if code not in issued]
    rows = await connection.fetch(
        _INSERT_CODES, tenant_id, book_id, [code for code, _ in placed], [place for _, place in placed]
    )
    return {row["code"] for row in rows}


async def place_codes(connection: asyncpg.Connection, book_id: str, begin: int, *, tell: bool) -> Book:
    """Give the codes of the next PIECE_CODES places from `begin` on, which are none yet, places among which they can be
    lent, and count them. `tell` the owner so."""
    span = await open_span(connection, book_id)
    done = await connection.execute(_PLACE_CODES, book_id, begin, PIECE_CODES, span.places(PIECE_CODES))
    return await count_in(connection, span, int(done.removeprefix("UPDATE ")), tell=tell)


class Span(NamedTuple):
    """Where new codes of a book get their places: in (above, upto]. The book's row is locked: nothing is lent meanwhile."""

    book_id: str
    shard: int
    status: BookStatus
    above: int
    upto: int

    def places(self, count: int) -> list[int]:
        return random_places(count, self.above, self.upto)


async def open_span(connection: asyncpg.Connection, book_id: str) -> Span:
    """The places among those of codes not lent yet, so that late uploads are mixed in; when all are lent, a new round."""
    row = await one_row(connection, LOCK_BOOK, book_id)
    above, upto, unlent = row["leased_upto"], row["places_upto"], row["unlent"]
    if unlent <= 0:
        above, upto = upto, upto + ROUND
    elif unlent > PIECE_CODES:
        upto = places_end(above, upto, unlent)
    elif (factor := spread_factor(upto - above, unlent)) > 1:
        await connection.execute(_SPREAD_CODES, book_id, above, factor)
        upto = above + max(1, upto - above) * factor
    return Span(book_id, row["shard"], BookStatus(row["status"]), above, upto)


async def count_in(
    connection: asyncpg.Connection, span: Span, added: int, *, tell: bool = True, guessed: float | None = None
) -> Book:
    row = await one_row(connection, _COUNT_IN, span.book_id, added, span.above, span.upto, guessed)
    if tell:
        await tell_owner(connection, span.shard)
    return book_from_row(row)


async def books_of(
    connection: asyncpg.Connection, tenant_id: int, codes: Sequence[str], ciphers: Ciphers = NO_CIPHERS
) -> dict[str, str]:
    """The books of codes that the tenant has, without those whose upload has not come to its end."""
    if not codes:
        return {}
    rows = await connection.fetch(_BOOKS_OF, tenant_id, codes)
    stored = {row["code"]: row["book_id"] for row in rows}
    others = [code for code in codes if code not in stored]
    return stored | await books_of_computed(connection, tenant_id, others, ciphers)


async def find_codes(database: Database, asked: Collection[tuple[int, str]]) -> dict[tuple[int, str], str]:
    """The books of those (tenant, code) that exist, with one statement. Raises LedgerUnavailable."""
    rows = await database.fetch(_FIND_CODES, [tenant_id for tenant_id, _ in asked], [code for _, code in asked])
    return {(row["tenant_id"], row["code"]): row["book_id"] for row in rows}


async def codes_taken(
    connection: asyncpg.Connection, tenant_id: int, codes: Collection[str], ciphers: Ciphers
) -> set[str]:
    """Those of the codes that the tenant has, or is uploading."""
    rows = await connection.fetch(TAKEN, tenant_id, list(codes))
    return {row["code"] for row in rows} | set(await books_of_computed(connection, tenant_id, codes, ciphers))
