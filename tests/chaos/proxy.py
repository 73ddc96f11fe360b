"""A TCP proxy on loopback that a test can cut, hold, delay and repoint while the service speaks through it.

It runs in a thread with a loop of its own: what the test's loop is busy with, a server's start or a long check, delays no
byte here. Its methods may be called from anywhere; each returns when what it says is so.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Literal, Self, TypeVar, cast
from urllib.parse import urlsplit, urlunsplit

T = TypeVar("T")

Treatment = Literal["pass", "hold", "lose"]

_RESET_AT_CLOSE = struct.pack("ii", 1, 0)


class Way:
    """One direction of every connection: what becomes of bytes that go it.

    `pass` delivers them, `delay_s` later; `hold` keeps them, to be delivered when they pass again; `lose` drops them.
    """

    def __init__(self) -> None:
        self.treatment: Treatment = "pass"
        self.delay_s = 0.0
        self.held = self.lost = self.delayed = 0
        """Bytes that were kept back, dropped and delivered late, since the proxy started."""


class Proxy:
    """Listens on a port of its own and speaks to the server of a URL. Use as a context manager."""

    def __init__(self, url: str) -> None:
        self._target = _address(url)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._pipes: set[_Pipe] = set()
        self._refusing = False
        self._server: asyncio.Server | None = None
        self.requests = Way()
        self.replies = Way()
        self.port = 0
        self.cuts = 0
        """Connections that were reset."""

    def __enter__(self) -> Self:
        self._thread.start()
        listening = self._loop.create_server(lambda: _Pipe(self).client, "127.0.0.1", 0)
        self._server = asyncio.run_coroutine_threadsafe(listening, self._loop).result(10)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._do(self._server.close)
        self.cut()
        self._do(lambda: self._loop.call_later(0.01, self._loop.stop))  # closed transports need a turn more
        self._thread.join(10)
        self._loop.close()

    def url(self, url: str) -> str:
        """The URL of the server as it is reached through here."""
        parts = urlsplit(url)
        return urlunsplit(parts._replace(netloc=f"{parts.netloc.rpartition('@')[0]}@127.0.0.1:{self.port}"))

    # --- what can be done to connections

    def heal(self) -> None:
        """Let everything pass from now on. What was held is delivered; connections that lost bytes are cut."""

        def work() -> None:
            lost = "lose" in (self.requests.treatment, self.replies.treatment)
            self._refusing = False
            for way in (self.requests, self.replies):
                way.treatment, way.delay_s = "pass", 0.0
            for pipe in list(self._pipes):
                if lost:
                    pipe.cut()
                else:
                    pipe.flush()

        self._do(work)

    def treat(self, *, requests: Treatment | None = None, replies: Treatment | None = None) -> None:
        """Treat bytes of one direction or both in another way. See Way."""

        def work() -> None:
            for way, treatment in ((self.requests, requests), (self.replies, replies)):
                way.treatment = treatment or way.treatment
            for pipe in list(self._pipes):
                pipe.flush()

        self._do(work)

    def delay_replies(self, seconds: float) -> None:
        """Replies that come from now on are delivered that much later."""
        self._do(lambda: setattr(self.replies, "delay_s", seconds))

    def cut(self, *, refuse: bool = False) -> None:
        """Reset every connection; with `refuse` also those that come, until healed."""

        def work() -> None:
            self._refusing = refuse
            for pipe in list(self._pipes):
                pipe.cut()

        self._do(work)

    def repoint(self, url: str) -> None:
        """Lead to another server from now on; connections to the old one are reset."""

        def work() -> None:
            self._target = _address(url)
            for pipe in list(self._pipes):
                pipe.cut()

        self._do(work)

    def _do(self, work: Callable[[], T]) -> T:
        """Do a piece of work in the proxy's thread, and wait until it is done."""

        async def there() -> T:
            return work()

        return asyncio.run_coroutine_threadsafe(there(), self._loop).result(10)


class _End(asyncio.Protocol):
    """One of the two sockets of a connection."""

    def __init__(self, pipe: _Pipe, way: Way) -> None:
        self._pipe = pipe
        self._way = way
        """The one that bytes go which come in here."""
        self._came: deque[tuple[float, bytes]] = deque()
        self.transport: asyncio.Transport | None = None
        self.closed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._pipe.made(self)

    def data_received(self, data: bytes) -> None:
        if self._way.treatment == "lose":
            self._way.lost += len(data)
            return
        if self._way.treatment == "hold":
            self._way.held += len(data)
        elif self._way.delay_s:
            self._way.delayed += len(data)
            self._pipe.flush_later(self._way.delay_s)
        self._came.append((self._pipe.now() + self._way.delay_s, data))
        self._pipe.flush()

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport, self.closed = None, True
        self._pipe.flush()

    def deliver(self, other: _End) -> None:
        """Hand on what is due; an end of the connection is handed on behind the last byte, like them."""
        if other.transport is None or self._way.treatment != "pass":
            return
        while self._came and self._came[0][0] <= self._pipe.now():
            other.transport.write(self._came.popleft()[1])
        if self.closed and not self._came:
            other.transport.close()

    def cut(self) -> None:
        self._came.clear()
        if self.transport is not None:
            with contextlib.suppress(OSError):
                self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_AT_CLOSE)
            self.transport.abort()


class _Pipe:
    """One connection through the proxy."""

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy
        self._connecting: asyncio.Task[None] | None = None
        self.client = _End(self, proxy.requests)
        self.server = _End(self, proxy.replies)

    def now(self) -> float:
        return self._proxy._loop.time()

    def made(self, end: _End) -> None:
        if end is self.server:
            self.flush()
        elif self._proxy._refusing:
            self.cut()
        else:
            self._proxy._pipes.add(self)
            self._connecting = self._proxy._loop.create_task(self._connect())

    async def _connect(self) -> None:
        try:
            await self._proxy._loop.create_connection(lambda: self.server, *self._proxy._target)
        except OSError:
            self.cut()

    def flush(self) -> None:
        """Deliver what may be delivered, both ways."""
        self.client.deliver(self.server)
        self.server.deliver(self.client)
        if self.client.closed and self.server.closed:
            self._proxy._pipes.discard(self)

    def flush_later(self, seconds: float) -> None:
        self._proxy._loop.call_later(seconds + 0.001, self.flush)

    def cut(self) -> None:
        """Reset both sockets."""
        self._proxy.cuts += 1
        self._proxy._pipes.discard(self)
        if self._connecting is not None and not self._connecting.done():
            self._connecting.cancel()
        self.client.cut()
        self.server.cut()


def _address(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    assert parts.hostname, "a proxy needs a host"
    assert parts.port, "a proxy needs a port"
    return parts.hostname, parts.port
