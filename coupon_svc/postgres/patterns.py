"""What of a pattern a tenant's codes have used up, for whoever asks before any code is made."""

from __future__ import annotations

from collections.abc import Collection

import asyncpg

from coupon_svc.domain.codes import Pattern
from coupon_svc.postgres import catalogue
from coupon_svc.postgres.computed import Ciphers, books_of_computed

COUNT_S = 8
"""How long the codes of a pattern are counted at most."""


async def count_used(connection: asyncpg.Connection, tenant_id: int, pattern: Pattern) -> int:
    """As `catalogue.count_used`; ends after COUNT_S, with an error that says that Postgres is unavailable."""
    async with connection.transaction(readonly=True):
        await connection.execute(f"SET LOCAL statement_timeout = '{COUNT_S}s'")
        return await catalogue.count_used(connection, tenant_id, pattern)


async def codes_taken(
    connection: asyncpg.Connection, tenant_id: int, codes: Collection[str], ciphers: Ciphers
) -> set[str]:
    """Those of the codes that the tenant has, or is uploading."""
    rows = await connection.fetch(
        "SELECT code FROM codes WHERE tenant_id = $1 AND code = ANY ($2)", tenant_id, list(codes)
    )
    return {row["code"] for row in rows} | set(await books_of_computed(connection, tenant_id, codes, ciphers))
