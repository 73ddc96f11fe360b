"""An HTTP/1.1 client that takes little of the processor, for loads that must not be bound by who sends them.

It keeps its connections, has one request in flight on each, and reads only what a load needs: status, head and body.
Nothing it does raises for what a server or a network does: a request without an answer has status 0 and says why
(`Failure`). Nothing is ever sent twice, so what the caller counts is what was sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections import deque
from collections.abc import Callable
from enum import StrEnum

import msgspec

CONNECT_TIMEOUT_S = 5.0
REPLY_TIMEOUT_S = 15.0  # the service waits for its ledger at most 5 s
BODY_BYTES_MAX = 64 * 2**20
_SWEEP_S = 0.1
_REFUSED_PAUSE_S = 0.05
"""A caller that asks a dead server as fast as it can would count refusals, and nothing else."""


class Failure(StrEnum):
    """Why there is no answer. After REFUSED the request was not sent; after the others it may have had its effect."""

    REFUSED = "connection_refused"
    RESET = "connection_reset"
    TIMEOUT = "no_answer_in_time"
    GARBLED = "no_valid_http"


class Reply(msgspec.Struct, gc=False):
    """An answer; `status` is 0 where there is none, and `failure` says why."""

    status: int
    body: bytes = b""
    head: bytes = b""
    failure: Failure | None = None

    def header(self, name: bytes) -> bytes | None:
        """The value of a header, named in lower case."""
        at = self.head.lower().find(b"\r\n" + name + b":")
        if at < 0:
            return None
        return self.head[at + len(name) + 3 :].split(b"\r\n", 1)[0].strip()


def build_request(method: bytes, path: bytes, headers: bytes, body: bytes = b"") -> bytes:
    """A request as it is sent. `headers` holds whole lines, `host` among them, each with its line break."""
    return b"%b %b HTTP/1.1\r\n%bcontent-length: %d\r\n\r\n%b" % (method, path, headers, len(body), body)


class Connection(asyncio.Protocol):
    """One connection, kept; one request at a time. Every `request` ends with exactly one call of its `done`."""

    __slots__ = ("_buffer", "_done", "_head", "_needed", "_status", "_transport", "sent_at")

    def __init__(self) -> None:
        self._buffer = b""
        self._head = b""
        self._status = 0
        self._needed = 0  # of a body whose head has come: its bytes; else 0
        self._done: Callable[[Reply], None] | None = None
        self._transport: asyncio.Transport | None = None
        self.sent_at = 0.0

    @property
    def open(self) -> bool:
        """Whether a request can be sent; the server may have hung up meanwhile."""
        return self._transport is not None

    @property
    def busy(self) -> bool:
        return self._done is not None

    def request(self, request: bytes, done: Callable[[Reply], None], now: float) -> None:
        """Send a request on an open connection that has none in flight."""
        self._done = done
        self.sent_at = now
        self._transport.write(request)  # type: ignore[union-attr]

    def abort(self, failure: Failure = Failure.RESET) -> None:
        """Close at once; what is in flight is answered with the failure."""
        if self._transport is not None:
            self._transport.abort()
        self._end(Reply(0, failure=failure))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def connection_lost(self, exc: Exception | None) -> None:
        reply = Reply(0, failure=Failure.RESET)
        if self._buffer and exc is None and not self._needed:
            reply = _parse(self._buffer, at_end=True) or reply  # a body without a length ends with the connection
        self._end(reply)

    def data_received(self, data: bytes) -> None:
        # uvicorn sends head and body apart, and most answers arrive so: a head, then a whole body.
        if self._needed:
            body = self._buffer + data if self._buffer else data
            if len(body) < self._needed:
                self._buffer = body
            elif len(body) == self._needed:
                self._answered(Reply(self._status, body, self._head))
            else:
                self._hang_up(_GARBLED)
            return
        if self._buffer:
            data = self._buffer + data
        end = data.find(b"\r\n\r\n") + 4
        at = data.find(b"\r\ncontent-length: ", 0, end) + 18  # as uvicorn writes it
        if end < 4 or at < 18 or data[9:10] < b"2":
            self._received_otherwise(data)
            return
        try:
            status, size = int(data[9:12]), int(data[at : data.index(b"\r", at)])
        except ValueError:
            self._hang_up(_GARBLED)
            return
        missing = end + size - len(data)
        if missing == 0:
            self._answered(Reply(status, data[end:], data[:end]))
        elif missing > 0 and size <= BODY_BYTES_MAX:
            self._status, self._head, self._buffer, self._needed = status, data[:end], data[end:], size
        else:
            self._hang_up(_GARBLED)

    def _received_otherwise(self, data: bytes) -> None:
        """The buffer grew to `data`, and it is not what uvicorn mostly sends."""
        reply = _parse(data)
        if reply is not None:
            self._answered(reply)
        elif len(data) > BODY_BYTES_MAX:
            self._hang_up(_GARBLED)
        else:
            self._buffer = data

    def _answered(self, reply: Reply) -> None:
        if self._buffer:
            self._buffer = b""
        self._needed = 0
        done = self._done
        # An answer to nothing, such as a 408 of a proxy: the next answer would not be the next request's.
        if done is None or reply.failure is not None or _closes(reply.head):
            self._hang_up(reply)
            return
        self._done = None
        done(reply)

    def _hang_up(self, reply: Reply) -> None:
        transport = self._transport
        self._end(reply)
        if transport is not None:
            transport.close()

    def _end(self, reply: Reply) -> None:
        self._transport = None
        self._buffer = b""
        self._needed = 0
        done, self._done = self._done, None
        if done is not None:
            done(reply)


_GARBLED = Reply(0, failure=Failure.GARBLED)


def _parse(data: bytes, *, at_end: bool = False) -> Reply | None:
    """The answer that `data` holds, of any form that HTTP/1.1 allows; None when it is not whole yet.

    `at_end`: nothing more will come.
    """
    end = data.find(b"\r\n\r\n") + 4
    if end < 4:
        return None
    head = data[:end].lower()
    try:
        status = int(data[9:12])
        if status < 200:  # an interim answer; the real one follows
            return _parse(data[end:], at_end=at_end)
        if b"\r\ntransfer-encoding:" in head:
            body = _join_chunks(data, end)
        elif status in (204, 304):
            body = data[end:]
        elif b"\r\ncontent-length:" in head:
            at = head.index(b"\r\ncontent-length:") + 17
            stop = end + int(head[at : head.index(b"\r", at)])
            if len(data) > stop:
                return _GARBLED
            body = data[end:] if len(data) == stop else None
        else:
            body = data[end:] if at_end else None
    except ValueError:
        return _GARBLED
    return None if body is None else Reply(status, body, data[:end])


def _join_chunks(data: bytes, at: int) -> bytes | None:
    """A body in chunks that begins at `at`; None when it is not whole yet. Raises ValueError where it is none."""
    chunks: list[bytes] = []
    while (line := data.find(b"\r\n", at)) >= 0:
        size = int(data[at:line].split(b";", 1)[0], 16)
        if size == 0:  # then trailers, if any, up to an empty line
            return b"".join(chunks) if data.find(b"\r\n\r\n", line) >= 0 else None
        chunks.append(data[line + 2 : line + 2 + size])
        at = line + 2 + size + 2
    return None


def _closes(head: bytes) -> bool:
    return b"\r\nconnection: close" in head.lower() or head[5:8] == b"1.0"


async def _connect(host: str, port: int, context: ssl.SSLContext | None) -> Connection | None:
    """A new connection; None when it is refused, or takes longer than CONNECT_TIMEOUT_S."""
    loop = asyncio.get_running_loop()
    with contextlib.suppress(OSError):  # TimeoutError is one
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            _, connection = await loop.create_connection(Connection, host, port, ssl=context)
        return connection
    return None


class Connections:
    """Up to `count` connections to one server. A request takes an idle one, and waits in line while there is none.

    A connection that was lost is made anew for the next request. `reply_timeout_s` counts from when a request was
    written; a connection whose answer is overdue is closed.
    """

    def __init__(
        self,
        host: str,
        port: int,
        count: int,
        *,
        ssl_context: ssl.SSLContext | None = None,
        reply_timeout_s: float = REPLY_TIMEOUT_S,
    ) -> None:
        self._address = (host, port, ssl_context)
        self._timeout_s = reply_timeout_s
        default = 443 if ssl_context else 80
        name = f"[{host}]" if ":" in host else host
        self.host_header = b"host: %b\r\n" % (name if port == default else f"{name}:{port}").encode()
        self._loop = asyncio.get_running_loop()
        self._idle: list[Connection] = []
        self._all: set[Connection] = set()
        self._absent = count  # connections that may still be made
        self._waiting: deque[tuple[bytes, Callable[[Reply], None], asyncio.Future[Reply] | None]] = deque()
        self._making: set[asyncio.Task[None]] = set()
        self._closed = False
        self._sweep = self._loop.call_later(_SWEEP_S, self._expire)

    @property
    def waiting(self) -> int:
        """Requests that have not been sent yet, for want of a connection."""
        return len(self._waiting)

    async def open(self) -> bool:
        """Make all connections now, that none is made while it is measured. False when one cannot be made."""
        made = await asyncio.gather(*(_connect(*self._address) for _ in range(self._absent)))
        good = [connection for connection in made if connection is not None]
        self._absent -= len(good)
        self._all.update(good)
        self._idle.extend(good)
        return self._absent == 0

    def send(self, method: bytes, path: bytes, headers: bytes = b"", body: bytes = b"") -> asyncio.Future[Reply]:
        """Send a request; the answer, or why there is none, is awaited. `headers`: whole lines with line breaks."""
        future: asyncio.Future[Reply] = self._loop.create_future()

        def done(reply: Reply) -> None:
            if not future.done():
                future.set_result(reply)

        self.submit(build_request(method, path, self.host_header + headers, body), done, future)
        return future

    def submit(
        self, request: bytes, done: Callable[[Reply], None], future: asyncio.Future[Reply] | None = None
    ) -> None:
        """Send a request as it is, with its head; `done` is called with the answer.

        A request whose future was cancelled while it was waiting in line is not sent, and `done` not called.
        """
        while self._idle:
            connection = self._idle.pop()
            if connection.open:
                self._use(connection, request, done)
                return
            self._forget(connection)
        self._waiting.append((request, done, future))
        self._replace()

    def close(self) -> None:
        """Close all connections; what is in flight or in line is answered with a failure."""
        self._closed = True
        self._sweep.cancel()
        for connection in list(self._all):
            connection.abort()
        self._idle.clear()
        self._fail_waiting()

    def _use(self, connection: Connection, request: bytes, done: Callable[[Reply], None]) -> None:
        def finish(reply: Reply) -> None:
            if connection.open:
                self._reuse(connection)
            else:
                self._forget(connection)
                self._replace()
            done(reply)

        connection.request(request, finish, self._loop.time())

    def _reuse(self, connection: Connection) -> None:
        while self._waiting:
            request, done, future = self._waiting.popleft()
            if future is None or not future.cancelled():
                self._use(connection, request, done)
                return
        self._idle.append(connection)

    def _forget(self, connection: Connection) -> None:
        self._all.discard(connection)
        self._absent += 1

    def _replace(self) -> None:
        """Make one more connection when somebody waits and it is allowed."""
        if self._waiting and self._absent and not self._closed:
            self._absent -= 1
            task = self._loop.create_task(self._make())
            self._making.add(task)
            task.add_done_callback(self._making.discard)

    async def _make(self) -> None:
        connection = await _connect(*self._address)
        if connection is not None and self._closed:
            connection.abort()
        if connection is not None and connection.open:
            self._all.add(connection)
            self._reuse(connection)
            return
        await asyncio.sleep(_REFUSED_PAUSE_S)
        self._absent += 1
        if not self._all:  # else one of the others takes them
            self._fail_waiting()

    def _fail_waiting(self) -> None:
        waiting, self._waiting = self._waiting, deque()
        for _, done, _ in waiting:
            done(Reply(0, failure=Failure.REFUSED))

    def _expire(self) -> None:
        overdue = self._loop.time() - self._timeout_s
        for connection in [c for c in self._all if c.busy and c.sent_at < overdue]:
            connection.abort(Failure.TIMEOUT)
        self._sweep = self._loop.call_later(_SWEEP_S, self._expire)


async def closed_loop(
    port: int,
    next_request: Callable[[], bytes],
    on_reply: Callable[[int, bytes], None],
    connections: int,
    seconds: float,
    host: str = "127.0.0.1",
) -> None:
    """Send on each connection the next request as soon as the last is answered, for `seconds`.

    `on_reply` has status and body, or 0 and the failure's name. What is in flight at the end is dropped uncounted.
    A connection that is lost is made anew.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds

    async def keep() -> None:
        while loop.time() < end:
            connection = await _connect(host, port, None)
            if connection is None:
                on_reply(0, Failure.REFUSED.encode())
                await asyncio.sleep(_REFUSED_PAUSE_S)
                continue
            await _drive(connection, next_request, on_reply, end)

    await asyncio.gather(*(keep() for _ in range(connections)))


async def _drive(
    connection: Connection, next_request: Callable[[], bytes], on_reply: Callable[[int, bytes], None], end: float
) -> None:
    """The loop on one connection, until `end` or until it is lost."""
    loop = asyncio.get_running_loop()
    lost = loop.create_future()

    def done(reply: Reply) -> None:
        if lost.done():
            return
        if reply.failure is None:
            on_reply(reply.status, reply.body)
        else:
            on_reply(0, reply.failure.encode())
        if connection.open:
            connection.request(next_request(), done, 0.0)
        else:
            lost.set_result(None)

    connection.request(next_request(), done, 0.0)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout_at(end):
            await lost
    lost.cancel()
    connection.abort()
