"""Whose an API key is: Postgres says, and whoever asks remembers it for a while."""

from __future__ import annotations

from coupon_svc.domain.api_keys import ApiKey
from coupon_svc.postgres.database import Database
from coupon_svc.postgres.keys import find_key


class ApiKeys:
    """Looks keys up by their hash."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def find(self, key_hash: bytes) -> ApiKey | None:
        """The key with this hash, revoked or not; None when there is none. Raises LedgerUnavailable."""
        async with self._database.connection(only_reads=True) as connection:
            return await find_key(connection, key_hash)
