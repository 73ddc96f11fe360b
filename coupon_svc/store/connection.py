"""One socket to Redis that many requests share: replies come back in the order of the commands.

Everything sent within one turn of the event loop leaves in one write, and the replies that arrive together are parsed
together; so the cost of the socket is shared by all requests of a moment. Nothing is ever sent twice: when the socket
breaks, whoever waits is told that the outcome is unknown.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections import deque
from collections.abc import Callable
from typing import Any, cast
from urllib.parse import urlsplit

import hiredis
from redis.connection import parse_url

Reply = Any
ReplyError = hiredis.ReplyError

IN_FLIGHT_MAX = 20_000


class StoreUnavailable(Exception):
    """The command was not sent: it has had no effect."""


class StoreOutcomeUnknown(Exception):
    """The command was sent and its reply never came: it may have had its effect."""


class Connection(asyncio.Protocol):
    """A verified-by-its-owner, multiplexed connection. Make one with `connect`."""

    def __init__(self, on_message: Callable[[Reply], None] | None = None) -> None:
        self._reader = hiredis.Reader(encoding="utf-8", errors="replace")
        self._on_message = on_message
        self._waiting: deque[asyncio.Future[Reply]] = deque()
        self._unsent: list[bytes] = []
        self._transport: asyncio.Transport | None = None
        self._loop = asyncio.get_running_loop()
        self._last_progress = self._loop.time()
        self.closed: asyncio.Future[None] = self._loop.create_future()

    # --- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._last_progress = self._loop.time()
        reader, waiting = self._reader, self._waiting
        reader.feed(data)
        while (reply := reader.gets()) is not False:
            if self._on_message and not waiting:
                self._on_message(reply)
                continue
            future = waiting.popleft()
            if not future.done():
                future.set_result(reply)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._unsent.clear()
        while self._waiting:
            future = self._waiting.popleft()
            if not future.done():
                future.set_exception(StoreOutcomeUnknown())
        if not self.closed.done():
            self.closed.set_result(None)

    # --- for its owner

    def send(self, *command: str | bytes | int | float) -> asyncio.Future[Reply]:
        """Queue a command for this turn's write. The future holds the reply; an error reply is a ReplyError value.

        Raises StoreUnavailable at once when the connection is gone or too much is under way already.
        The future raises StoreOutcomeUnknown when the connection breaks first.
        """
        if self._transport is None or len(self._waiting) >= IN_FLIGHT_MAX:
            raise StoreUnavailable
        if not self._waiting:
            self._last_progress = self._loop.time()
        if not self._unsent:
            self._loop.call_soon(self._flush)
        self._unsent.append(hiredis.pack_command(cast(Any, command)))
        future = self._loop.create_future()
        self._waiting.append(future)
        return future

    async def ask(self, *command: str | bytes | int | float) -> Reply:
        """Send one command and return its reply; an error reply is raised."""
        reply = await self.send(*command)
        if isinstance(reply, ReplyError):
            raise reply
        return reply

    def stalled_for(self) -> float:
        """Seconds since anything came back while something is waited for; 0.0 when nothing is."""
        return self._loop.time() - self._last_progress if self._waiting else 0.0

    def abort(self) -> None:
        """Break the connection at once: whoever waits learns that the outcome is unknown."""
        if self._transport is not None:
            self._transport.abort()

    def _flush(self) -> None:
        if self._transport is not None and self._unsent:
            self._transport.write(b"".join(self._unsent))
            self._unsent.clear()


async def connect(
    url: str, name: str, on_message: Callable[[Reply], None] | None = None, timeout: float = 2.0
) -> Connection:
    """Open a connection to `redis://`, `rediss://` or `unix://`, authenticated and named for CLIENT LIST.

    Raises StoreUnavailable when that fails or takes longer than `timeout` seconds. The message never holds the URL.
    """
    parts: dict[str, Any] = dict(parse_url(url))  # type: ignore[no-untyped-call]
    loop = asyncio.get_running_loop()
    connection: Connection | None = None
    try:
        async with asyncio.timeout(timeout):
            if "path" in parts:
                _, connection = await loop.create_unix_connection(lambda: Connection(on_message), parts["path"])
            else:
                secure = ssl.create_default_context() if urlsplit(url).scheme == "rediss" else None
                _, connection = await loop.create_connection(
                    lambda: Connection(on_message), parts.get("host", "localhost"), parts.get("port", 6379), ssl=secure
                )
            if password := parts.get("password"):
                await connection.ask("AUTH", parts.get("username") or "default", password)
            if database := parts.get("db"):
                await connection.ask("SELECT", database)
            with contextlib.suppress(ReplyError):
                await connection.ask("CLIENT", "SETNAME", name)
    except (OSError, TimeoutError, StoreOutcomeUnknown, ReplyError) as error:
        if connection:
            connection.abort()
        raise StoreUnavailable(type(error).__name__) from None
    return connection
