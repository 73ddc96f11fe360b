"""What every connection to Postgres is, however the server was set up."""

from __future__ import annotations

from typing import Any

import asyncpg
import pytest

from coupon_svc.postgres.database import Database, open_connection, within
from coupon_svc.postgres.errors import LedgerUnavailable
from tests.harness import fresh_database


@pytest.mark.parametrize(("set_up", "kept"), [("off", "on"), ("local", "local"), ("remote_apply", "remote_apply")])
async def test_a_commit_is_confirmed_only_when_a_crash_would_keep_it(set_up: str, kept: str, postgres_url: str) -> None:
    url = await fresh_database(postgres_url, 1)
    admin = await asyncpg.connect(url)
    await admin.execute(
        f"ALTER DATABASE {await admin.fetchval('SELECT current_database()')} SET synchronous_commit = {set_up}"
    )
    await admin.close()
    connection = await open_connection(url, "test")
    assert await connection.fetchval("SHOW synchronous_commit") == kept
    await connection.close()


async def test_a_connection_on_which_the_server_refused_is_given_up(postgres_url: str) -> None:
    """It may have begun while the server was read-only: then it stays so, whatever the server is by now."""
    connection = await open_connection(await fresh_database(postgres_url, 1), "test")
    await connection.execute("SET default_transaction_read_only = on")
    with pytest.raises(LedgerUnavailable):
        async with within(connection, 5.0):
            await connection.execute("CREATE TABLE t ()")
    assert connection.is_closed()


async def test_a_connection_that_ends_between_two_messages_of_a_statement_is_given_up(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The watchdog may come just when the server has parsed a statement, and not run it yet."""
    connection = await open_connection(await fresh_database(postgres_url, 1), "test")
    parse = asyncpg.Connection._get_statement  # type: ignore[attr-defined]

    async def parse_and_end(self: asyncpg.Connection, *args: Any, **named: Any) -> Any:
        statement = await parse(self, *args, **named)
        self.terminate()
        return statement

    monkeypatch.setattr(asyncpg.Connection, "_get_statement", parse_and_end)
    with pytest.raises(LedgerUnavailable):
        async with within(connection, 5.0):
            await connection.fetchval("SELECT 1")


async def test_a_mistake_of_ours_is_not_taken_for_an_unfit_server(postgres_url: str) -> None:
    connection = await open_connection(await fresh_database(postgres_url, 1), "test")
    with pytest.raises(AttributeError):
        async with within(connection, 5.0):
            await connection.no_such_method()  # type: ignore[attr-defined]
    assert not connection.is_closed()
    await connection.close()


async def test_a_pool_opens_no_more_connections_than_it_may_and_uses_them_again(postgres_url: str) -> None:
    database = Database(await fresh_database(postgres_url, 1), "test", size=2)
    backend = "SELECT pg_backend_pid()"
    async with database.connection() as one, database.connection() as other:
        backends = {await one.fetchval(backend), await other.fetchval(backend)}
        with pytest.raises(LedgerUnavailable):
            async with database.connection(wait_s=0.05):
                pass
    for _ in range(3):
        assert (await database.fetch(backend))[0][0] in backends
    await database.close()
