"""What of a pattern a tenant's codes have used up, for whoever asks before any code is made."""

from __future__ import annotations

from collections.abc import Collection

import asyncpg

from coupon_svc.domain.codes import Pattern
from coupon_svc.postgres.catalogue import CODES_IN_PATTERN

COUNT_S = 8
"""How long the codes of a pattern are counted at most."""


async def count_used(connection: asyncpg.Connection, tenant_id: int, pattern: Pattern) -> int:
    """How many codes of the tenant lie in the pattern, those of uploads under way too. Reads all codes that begin as the
    pattern does; ends after COUNT_S, with an error that says that Postgres is unavailable."""
    async with connection.transaction(readonly=True):
        await connection.execute(f"SET LOCAL statement_timeout = '{COUNT_S}s'")
        used: int = await connection.fetchval(CODES_IN_PATTERN, tenant_id, *pattern.bounds, pattern.regex)
        return used


async def codes_taken(connection: asyncpg.Connection, tenant_id: int, codes: Collection[str]) -> set[str]:
    """Those of the codes that the tenant has, or is uploading."""
    rows = await connection.fetch(
        "SELECT code FROM codes WHERE tenant_id = $1 AND code = ANY ($2)", tenant_id, list(codes)
    )
    return {row["code"] for row in rows}
