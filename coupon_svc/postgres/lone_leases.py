"""Codes that are lent alone, before their turn, since somebody asked for them by name; and are on their way to Redis."""

from __future__ import annotations

from collections.abc import Sequence

import asyncpg

from coupon_svc.domain.outcomes import Outcome, Refused
from coupon_svc.postgres.books import tell_owner
from coupon_svc.postgres.computed.ciphers import NO_CIPHERS, Ciphers
from coupon_svc.postgres.computed.rows import give_rows
from coupon_svc.postgres.database import one_row
from coupon_svc.postgres.lending import Lease

BROUGHT_AT_ONCE = 500
_LOCK_BOOK = "SELECT shard, leased_upto FROM books WHERE book_id = $1 FOR UPDATE"
_MOVE_UP = "UPDATE codes SET place = 0 WHERE tenant_id = $1 AND code = $2 AND place > $3"
_NOTE = "INSERT INTO lone_leases (book_id, code, shard) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING"
_ON_THE_WAY = f"""
    SELECT books.book_id, array_agg(code) AS codes, total - lent - quarantined AS unlent,
           (SELECT count(*) FROM lone_leases o WHERE o.book_id = books.book_id) - count(*) AS lone
    FROM (SELECT * FROM lone_leases WHERE shard = ANY ($1) LIMIT {BROUGHT_AT_ONCE}) l JOIN books USING (book_id)
    GROUP BY books.book_id
"""
_PLACE_OF = "SELECT place FROM codes WHERE tenant_id = $1 AND code = $2"


async def lease_code(
    connection: asyncpg.Connection, tenant_id: int, book_id: str, code: str, ciphers: Ciphers = NO_CIPHERS
) -> None:
    """Lend one code alone, before its turn, and ask the shard's owner to bring it to Redis. Safe to ask twice.

    Raises Refused(code_quarantined) for a code that is never dealt again.
    """
    book = await one_row(connection, _LOCK_BOOK, book_id)
    moved = await connection.execute(_MOVE_UP, tenant_id, code, book["leased_upto"])
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
    await connection.execute(_NOTE, book_id, code, book["shard"])
    await tell_owner(connection, book["shard"])


async def lone_leases(connection: asyncpg.Connection, shards: Sequence[int]) -> dict[str, Lease]:
    """Codes that were lent alone and are not in Redis yet, by book: the next BROUGHT_AT_ONCE."""
    rows = await connection.fetch(_ON_THE_WAY, list(shards))
    return {row["book_id"]: Lease(row["codes"], row["unlent"], row["lone"]) for row in rows}


async def note_lone_brought(connection: asyncpg.Connection, book_id: str, codes: list[str]) -> None:
    """Redis has these codes now. A trigger keeps them as outstanding (`lone_leases_stay_outstanding`)."""
    await connection.execute("DELETE FROM lone_leases WHERE book_id = $1 AND code = ANY ($2)", book_id, codes)
