"""Connections to Postgres that nothing can hang: a server that does not answer in time is given up, not waited for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import asyncpg

from coupon_svc.postgres.errors import LedgerUnavailable

T = TypeVar("T")

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


async def bounded(connection: asyncpg.Connection, work: Awaitable[T], seconds: float) -> T:
    """Await `work` on `connection`, and end the connection when it takes longer than `seconds`.

    Cancelling a statement waits for the server to confirm, which a stopped one never does (asyncpg #1326); ending the
    socket does not. Raises LedgerUnavailable then, and for every error that is no fault of the data; the connection is
    ended in either case.
    """
    task = asyncio.ensure_future(work)
    try:
        done, _ = await asyncio.wait({task}, timeout=seconds)
        if not done:
            connection.terminate()
        return await task
    except asyncio.CancelledError:
        connection.terminate()
        raise
    except UNAVAILABLE as error:
        # The next connection may be better off: this one may have begun while the server was read-only, and stays so.
        connection.terminate()
        raise LedgerUnavailable(type(error).__name__) from None


async def open_connection(url: str, name: str, timeout_s: float = CONNECT_TIMEOUT_S) -> asyncpg.Connection:
    """One connection of one's own, made within twice `timeout_s`. Raises LedgerUnavailable."""
    try:
        connection = await asyncpg.connect(url, timeout=timeout_s, server_settings={"application_name": name})
    except UNAVAILABLE as error:
        raise LedgerUnavailable(type(error).__name__) from None
    # A server may be set up to forget the last commits when it crashes. What we have answered must not be among them.
    # A process that is stopped or cut off within a transaction must not hold a book or a shard until TCP gives it up.
    first = connection.execute(
        "SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off';"
        f"SET idle_in_transaction_session_timeout = '{IDLE_IN_TRANSACTION_S}s'"
    )
    await bounded(connection, first, timeout_s)
    return connection


class Database:
    """A small pool that begins to connect when it is first used, so that a process starts while Postgres is away."""

    def __init__(self, url: str, name: str, size: int = 8) -> None:
        self._url = url
        self._name = name
        self._free: list[asyncpg.Connection] = []
        self._slots = asyncio.Semaphore(size)

    @asynccontextmanager
    async def connection(
        self, seconds: float | None = 5.0, *, only_reads: bool = False, wait_s: float = CONNECT_TIMEOUT_S
    ) -> AsyncIterator[asyncpg.Connection]:
        """A connection for a few statements that take at most `seconds` together; with None, the caller bounds each. One
        is free within `wait_s`.

        Raises LedgerUnavailable for whatever goes wrong with the server. A connection on which that happened, or that
        was left within a transaction, is not used again.
        """
        try:
            async with asyncio.timeout(wait_s):
                await self._slots.acquire()
        except TimeoutError:
            raise LedgerUnavailable("all connections are busy") from None
        connection: asyncpg.Connection | None = None
        try:
            while self._free and connection is None:
                connection = self._free.pop()
                if connection.is_closed():
                    connection = None
            if connection is None:
                connection = await open_connection(self._url, self._name)
            watchdog = None
            if seconds is not None:
                watchdog = asyncio.get_running_loop().call_later(seconds, connection.terminate)
            try:
                yield connection
            finally:
                if watchdog is not None:
                    watchdog.cancel()
        except UNAVAILABLE as error:
            unavailable = LedgerUnavailable(type(error).__name__)
            if connection is not None:
                unavailable.may_have_happened = not only_reads
                connection.terminate()
            raise unavailable from None
        finally:
            if connection is not None:
                if connection.is_closed() or connection.is_in_transaction():
                    connection.terminate()
                else:
                    self._free.append(connection)
            self._slots.release()

    async def close(self) -> None:
        while self._free:
            self._free.pop().terminate()

    async def fetch(self, statement: str, *args: Any) -> list[asyncpg.Record]:
        """Rows of one statement that only reads."""
        async with self.connection(only_reads=True) as connection:
            return list(await connection.fetch(statement, *args))
