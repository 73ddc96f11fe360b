"""One socket to Redis that many requests share: replies come back in the order of the commands.

Everything sent within one turn of the event loop leaves in one write, and the replies that arrive together are parsed
together; so the cost of the socket is shared by all requests of a moment. Nothing is ever sent twice: when the socket
breaks, whoever waits is told that the outcome is unknown.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, cast
from urllib.parse import parse_qs, unquote, urlsplit

import hiredis

from coupon_svc.domain.errors import error_location
from coupon_svc.hot import Slot
from coupon_svc.redis.errors import NotSent, OutcomeUnknown, ReplyError, StoreError

log = logging.getLogger(__name__)

Reply = Any
OnReply = Callable[[Reply], object]
"""Takes a reply: an error reply is a ReplyError value; OutcomeUnknown, as a value, says that the connection broke first."""

IN_FLIGHT_MAX = 20_000
OPEN_WITHIN_S = 5.0
"""How long a connection may take to open: TCP repeats what was lost after 1 and 3 s, and a busy process needs some turns."""
SILENT_S = 2.0
"""How long nothing may come back on a connection while something is waited for."""
WATCH_EVERY_S = 0.1
LOOKS = 5
"""How often in a row a connection must seem silent before it is broken. A turn of the event loop with thousands of requests
takes seconds: what is sent in it is written to the socket when it is over, and a reply that came meanwhile is read in the
next one."""


class Connection(asyncio.Protocol):
    """A multiplexed connection. Make one with `connect`; whoever uses it verifies the server."""

    def __init__(self, on_message: Callable[[Reply], None] | None = None, *, as_bytes: bool = False) -> None:
        self._reader = hiredis.Reader(replyError=ReplyError, encoding=None if as_bytes else "utf-8", errors="replace")
        self._on_message = on_message
        self._waiting: deque[OnReply] = deque()
        self._unsent: list[bytes] = []
        self._transport: asyncio.Transport | None = None
        self._loop = asyncio.get_running_loop()
        self._last_progress = self._loop.time()
        self._watching: asyncio.Task[None] | None = None
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
            try:
                waiting.popleft()(reply)
            except Exception as error:
                _log_not_taken(error)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._unsent.clear()
        if self._watching is not None:
            self._watching.cancel()
        while self._waiting:
            try:
                self._waiting.popleft()(OutcomeUnknown("the connection broke"))
            except Exception as error:
                _log_not_taken(error)
        if not self.closed.done():
            self.closed.set_result(None)

    # --- for its user

    def submit(
        self, command: tuple[str | bytes | int | float, ...], on_reply: OnReply, *, will_flush: bool = False
    ) -> None:
        """Queue a command for this turn's write, and call `on_reply` once: with its reply, or as the connection breaks.

        Who says `will_flush` calls `flush` before this turn is over, which saves a turn of the event loop. Raises NotSent
        at once when the connection is gone or too much is under way already.
        """
        if self._transport is None or len(self._waiting) >= IN_FLIGHT_MAX:
            raise NotSent("there is no connection, or too much is under way on it")
        if not self._waiting:
            self._last_progress = self._loop.time()
        if not will_flush and not self._unsent:
            self._loop.call_soon(self.flush)
        self._unsent.append(hiredis.pack_command(cast(Any, command)))
        self._waiting.append(on_reply)

    def send(self, *command: str | bytes | int | float) -> Slot[Reply]:
        """As `submit`, with the reply in a Slot, which raises OutcomeUnknown when the connection breaks first."""
        slot: Slot[Reply] = Slot()

        def on_reply(reply: Reply) -> None:
            if type(reply) is OutcomeUnknown:
                slot.set_exception(reply)
            else:
                slot.set_result(reply)

        self.submit(command, on_reply)
        return slot

    async def ask(self, *command: str | bytes | int | float) -> Reply:
        """Send one command and return its reply; an error reply is raised."""
        reply = await self.send(*command)
        if isinstance(reply, ReplyError):
            raise reply
        return reply

    def stalled_for(self) -> float:
        """Seconds since anything came back while something is waited for; 0.0 when nothing is."""
        return self._loop.time() - self._last_progress if self._waiting else 0.0

    def watch(self, name: str) -> None:
        """From now on, break this connection when Redis is silent on it for SILENT_S. The log calls it by `name`."""
        self._watching = asyncio.create_task(_break_when_silent(self, name))

    def abort(self) -> None:
        """Break the connection at once: whoever waits learns that the outcome is unknown."""
        if self._transport is not None:
            self._transport.abort()

    def flush(self) -> None:
        """Write all that is queued."""
        if self._transport is not None and self._unsent:
            self._transport.write(b"".join(self._unsent))
            self._unsent.clear()


def _log_not_taken(error: Exception) -> None:
    """What one callback raises must not cost the others their replies."""
    log.error("a reply was not taken: %s at %s", type(error).__name__, error_location(error))


async def _break_when_silent(connection: Connection, name: str) -> None:
    silent = 0
    while silent < LOOKS:
        await asyncio.sleep(WATCH_EVERY_S)
        silent = silent + 1 if connection.stalled_for() > SILENT_S - (LOOKS - 1) * WATCH_EVERY_S else 0
    log.warning("redis does not answer on %s; the connection is given up", name)
    connection.abort()


class Address(NamedTuple):
    """A parsed Redis URL: endpoint, TLS and credentials."""

    path: str | None
    """of a Unix socket, instead of host and port"""
    host: str
    port: int
    tls: bool
    username: str
    password: str | None
    database: int


def parse_address(url: str) -> Address:
    """The parts of `redis://user:password@host:port/database`, `rediss://` or `unix://user:password@/path?db=database`.

    As redis-py reads them, which would take every process of the service a tenth of a second to import.
    """
    parts = urlsplit(url)
    number = parse_qs(parts.query).get("db", [parts.path.strip("/") if parts.scheme != "unix" else ""])[0]
    return Address(
        path=unquote(parts.path) if parts.scheme == "unix" else None,
        host=parts.hostname or "localhost",
        port=parts.port or 6379,
        tls=parts.scheme == "rediss",
        username=unquote(parts.username or "default"),
        password=unquote(parts.password) if parts.password else None,
        database=int(number) if number.isdecimal() else 0,
    )


async def connect(
    url: str, name: str, on_message: Callable[[Reply], None] | None = None, *, as_bytes: bool = False
) -> Connection:
    """Open a connection to `redis://`, `rediss://` or `unix://`, authenticated and named for CLIENT LIST. With `as_bytes`
    replies hold bytes, otherwise texts.

    The connection breaks once Redis is silent for SILENT_S. No other limit of time applies to replies, not even to many of
    them together: a busy process would exceed it, break its connection, and then break each new one.

    Raises NotSent when the connection does not open within OPEN_WITHIN_S, or breaks meanwhile. The message never holds the
    URL.
    """
    address = parse_address(url)
    loop = asyncio.get_running_loop()

    def make() -> Connection:
        return Connection(on_message, as_bytes=as_bytes)

    try:
        async with asyncio.timeout(OPEN_WITHIN_S):
            if address.path is not None:
                _, connection = await loop.create_unix_connection(make, address.path)
            else:
                secure = ssl.create_default_context() if address.tls else None
                _, connection = await loop.create_connection(make, address.host, address.port, ssl=secure)
    except (OSError, TimeoutError) as error:
        raise NotSent(type(error).__name__) from None
    try:
        connection.watch(name)
        if address.password is not None:
            await connection.ask("AUTH", address.username, address.password)
        if address.database:
            await connection.ask("SELECT", address.database)
        with contextlib.suppress(ReplyError):
            await connection.ask("CLIENT", "SETNAME", name)
    except StoreError as error:
        connection.abort()
        raise NotSent(type(error).__name__) from None
    except BaseException:  # its caller was cancelled, and would never close it
        connection.abort()
        raise
    return connection
