"""Brings the database to the newest schema: the files of `sql/`, in the order of their numbers, each once."""

from __future__ import annotations

import secrets
from pathlib import Path

import asyncpg

from coupon_svc.postgres.errors import DatabaseUnfit
from coupon_svc.resources import resource_folder

_ONE_AT_A_TIME = 0x636F75706F6E  # "coupon"; the advisory lock of whoever migrates


async def migrate(connection: asyncpg.Connection, shards: int, folder: Path | None = None) -> list[str]:
    """Apply what is missing, in one transaction, and note the number of shards at the first start.

    Returns the names of the files applied. Raises DatabaseUnfit for an encoding other than UTF-8, and for another number
    of shards: books name their shard in their id, so it can never change.
    """
    await _check_encoding(connection)
    async with connection.transaction():
        await connection.execute("SELECT pg_advisory_xact_lock($1)", _ONE_AT_A_TIME)
        await connection.execute(
            "CREATE TABLE IF NOT EXISTS schema_migrations (name text PRIMARY KEY, at timestamptz DEFAULT now())"
        )
        done = {row["name"] for row in await connection.fetch("SELECT name FROM schema_migrations")}
        applied = []
        for path in _migrations(folder):
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
        await _check_shards(connection, shards)
    return applied


async def check_installation(connection: asyncpg.Connection, shards: int) -> str:
    """The id of the installation to which the database belongs.

    Raises DatabaseUnfit unless the database is in UTF-8, has every migration that this version knows, and was made for
    `shards` shards. A migration that this version does not know is no reason to refuse: while a newer version is rolled
    out, the older one works on.
    """
    await _check_encoding(connection)
    if await connection.fetchval("SELECT to_regclass('schema_migrations')") is None:
        raise DatabaseUnfit("This database has no schema yet: run `coupon-svc migrate` first.")
    done = {row["name"] for row in await connection.fetch("SELECT name FROM schema_migrations")}
    missing = [path.stem for path in _migrations(None) if path.stem not in done]
    if missing:
        raise DatabaseUnfit(f"This database lacks {', '.join(missing)}: run `coupon-svc migrate` first.")
    await _check_shards(connection, shards)
    installation: str = await connection.fetchval("SELECT installation FROM settings")
    return installation


async def _check_shards(connection: asyncpg.Connection, shards: int) -> None:
    stored = await connection.fetchval("SELECT shards FROM settings")
    if stored != shards:
        raise DatabaseUnfit(
            f"COUPON_SHARDS is {shards}, but this database was made for {stored}: set COUPON_SHARDS={stored}."
        )


async def _check_encoding(connection: asyncpg.Connection) -> None:
    encoding = await connection.fetchval("SHOW server_encoding")
    if encoding != "UTF8":
        raise DatabaseUnfit(
            f"This database is in {encoding}, which cannot hold every user id: create one in UTF-8, e.g. with"
            " CREATE DATABASE coupons ENCODING 'UTF8' TEMPLATE template0."
        )


def _migrations(folder: Path | None) -> list[Path]:
    return sorted((folder or resource_folder("sql")).glob("[0-9]*.sql"))
