"""The control plane: books and their codes, Postgres first. The shard's owner brings every change to Redis after.

Functions take a connection within a transaction of the caller's, so that an Idempotency-Key is remembered together
with its effect.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Collection, Sequence
from typing import NamedTuple

import asyncpg
import msgspec

from coupon_svc.domain.books import Ack, Book, BookStatus, check_period
from coupon_svc.domain.codes import Pattern, check_capacity, fits, guess_probability
from coupon_svc.domain.outcomes import Outcome, Refused
from coupon_svc.postgres.books import BOOK_COLUMNS, book_from_row
from coupon_svc.postgres.computed import (
    NO_CIPHERS,
    Ciphers,
    books_of_computed,
    give_rows,
    numbers_used,
    shut_out_issued,
    take_range,
)
from coupon_svc.postgres.database import one_row
from coupon_svc.postgres.errors import TakeTurns

WRITER_CHANNEL = "coupon_writer"
"""NOTIFY channel on which the owners of shards hear that a book has changed."""

PIECE_CODES = 2_000
"""How many codes one transaction adds at most: it holds the row of their book, and whoever changes or lends waits for it."""
ROUND = 1 << 32
PLACES_PER_CODE_MIN = 64
"""Beyond it the codes of a book are spread over more places, if it takes no longer than a piece. Where that is too many
codes, they share places."""
CODES_PER_PLACE_MAX = 16
UNPLACED_FROM = -(1 << 40)
"""Places from here up to -2 are of codes whose upload has not come to its end: nobody sees, lends or counts them yet."""
_PLACE_OF = "SELECT place FROM codes WHERE tenant_id = $1 AND code = $2"
_BARREN_MAX = 200
_GENERATE_LOCK = (
    0x67656E65  # "gene"; the advisory lock under which a tenant's generations are measured against a pattern
)

_INSERT_BOOK = f"""
    INSERT INTO books (book_id, shard, tenant_id, name, max_codes_per_user, max_redemptions_per_code, lock_ttl_seconds,
                       starts_at_ms, expires_at_ms, ack, metadata, created_at_ms)
    VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)
    RETURNING {BOOK_COLUMNS}
"""
_INSERT_CODES = """
    INSERT INTO codes (tenant_id, code, book_id, place)
    SELECT $1, code, $2, place FROM unnest($3::text[], $4::bigint[]) AS new (code, place)
    ORDER BY code
    ON CONFLICT DO NOTHING
    RETURNING code
"""
_LOCK_BOOK = """
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
# All stored codes of the tenant, whatever they look like: those that uploads may still add count as if they were there.
_ALL_CODES = """
    SELECT coalesce((SELECT sum(total - computed_total) FROM books WHERE tenant_id = $1), 0)
         + coalesce((SELECT sum(codes) FROM uploads WHERE tenant_id = $1), 0)
"""
# Keeps their order, so nobody's chance changes; and codes that are added now come between them.
_SPREAD_CODES = "UPDATE codes SET place = $2 + (place - $2) * $3 WHERE book_id = $1 AND place > $2"
CODES_IN_PATTERN = """
    SELECT count(*) FROM codes WHERE tenant_id = $1 AND code >= $2 AND code < $3 AND code ~ $4
"""


# Bounded, unlike CODES_IN_PATTERN: a tenant may have any number of codes that begin as the pattern does.
_SOME_CODES_IN_PATTERN = """
    SELECT count(*) AS looked_at, count(*) FILTER (WHERE code ~ $4) AS used
    FROM (SELECT code FROM codes WHERE tenant_id = $1 AND code >= $2 AND code < $3 LIMIT $5) AS begin_so
"""
_LOOKED_AT_MAX = 10_000
_NOTE_GUESSING = f"""
    UPDATE books SET guess_probability = greatest(guess_probability, $2) WHERE book_id = $1 RETURNING {BOOK_COLUMNS}
"""


class NewBook(NamedTuple):
    """A book to be made, its rules already validated."""

    book_id: str
    shard: int
    tenant_id: int
    name: str
    max_codes_per_user: int | None
    max_redemptions_per_code: int | None
    lock_ttl_seconds: int
    starts_at_ms: int | None
    expires_at_ms: int | None
    ack: Ack
    metadata: str
    created_at_ms: int


async def insert_book(connection: asyncpg.Connection, book: NewBook) -> Book:
    """Make the book, without codes."""
    row = await one_row(connection, _INSERT_BOOK, *book)
    await tell_owner(connection, book.shard)
    return book_from_row(row)


async def read_book(connection: asyncpg.Connection, tenant_id: int, book_id: str) -> Book:
    """A book of the tenant. Raises Refused(book_not_found)."""
    row = await connection.fetchrow(
        f"SELECT {BOOK_COLUMNS} FROM books WHERE book_id = $1 AND tenant_id = $2", book_id, tenant_id
    )
    if row is None:
        raise Refused(Outcome.BOOK_NOT_FOUND)
    return book_from_row(row)


async def list_books(
    connection: asyncpg.Connection, tenant_id: int, limit: int, before: tuple[int, str] | None
) -> list[Book]:
    """The tenant's books, newest first; `before` is (created_at_ms, book_id) of the last one of the page before."""
    created_at_ms, book_id = before or (1 << 62, "")
    rows = await connection.fetch(
        f"SELECT {BOOK_COLUMNS} FROM books WHERE tenant_id = $1 AND (created_at_ms, book_id) < ($2, $3)"
        " ORDER BY created_at_ms DESC, book_id DESC LIMIT $4",
        tenant_id,
        created_at_ms,
        book_id,
        limit,
    )
    return [book_from_row(row) for row in rows]


async def update_book(connection: asyncpg.Connection, tenant_id: int, book_id: str, changes: dict[str, object]) -> Book:
    """Change columns of a book and raise its version.

    Raises Refused: book_not_found; book_closed when a closed book is to be opened again. Raises InvalidPeriod.
    """
    row = await connection.fetchrow(
        f"SELECT {BOOK_COLUMNS} FROM books WHERE book_id = $1 AND tenant_id = $2 FOR UPDATE", book_id, tenant_id
    )
    if row is None:
        raise Refused(Outcome.BOOK_NOT_FOUND)
    book = book_from_row(row)
    if book.status is BookStatus.CLOSED and changes.get("status", BookStatus.CLOSED) != BookStatus.CLOSED:
        raise Refused(Outcome.BOOK_CLOSED, "A closed book stays closed.")
    changed = msgspec.structs.replace(book, **changes)
    check_period(changed.starts_at_ms, changed.expires_at_ms)
    if changes:
        columns = ", ".join(f"{column} = ${i}" for i, column in enumerate(changes, 2))
        row = await one_row(
            connection,
            f"UPDATE books SET {columns}, version = version + 1 WHERE book_id = $1 RETURNING {BOOK_COLUMNS}, shard",
            book_id,
            *(bytes(value).decode() if isinstance(value, msgspec.Raw) else value for value in changes.values()),
        )
        await tell_owner(connection, row["shard"])
    return book_from_row(row)


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
    span = await _open_span(connection, book_id)
    if span.status is BookStatus.CLOSED:
        raise Refused(Outcome.BOOK_CLOSED)
    inserted = await insert_rows(connection, tenant_id, book_id, codes, span.places(len(codes)), ciphers)
    left_out = [code for code in codes if code not in inserted]
    taken = await books_of(connection, tenant_id, left_out, ciphers)
    if len(taken) < len(left_out):
        raise TakeTurns
    return await _count_in(connection, span, len(inserted), tell=tell), taken


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
    span = await _open_span(connection, book_id)
    if span.status is BookStatus.CLOSED:
        raise Refused(Outcome.BOOK_CLOSED)
    # In one statement, and so in one order: a second one could wait for somebody who waits for the first.
    inserted = await insert_rows(connection, tenant_id, book_id, codes, span.places(len(codes)), ciphers)
    if len(inserted) < total:
        raise TakeTurns
    return await _count_in(connection, span, total, guessed=guess_probability(pattern, used + total))


async def require_not_closed(connection: asyncpg.Connection, book_id: str) -> None:
    """Raises Refused(book_closed); otherwise the book is not closed until the transaction ends."""
    status = await connection.fetchval("SELECT status FROM books WHERE book_id = $1 FOR SHARE", book_id)
    if status == BookStatus.CLOSED:
        raise Refused(Outcome.BOOK_CLOSED)


async def require_capacity(connection: asyncpg.Connection, tenant_id: int, pattern: Pattern, total: int) -> int:
    """Raises Refused(pattern_capacity) when the tenant's codes that lie in the pattern, with `total` more, would fill more
    than half of it. Returns how many lie in it, or somewhat more. Nobody else adds generated codes of the tenant until the
    transaction ends.

    Codes are counted, which may take seconds of a large tenant, only when all that the tenant has might be too many.
    """
    await connection.execute("SELECT pg_advisory_xact_lock($1, $2)", _GENERATE_LOCK, tenant_id)
    if not fits(pattern, total, await _at_most_used(connection, tenant_id, pattern)):
        used = await count_used(connection, tenant_id, pattern)
        check_capacity(pattern, total, used)
        return used
    return await _used_about(connection, tenant_id, pattern)


async def compute_codes(
    connection: asyncpg.Connection, tenant_id: int, book_id: str, pattern: Pattern, total: int, ciphers: Ciphers
) -> Book | None:
    """Add codes to a book that are computed: it takes a range of the pattern's numbers, however many. None, with nothing
    done, where they must be rows. Raises Refused: book_closed, pattern_capacity."""
    used = await require_capacity(connection, tenant_id, pattern, total)
    book = await one_row(connection, _LOCK_BOOK, book_id)
    if book["status"] == BookStatus.CLOSED:
        raise Refused(Outcome.BOOK_CLOSED)
    if not await take_range(connection, tenant_id, book_id, pattern, total, ciphers):
        return None
    await tell_owner(connection, book["shard"])
    return book_from_row(await one_row(connection, _NOTE_GUESSING, book_id, guess_probability(pattern, used + total)))


async def count_used(connection: asyncpg.Connection, tenant_id: int, pattern: Pattern) -> int:
    """How many codes of the tenant lie in the pattern, those of uploads under way too; of computed codes of another pattern,
    about how many. Reads all codes that begin as the pattern does, unless the pattern's own codes are computed."""
    computed, all_of_them = await numbers_used(connection, tenant_id, pattern)
    if all_of_them:
        return computed
    stored: int = await connection.fetchval(CODES_IN_PATTERN, tenant_id, *pattern.bounds, pattern.regex)
    return computed + stored


async def note_guessing(
    connection: asyncpg.Connection, upload_id: int, book_id: str, pattern: Pattern, total: int
) -> Book:
    """Note how easily a code is guessed once the upload's codes are in. Returns the book as it is then."""
    used = await connection.fetchval("SELECT used FROM uploads WHERE upload_id = $1", upload_id)
    return book_from_row(await one_row(connection, _NOTE_GUESSING, book_id, guess_probability(pattern, used + total)))


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
    span = await _open_span(connection, book_id)
    done = await connection.execute(_PLACE_CODES, book_id, begin, PIECE_CODES, span.places(PIECE_CODES))
    return await _count_in(connection, span, int(done.removeprefix("UPDATE ")), tell=tell)


async def lease_code(
    connection: asyncpg.Connection, tenant_id: int, book_id: str, code: str, ciphers: Ciphers = NO_CIPHERS
) -> None:
    """Lend one code alone, before its turn, and ask the shard's owner to bring it to Redis. Safe to ask twice.

    Raises Refused(code_quarantined) for a code that is never dealt again.
    """
    book = await one_row(connection, "SELECT shard, leased_upto FROM books WHERE book_id = $1 FOR UPDATE", book_id)
    moved = await connection.execute(
        "UPDATE codes SET place = 0 WHERE tenant_id = $1 AND code = $2 AND place > $3",
        tenant_id,
        code,
        book["leased_upto"],
    )
    place = await connection.fetchval(_PLACE_OF, tenant_id, code)
    if place is None:
        await give_rows(connection, tenant_id, book_id, [code], ciphers)
        place = await connection.fetchval(_PLACE_OF, tenant_id, code)
    if place is None or place < -1:
        raise Refused(Outcome.CODE_NOT_FOUND)
    if place < 0:
        raise Refused(Outcome.CODE_QUARANTINED)
    if moved == "UPDATE 1":
        await connection.execute("UPDATE books SET lent = lent + 1 WHERE book_id = $1", book_id)
    await connection.execute(
        "INSERT INTO lone_leases (book_id, code, shard) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING",
        book_id,
        code,
        book["shard"],
    )
    await tell_owner(connection, book["shard"])


def random_places(count: int, above: int, upto: int) -> list[int]:
    """Places in (above, upto], each alike likely, from the system's CSPRNG."""
    numbers = struct.unpack(f"<{count}Q", os.urandom(8 * count))
    return [above + 1 + (number * (upto - above) >> 64) for number in numbers]


def spread_factor(places: int, codes: int) -> int:
    """How much further apart so many codes are to stand that share so many places, as they do in a book that is topped up
    again and again before it runs dry; 1 where they stand well."""
    return 1 if places >= PLACES_PER_CODE_MIN * codes else ROUND // max(1, places)


def places_end(leased_upto: int, places_upto: int, codes: int) -> int:
    """Where the places of new codes end, given that more codes than can be spread have places between these two: further up
    when too many share a place. Those that are there then come before most of the new ones."""
    crowded = (places_upto - leased_upto) * CODES_PER_PLACE_MAX < codes
    return places_upto + ROUND if crowded else places_upto


class _Span(NamedTuple):
    """Where new codes of a book get their places: in (above, upto]. The book's row is locked: nothing is lent meanwhile."""

    book_id: str
    shard: int
    status: BookStatus
    above: int
    upto: int

    def places(self, count: int) -> list[int]:
        return random_places(count, self.above, self.upto)


async def _open_span(connection: asyncpg.Connection, book_id: str) -> _Span:
    """The places among those of codes not lent yet, so that late uploads are mixed in; when all are lent, a new round."""
    row = await one_row(connection, _LOCK_BOOK, book_id)
    above, upto, unlent = row["leased_upto"], row["places_upto"], row["unlent"]
    if unlent <= 0:
        above, upto = upto, upto + ROUND
    elif unlent > PIECE_CODES:
        upto = places_end(above, upto, unlent)
    elif (factor := spread_factor(upto - above, unlent)) > 1:
        await connection.execute(_SPREAD_CODES, book_id, above, factor)
        upto = above + max(1, upto - above) * factor
    return _Span(book_id, row["shard"], BookStatus(row["status"]), above, upto)


async def _count_in(
    connection: asyncpg.Connection, span: _Span, added: int, *, tell: bool = True, guessed: float | None = None
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
    rows = await connection.fetch(
        "SELECT code, book_id FROM codes WHERE tenant_id = $1 AND code = ANY ($2) AND place >= -1", tenant_id, codes
    )
    stored = {row["code"]: row["book_id"] for row in rows}
    others = [code for code in codes if code not in stored]
    return stored | await books_of_computed(connection, tenant_id, others, ciphers)


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
    for _ in range(_BARREN_MAX):
        drawn = set(pattern.draw(count - len(codes))) - codes
        rows = await connection.fetch(
            "SELECT code FROM codes WHERE tenant_id = $1 AND code = ANY ($2)", tenant_id, list(drawn)
        )
        codes |= drawn - {row["code"] for row in rows}
        if len(codes) == count:
            return codes
    raise TakeTurns


async def tell_owner(connection: asyncpg.Connection, shard: int) -> None:
    """Wake the writer that owns the shard, once the transaction has committed."""
    await connection.execute("SELECT pg_notify($1, $2)", WRITER_CHANNEL, str(shard))
