"""API keys: what is known of one. The key itself is nowhere kept."""

from __future__ import annotations

from typing import NamedTuple


class ApiKey(NamedTuple):
    """`expires_at_ms` is None when the key lives until it is revoked."""

    key_id: str
    tenant_id: int
    tenant: str
    scopes: frozenset[str]
    label: str
    expires_at_ms: int | None
    revoked: bool
