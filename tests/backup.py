"""A backup of the ledger, as an operator restores it."""

from __future__ import annotations

from typing import Any

import asyncpg

from tests.harness import Stack


class Backup:
    """A copy of the whole database, put back over what came after it."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._tables: dict[str, list[Any]] = {}

    async def take(self) -> None:
        ledger = await asyncpg.connect(self._stack.database_url)
        async with ledger.transaction(isolation="repeatable_read", readonly=True):  # of one moment
            names = await ledger.fetch(
                "SELECT relname FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace"
            )
            for (name,) in names:
                self._tables[name] = await ledger.fetch(f"SELECT * FROM {name}")
        await ledger.close()

    async def put_back(self) -> None:
        ledger = await asyncpg.connect(self._stack.database_url)
        async with ledger.transaction():
            await ledger.execute("SET LOCAL session_replication_role = replica")
            await ledger.execute(f"TRUNCATE {', '.join(self._tables)}")
            for name, rows in self._tables.items():
                if rows:
                    await ledger.copy_records_to_table(name, records=rows, columns=list(rows[0].keys()))
        await ledger.close()
