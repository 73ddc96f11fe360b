"""A migration is applied once, and never changed afterwards."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest

from coupon_svc.postgres.errors import DatabaseUnfit
from coupon_svc.postgres.keys import SCOPES, create_key, find_key, hash_key
from coupon_svc.postgres.migrations import migrate, read_migrations
from coupon_svc.resources import resource_folder
from tests.conftest import SHARDS
from tests.harness import fresh_database

FOREIGN = "0012_foreign"


@pytest.fixture
async def ledger(postgres_url: str) -> AsyncIterator[asyncpg.Connection]:
    """A database of its own with the newest schema."""
    connection = await asyncpg.connect(await fresh_database(postgres_url, SHARDS))
    yield connection
    await connection.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of `sql/`, to be changed."""
    for path in resource_folder("sql").glob("*.sql"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


async def noted(ledger: asyncpg.Connection) -> dict[str, str | None]:
    return {row["name"]: row["checksum"] for row in await ledger.fetch("SELECT name, checksum FROM schema_migrations")}


async def test_every_applied_file_has_its_checksum(ledger: asyncpg.Connection) -> None:
    assert await noted(ledger) == {one.name: one.checksum for one in read_migrations()}


async def test_a_file_that_was_changed_after_it_was_applied_is_refused_by_name(
    ledger: asyncpg.Connection, folder: Path
) -> None:
    changed = folder / "0003_ledger.sql"
    changed.write_text(changed.read_text() + "-- one more word\n")
    (folder / f"{FOREIGN}.sql").write_text("CREATE TABLE foreign_table (id int);")
    with pytest.raises(DatabaseUnfit, match=r"sql/0003_ledger.sql was changed after it was applied"):
        await migrate(ledger, SHARDS, folder)
    assert await ledger.fetchval("SELECT to_regclass('foreign_table')") is None, "nothing was applied"


@pytest.fixture
def folder_of_windows(folder: Path) -> Path:
    """`folder` as a checkout on Windows has it."""
    for path in folder.glob("*.sql"):
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    return folder


async def test_line_ends_are_no_change(ledger: asyncpg.Connection, folder_of_windows: Path) -> None:
    assert await migrate(ledger, SHARDS, folder_of_windows) == []


async def test_rows_of_a_version_without_checksums_get_one(ledger: asyncpg.Connection) -> None:
    before = await noted(ledger)
    await ledger.execute("UPDATE schema_migrations SET checksum = NULL WHERE name < '0005'")
    assert await migrate(ledger, SHARDS) == []
    assert await noted(ledger) == before


async def test_a_database_of_the_version_before_is_brought_up(ledger: asyncpg.Connection, folder: Path) -> None:
    await ledger.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    newest = folder / "0011_checksums.sql"
    text = newest.read_text()
    newest.unlink()
    await migrate(ledger, SHARDS, folder)
    newest.write_text(text)
    assert await migrate(ledger, SHARDS, folder) == ["0011_checksums"]
    assert await noted(ledger) == {one.name: one.checksum for one in read_migrations(folder)}


async def test_only_keys_with_all_scopes_get_a_new_one(ledger: asyncpg.Connection, folder: Path) -> None:
    await ledger.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    newest = folder / "0014_codes_in_order.sql"
    text = newest.read_text()
    newest.unlink()
    await migrate(ledger, SHARDS, folder)
    before = tuple(scope for scope in SCOPES if scope != "codes:read")
    for key, scopes in (("all", before), ("some", before[1:])):
        await create_key(ledger, "acme", key, scopes)
    newest.write_text(text)
    assert await migrate(ledger, SHARDS, folder) == ["0014_codes_in_order"]
    found = [await find_key(ledger, hash_key(key)) for key in ("all", "some")]
    assert [one.scopes if one else None for one in found] == [frozenset(SCOPES), frozenset(before[1:])]


async def test_what_a_migration_needs_is_noted(ledger: asyncpg.Connection, folder: Path) -> None:
    text = "-- No version asks for it any more.\n-- needs: 0011_checksums\nDROP TABLE patterns;\n"
    (folder / f"{FOREIGN}.sql").write_text(text)
    assert await migrate(ledger, SHARDS, folder) == [FOREIGN]
    needs = await ledger.fetch("SELECT name, needs FROM schema_migrations WHERE needs IS NOT NULL")
    ours = {(name, name) for name in ("0012_entries", "0019_computed_codes")}
    assert {tuple(row) for row in needs} == {*ours, (FOREIGN, "0011_checksums")}
