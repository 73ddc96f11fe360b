"""A TCP proxy on loopback that a test can cut, hold, delay and repoint while the service speaks through it.

Of a proxy that is told the protocol, `cut_at` cuts the connection before or after the Nth message from the client.

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
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Literal, Self, TypeVar, cast
from urllib.parse import urlsplit, urlunsplit

T = TypeVar("T")

Treatment = Literal["pass", "hold", "lose"]
Side = Literal["before", "after"]

_RESET_AT_CLOSE = struct.pack("ii", 1, 0)
_PROTOCOL_3 = b"\x00\x03"
"""Of a Postgres start-up message, behind its length. A request for TLS has another number there."""
_PREPARING = b"PBDEC"
"""Frames that Postgres answers with the Sync or Flush that follows."""


class Way:
    """One direction of every connection: what becomes of bytes that go it.

    `pass` delivers them, `delay_s` later; `hold` keeps them, to be delivered when they pass again; `lose` drops them.
    """

    def __init__(self) -> None:
        self.treatment: Treatment = "pass"
        self.delay_s = 0.0
        self.held = self.lost = self.delayed = 0
        """Bytes that were kept back, dropped and delivered late, since the proxy started."""


class Messages:
    """Cuts what a client sends into the messages of its protocol, of one connection."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def whole(self, data: bytes) -> Iterator[bytes]:
        """The messages that are complete with these bytes. What begins another one is kept until its end comes."""
        self._rest += data
        while size := self._size(self._rest):
            message = bytes(self._rest[:size])
            del self._rest[:size]
            yield message

    def _size(self, rest: bytearray) -> int:
        """Bytes of the first message, or 0 while it is incomplete."""
        raise NotImplementedError


class PostgresMessages(Messages):
    """Frames: a byte that says which kind, then a length that counts itself. Before the session starts, the kind is missing.

    Frames up to the next one that Postgres acts on count as one message: without it, all of them are undone.
    """

    def __init__(self) -> None:
        super().__init__()
        self._started = False

    def _size(self, rest: bytearray) -> int:
        if not self._started:
            size = self._frame(rest, 0)
            self._started = size > 0 and rest[4:6] == _PROTOCOL_3
            return size
        end = 0
        while size := self._frame(rest, end + 1):
            kind, end = rest[end], end + 1 + size
            if kind not in _PREPARING:
                return end
        return 0

    def _frame(self, rest: bytearray, begin: int) -> int:
        """Bytes of the frame whose length stands at `begin`, or 0 while it is incomplete."""
        size = int.from_bytes(rest[begin : begin + 4]) if len(rest) >= begin + 4 else 0
        return size if begin + size <= len(rest) else 0


class RedisMessages(Messages):
    """A command is `*<words>`, and of each word `$<length>` and its bytes. Each line and each word ends with CRLF."""

    def _size(self, rest: bytearray) -> int:
        size, words = self._number(rest, 0)
        for _ in range(words):
            begin, length = self._number(rest, size)
            size = begin + length + 2
            if not begin or size > len(rest):
                return 0
        return size

    def _number(self, rest: bytearray, begin: int) -> tuple[int, int]:
        """(where the line from `begin` ends, its number), or (0, 0) while it is incomplete."""
        end = rest.find(b"\r\n", begin)
        return (end + 2, int(rest[begin + 1 : end])) if end >= 0 else (0, 0)


class Proxy:
    """Listens on a port of its own and speaks to the server of a URL. Use as a context manager.

    With `messages`, what clients send is counted by messages of that protocol, for `cut_at`.
    """

    def __init__(self, url: str, messages: type[Messages] | None = None) -> None:
        self._target = _address(url)
        self._messages = messages
        self._to_come = 0
        """Messages that come until a connection is cut, the last one included. 0: none is to be cut."""
        self._cut_message: bytes | None = None
        self._side: Side = "before"
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

    def cut_at(self, number: int, side: Side) -> None:
        """Reset the connection of the `number`th message that clients send from now on, counted from 1 over all
        connections. The server gets all that came before; the message itself only if it is cut `after` it."""
        assert self._messages, "a proxy that counts messages must know their protocol"

        def work() -> None:
            self._to_come, self._side = number, side

        self._do(work)

    def cut_message(self) -> bytes | None:
        """The message whose connection was cut, or None if it has not come. No cut is waited for any more."""

        def work() -> bytes | None:
            message, self._cut_message, self._to_come = self._cut_message, None, 0
            return message

        return self._do(work)

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

    def __init__(self, pipe: _Pipe, way: Way, messages: Messages | None = None) -> None:
        self._pipe = pipe
        self._way = way
        """The one that bytes go which come in here."""
        self._came: deque[tuple[float, bytes]] = deque()
        self._messages = messages
        self.transport: asyncio.Transport | None = None
        self.closed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._pipe.made(self)

    def data_received(self, data: bytes) -> None:
        if self._messages is None:
            self._take(data)
            return
        for message in self._messages.whole(data):
            side = self._pipe.side_to_cut(message)
            if side != "before":
                self._take(message)
            if side is not None:
                self._pipe.cut_client()
                return

    def _take(self, data: bytes) -> None:
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
        self.reset()

    def reset(self) -> None:
        """Reset the socket. What came from it is still handed on."""
        if self.transport is not None:
            with contextlib.suppress(OSError):
                self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_AT_CLOSE)
            self.transport.abort()


class _Pipe:
    """One connection through the proxy."""

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy
        self._connecting: asyncio.Task[None] | None = None
        self.client = _End(self, proxy.requests, proxy._messages() if proxy._messages else None)
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

    def side_to_cut(self, message: bytes) -> Side | None:
        """Count a message. On which side of it to cut, if it is the one that `cut_at` waits for."""
        if not self._proxy._to_come:
            return None
        self._proxy._to_come -= 1
        if self._proxy._to_come:
            return None
        self._proxy._cut_message = message
        return self._proxy._side

    def cut_client(self) -> None:
        """Reset the client's socket. The server's end is closed behind what came, so that it does get that."""
        self._proxy.cuts += 1
        self.client.reset()

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
