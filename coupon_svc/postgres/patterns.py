"""Codes that follow a pattern: how many of a tenant's there are, and how more are made, as rows or computed."""

from __future__ import annotations

import asyncpg

from coupon_svc.domain.books import Book, BookStatus
from coupon_svc.domain.codes import Pattern, check_capacity, fits, guess_probability
from coupon_svc.domain.outcomes import Outcome, Refused
from coupon_svc.postgres.books import BOOK_COLUMNS, book_from_row, tell_owner
from coupon_svc.postgres.codes import LOCK_BOOK, TAKEN, count_in, insert_rows, open_span
from coupon_svc.postgres.computed.ciphers import Ciphers
from coupon_svc.postgres.computed.ranges import numbers_used, take_range
from coupon_svc.postgres.database import one_row
from coupon_svc.postgres.errors import TakeTurns

COUNT_S = 8
"""How long the codes of a pattern are counted at most."""
BARREN_DRAWS_MAX = 200
"""Draws in vain after which a pattern counts as full, though half of it was free when the drawing began."""
_GENERATE_LOCK = (
    0x67656E65  # "gene"; the advisory lock under which a tenant's generations are measured against a pattern
)
# All stored codes of the tenant, whatever they look like: those that uploads may still add count as if they were there.
_ALL_CODES = """
    SELECT coalesce((SELECT sum(total - computed_total) FROM books WHERE tenant_id = $1), 0)
         + coalesce((SELECT sum(codes) FROM uploads WHERE tenant_id = $1), 0)
"""
_CODES_IN_PATTERN = """
    SELECT count(*) FROM codes WHERE tenant_id = $1 AND code >= $2 AND code < $3 AND code ~ $4
"""
# Bounded, unlike _CODES_IN_PATTERN: a tenant may have any number of codes that begin as the pattern does.
_SOME_CODES_IN_PATTERN = """
    SELECT count(*) AS looked_at, count(*) FILTER (WHERE code ~ $4) AS used
    FROM (SELECT code FROM codes WHERE tenant_id = $1 AND code >= $2 AND code < $3 LIMIT $5) AS begin_so
"""
_LOOKED_AT_MAX = 10_000
_NOTE_GUESSING = f"""
    UPDATE books SET guess_probability = greatest(guess_probability, $2) WHERE book_id = $1 RETURNING {BOOK_COLUMNS}
"""


async def generate_codes(
    connection: asyncpg.Connection, tenant_id: int, book_id: str, pattern: Pattern, total: int, ciphers: Ciphers
) -> Book:
    """Add up to PIECE_CODES new codes that follow the pattern, as rows. Raises Refused(book_closed); TakeTurns when the
    pattern may be too full for them, or somebody else is measuring one.
    """
    if not await connection.fetchval("SELECT pg_try_advisory_xact_lock($1, $2)", _GENERATE_LOCK, tenant_id):
        raise TakeTurns
    if not fits(pattern, total, await _at_most_used(connection, tenant_id, pattern)):
        raise TakeTurns
    used = await _used_about(connection, tenant_id, pattern)
    codes = await _draw_free(connection, tenant_id, pattern, total)
    span = await open_span(connection, book_id)
    if span.status is BookStatus.CLOSED:
        raise Refused(Outcome.BOOK_CLOSED)
    # In one statement, and so in one order: a second one could wait for somebody who waits for the first.
    inserted = await insert_rows(connection, tenant_id, book_id, codes, span.places(len(codes)), ciphers)
    if len(inserted) < total:
        raise TakeTurns
    return await count_in(connection, span, total, guessed=guess_probability(pattern, used + total))


async def compute_codes(
    connection: asyncpg.Connection, tenant_id: int, book_id: str, pattern: Pattern, total: int, ciphers: Ciphers
) -> Book | None:
    """Add codes to a book that are computed: it takes a range of the pattern's numbers, however many. None, with nothing
    done, where they must be rows. Raises Refused: book_closed, pattern_capacity."""
    used = await require_capacity(connection, tenant_id, pattern, total)
    book = await one_row(connection, LOCK_BOOK, book_id)
    if book["status"] == BookStatus.CLOSED:
        raise Refused(Outcome.BOOK_CLOSED)
    if not await take_range(connection, tenant_id, book_id, pattern, total, ciphers):
        return None
    await tell_owner(connection, book["shard"])
    return book_from_row(await one_row(connection, _NOTE_GUESSING, book_id, guess_probability(pattern, used + total)))


async def note_guessing(
    connection: asyncpg.Connection, upload_id: int, book_id: str, pattern: Pattern, total: int
) -> Book:
    """Note how easily a code is guessed once the upload's codes are in. Returns the book as it is then."""
    used = await connection.fetchval("SELECT used FROM uploads WHERE upload_id = $1", upload_id)
    return book_from_row(await one_row(connection, _NOTE_GUESSING, book_id, guess_probability(pattern, used + total)))


async def require_capacity(connection: asyncpg.Connection, tenant_id: int, pattern: Pattern, total: int) -> int:
    """Raises Refused(pattern_capacity) when the tenant's codes that lie in the pattern, with `total` more, would fill more
    than half of it. Returns how many lie in it, or somewhat more. Nobody else adds generated codes of the tenant until the
    transaction ends.

    Codes are counted, which may take seconds of a large tenant, only when all that the tenant has might be too many.
    """
    await connection.execute("SELECT pg_advisory_xact_lock($1, $2)", _GENERATE_LOCK, tenant_id)
    if not fits(pattern, total, await _at_most_used(connection, tenant_id, pattern)):
        used = await _count_used(connection, tenant_id, pattern)
        check_capacity(pattern, total, used)
        return used
    return await _used_about(connection, tenant_id, pattern)


async def count_used(connection: asyncpg.Connection, tenant_id: int, pattern: Pattern) -> int:
    """As `_count_used`; ends after COUNT_S, with an error that says that Postgres is unavailable."""
    async with connection.transaction(readonly=True):
        await connection.execute(f"SET LOCAL statement_timeout = '{COUNT_S}s'")
        return await _count_used(connection, tenant_id, pattern)


async def _count_used(connection: asyncpg.Connection, tenant_id: int, pattern: Pattern) -> int:
    """How many codes of the tenant lie in the pattern, those of uploads under way too; of computed codes of another pattern,
    about how many. Reads all codes that begin as the pattern does, unless the pattern's own codes are computed."""
    computed, all_of_them = await numbers_used(connection, tenant_id, pattern)
    if all_of_them:
        return computed
    stored: int = await connection.fetchval(_CODES_IN_PATTERN, tenant_id, *pattern.bounds, pattern.regex)
    return computed + stored


async def _at_most_used(connection: asyncpg.Connection, tenant_id: int, pattern: Pattern) -> int:
    """What of the pattern the tenant has used, at most, told without a look at its codes."""
    computed, all_of_them = await numbers_used(connection, tenant_id, pattern)
    stored = 0 if all_of_them else await connection.fetchval(_ALL_CODES, tenant_id)
    return computed + int(stored)


async def _used_about(connection: asyncpg.Connection, tenant_id: int, pattern: Pattern) -> int:
    """How many codes of the tenant lie in the pattern. Where more than _LOOKED_AT_MAX begin as it does, all that the tenant
    has are taken for those: a guess is then said to be easier than it is."""
    computed, all_of_them = await numbers_used(connection, tenant_id, pattern)
    if all_of_them:
        return computed
    row = await one_row(connection, _SOME_CODES_IN_PATTERN, tenant_id, *pattern.bounds, pattern.regex, _LOOKED_AT_MAX)
    if row["looked_at"] < _LOOKED_AT_MAX:
        return computed + int(row["used"])
    return computed + int(await connection.fetchval(_ALL_CODES, tenant_id))


async def _draw_free(connection: asyncpg.Connection, tenant_id: int, pattern: Pattern, count: int) -> set[str]:
    """Different codes of the pattern that the tenant does not have. Raises TakeTurns when they are hard to find."""
    codes: set[str] = set()
    for _ in range(BARREN_DRAWS_MAX):
        drawn = set(pattern.draw(count - len(codes))) - codes
        rows = await connection.fetch(TAKEN, tenant_id, list(drawn))
        codes |= drawn - {row["code"] for row in rows}
        if len(codes) == count:
            return codes
    raise TakeTurns
