"""API keys: made, listed, revoked, and recognised by their hash. The key itself is shown once and stored nowhere."""

from __future__ import annotations

import hashlib
import secrets
from datetime import UTC, datetime

import asyncpg

from coupon_svc.domain.api_keys import ApiKey

SCOPES = ("books:write", "books:read", "codes:write", "codes:read", "coupons:assign", "coupons:redeem", "coupons:read")


_SELECT = """
    SELECT key_id, tenant_id, tenants.name AS tenant, scopes, label,
           (extract(epoch FROM expires_at) * 1000)::bigint AS expires_at_ms, revoked_at IS NOT NULL AS revoked
    FROM api_keys JOIN tenants USING (tenant_id)
"""


def hash_key(key: str) -> bytes:
    """What is stored of a key: its SHA-256. Fit for keys with at least 112 random bits (NIST SP 800-63B)."""
    return hashlib.sha256(key.encode()).digest()


def new_key() -> str:
    """A fresh key: a prefix that scanners for leaked secrets can be taught, and 256 random bits."""
    return "cbk_" + secrets.token_urlsafe(32)


async def find_key(connection: asyncpg.Connection, key_hash: bytes) -> ApiKey | None:
    """The key with this hash, or None. Revoked and expired ones are found, too."""
    row = await connection.fetchrow(_SELECT + " WHERE key_hash = $1", key_hash)
    return _api_key(row) if row is not None else None


async def create_key(
    connection: asyncpg.Connection,
    tenant: str,
    key: str,
    scopes: tuple[str, ...] = SCOPES,
    label: str = "",
    expires_at: datetime | None = None,
) -> str:
    """Store a key of a tenant, which is made when there is none of this name. Returns the key's id.

    A key that exists already stays as it is; ValueError when it is another tenant's.
    """
    async with connection.transaction():
        await connection.execute("INSERT INTO tenants (name) VALUES ($1) ON CONFLICT DO NOTHING", tenant)
        tenant_id = await connection.fetchval("SELECT tenant_id FROM tenants WHERE name = $1", tenant)
        await connection.execute(
            "INSERT INTO api_keys (key_id, tenant_id, key_hash, scopes, label, expires_at)"
            " VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT (key_hash) DO NOTHING",
            "key_" + secrets.token_hex(6),
            tenant_id,
            hash_key(key),
            list(scopes),
            label,
            expires_at,
        )
        stored = await find_key(connection, hash_key(key))
        assert stored is not None
        if stored.tenant_id != tenant_id:
            raise ValueError("this key belongs to another tenant already")
        return stored.key_id


async def list_keys(connection: asyncpg.Connection, tenant: str | None = None) -> list[ApiKey]:
    """All keys, or those of a tenant, oldest first."""
    rows = await connection.fetch(
        _SELECT + " WHERE $1::text IS NULL OR tenants.name = $1 ORDER BY api_keys.created_at", tenant
    )
    return [_api_key(row) for row in rows]


async def revoke_key(connection: asyncpg.Connection, key_id: str) -> bool:
    """Revoke a key; False when there is none of this id. Every process refuses it once its cache has aged out."""
    done = await connection.execute(
        "UPDATE api_keys SET revoked_at = coalesce(revoked_at, $2) WHERE key_id = $1", key_id, datetime.now(UTC)
    )
    return bool(done == "UPDATE 1")


def _api_key(row: asyncpg.Record) -> ApiKey:
    return ApiKey(
        row["key_id"],
        row["tenant_id"],
        row["tenant"],
        frozenset(row["scopes"]),
        row["label"],
        row["expires_at_ms"],
        row["revoked"],
    )
