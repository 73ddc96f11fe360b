"""A book that stands in the ledger, for tests without a service."""

from __future__ import annotations

import asyncpg
import msgspec

from coupon_svc.domain.books import Ack, BookRules
from coupon_svc.postgres.books import NewBook, insert_book


async def insert_bare_book(
    connection: asyncpg.Connection, book_id: str, *, shard: int = 0, tenant_id: int = 1, ack: Ack = Ack.LEDGER
) -> None:
    """A book without codes, limits or dates, each of whose codes is good for one redemption."""
    rules = BookRules(
        name="b",
        max_codes_per_user=None,
        max_redemptions_per_code=1,
        lock_ttl_seconds=120,
        starts_at_ms=None,
        expires_at_ms=None,
        ack=ack,
        metadata=msgspec.Raw(b"{}"),
    )
    await insert_book(connection, NewBook(book_id, shard, tenant_id, 0, rules))
