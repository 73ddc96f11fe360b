"""Book rows: how callers make, read and change them. `lending` says what of a book Redis has.

Functions take a connection within a transaction of the caller's, so that an Idempotency-Key is remembered together with
its effect. The shard's owner brings every change to Redis after."""

from __future__ import annotations

from typing import NamedTuple

import asyncpg
import msgspec

from coupon_svc.domain.books import Ack, Book, BookRules, BookStatus, check_period
from coupon_svc.domain.outcomes import Outcome, Refused
from coupon_svc.postgres.database import one_row

WRITER_CHANNEL = "coupon_writer"
"""NOTIFY channel on which the owners of shards hear that a book has changed."""
BOOK_COLUMNS = """book_id, tenant_id, name, max_codes_per_user, max_redemptions_per_code, lock_ttl_seconds, starts_at_ms,
    expires_at_ms, ack, metadata, status, created_at_ms, version, total, lent,
    quarantined, guess_probability"""
_INSERT_BOOK = f"""
    INSERT INTO books (book_id, shard, tenant_id, created_at_ms, {", ".join(BookRules.__struct_fields__)})
    VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)
    RETURNING {BOOK_COLUMNS}
"""
_OF_TENANT = f"SELECT {BOOK_COLUMNS} FROM books WHERE book_id = $1 AND tenant_id = $2"
_OLDER_THAN = f"""
    SELECT {BOOK_COLUMNS} FROM books WHERE tenant_id = $1 AND (created_at_ms, book_id) < ($2, $3)
    ORDER BY created_at_ms DESC, book_id DESC LIMIT $4
"""
_IS_LOADED = "SELECT loaded FROM books WHERE book_id = $1 AND tenant_id = $2"


class NewBook(NamedTuple):
    """A book to be made, its rules already validated."""

    book_id: str
    shard: int
    tenant_id: int
    created_at_ms: int
    rules: BookRules


async def insert_book(connection: asyncpg.Connection, book: NewBook) -> Book:
    """Make the book, without codes."""
    rules = map(_stored, msgspec.structs.astuple(book.rules))
    row = await one_row(connection, _INSERT_BOOK, book.book_id, book.shard, book.tenant_id, book.created_at_ms, *rules)
    await tell_owner(connection, book.shard)
    return book_from_row(row)


async def read_book(connection: asyncpg.Connection, tenant_id: int, book_id: str) -> Book:
    """A book of the tenant. Raises Refused(book_not_found)."""
    row = await connection.fetchrow(_OF_TENANT, book_id, tenant_id)
    if row is None:
        raise Refused(Outcome.BOOK_NOT_FOUND)
    return book_from_row(row)


async def list_books(
    connection: asyncpg.Connection, tenant_id: int, limit: int, before: tuple[int, str] | None
) -> list[Book]:
    """The tenant's books, newest first; `before` is (created_at_ms, book_id) of the last one of the page before."""
    created_at_ms, book_id = before or (1 << 62, "")
    rows = await connection.fetch(_OLDER_THAN, tenant_id, created_at_ms, book_id, limit)
    return [book_from_row(row) for row in rows]


async def books_of_shard(connection: asyncpg.Connection, shard: int) -> list[Book]:
    """Every book of the shard that was ever brought to Redis."""
    rows = await connection.fetch(f"SELECT {BOOK_COLUMNS} FROM books WHERE shard = $1 AND loaded", shard)
    return [book_from_row(row) for row in rows]


async def is_loaded(connection: asyncpg.Connection, tenant_id: int, book_id: str) -> bool | None:
    """Whether the tenant's book was ever brought to Redis; None when there is no such book."""
    loaded: bool | None = await connection.fetchval(_IS_LOADED, book_id, tenant_id)
    return loaded


async def update_book(connection: asyncpg.Connection, tenant_id: int, book_id: str, changes: dict[str, object]) -> Book:
    """Change columns of a book and raise its version.

    Raises Refused: book_not_found; book_closed when a closed book is to be opened again. Raises InvalidPeriod.
    """
    row = await connection.fetchrow(f"{_OF_TENANT} FOR UPDATE", book_id, tenant_id)
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
            *map(_stored, changes.values()),
        )
        await tell_owner(connection, row["shard"])
    return book_from_row(row)


async def require_not_closed(connection: asyncpg.Connection, book_id: str) -> None:
    """Raises Refused(book_closed); otherwise the book is not closed until the transaction ends."""
    status = await connection.fetchval("SELECT status FROM books WHERE book_id = $1 FOR SHARE", book_id)
    if status == BookStatus.CLOSED:
        raise Refused(Outcome.BOOK_CLOSED)


async def tell_owner(connection: asyncpg.Connection, shard: int) -> None:
    """Wake the writer that owns the shard, once the transaction has committed. All writers are woken, and look."""
    await connection.execute("SELECT pg_notify($1, $2)", WRITER_CHANNEL, str(shard))


def _stored(value: object) -> object:
    """A field of a book as a statement takes it."""
    return bytes(value).decode() if isinstance(value, msgspec.Raw) else value


def book_from_row(row: asyncpg.Record) -> Book:
    """The book in a row of BOOK_COLUMNS."""
    values = {name: row[name] for name in Book.__struct_fields__}
    values["metadata"] = msgspec.Raw(row["metadata"].encode())
    values["ack"] = Ack(row["ack"])
    values["status"] = BookStatus(row["status"])
    return Book(**values)
