"""The control plane: books and their codes, Postgres first. The shard's owner brings every change to Redis after.

Functions take a connection within a transaction of the caller's, so that an Idempotency-Key is remembered together
with its effect.
"""

from __future__ import annotations

import asyncio
import os
import struct
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import NamedTuple

import asyncpg
import msgspec

from coupon_svc.domain.books import Ack, Book, BookStatus
from coupon_svc.domain.codes import Pattern, check_capacity
from coupon_svc.domain.outcomes import Outcome, Refused
from coupon_svc.ledger.books import BOOK_COLUMNS, book_from_row

WRITER_CHANNEL = "coupon_writer"
"""NOTIFY channel on which the owners of shards hear that a book has changed."""

INSERT_CHUNK = 10_000
ROUND = 1 << 32
_CODES_LOCK = 0x636F6465  # "code"; the advisory lock on a tenant's codes: shared by uploads, one generation at a time

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
    row = await connection.fetchrow(_INSERT_BOOK, *book)
    await _tell_owner(connection, book.shard)
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

    Raises Refused: book_not_found; book_closed when a closed book is to be opened again; invalid_request when it would
    end before it begins.
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
        row = await connection.fetchrow(
            f"UPDATE books SET {columns}, version = version + 1 WHERE book_id = $1 RETURNING {BOOK_COLUMNS}, shard",
            book_id,
            *(bytes(value).decode() if isinstance(value, msgspec.Raw) else value for value in changes.values()),
        )
        await _tell_owner(connection, row["shard"])
    return book_from_row(row)


def check_period(starts_at_ms: int | None, expires_at_ms: int | None) -> None:
    """Raises Refused(invalid_request) when a book would end before it begins."""
    if starts_at_ms is not None and expires_at_ms is not None and starts_at_ms >= expires_at_ms:
        raise Refused(
            Outcome.INVALID_REQUEST, errors=[{"pointer": "/expires_at", "detail": "must be later than starts_at"}]
        )


async def insert_codes(
    connection: asyncpg.Connection, tenant_id: int, book_id: str, codes: Sequence[str]
) -> tuple[Book, set[str]]:
    """Add codes to a book; those that the tenant has already, in any book, are left out.

    Returns the book as it is then and the codes that were added. Raises Refused(book_not_found).
    """
    await read_book(connection, tenant_id, book_id)
    await connection.execute("SELECT pg_advisory_xact_lock_shared($1, $2)", _CODES_LOCK, tenant_id)
    span = await _place_span(connection, book_id)
    inserted: set[str] = set()
    for chunk in _chunks(sorted(codes)):  # in one order, so that two uploads of the same codes cannot deadlock
        rows = await connection.fetch(
            _INSERT_CODES + " RETURNING code", tenant_id, book_id, chunk, random_places(len(chunk), *span)
        )
        inserted |= {row["code"] for row in rows}
    return await _count_in(connection, book_id, len(inserted)), inserted


async def generate_codes(
    connection: asyncpg.Connection, tenant_id: int, book_id: str, pattern: Pattern, total: int
) -> Book:
    """Add `total` new codes that follow the pattern. Raises Refused: book_not_found, pattern_capacity.

    This is the place that computed codes will fill: the caller knows a pattern and a number, and no code.
    """
    await read_book(connection, tenant_id, book_id)
    # Codes come in no order here: two that generate from patterns with codes in common would wait for each other for ever.
    await connection.execute("SELECT pg_advisory_xact_lock($1, $2)", _CODES_LOCK, tenant_id)
    used = await connection.fetchval(
        "INSERT INTO patterns (tenant_id, pattern, symbols) VALUES ($1, $2, $3)"
        " ON CONFLICT (tenant_id, pattern, symbols) DO UPDATE SET used = patterns.used RETURNING used",
        tenant_id,
        pattern.text,
        pattern.symbols,
    )
    check_capacity(pattern, total, used)
    span = await _place_span(connection, book_id)
    missing, barren = total, 0
    while missing:
        chunk = list(pattern.draw(min(missing, INSERT_CHUNK)))
        done = await connection.execute(_INSERT_CODES, tenant_id, book_id, chunk, random_places(len(chunk), *span))
        inserted = int(done.removeprefix("INSERT 0 "))
        missing -= inserted
        barren = 0 if inserted else barren + 1
        if barren == 200:  # at least half of the pattern is free of generated codes: uploaded ones have filled the rest
            raise Refused(Outcome.PATTERN_CAPACITY, capacity=pattern.capacity, requested=total, already_used=used)
        await asyncio.sleep(0)
    await connection.execute(
        "UPDATE patterns SET used = used + $4 WHERE tenant_id = $1 AND pattern = $2 AND symbols = $3",
        tenant_id,
        pattern.text,
        pattern.symbols,
        total,
    )
    return await _count_in(connection, book_id, total)


async def lease_code(connection: asyncpg.Connection, tenant_id: int, book_id: str, code: str) -> None:
    """Lend one code alone, before its turn, and ask the shard's owner to bring it to Redis. Safe to ask twice.

    Raises Refused(code_quarantined) for a code that is never dealt again.
    """
    book = await connection.fetchrow("SELECT shard, leased_upto FROM books WHERE book_id = $1 FOR UPDATE", book_id)
    moved = await connection.execute(
        "UPDATE codes SET place = 0 WHERE tenant_id = $1 AND code = $2 AND place > $3",
        tenant_id,
        code,
        book["leased_upto"],
    )
    place = await connection.fetchval("SELECT place FROM codes WHERE tenant_id = $1 AND code = $2", tenant_id, code)
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
    await _tell_owner(connection, book["shard"])


def random_places(count: int, above: int, upto: int) -> list[int]:
    """Places in (above, upto], each alike likely, from the system's CSPRNG."""
    numbers = struct.unpack(f"<{count}Q", os.urandom(8 * count))
    return [above + 1 + (number * (upto - above) >> 64) for number in numbers]


async def _place_span(connection: asyncpg.Connection, book_id: str) -> tuple[int, int]:
    """Where new codes of a book get their places: among those not lent yet, so that late uploads are mixed in.

    When all are lent, a new round of places begins, so that the span does not shrink away over many uploads. The row
    stays locked: nothing is lent meanwhile.
    """
    row = await connection.fetchrow(
        "SELECT total - lent - quarantined AS unlent, leased_upto, places_upto FROM books WHERE book_id = $1 FOR UPDATE",
        book_id,
    )
    if row["unlent"] > 0:
        return row["leased_upto"], row["places_upto"]
    upto = row["places_upto"] + ROUND
    await connection.execute(
        "UPDATE books SET leased_upto = places_upto, places_upto = $2 WHERE book_id = $1", book_id, upto
    )
    return row["places_upto"], upto


async def _count_in(connection: asyncpg.Connection, book_id: str, added: int) -> Book:
    row = await connection.fetchrow(
        "UPDATE books SET total = total + $2, version = version + (CASE WHEN $2 > 0 THEN 1 ELSE 0 END)"
        f" WHERE book_id = $1 RETURNING {BOOK_COLUMNS}, shard",
        book_id,
        added,
    )
    await _tell_owner(connection, row["shard"])
    return book_from_row(row)


async def _tell_owner(connection: asyncpg.Connection, shard: int) -> None:
    await connection.execute("SELECT pg_notify($1, $2)", WRITER_CHANNEL, str(shard))


def _chunks(codes: Iterable[str]) -> Iterable[list[str]]:
    rest = iter(codes)
    while chunk := list(islice(rest, INSERT_CHUNK)):
        yield chunk
