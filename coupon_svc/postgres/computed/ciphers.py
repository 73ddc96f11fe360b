"""The keys of computed patterns: read and written under a master key, and made into ciphers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from typing import NamedTuple

import asyncpg

from coupon_svc.domain.codes import Pattern
from coupon_svc.domain.computed import PatternCipher
from coupon_svc.domain.master_key import InvalidMasterKey, MasterKeys
from coupon_svc.postgres.errors import DatabaseUnfit

AT_ONCE = 500
"""Codes that are computed before others have their turn: about 2 ms."""
CIPHERS_KEPT_MAX = 10_000
PATTERN_COLUMNS = "pattern_id, tenant_id, pattern, symbols, sealed_key, master_key_id, taken"
_UNDER_ANOTHER_KEY = f"SELECT {PATTERN_COLUMNS} FROM computed_patterns WHERE master_key_id <> $1"
_SEAL_ANEW = "UPDATE computed_patterns SET sealed_key = $2, master_key_id = $3 WHERE pattern_id = $1"


class Ciphers:
    """The patterns' ciphers that a process has made, and the master keys to make others with."""

    def __init__(self, keys: MasterKeys) -> None:
        self.keys = keys
        self._made: OrderedDict[int, PatternCipher] = OrderedDict()

    def of(self, row: asyncpg.Record) -> PatternCipher:
        """The cipher of a row of `computed_patterns`. Raises DatabaseUnfit where its key cannot be read."""
        cipher = self._made.get(row["pattern_id"])
        if cipher is None:
            pattern = Pattern(row["pattern"], row["symbols"])
            try:
                key = self.keys.open(row["master_key_id"], row["sealed_key"], seal_of(row["tenant_id"], pattern))
            except KeyError:
                raise DatabaseUnfit(_lacks_key({row["master_key_id"]}, self.keys)) from None
            except InvalidMasterKey as error:
                raise DatabaseUnfit(f"{error}: restore it from a backup") from None
            cipher = self._made[row["pattern_id"]] = PatternCipher(pattern, key)
            if len(self._made) > CIPHERS_KEPT_MAX:
                self._made.popitem(last=False)
        return cipher


NO_CIPHERS = Ciphers(MasterKeys({}))
"""Of a process without a master key: it computes no codes, and refuses to work where there are computed books."""


class Known(NamedTuple):
    """A pattern of a tenant as it was read: its cipher, and below which number all are taken."""

    pattern_id: int
    cipher: PatternCipher
    taken: int


async def known_patterns(connection: asyncpg.Connection, tenant_id: int, ciphers: Ciphers) -> list[Known]:
    """The tenant's computed patterns as they are now."""
    rows = await connection.fetch(f"SELECT {PATTERN_COLUMNS} FROM computed_patterns WHERE tenant_id = $1", tenant_id)
    return [Known(row["pattern_id"], ciphers.of(row), row["taken"]) for row in rows]


async def check_master_key(connection: asyncpg.Connection, keys: MasterKeys) -> None:
    """Raises DatabaseUnfit when there are computed codes, and a master key of theirs is missing."""
    if missing := await _missing_keys(connection, keys):
        raise DatabaseUnfit(_lacks_key(missing, keys))


async def has_master_key(connection: asyncpg.Connection, keys: MasterKeys) -> bool:
    """Whether every computed code can be told with these keys."""
    return not await _missing_keys(connection, keys)


async def _missing_keys(connection: asyncpg.Connection, keys: MasterKeys) -> set[str]:
    rows = await connection.fetch("SELECT DISTINCT master_key_id FROM computed_patterns")
    return {row["master_key_id"] for row in rows if row["master_key_id"] not in keys}


def _lacks_key(missing: Collection[str], keys: MasterKeys) -> str:
    names = ", ".join(sorted(missing))
    if not keys:
        return (
            f"This database has computed codes, and COUPON_MASTER_KEY is not set: give the key {names}. Nothing is lost; no"
            " code can be computed without it."
        )
    return (
        f"This database has computed codes under the master key {names}, and COUPON_MASTER_KEY is another one"
        f" ({keys.first}): give the key under which they were made. Nothing is lost."
    )


async def rotate(connection: asyncpg.Connection, keys: MasterKeys) -> int:
    """Encrypt every pattern's key under the first master key. Returns how many were under another. The codes stay as they
    are. Raises DatabaseUnfit when one of the others is missing; then nothing was changed."""
    await check_master_key(connection, keys)
    async with connection.transaction():
        await connection.execute("LOCK TABLE computed_patterns IN SHARE ROW EXCLUSIVE MODE")
        rows = await connection.fetch(_UNDER_ANOTHER_KEY, keys.first)
        for row in rows:
            of = seal_of(row["tenant_id"], Pattern(row["pattern"], row["symbols"]))
            if row["master_key_id"] not in keys:
                raise DatabaseUnfit(_lacks_key({row["master_key_id"]}, keys))
            await connection.execute(
                _SEAL_ANEW,
                row["pattern_id"],
                keys.seal(keys.first, keys.open(row["master_key_id"], row["sealed_key"], of), of),
                keys.first,
            )
    return len(rows)


def seal_of(tenant_id: int, pattern: Pattern) -> str:
    return f"{tenant_id}\n{pattern.text}\n{pattern.symbols}"
