"""The command line against a database of its own: what is printed where, and what is refused."""

from __future__ import annotations

import asyncio
import contextlib
import io
import secrets
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest

from coupon_svc.cli import main
from coupon_svc.postgres.keys import SCOPES, hash_key
from coupon_svc.postgres.migrations import migrate
from coupon_svc.resources import resource_folder

SHARDS = 4


class Ran(NamedTuple):
    status: int
    out: str
    error: str


class Cli:
    """`coupon-svc` with COUPON_DATABASE_URL set, in this process; what it prints is caught."""

    def __init__(self, url: str, capsys: pytest.CaptureFixture[str]) -> None:
        self.url = url
        self._capsys = capsys

    def __call__(self, *args: str) -> Ran:
        try:
            status = main(list(args))
        except SystemExit as stopped:
            status = int(stopped.code or 0)
        return Ran(status, *self._capsys.readouterr())

    def refused(self, *args: str) -> str:
        """Why the command was refused: one line, with exit status 1 and nothing on standard output."""
        ran = self(*args)
        assert (ran.status, ran.out) == (1, ""), ran
        assert ran.error.startswith("coupon-svc: ")
        assert len(ran.error.splitlines()) == 1
        return ran.error

    def rows(self, statement: str) -> list[tuple[Any, ...]]:
        async def fetch() -> list[tuple[Any, ...]]:
            connection = await asyncpg.connect(self.url)
            try:
                return [tuple(row) for row in await connection.fetch(statement)]
            finally:
                await connection.close()

        return asyncio.run(fetch())


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Without a database that could be reached."""
    url = "postgresql://127.0.0.1:1/nowhere"
    monkeypatch.setenv("COUPON_DATABASE_URL", url)
    monkeypatch.setenv("COUPON_SHARDS", str(SHARDS))
    monkeypatch.delenv("COUPON_REDIS_URL", raising=False)
    return Cli(url, capsys)


@contextlib.asynccontextmanager
async def database_of_its_own(postgres_url: str) -> AsyncIterator[str]:
    name = "cli_" + secrets.token_hex(6)
    connection = await asyncpg.connect(postgres_url)
    await connection.execute(f"CREATE DATABASE {name}")
    yield urlunsplit(urlsplit(postgres_url)._replace(path=f"/{name}"))
    await connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
    await connection.close()


@pytest.fixture
async def empty(cli: Cli, postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Cli]:
    """On an empty database."""
    async with database_of_its_own(postgres_url) as url:
        monkeypatch.setenv("COUPON_DATABASE_URL", url)
        cli.url = url
        yield cli


@pytest.fixture(scope="module")
async def migrated_database(postgres_url: str) -> AsyncIterator[str]:
    async with database_of_its_own(postgres_url) as url:
        connection = await asyncpg.connect(url)
        await migrate(connection, SHARDS)
        yield url
        await connection.close()


@pytest.fixture
async def migrated(cli: Cli, migrated_database: str, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """On a database with the newest schema, and no keys."""
    connection = await asyncpg.connect(migrated_database)
    await connection.execute("TRUNCATE tenants CASCADE")
    await connection.close()
    monkeypatch.setenv("COUPON_DATABASE_URL", migrated_database)
    cli.url = migrated_database
    return cli


# -- help and wrong use -----------------------------------------------------------------------------------------------


def test_without_arguments_it_shows_help(cli: Cli) -> None:
    ran = cli()
    assert (ran.status, ran.error) == (0, "")
    for command in ("dev", "demo", "load", "api", "writer", "migrate", "keys"):
        assert f"\n    {command} " in ran.out


def test_keys_alone_shows_what_can_be_done_with_them(cli: Cli) -> None:
    ran = cli("keys")
    assert (ran.status, ran.error) == (0, "")
    for action in ("create", "import", "list", "revoke"):
        assert f"\n    {action} " in ran.out


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["frobnicate"], "invalid choice: 'frobnicate'"),
        (["dev", "--port", "abc"], "--port: give a whole number between 0 and 65535, not 'abc'"),
        (["dev", "--port", "65536"], "--port: give a whole number between 0 and 65535, not '65536'"),
        (["dev", "--port", "-1"], "--port"),
        (["dev", "--workers", "0"], "--workers: give a whole number between 1 and 64, not '0'"),
        (["api", "--workers", "65"], "--workers: give a whole number between 1 and 64, not '65'"),
        (["keys", "create"], "--tenant"),
        (["keys", "revoke"], "key_id"),
    ],
)
def test_what_is_not_understood_is_told_in_one_line(cli: Cli, args: list[str], said: str) -> None:
    ran = cli(*args)
    assert (ran.status, ran.out) == (2, "")
    assert said in ran.error
    assert len(ran.error.splitlines()) == 1


@pytest.mark.parametrize("key", ["", "two words", "ä", "x" * 201, "new\nline"])
def test_dev_refuses_a_key_that_cannot_be_one_before_it_starts_anything(cli: Cli, tmp_path: Path, key: str) -> None:
    assert "1..200 printable ASCII characters" in cli.refused(
        "dev", "--data-dir", str(tmp_path / "data"), "--api-key", key
    )
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("shards", ["nonsense", "0", "100", "1.5"])
def test_dev_refuses_a_senseless_setting_before_it_starts_anything(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: str
) -> None:
    monkeypatch.setenv("COUPON_SHARDS", shards)
    assert "COUPON_SHARDS" in cli.refused("dev", "--data-dir", str(tmp_path / "data"))
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("command", [["migrate"], ["keys", "list"], ["keys", "create", "--tenant", "t"]])
def test_a_missing_database_url_is_told_by_its_name(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.delenv("COUPON_DATABASE_URL")
    said = cli.refused(*command)
    assert "COUPON_DATABASE_URL is not set" in said
    assert "postgresql://" in said
    assert "coupon-svc dev" in said


@pytest.mark.parametrize("command", ["api", "writer"])
def test_a_missing_redis_url_is_told_by_its_name(cli: Cli, command: str) -> None:
    assert "COUPON_REDIS_URL is not set" in cli.refused(command)


@pytest.mark.parametrize("url", ["foo", "postgresql://h:abc/x", "postgresql://[::1/x", "postgresql://127.0.0.1:1/x"])
def test_a_database_url_that_leads_nowhere_is_told_by_its_name(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setenv("COUPON_DATABASE_URL", url)
    assert "COUPON_DATABASE_URL" in cli.refused("migrate")


def test_a_database_that_does_not_exist_is_told_by_its_name(
    cli: Cli, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COUPON_DATABASE_URL", urlunsplit(urlsplit(postgres_url)._replace(path="/nowhere")))
    said = cli.refused("migrate")
    assert 'database "nowhere" does not exist' in said
    assert "COUPON_DATABASE_URL" in said


def test_python_dash_m_is_the_same_command() -> None:
    command = [sys.executable, "-m", "coupon_svc", "writer", "--help"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    assert ran.stdout.startswith("usage: coupon-svc writer")


# -- migrate ----------------------------------------------------------------------------------------------------------


def test_migrate_brings_every_file_once(empty: Cli) -> None:
    files = [path.stem for path in sorted(resource_folder("sql").glob("[0-9]*.sql"))]
    assert empty("migrate") == Ran(0, "".join(f"applied {name}\n" for name in files), "")
    assert empty("migrate") == Ran(0, "the schema is the newest already\n", "")
    assert empty.rows("SELECT name FROM schema_migrations ORDER BY name") == [(name,) for name in files]
    assert empty.rows("SELECT count(*) FROM shards") == [(SHARDS,)]


def test_another_number_of_shards_is_refused(migrated: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COUPON_SHARDS", "5")
    assert f"set COUPON_SHARDS={SHARDS}" in migrated.refused("migrate")
    assert migrated.rows("SELECT count(*) FROM shards") == [(SHARDS,)]


# -- keys -------------------------------------------------------------------------------------------------------------


def test_a_created_key_is_printed_once_and_kept_as_a_hash(migrated: Cli) -> None:
    ran = migrated("keys", "create", "--tenant", "acme", "--label", "checkout")
    key = ran.out.strip()
    assert (ran.status, ran.out) == (0, f"{key}\n")
    assert len(key) > 40
    assert key not in ran.error
    ((key_id, stored_hash, tenant),) = migrated.rows(
        "SELECT key_id, key_hash, name FROM api_keys JOIN tenants USING (tenant_id)"
    )
    assert (stored_hash, tenant) == (hash_key(key), "acme")
    assert f"{key_id} of tenant acme" in ran.error
    whole = migrated.rows("SELECT to_jsonb(api_keys)::text || to_jsonb(tenants)::text FROM api_keys, tenants")
    assert key not in str(whole)
    listed = migrated("keys", "list").out
    assert listed == f"{key_id}  acme  never expires  {','.join(sorted(SCOPES))}  checkout\n"


def test_keys_are_listed_by_tenant_with_what_ends_them(migrated: Cli) -> None:
    migrated("keys", "create", "--tenant", "acme", "--scopes", "coupons:read, books:read", "--expires-in-days", "0.5")
    migrated("keys", "create", "--tenant", "other")
    listed = migrated("keys", "list", "--tenant", "acme").out
    assert len(listed.splitlines()) == 1
    assert "  acme  expires 20" in listed
    assert "  books:read,coupons:read" in listed
    assert len(migrated("keys", "list").out.splitlines()) == 2
    assert migrated("keys", "list", "--tenant", "nobody") == Ran(0, "", "there are none\n")


def test_a_revoked_key_stays_revoked(migrated: Cli) -> None:
    migrated("keys", "create", "--tenant", "acme")
    ((key_id,),) = migrated.rows("SELECT key_id FROM api_keys")
    assert migrated("keys", "revoke", key_id) == Ran(0, f"{key_id} is revoked\n", "")
    before = migrated.rows("SELECT revoked_at FROM api_keys")
    assert migrated("keys", "revoke", key_id).status == 0
    assert migrated.rows("SELECT revoked_at FROM api_keys") == before != [(None,)]
    assert f"{key_id}  acme  revoked  " in migrated("keys", "list").out


def test_an_unknown_key_cannot_be_revoked(migrated: Cli) -> None:
    assert "there is no key key_0; see `coupon-svc keys list`" in migrated.refused("keys", "revoke", "key_0")


def give(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def test_a_key_of_ones_own_is_imported_once(migrated: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = []
    for _ in range(2):
        give(monkeypatch, "my-own-key\n")
        answers.append(migrated("keys", "import", "--tenant", "acme"))
    ((key_id, stored_hash),) = migrated.rows("SELECT key_id, key_hash FROM api_keys")
    assert stored_hash == hash_key("my-own-key")
    assert answers == [Ran(0, f"{key_id}\n", "")] * 2


def test_an_import_that_would_change_nothing_is_not_called_done(migrated: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, "my-own-key")
    key_id = migrated("keys", "import", "--tenant", "acme", "--scopes", "books:read").out.strip()
    give(monkeypatch, "my-own-key")
    assert "has the scopes books:read; nothing was changed" in migrated.refused("keys", "import", "--tenant", "acme")
    give(monkeypatch, "my-own-key")
    assert "belongs to another tenant" in migrated.refused("keys", "import", "--tenant", "other")
    assert migrated.rows("SELECT name FROM tenants") == [("acme",)]
    migrated("keys", "revoke", key_id)
    give(monkeypatch, "my-own-key")
    said = migrated.refused("keys", "import", "--tenant", "acme", "--scopes", "books:read")
    assert f"as {key_id}, and is revoked" in said
    assert "my-own-key" not in said


@pytest.mark.parametrize("key", ["", "\n", "two words\n", "ä\n", "x" * 201])
def test_what_cannot_be_a_key_is_not_imported(migrated: Cli, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    give(monkeypatch, key)
    assert "1..200 printable ASCII characters" in migrated.refused("keys", "import", "--tenant", "acme")
    assert migrated.rows("SELECT count(*) FROM api_keys") == [(0,)]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (
            ["--tenant", "acme", "--scopes", "books:read,everything"],
            "--scopes takes one or more of books:write, books:read",
        ),
        (["--tenant", "acme", "--scopes", ""], "--scopes takes one or more of"),
        (["--tenant", ""], "a tenant's name has 1..100 printable characters"),
        (["--tenant", "x" * 101], "a tenant's name has 1..100 printable characters"),
        (["--tenant", "two\nlines"], "a tenant's name has 1..100 printable characters"),
        (["--tenant", "acme", "--label", "two\nlines"], "a label has at most 200 printable characters"),
        (["--tenant", "acme", "--expires-in-days", "0"], "between 0 and 36500"),
        (["--tenant", "acme", "--expires-in-days", "nan"], "between 0 and 36500"),
        (["--tenant", "acme", "--expires-in-days", "inf"], "between 0 and 36500"),
    ],
)
def test_a_key_that_makes_no_sense_is_refused(migrated: Cli, args: list[str], said: str) -> None:
    assert said in migrated.refused("keys", "create", *args)
    assert migrated.rows("SELECT count(*) FROM api_keys") == [(0,)]


def test_keys_need_a_schema_and_say_so(empty: Cli) -> None:
    assert "run `coupon-svc migrate` first" in empty.refused("keys", "create", "--tenant", "acme")
    assert "run `coupon-svc migrate` first" in empty.refused("keys", "list")


# -- rebuild and quarantine -------------------------------------------------------------------------------------------

BOOK_ID = "bk_02" + "q" * 16


@pytest.fixture
async def held_back(migrated: Cli) -> AsyncIterator[Cli]:
    """With a book of which two codes are in quarantine and one is lent, and shards that were certified once."""
    connection = await asyncpg.connect(migrated.url)
    await connection.execute(
        f"""
        UPDATE shards SET epoch = 3, generation = 1, committed = 9, certified_epoch = 3, rebuild = false, stopped = NULL;
        INSERT INTO tenants (tenant_id, name) OVERRIDING SYSTEM VALUE VALUES (1, 'acme');
        INSERT INTO books (book_id, shard, tenant_id, name, lock_ttl_seconds, ack, metadata, created_at_ms, total, lent,
                           quarantined, leased_upto, places_upto)
            VALUES ('{BOOK_ID}', 2, 1, 'Summer', 60, 'redis', '{{}}', 1, 3, 1, 2, 5, 9);
        INSERT INTO codes VALUES (1, 'LENT', '{BOOK_ID}', 5), (1, 'LOST-1', '{BOOK_ID}', -1), (1, 'LOST-2', '{BOOK_ID}', -1);
        INSERT INTO quarantine (book_id, code, shard, epoch, at)
            VALUES ('{BOOK_ID}', 'LOST-1', 2, 2, '2026-11-25 10:00Z'), ('{BOOK_ID}', 'LOST-2', 2, 2, '2026-11-25 11:00Z')
        """
    )
    yield migrated
    await connection.execute(
        "TRUNCATE quarantine, quarantine_decisions, codes, tenants CASCADE;"
        " UPDATE shards SET stopped = NULL, rebuild = false"
    )
    await connection.close()


def test_every_shard_is_rebuilt_or_the_one_that_is_named(held_back: Cli) -> None:
    assert held_back("rebuild", "--shard", "2").out.startswith("1 shards are being rebuilt")
    states = "SELECT shard, epoch, committed, rebuild FROM shards ORDER BY shard"
    others = [(shard, 3, 9, False) for shard in (0, 1, 3)]
    assert sorted(held_back.rows(states)) == sorted([*others, (2, 4, 0, True)])
    assert held_back("rebuild").out.startswith("4 shards are being rebuilt")
    assert {row[3] for row in held_back.rows(states)} == {True}


def test_a_shard_that_is_stopped_or_does_not_exist_is_not_rebuilt(held_back: Cli) -> None:
    held_back.rows("UPDATE shards SET stopped = 'a person looks' WHERE shard = 1")
    assert "there is no shard 1 to rebuild" in held_back.refused("rebuild", "--shard", "1")
    assert "there is no shard 9 to rebuild" in held_back.refused("rebuild", "--shard", "9")
    assert held_back("rebuild").out.startswith("3 shards")
    assert held_back.rows("SELECT epoch, rebuild FROM shards WHERE shard = 1") == [(3, False)]


def test_books_with_codes_in_quarantine_are_listed(held_back: Cli) -> None:
    listed = held_back("quarantine", "list")
    assert listed == Ran(0, f"{BOOK_ID}  2 codes since 2026-11-25 10:00Z  Summer\n", "")


def test_codes_leave_the_quarantine_only_when_it_is_said_that_they_are_dealt_again(held_back: Cli) -> None:
    assert "say --deal-again" in held_back.refused("quarantine", "release", BOOK_ID)
    assert held_back.rows("SELECT count(*) FROM quarantine") == [(2,)]
    released = held_back("quarantine", "release", BOOK_ID, "--deal-again")
    assert released == Ran(0, f"2 codes of {BOOK_ID} are dealt again\n", "")
    assert held_back.rows("SELECT count(*) FROM quarantine") == [(0,)]
    decisions = held_back.rows("SELECT code, decision FROM quarantine_decisions ORDER BY code")
    assert decisions == [("LOST-1", "dealt_again"), ("LOST-2", "dealt_again")]
    assert held_back.rows("SELECT code FROM codes WHERE place BETWEEN 6 AND 9") != []
    assert held_back.rows("SELECT quarantined, total - lent - quarantined FROM books") == [(0, 2)]
    assert held_back.rows("SELECT epoch FROM shards WHERE shard = 2") == [(4,)], "its owner brings them to Redis"
    assert "no codes in quarantine" in held_back.refused("quarantine", "release", BOOK_ID, "--deal-again")
    assert "no codes in quarantine" in held_back.refused("quarantine", "release", "bk_none", "--deal-again")
