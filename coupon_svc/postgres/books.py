"""Book rows: how they are read. Who writes them: `catalogue` for callers, `lending` for the shard's owner."""

from __future__ import annotations

from collections.abc import Collection

import asyncpg
import msgspec

from coupon_svc.domain.books import Ack, Book, BookStatus
from coupon_svc.postgres.database import Database

BOOK_COLUMNS = """book_id, tenant_id, name, max_codes_per_user, max_redemptions_per_code, lock_ttl_seconds, starts_at_ms,
    expires_at_ms, ack, metadata, status, created_at_ms, version, total, lent,
    quarantined, guess_probability"""
_FIND_CODES = """
    SELECT tenant_id, code, book_id FROM codes
    JOIN unnest($1::int[], $2::text[]) AS asked (tenant_id, code) USING (tenant_id, code)
    WHERE place >= -1 -- others are of an upload that may still come to nothing
"""


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


async def find_codes(database: Database, asked: Collection[tuple[int, str]]) -> dict[tuple[int, str], str]:
    """The books of those (tenant, code) that exist, with one statement. Raises LedgerUnavailable."""
    rows = await database.fetch(_FIND_CODES, [tenant_id for tenant_id, _ in asked], [code for _, code in asked])
    return {(row["tenant_id"], row["code"]): row["book_id"] for row in rows}


async def is_loaded(connection: asyncpg.Connection, tenant_id: int, book_id: str) -> bool | None:
    """Whether the tenant's book was ever brought to Redis; None when there is no such book."""
    loaded: bool | None = await connection.fetchval(
        "SELECT loaded FROM books WHERE book_id = $1 AND tenant_id = $2", book_id, tenant_id
    )
    return loaded
