"""Book rows: how they are read. Who writes them: `catalogue` for callers, `lending` for the shard's owner."""

from __future__ import annotations

import asyncpg
import msgspec

from coupon_svc.domain.books import Ack, Book, BookStatus

BOOK_COLUMNS = """book_id, tenant_id, name, max_codes_per_user, max_redemptions_per_code, lock_ttl_seconds, starts_at_ms,
    expires_at_ms, ack, metadata, status, created_at_ms, version, total, lent,
    quarantined"""


def book_from_row(row: asyncpg.Record) -> Book:
    """The book in a row of BOOK_COLUMNS."""
    values = {name: row[name] for name in Book.__struct_fields__}
    values["metadata"] = msgspec.Raw(row["metadata"].encode())
    values["ack"] = Ack(row["ack"])
    values["status"] = BookStatus(row["status"])
    return Book(**values)


async def books_of_shard(connection: asyncpg.Connection, shard: int) -> list[Book]:
    """Every book of the shard that was ever brought to Redis."""
    rows = await connection.fetch(f"SELECT {BOOK_COLUMNS} FROM books WHERE shard = $1 AND loaded", shard)
    return [book_from_row(row) for row in rows]
