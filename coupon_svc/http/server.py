"""How the API is served: uvicorn, with a fast path for the hot operations.

ASGI costs a scope, an event, a route's match and three messages per request: more than a decision of Redis does. On the
fast path a POST with a short Content-Length goes from the parser to its endpoint, and its response leaves in one write.
All other requests go by ASGI to the same endpoints. So do hot operations with something unusual: pipelining, `Expect`,
chunks, an escaped path, or a caller who does not read.

tests/unit/test_uvicorn.py names what is used of uvicorn beyond its documentation.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import math
import socket
import struct
import sys
import termios
from asyncio.events import TimerHandle
from functools import partial
from typing import Any

from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from coupon_svc.domain.outcomes import Outcome, Refused
from coupon_svc.hot import Driven
from coupon_svc.http.endpoint import CALLER_GONE, Endpoint
from coupon_svc.http.problems import log_failure, problem_response
from coupon_svc.http.public import send_problem
from coupon_svc.http.request_id import HEADER, STATE, choose_request_id
from coupon_svc.http.response import Response
from coupon_svc.http.routes import Api

SERVER_SETTINGS: dict[str, Any] = {
    "loop": "uvloop",
    "ws": "none",  # no limit would hold on an upgraded connection
    "access_log": False,  # it would print codes
    "log_config": None,
    "server_header": False,
    "proxy_headers": False,  # nothing here depends on the caller's address
    "timeout_graceful_shutdown": 5,
}
"""What coupon_svc/cli.py starts uvicorn with, beside CouponProtocol."""
HOT_BODY_BYTES_MAX = 16 * 1024
"""The largest body on the fast path."""
HEAD_BYTES_MAX = 64 * 1024
"""The largest incomplete request line with headers. The parser alone would keep as much as is sent."""
PASSED_OVER_BYTES_MAX = 8 * 1024 * 1024
"""How much is read and dropped of a body that was answered early, e.g. because it is too large. Callers who send all of
it before they read the answer still find the answer, and keep the connection."""
STOP_BODY_S = 2.0
"""How long a body may still take when the server stops: well below uvicorn's own limit for requests under way."""
LINGER_S = 1.0
"""How long a connection is drained after its last response."""
HALF_CLOSED_WAIT_S = 0.1
"""How long a request whose caller has closed may wait to be sent to Redis. Whoever hangs up and whoever half-closes look
alike, and the second still wants the response."""
_NOTHING, _HEAD, _BODY = range(3)
"""What the parser is reading."""


class _HotCycle:
    """A request on the fast path. It has the attributes of RequestResponseCycle that uvicorn's protocol uses."""

    __slots__ = (
        "body",
        "disconnected",
        "driven",
        "endpoint",
        "headers",
        "keep_alive",
        "message_event",
        "more_body",
        "path",
        "request_id",
        "response_complete",
    )

    def __init__(
        self,
        endpoint: Endpoint,
        path: dict[str, str],
        headers: dict[bytes, bytes],
        request_id: bytes,
        keep_alive: bool,
    ) -> None:
        self.endpoint = endpoint
        self.path = path
        self.headers = headers
        self.request_id = request_id
        self.keep_alive = keep_alive
        self.body = b""
        self.more_body = True
        self.disconnected = False
        self.response_complete = False
        self.message_event = _NOBODY_WAITS
        self.driven: Any = None
        """Its place in uvicorn's set of tasks; None when it was answered at once."""


class _NobodyWaits:
    """Stands for the asyncio.Event of a cycle."""

    def set(self) -> None:
        """Do nothing: nobody waits for the body of a request on the fast path."""


_NOBODY_WAITS = _NobodyWaits()


class CouponProtocol(HttpToolsProtocol):
    """HTTP/1.1 for an Api, within its limits. Malformed HTTP is refused as a problem, and the connection is closed.

    A connection has one timer. It moves only to an earlier time; when it is due, the connection is checked and the timer
    set anew. So a request that comes in one piece moves no timer.
    """

    app: Api
    cycle: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits = self.app.limits
        self._request_ids = self.app.request_ids
        self._request_id = b""
        """The id of the request that is being read; empty until its headers are complete."""
        self._reading = _NOTHING
        self._since = 0.0
        """When waiting for the caller began: at the connect, the last response, or the start of a head or of a body's
        window."""
        self._bytes: int | None = None
        """Bytes read of a head, or of a body in this window. None until the piece in which it began has been read."""
        self._passed_over = 0
        """Bytes dropped of a body that was answered early."""
        self._was_paused = False
        """Whether the server paused reading in this window; then the caller is not to blame."""
        self._unsent_before = 0
        """Bytes of responses that the caller had not taken at the last check."""
        self._timer: TimerHandle | None = None
        self._due = math.inf
        self._stopping = False
        self._ended = False
        self._caller_gone = False
        self._default_headers: Any = None
        self._default_lines = b""

    def connection_made(self, transport: Any) -> None:
        """Accept a connection. Beyond `connections_max` it is told so; beyond `connections_refused_max` it is cut."""
        super().connection_made(transport)
        beyond = len(self.connections) - self._limits.connections_max
        if beyond > self._limits.connections_refused_max:
            transport.abort()
            return
        if beyond > 0:
            stand_in: Any = _Full(self.app)
            self.app = stand_in
        self._since = self.loop.time()
        self._check_by(self._since + self._limits.head_s)

    def data_received(self, data: bytes) -> None:
        """Parse a piece, and note when the rest of an incomplete request is due."""
        super().data_received(data)
        if self._reading:
            self._count_piece(len(data))

    def eof_received(self) -> bool | None:  # type: ignore[override]  # asyncio's own, which uvicorn leaves out
        """A caller may half-close after its request: it still gets the response, and the connection ends with that."""
        cycle = self.cycle
        if cycle is None or cycle.response_complete or cycle.more_body:
            return None
        cycle.keep_alive = False
        self.loop.call_later(HALF_CLOSED_WAIT_S, self._withdraw)
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone: nothing is timed any more."""
        super().connection_lost(exc)
        if self._timer is not None:
            self._timer.cancel()
        self._ended = True
        self._withdraw()

    def _withdraw(self) -> None:
        """The caller is gone: nothing is done for its request if nothing was done yet. By ASGI, the request may ask."""
        self._caller_gone = True
        cycle = self.cycle
        if type(cycle) is _HotCycle and not cycle.response_complete and cycle.driven is not None:
            cycle.driven.withdraw()

    def _caller_is_gone(self) -> bool:
        return self._caller_gone

    # --- from the parser

    def on_message_begin(self) -> None:
        """A request begins. It gets no ASGI scope yet, for the fast path needs none."""
        self._reading, self._bytes = _HEAD, None
        self._request_id = b""
        self.url = b""
        self.headers = []
        self.expect_100_continue = False

    def on_headers_complete(self) -> None:
        """The head is complete: the request gets its id, and takes the fast path or goes by ASGI."""
        self._reading, self._bytes = _BODY, None
        if self.transport.is_closing() and self.cycle is not None:  # the last response was the last: this gets none
            return
        by_name = dict(self.headers)
        if HEADER in by_name:
            self._request_id = choose_request_id(by_name[HEADER], self._request_ids)
        else:
            self._request_id = next(self._request_ids)
        hot = self._hot_cycle(by_name)
        if hot is not None:
            self.cycle = hot
            return
        url, headers, expects = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        headers_of_scope: Any = headers
        self.url, self.headers, self.expect_100_continue = url, headers, expects
        self.scope["headers"] = headers_of_scope
        self.scope["state"][STATE] = self._request_id
        self.scope["state"][CALLER_GONE] = self._caller_is_gone
        super().on_headers_complete()
        # uvicorn puts these before those of each response, its own 500 included.
        self.cycle.default_headers = [*self.server_state.default_headers, (HEADER, self._request_id)]
        if self.app.draining:
            self.cycle.keep_alive = False
        if self.parser.get_http_version() == "1.0":
            self.cycle.send = _Unchunked(self.cycle).send

    def on_body(self, body: bytes) -> None:
        """A piece of the body was parsed."""
        if type(self.cycle) is _HotCycle:
            self.cycle.body += body
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is complete. On the fast path it is answered from now on, by ASGI since its head was."""
        self._reading = _NOTHING
        self._request_id = b""
        cycle = self.cycle
        if type(cycle) is not _HotCycle or not cycle.more_body:
            super().on_message_complete()
            return
        cycle.more_body = False
        driven: Any = Driven(
            cycle.endpoint.respond(cycle.request_id, "POST", cycle.path, b"", cycle.headers, cycle.body),
            partial(self._respond, cycle),
        )
        driven.go_on()
        if not cycle.response_complete:
            cycle.driven = driven
            self.tasks.add(driven)  # the server waits for its end when it stops, and cancels it in the end

    # --- the fast path

    def _hot_cycle(self, headers: dict[bytes, bytes]) -> _HotCycle | None:
        """The cycle of a request that may take the fast path; None for any other."""
        if self.cycle is not None and not self.cycle.response_complete:
            return None
        if self.expect_100_continue or self.flow.write_paused or self.parser.get_method() != b"POST":
            return None
        found = self.app.hot_endpoint(self.url)
        if found is None or self.parser.get_http_version() != "1.1" or self.parser.should_upgrade():
            return None
        length = headers.get(b"content-length", b"")
        if not length.isdigit() or len(length) > 5 or int(length) > HOT_BODY_BYTES_MAX:
            return None
        keep_alive = self.parser.should_keep_alive() and not self.app.draining
        return _HotCycle(*found, headers, self._request_id, keep_alive)

    def _respond(self, cycle: _HotCycle, response: Response | None) -> None:
        """Write a response; None, of an endpoint that failed, closes the connection."""
        cycle.response_complete = True
        if cycle.driven is not None:
            self.tasks.discard(cycle.driven)
            cycle.driven = None  # it holds the cycle: together they would wait for the garbage collector
        if self.transport.is_closing():
            return
        if response is None:
            self.transport.close()
            return
        self.transport.write(self._bytes_of(response, cycle.request_id, cycle.keep_alive))
        if not cycle.keep_alive:
            self.transport.close()
        self.on_response_complete()

    def _bytes_of(self, response: Response, request_id: bytes, keep_alive: bool) -> bytes:
        """A response as it is written to the socket."""
        if self._default_headers is not self.server_state.default_headers:  # the date changes once per second
            self._default_headers = self.server_state.default_headers
            self._default_lines = b"".join(b"%b: %b\r\n" % header for header in self._default_headers)
        status, headers, body, _ = response
        lines = b"%bx-request-id: %b\r\n" % (STATUS_LINE[status] + self._default_lines, request_id)
        for header in headers:
            lines += b"%b: %b\r\n" % header
        if status != 204:
            lines += b"content-length: %d\r\n" % len(body)
        return lines + (b"\r\n" if keep_alive else b"connection: close\r\n\r\n") + body

    def on_response_complete(self) -> None:
        """A response was written: start the next pipelined request, or wait for one."""
        if self.pipeline or self.transport.is_closing():
            super().on_response_complete()
            if self.transport.is_closing():  # once the response has been taken, or its time is over
                self._check_by(self.loop.time() + self._limits.body_s)
            return
        self.server_state.total_requests += 1
        if self.flow.read_paused:
            self.flow.resume_reading()
        self._since = now = self.loop.time()
        due = now + (self._limits.head_s if self._reading == _HEAD else self._limits.keep_alive_s)
        if due < self._due:
            self._check_by(due)

    # --- callers who are late

    def _check_by(self, due: float) -> None:
        """Check this connection at that time, or earlier."""
        if due >= self._due:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._due = due
        self._timer = self.loop.call_at(due, self._check)

    def _count_piece(self, number: int) -> None:
        """Count a piece of an incomplete request, and set the time for the rest of it."""
        if self._ended or self.transport.is_closing():
            return
        begins = self._bytes is None
        self._bytes = 0 if self._bytes is None else self._bytes + number
        if self._reading == _HEAD:
            if begins and self.cycle is not None:  # the first request has been waited for since the connect
                self._since = self.loop.time()
                self._check_by(self._since + self._limits.head_s)
            if self._bytes > HEAD_BYTES_MAX:
                self.send_400_response("")
            return
        if begins:
            self._passed_over = 0
            self._begin_window(self.loop.time())
        if self.flow.read_paused:
            self._was_paused = True
        if self.cycle.response_complete:
            self._passed_over += number
            if self._passed_over > PASSED_OVER_BYTES_MAX:
                self.transport.close()

    def _begin_window(self, now: float) -> None:
        """Start a body's window: a time in which it must end, or keep its minimum rate."""
        self._since, self._bytes, self._was_paused = now, 0, self.flow.read_paused
        self._check_by(now + self._limits.body_s)

    def pause_writing(self) -> None:
        """The caller does not take its responses: give it a time to go on."""
        super().pause_writing()
        self._unsent_before = 0
        self._check_by(self.loop.time() + self._limits.body_s)

    def _check(self) -> None:
        """The timer is due: end the connection if its caller is late, else set the next time."""
        self._timer, self._due = None, math.inf
        now = self.loop.time()
        if self.transport.is_closing() or self.flow.write_paused:
            unsent = self._unsent_bytes()
            if unsent and unsent == self._unsent_before:
                self.transport.abort()
                return
            self._unsent_before = unsent
            self._check_by(now + self._limits.body_s)
            if self.transport.is_closing():
                return
        cycle = self.cycle
        if self._reading == _BODY:
            self._check_body(now)
        elif cycle is not None and not cycle.response_complete:
            pass  # the caller waits for its response
        elif self._reading == _HEAD:
            self._end_when_due(self._since + self._limits.head_s, now, Outcome.REQUEST_TIMEOUT)
        else:
            wait = self._limits.head_s if cycle is None else self._limits.keep_alive_s
            self._end_when_due(self._since + wait, now, None)

    def _unsent_bytes(self) -> int:
        """Bytes of responses that the caller has not taken: the transport's and the kernel's.

        The kernel takes more only when much of its buffer is free. By the transport's bytes alone, a slow reader would seem
        to have stopped.
        """
        with_kernel = bytearray(4)
        with contextlib.suppress(OSError, ValueError):  # the socket is closed
            fcntl.ioctl(self.transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, with_kernel)
        return self.transport.get_write_buffer_size() + int.from_bytes(with_kernel, sys.byteorder)

    def _check_body(self, now: float) -> None:
        if self._stopping:
            self._end(Outcome.SHUTTING_DOWN)
        elif self._since + self._limits.body_s > now:
            self._check_by(self._since + self._limits.body_s)
        elif (
            self._was_paused
            or self.flow.read_paused
            or (self._bytes or 0) >= self._limits.body_s * self._limits.body_bytes_per_s_min
        ):
            self._begin_window(now)
        else:
            self._end(Outcome.REQUEST_TIMEOUT)

    def _end_when_due(self, due: float, now: float, outcome: Outcome | None) -> None:
        if due > now:
            self._check_by(due)
        elif outcome is not None:
            self._end(outcome)
        elif self.transport.get_write_buffer_size():
            self.transport.abort()  # the caller has had all this time to take its response
        else:
            self.transport.close()

    def _end(self, outcome: Outcome) -> None:
        """Refuse the request that is being read, unless its response has begun, and close the connection."""
        cycle = self.cycle
        if self._reading == _BODY and (cycle.response_complete or getattr(cycle, "response_started", False)):
            self.transport.close()
            return
        self._refuse(outcome)

    def shutdown(self) -> None:
        """The server stops: close after the request under way. A body gets STOP_BODY_S to end."""
        if self._ended:
            self.transport.close()
            return
        super().shutdown()
        if self._reading == _BODY and not self.transport.is_closing():
            self._stopping = True
            self._check_by(self.loop.time() + STOP_BODY_S)

    # --- refusals

    def send_400_response(self, msg: str) -> None:
        """Refuse malformed HTTP, in its turn, and close the connection. `msg` is uvicorn's, and not shown."""
        cycle = self.cycle
        if self.pipeline or (cycle is not None and not cycle.response_complete and self._reading != _BODY):
            # An earlier request is still being answered. A 400 written now would be read as its response.
            cycle.keep_alive = False
            if self._reading == _BODY:
                self.pipeline[0] = (cycle, _malformed)
            self.flow.pause_reading()
            return
        self._refuse(Outcome.MALFORMED_HTTP)

    def _refuse(self, outcome: Outcome) -> None:
        """Refuse the request that is being read, and close the connection."""
        request_id = self._request_id or next(self._request_ids)
        response = problem_response(Refused(outcome), request_id)
        log_failure(outcome, "no operation", request_id)
        self._send_last(self._bytes_of(response, request_id, keep_alive=False))

    def _send_last(self, response: bytes) -> None:
        """Send the response to a request that was not read to its end, and close the connection.

        What the caller still sends is read and dropped for LINGER_S. Closing a socket with unread bytes resets the
        connection, which may lose the response.
        """
        self._ended = True
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:  # wake whoever waits for its body
            cycle.disconnected = True
            cycle.message_event.set()
        if self.transport.get_write_buffer_size():
            self.transport.write(response)
            self.transport.close()
            self._check_by(self.loop.time() + self._limits.body_s)
            return
        self.transport.write(response)
        self.transport.write_eof()
        self.flow.resume_reading()
        self.transport.set_protocol(_Lingering(self))


async def _malformed(scope: Any, receive: Any, send: Any) -> None:
    """The ASGI application for a pipelined request whose body is malformed: refuses it when it is its turn."""
    await send_problem(scope, send, Refused(Outcome.MALFORMED_HTTP))


class _Unchunked:
    """Sends the response of a request to a caller whose HTTP/1.0 knows no chunks: a body in pieces ends with its connection.

    Until that end, to close the connection resets it: otherwise nobody could tell that a body is short.
    """

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self._send: Any = cycle.send
        self._in_pieces = False

    async def send(self, message: Message) -> None:
        """Stands for the cycle's own."""
        cycle = self._cycle
        if message["type"] == "http.response.start":
            self._in_pieces = all(name != b"content-length" for name, _ in message["headers"])
            if self._in_pieces:
                cycle.chunked_encoding = False
                self._reset_when_closed(True)
        elif self._in_pieces:
            cycle.expected_content_length = len(message["body"])
            if not message.get("more_body", False):
                self._reset_when_closed(False)
        await self._send(message)

    def _reset_when_closed(self, resets: bool) -> None:
        with contextlib.suppress(OSError, ValueError):  # the socket is closed
            self._cycle.transport.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", resets, 0)
            )


class _Lingering(asyncio.Protocol):
    """The protocol of a connection after its last response, until the caller closes it or LINGER_S have passed."""

    def __init__(self, protocol: CouponProtocol) -> None:
        self._protocol = protocol
        self._timer = protocol.loop.call_later(LINGER_S, protocol.transport.abort)

    def data_received(self, data: bytes) -> None:
        """Drop it."""

    def connection_lost(self, exc: Exception | None) -> None:
        """The caller has closed: tell the protocol whose place this took."""
        self._timer.cancel()
        self._protocol.connection_lost(exc)


class _Full:
    """Stands for the Api on a connection beyond `connections_max`: refuses everything but /healthz.

    A connection that is not accepted, or cut at once, would look like a dead process.
    """

    draining = True
    """Each response is its connection's last."""

    def __init__(self, api: Api) -> None:
        self._api = api

    def hot_endpoint(self, url: bytes) -> None:
        """None, whatever the path: nothing takes the fast path."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/healthz":
            await self._api(scope, receive, send)
        else:
            await send_problem(scope, send, Refused(Outcome.TOO_MANY_CONNECTIONS))
