"""Connections to Postgres that cannot hang: a server that does not answer in time is given up, not waited for.

`within` bounds work on a connection. A background loop keeps a `LedgerSession`; requests share the pool of `Database`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import asyncpg

from coupon_svc.postgres.errors import DatabaseUnfit, LedgerUnavailable

T = TypeVar("T")

LedgerConnection = asyncpg.Connection
LedgerRow = asyncpg.Record
"""What statements run on and return, by names for packages that do not speak to Postgres themselves."""
OnOpen = Callable[[LedgerConnection], Awaitable[object]]
"""Runs on each new connection before anybody else uses it: to check the database, or to listen. What it raises ends the
connection."""

CONNECT_TIMEOUT_S = 2.0
PATIENT_S = 15.0
"""For a person's command: who waits for one answer would rather have it late than be told to try again."""
IDLE_IN_TRANSACTION_S = 10


UNAVAILABLE = (
    OSError,
    TimeoutError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    asyncpg.PostgresConnectionError,  # 08
    asyncpg.InsufficientResourcesError,  # 53
    asyncpg.OperatorInterventionError,  # 57
    asyncpg.PostgresSystemError,  # 58
    asyncpg.TransactionRollbackError,  # 40
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidTransactionStateError,  # 25: read-only, or ended while it was idle
    asyncpg.ObjectNotInPrerequisiteStateError,  # 55: not accepting connections, a lock that cannot be had
    asyncpg.InternalServerError,  # XX
)
"""Errors that say nothing about the data sent: try again, elsewhere or later (SQLSTATE classes 08, 25, 40, 53, 55, 57, 58,
XX)."""


@asynccontextmanager
async def within(
    connection: LedgerConnection, seconds: float | None, *, only_reads: bool = True
) -> AsyncIterator[None]:
    """Bound what is done on `connection` to `seconds` in all; with None the body bounds its own steps.

    Work that takes longer ends the connection: cancelling a statement waits for the server to confirm, which a stopped one
    never does (asyncpg #1326); ending the socket does not. Raises LedgerUnavailable then, and for every error that is not
    the data's fault; `may_have_happened` is set unless the body `only_reads`. The connection is ended in every such case.
    """
    watchdog = None
    if seconds is not None:
        watchdog = asyncio.get_running_loop().call_later(seconds, connection.terminate)
    try:
        yield
    except asyncio.CancelledError:
        connection.terminate()
        raise
    except (*UNAVAILABLE, AttributeError) as error:
        # asyncpg raises AttributeError when the connection is ended between two messages of one statement.
        if isinstance(error, AttributeError) and not connection.is_closed():
            raise
        # The next connection may be better off: this one may have begun while the server was read-only, and stays so.
        connection.terminate()
        task = asyncio.current_task()
        if task is not None and task.cancelling():  # its rollback failed, and must not keep the task from ending
            raise asyncio.CancelledError from None
        unavailable = LedgerUnavailable(type(error).__name__)
        unavailable.may_have_happened = not only_reads
        raise unavailable from None
    finally:
        if watchdog is not None:
            watchdog.cancel()


async def one_row(connection: LedgerConnection, statement: str, *args: Any) -> asyncpg.Record:
    """The first row of a statement that always returns one."""
    row = await connection.fetchrow(statement, *args)
    assert row is not None
    return row


async def open_connection(url: str, name: str, timeout_s: float = CONNECT_TIMEOUT_S) -> LedgerConnection:
    """One connection of one's own, made within twice `timeout_s`. Raises LedgerUnavailable."""
    try:
        connection = await asyncpg.connect(url, timeout=timeout_s, server_settings={"application_name": name})
    except UNAVAILABLE as error:
        raise LedgerUnavailable(type(error).__name__) from None
    # A server may be set up to forget the last commits when it crashes. What we have answered must not be among them.
    # A process that is stopped or cut off within a transaction must not hold a book or a shard until TCP gives it up.
    first = (
        "SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off';"
        f"SET idle_in_transaction_session_timeout = '{IDLE_IN_TRANSACTION_S}s'"
    )
    async with within(connection, timeout_s):
        await connection.execute(first)
    return connection


async def _open_with(url: str, name: str, on_open: OnOpen | None) -> LedgerConnection:
    """Raises LedgerUnavailable, and what `on_open` raises."""
    connection = await open_connection(url, name)
    if on_open is not None:
        try:
            async with within(connection, CONNECT_TIMEOUT_S):
                await on_open(connection)
        except BaseException:
            connection.terminate()
            raise
    return connection


class LedgerSession:
    """The one connection of a background loop, opened when it is first needed and again after it was lost. One task at a
    time may use it."""

    def __init__(self, url: str, name: str, *, on_open: OnOpen | None = None) -> None:
        self._url = url
        self._name = name
        self._on_open = on_open
        self._connection: LedgerConnection | None = None

    async def connection(self) -> LedgerConnection:
        """The connection as it is, for steps that must all be done on the same one, each `within` its own bound.

        Raises LedgerUnavailable, and what `on_open` raises.
        """
        if self._connection is None or self._connection.is_closed():
            self._connection = await _open_with(self._url, self._name, self._on_open)
        return self._connection

    @asynccontextmanager
    async def work(self, seconds: float) -> AsyncIterator[LedgerConnection]:
        """The connection for statements that take at most `seconds` together, as `within` bounds them.

        Raises LedgerUnavailable, and what `on_open` raises.
        """
        connection = await self.connection()
        async with within(connection, seconds):
            yield connection

    def close(self) -> None:
        """End the connection at once. The next use opens another one."""
        if self._connection is not None:
            self._connection.terminate()


class Database:
    """A small pool that begins to connect when it is first used, so that a process starts while Postgres is away."""

    def __init__(self, url: str, name: str, size: int = 8, *, on_open: OnOpen | None = None) -> None:
        self._url = url
        self._name = name
        self._on_open = on_open
        self._free: list[LedgerConnection] = []
        self._slots = asyncio.Semaphore(size)

    @asynccontextmanager
    async def connection(
        self, seconds: float | None = 5.0, *, only_reads: bool = False, wait_s: float = CONNECT_TIMEOUT_S
    ) -> AsyncIterator[LedgerConnection]:
        """A connection for a few statements that take at most `seconds` together; with None, the caller bounds each. One
        is free within `wait_s`.

        Raises LedgerUnavailable for whatever goes wrong with the server, and for a database that `on_open` finds unfit. A
        connection on which that happened, or that was left within a transaction, is not used again.
        """
        try:
            async with asyncio.timeout(wait_s):
                await self._slots.acquire()
        except TimeoutError:
            raise LedgerUnavailable("all connections are busy") from None
        connection: LedgerConnection | None = None
        try:
            while self._free and connection is None:
                connection = self._free.pop()
                if connection.is_closed():
                    connection = None
            if connection is None:
                connection = await self._open()
            async with within(connection, seconds, only_reads=only_reads):
                yield connection
        finally:
            if connection is not None:
                if connection.is_closed() or connection.is_in_transaction():
                    connection.terminate()
                else:
                    self._free.append(connection)
            self._slots.release()

    async def _open(self) -> LedgerConnection:
        try:
            return await _open_with(self._url, self._name, self._on_open)
        except DatabaseUnfit as error:
            raise LedgerUnavailable(str(error)) from None

    async def close(self) -> None:
        while self._free:
            self._free.pop().terminate()

    async def fetch(self, statement: str, *args: Any) -> list[asyncpg.Record]:
        """Rows of one statement that only reads."""
        async with self.connection(only_reads=True) as connection:
            return list(await connection.fetch(statement, *args))
