"""Brings the database to the newest schema: the files of `sql/`, in the order of their numbers, each once."""

from __future__ import annotations

import secrets
from pathlib import Path

import asyncpg

from coupon_svc.resources import resource_folder

_ONE_AT_A_TIME = 0x636F75706F6E  # "coupon"; the advisory lock of whoever migrates


class ShardsDiffer(Exception):
    """The database was made for another number of shards; the message says for how many."""


async def migrate(connection: asyncpg.Connection, shards: int, folder: Path | None = None) -> list[str]:
    """Apply what is missing, in one transaction, and note the number of shards at the first start.

    Returns the names of the files applied. Raises ShardsDiffer when the database has another number of shards: books
    name their shard in their id, so it can never change.
    """
    async with connection.transaction():
        await connection.execute("SELECT pg_advisory_xact_lock($1)", _ONE_AT_A_TIME)
        await connection.execute(
            "CREATE TABLE IF NOT EXISTS schema_migrations (name text PRIMARY KEY, at timestamptz DEFAULT now())"
        )
        done = {row["name"] for row in await connection.fetch("SELECT name FROM schema_migrations")}
        applied = []
        for path in sorted((folder or resource_folder("sql")).glob("[0-9]*.sql")):
            if path.stem not in done:
                await connection.execute(path.read_text())
                await connection.execute("INSERT INTO schema_migrations (name) VALUES ($1)", path.stem)
                applied.append(path.stem)
        await connection.execute("INSERT INTO settings (shards) VALUES ($1) ON CONFLICT DO NOTHING", shards)
        await connection.execute(
            "UPDATE settings SET receipt_secret = $1 WHERE receipt_secret IS NULL", secrets.token_bytes(32)
        )
        await connection.execute(
            "INSERT INTO shards (shard) SELECT generate_series(0, shards - 1) FROM settings ON CONFLICT DO NOTHING"
        )
        await check_shards(connection, shards)
    return applied


async def check_shards(connection: asyncpg.Connection, shards: int) -> None:
    """Raises ShardsDiffer unless the database was made for `shards` shards."""
    stored = await connection.fetchval("SELECT shards FROM settings")
    if stored != shards:
        raise ShardsDiffer(
            f"COUPON_SHARDS is {shards}, but this database was made for {stored}: set COUPON_SHARDS={stored}."
        )
