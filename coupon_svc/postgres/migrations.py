"""Brings the database to the newest schema: the files of `sql/`, in the order of their numbers, each once.

A file that was applied is never changed: its checksum is kept, and compared by every `migrate`. A file may hold one line
`-- needs: 0011_name`: processes that do not know that migration do not work with the schema any more, and refuse to.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from pathlib import Path
from typing import NamedTuple

import asyncpg

from coupon_svc.postgres.errors import DatabaseUnfit
from coupon_svc.resources import resource_folder

_ONE_AT_A_TIME = 0x636F75706F6E  # "coupon"; the advisory lock of whoever migrates

_NEEDS = re.compile(r"^-- needs: (\w+)$", re.MULTILINE)
_HAS_CHECKSUMS = """
    SELECT EXISTS (SELECT FROM pg_attribute
                   WHERE attrelid = to_regclass('schema_migrations') AND attname = 'checksum' AND NOT attisdropped)
"""


class Migration(NamedTuple):
    """A file of `sql/`."""

    name: str
    statements: str
    checksum: str
    """SHA-256, in hexadecimal, of the text with line ends as `\\n`: a checkout on Windows has the same."""
    needs: str | None
    """The migration that a process must know to work with the schema that this one leaves."""


def read_migrations(folder: Path | None = None) -> list[Migration]:
    """The migrations in `folder` (this version's own unless given), in the order in which they are applied."""
    migrations = []
    for path in sorted((folder or resource_folder("sql")).glob("[0-9]*.sql")):
        text = path.read_text(encoding="utf-8")  # with universal newlines
        needs = _NEEDS.search(text)
        checksum = hashlib.sha256(text.encode()).hexdigest()
        migrations.append(Migration(path.stem, text, checksum, needs[1] if needs else None))
    return migrations


async def migrate(connection: asyncpg.Connection, shards: int, folder: Path | None = None) -> list[str]:
    """Apply what is missing, in one transaction, and note the number of shards at the first start.

    Returns the names of the files applied. Raises DatabaseUnfit, with nothing applied: for an encoding other than UTF-8; for
    a file that was changed after it was applied; for another number of shards. That can never change, since books name
    their shard in their id.
    """
    await _check_encoding(connection)
    migrations = read_migrations(folder)
    async with connection.transaction():
        await connection.execute("SELECT pg_advisory_xact_lock($1)", _ONE_AT_A_TIME)
        await connection.execute(
            "CREATE TABLE IF NOT EXISTS schema_migrations (name text PRIMARY KEY, at timestamptz DEFAULT now())"
        )
        done = {row["name"] for row in await connection.fetch("SELECT name FROM schema_migrations")}
        await _check_unchanged(connection, migrations)
        missing = [migration for migration in migrations if migration.name not in done]
        for migration in missing:
            await connection.execute(migration.statements)
            await connection.execute("INSERT INTO schema_migrations (name) VALUES ($1)", migration.name)
        await _note_checksums(connection, migrations)
        await connection.execute("INSERT INTO settings (shards) VALUES ($1) ON CONFLICT DO NOTHING", shards)
        await connection.execute(
            "UPDATE settings SET receipt_secret = $1 WHERE receipt_secret IS NULL", secrets.token_bytes(32)
        )
        await connection.execute(
            "INSERT INTO shards (shard) SELECT generate_series(0, shards - 1) FROM settings ON CONFLICT DO NOTHING"
        )
        await _check_shards(connection, shards)
    return [migration.name for migration in missing]


def known_migrations() -> list[str]:
    """The names of the migrations that this version knows, in their order."""
    return [migration.name for migration in read_migrations()]


async def check_installation(connection: asyncpg.Connection, shards: int, known: list[str]) -> str:
    """The id of the installation to which the database belongs. `known` are the migrations of this version, which a process
    reads once.

    Raises DatabaseUnfit unless the database is in UTF-8, has every migration that this version knows, was made for `shards`
    shards, and has no migration that leaves this version behind. One that this version merely does not know is no reason
    to refuse: while a newer version is rolled out, the older one works on.
    """
    await _check_encoding(connection)
    if await connection.fetchval("SELECT to_regclass('schema_migrations')") is None:
        raise DatabaseUnfit("This database has no schema yet: run `coupon-svc migrate` first.")
    done = {row["name"] for row in await connection.fetch("SELECT name FROM schema_migrations")}
    missing = [name for name in known if name not in done]
    if missing:
        raise DatabaseUnfit(f"This database lacks {', '.join(missing)}: run `coupon-svc migrate` first.")
    for row in await connection.fetch(
        "SELECT name, needs FROM schema_migrations WHERE needs <> ALL ($1) ORDER BY name", known
    ):
        raise DatabaseUnfit(
            f"This database has {row['name']}, with which only versions work that know {row['needs']}; this one does not:"
            " start a newer version."
        )
    await _check_shards(connection, shards)
    installation: str = await connection.fetchval("SELECT installation FROM settings")
    return installation


async def _check_unchanged(connection: asyncpg.Connection, migrations: list[Migration]) -> None:
    """Raises DatabaseUnfit when a file is not what was applied under its name."""
    if not await connection.fetchval(_HAS_CHECKSUMS):
        return
    rows = await connection.fetch("SELECT name, checksum FROM schema_migrations WHERE checksum IS NOT NULL")
    applied = {row["name"]: row["checksum"] for row in rows}
    changed = [one.name for one in migrations if applied.get(one.name, one.checksum) != one.checksum]
    if changed:
        raise DatabaseUnfit(
            f"sql/{changed[0]}.sql was changed after it was applied to this database: restore the file as it was, and put"
            " the change into a migration of its own."
        )


async def _note_checksums(connection: asyncpg.Connection, migrations: list[Migration]) -> None:
    """Give rows their checksum that have none: new ones, and those of versions that kept none."""
    if await connection.fetchval(_HAS_CHECKSUMS):
        await connection.execute(
            "UPDATE schema_migrations SET checksum = noted.checksum, needs = noted.needs"
            " FROM unnest($1::text[], $2::text[], $3::text[]) AS noted (name, checksum, needs)"
            " WHERE schema_migrations.name = noted.name AND schema_migrations.checksum IS NULL",
            [one.name for one in migrations],
            [one.checksum for one in migrations],
            [one.needs for one in migrations],
        )


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
