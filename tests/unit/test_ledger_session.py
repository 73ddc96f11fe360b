"""How work on a connection to Postgres ends: in time, with the connection, or with the task."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from coupon_svc.postgres import database
from coupon_svc.postgres.database import LedgerConnection, LedgerSession, within
from coupon_svc.postgres.errors import LedgerUnavailable


class FakeConnection:
    """A connection whose statement ends when the connection is terminated."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()

    def terminate(self) -> None:
        self.ended.set()

    def is_closed(self) -> bool:
        return self.ended.is_set()

    async def statement(self) -> None:
        await self.ended.wait()
        raise ConnectionResetError


def as_ledger(connection: FakeConnection) -> LedgerConnection:
    return cast(LedgerConnection, connection)


async def test_work_that_takes_too_long_ends_its_connection() -> None:
    connection = FakeConnection()

    with pytest.raises(LedgerUnavailable):
        async with asyncio.timeout(5), within(as_ledger(connection), 0.01):
            await connection.statement()

    assert connection.is_closed()


async def test_work_that_ends_in_time_keeps_its_connection() -> None:
    connection = FakeConnection()

    async with within(as_ledger(connection), 0.01):
        pass
    await asyncio.sleep(0.03)

    assert not connection.is_closed()


@pytest.mark.parametrize(("only_reads", "expected"), [(True, False), (False, True)])
async def test_a_failure_says_whether_something_may_have_been_committed(only_reads: bool, expected: bool) -> None:
    with pytest.raises(LedgerUnavailable) as raised:
        async with within(as_ledger(FakeConnection()), 1, only_reads=only_reads):
            raise ConnectionResetError

    assert raised.value.may_have_happened is expected


async def test_an_error_of_the_data_passes_and_keeps_the_connection() -> None:
    connection = FakeConnection()

    with pytest.raises(KeyError):
        async with within(as_ledger(connection), 1):
            raise KeyError

    assert not connection.is_closed()


async def test_a_task_that_is_cancelled_ends_though_its_rollback_fails() -> None:
    """Else a background loop would take the failure for a Postgres that is away, and go on for ever."""
    connection = FakeConnection()

    async def work() -> None:
        async with within(as_ledger(connection), 5):
            try:
                await asyncio.sleep(5)
            finally:
                await connection.statement()  # the rollback

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.sleep(0)
    connection.terminate()

    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_session_opens_another_connection_when_its_own_was_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[FakeConnection] = []
    greeted: list[LedgerConnection] = []

    async def open_connection(url: str, name: str) -> LedgerConnection:
        opened.append(FakeConnection())
        return as_ledger(opened[-1])

    async def greet(connection: LedgerConnection) -> None:
        greeted.append(connection)

    monkeypatch.setattr(database, "open_connection", open_connection)
    session = LedgerSession("postgresql://x", "test", on_open=greet)
    for lost in (False, True, False):
        async with session.work(1) as connection:
            assert cast(object, connection) is opened[-1]
        if lost:
            opened[-1].terminate()

    assert greeted == [as_ledger(one) for one in opened]
    assert len(opened) == 2


async def test_a_connection_that_fails_its_check_is_ended_and_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[FakeConnection] = []

    async def open_connection(url: str, name: str) -> LedgerConnection:
        opened.append(FakeConnection())
        return as_ledger(opened[-1])

    async def refuse(_: LedgerConnection) -> None:
        raise KeyError

    monkeypatch.setattr(database, "open_connection", open_connection)
    session = LedgerSession("postgresql://x", "test", on_open=refuse)
    for _ in range(2):
        with pytest.raises(KeyError):
            await session.connection()

    assert [one.is_closed() for one in opened] == [True, True]
