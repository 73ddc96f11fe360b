"""How the API is served: uvicorn, with a shorter way for the routes that a flash sale is made of.

ASGI costs a scope, an event, a route's match and three messages a request: more than a decision of Redis does. A POST on
a hot route whose body is announced and short goes from the parser to its endpoint, and its response leaves in one
write. Everything else, and whatever is out of the ordinary on a hot route (pipelining, `Expect`, chunks, an escaped
path, a caller who does not read), takes uvicorn's own way to the same endpoint.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import math
import sys
import termios
from asyncio.events import TimerHandle
from typing import Any

from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from coupon_svc.domain.outcomes import Outcome, Refused
from coupon_svc.http.endpoint import Endpoint
from coupon_svc.http.problems import log_failure, problem_response
from coupon_svc.http.public import send_problem
from coupon_svc.http.request_id import HEADER, STATE, choose_request_id
from coupon_svc.http.response import Response
from coupon_svc.http.routes import Api

SERVER_SETTINGS: dict[str, Any] = {
    "loop": "uvloop",
    "ws": "none",  # a connection that was upgraded would be beyond all limits
    "access_log": False,  # it would print codes
    "log_config": None,
    "server_header": False,
    "proxy_headers": False,  # nothing here depends on the caller's address
    "timeout_graceful_shutdown": 5,
}
HOT_BODY_BYTES_MAX = 16 * 1024
HEAD_BYTES_MAX = 64 * 1024
"""Of a request line and its headers that are not complete yet; the parser itself would keep as many as are sent."""
PASSED_OVER_BYTES_MAX = 8 * 1024 * 1024
"""Of a body that was answered before its end, as one that is too large is: callers who send it all before they read the
answer find it, and the connection, up to here."""
STOP_BODY_S = 2.0
"""For the rest of a body when the server stops: well before it gives up what is under way."""
LINGER_S = 1.0
_NOTHING, _HEAD, _BODY = range(3)
"""What the parser is in the middle of."""


class _HotCycle:
    """A request on the short way, in the place of uvicorn's RequestResponseCycle, which asks these of it."""

    __slots__ = (
        "body",
        "disconnected",
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


class _NobodyWaits:
    def set(self) -> None:
        """Nobody waits for the body of a request on the short way."""


_NOBODY_WAITS = _NobodyWaits()


class CouponProtocol(HttpToolsProtocol):
    """HTTP/1.1 for an Api, within its limits. Malformed HTTP is refused as a problem, and the connection closed.

    A connection has one timer. It is looked at when it is due, and moved only when somebody may be late earlier than
    that: so a request that comes in one piece costs no timer.
    """

    app: Api
    cycle: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits = self.app.limits
        self._request_ids = self.app.request_ids
        self._request_id = b""
        """Of the request that is being read, once its head is complete."""
        self._reading = _NOTHING
        self._since = 0.0
        """When the caller began to be waited for: since the connect, the last answer, or the begin of a head or of a
        window of a body."""
        self._bytes: int | None = None
        """Read of a head, or of a body in this window; None until the end of the piece in which it began."""
        self._passed_over = 0
        """Bytes of a body that was answered before its end."""
        self._was_paused = False
        """Whether reading was paused in this window: then it was not the caller who was slow."""
        self._untaken_before = 0
        """Bytes of answers that the caller had not taken at the last look."""
        self._timer: TimerHandle | None = None
        self._due = math.inf
        self._stopping = False
        self._ended = False
        self._default_headers: Any = None
        self._default_lines = b""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        beyond = len(self.connections) - self._limits.connections_max
        if beyond > self._limits.connections_refused_max:
            transport.abort()
            return
        if beyond > 0:
            stand_in: Any = _Full(self.app)
            self.app = stand_in
        self._since = self.loop.time()
        self._look_at(self._since + self._limits.head_s)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._reading:
            self._read_a_part(len(data))

    def eof_received(self) -> bool | None:  # type: ignore[override]  # asyncio's own, which uvicorn leaves out
        """A caller may close its side once it has asked; what it asked for is answered."""
        cycle = self.cycle
        if cycle is None or cycle.response_complete or cycle.more_body:
            return None
        cycle.keep_alive = False
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._timer is not None:
            self._timer.cancel()
        self._ended = True

    # --- from the parser

    def on_message_begin(self) -> None:
        """A request begins. It gets no ASGI scope yet: a hot one needs none."""
        self._reading, self._bytes = _HEAD, None
        self._request_id = b""
        self.url = b""
        self.headers = []
        self.expect_100_continue = False

    def on_headers_complete(self) -> None:
        """The request line and all headers are there: the request gets its id and goes the short way, or by ASGI."""
        self._reading, self._bytes = _BODY, None
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
        super().on_headers_complete()
        # uvicorn puts these before those of each response, its own 500 included.
        self.cycle.default_headers = [*self.server_state.default_headers, (HEADER, self._request_id)]
        if self.app.draining:
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        """A piece of a body."""
        if type(self.cycle) is _HotCycle:
            self.cycle.body += body
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is whole. On the short way its task begins now; by ASGI it began with the head."""
        self._reading = _NOTHING
        self._request_id = b""
        cycle = self.cycle
        if type(cycle) is _HotCycle and cycle.more_body:
            cycle.more_body = False
            task = self.loop.create_task(self._answer(cycle))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)
        else:
            super().on_message_complete()

    # --- the short way

    def _hot_cycle(self, headers: dict[bytes, bytes]) -> _HotCycle | None:
        """The cycle of a request that may go the short way."""
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

    async def _answer(self, cycle: _HotCycle) -> None:
        response = await cycle.endpoint.respond(cycle.request_id, "POST", cycle.path, b"", cycle.headers, cycle.body)
        cycle.response_complete = True
        if response is None or self.transport.is_closing():
            return
        self.transport.write(self._bytes_of(response, cycle.request_id, cycle.keep_alive))
        if not cycle.keep_alive:
            self.transport.close()
        self.on_response_complete()

    def _bytes_of(self, response: Response, request_id: bytes, keep_alive: bool) -> bytes:
        """A response as it goes over the wire."""
        if self._default_headers is not self.server_state.default_headers:  # the date changes once per second
            self._default_headers = self.server_state.default_headers
            self._default_lines = b"".join(b"%b: %b\r\n" % header for header in self._default_headers)
        return b"".join(
            [
                STATUS_LINE[response.status],
                self._default_lines,
                b"x-request-id: %b\r\n" % request_id,
                *[b"%b: %b\r\n" % header for header in response.headers],
                b"content-length: %d\r\n" % len(response.body) if response.status != 204 else b"",
                b"\r\n" if keep_alive else b"connection: close\r\n\r\n",
                response.body,
            ]
        )

    def on_response_complete(self) -> None:
        if self.pipeline or self.transport.is_closing():
            super().on_response_complete()
            if self.transport.is_closing():  # not before the answer is sent
                self._look_at(self.loop.time() + self._limits.body_s)
            return
        self.server_state.total_requests += 1
        if self.flow.read_paused:
            self.flow.resume_reading()
        self._since = now = self.loop.time()
        due = now + (self._limits.head_s if self._reading == _HEAD else self._limits.keep_alive_s)
        if due < self._due:
            self._look_at(due)

    # --- callers who are late

    def _look_at(self, due: float) -> None:
        """Look at this connection at that time, or before."""
        if due >= self._due:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._due = due
        self._timer = self.loop.call_at(due, self._look)

    def _read_a_part(self, number: int) -> None:
        """More is to come of what was received: note how much there is, and see to it that the rest is in time."""
        if self._ended or self.transport.is_closing():
            return
        begins = self._bytes is None
        self._bytes = 0 if self._bytes is None else self._bytes + number
        if self._reading == _HEAD:
            if begins and self.cycle is not None:  # of the first request the connect is the begin
                self._since = self.loop.time()
                self._look_at(self._since + self._limits.head_s)
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
        """Give a body, or what is left of it, its time."""
        self._since, self._bytes, self._was_paused = now, 0, self.flow.read_paused
        self._look_at(now + self._limits.body_s)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._untaken_before = 0
        self._look_at(self.loop.time() + self._limits.body_s)

    def _look(self) -> None:
        """Act on whoever is late, and look again when the next one may be."""
        self._timer, self._due = None, math.inf
        now = self.loop.time()
        if self.transport.is_closing() or self.flow.write_paused:
            untaken = self._untaken()
            if untaken and untaken == self._untaken_before:
                self.transport.abort()
                return
            self._untaken_before = untaken
            self._look_at(now + self._limits.body_s)
            if self.transport.is_closing():
                return
        cycle = self.cycle
        if self._reading == _BODY:
            self._look_at_body(now)
        elif cycle is not None and not cycle.response_complete:
            pass  # the caller waits for us
        elif self._reading == _HEAD:
            self._end_when_due(self._since + self._limits.head_s, now, Outcome.REQUEST_TIMEOUT)
        else:
            wait = self._limits.head_s if cycle is None else self._limits.keep_alive_s
            self._end_when_due(self._since + wait, now, None)

    def _untaken(self) -> int:
        """Bytes of answers that the caller has not taken yet: ours, and those that are with the kernel, which asks for
        more only when much of its buffer is free; a slow reader would seem to stand still."""
        with_kernel = bytearray(4)
        with contextlib.suppress(OSError, ValueError):  # of a socket that is closed
            fcntl.ioctl(self.transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, with_kernel)
        return self.transport.get_write_buffer_size() + int.from_bytes(with_kernel, sys.byteorder)

    def _look_at_body(self, now: float) -> None:
        if self._stopping:
            self._end(Outcome.SHUTTING_DOWN)
        elif self._since + self._limits.body_s > now:
            self._look_at(self._since + self._limits.body_s)
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
            self._look_at(due)
        elif outcome is not None:
            self._end(outcome)
        elif self.transport.get_write_buffer_size():
            self.transport.abort()  # it has had all this time to take its answer
        else:
            self.transport.close()

    def _end(self, outcome: Outcome) -> None:
        """Refuse the request that is being read, where that can be told yet, and close the connection."""
        cycle = self.cycle
        if self._reading == _BODY and (cycle.response_complete or getattr(cycle, "response_started", False)):
            self.transport.close()
            return
        self._refuse(outcome)

    def shutdown(self) -> None:
        """Close when nothing is under way; a request that is not complete soon is given up."""
        if self._ended:
            self.transport.close()
            return
        super().shutdown()
        if self._reading == _BODY and not self.transport.is_closing():
            self._stopping = True
            self._look_at(self.loop.time() + STOP_BODY_S)

    # --- what is no HTTP

    def send_400_response(self, msg: str) -> None:
        cycle = self.cycle
        if self.pipeline or (cycle is not None and not cycle.response_complete and self._reading != _BODY):
            # What came before is still under way, and its caller would take the refusal for its answer.
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
        self._send_last(self._bytes_of(response, request_id, keep_alive=False))
        log_failure(outcome, "no operation", request_id)

    def _send_last(self, response: bytes) -> None:
        """Send a response to a request that was not read to its end, and close the connection.

        What the caller still sends is passed over for a moment: to close a socket with unread bytes resets the connection,
        and the response might be lost with it.
        """
        self._ended = True
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:  # whoever reads its body need not wait any longer
            cycle.disconnected = True
            cycle.message_event.set()
        if self.transport.get_write_buffer_size():
            self.transport.write(response)
            self.transport.close()
            self._look_at(self.loop.time() + self._limits.body_s)
            return
        self.transport.write(response)
        self.transport.write_eof()
        self.flow.resume_reading()
        self.transport.set_protocol(_Lingering(self))


async def _malformed(scope: Any, receive: Any, send: Any) -> None:
    """Answers, in its turn, a pipelined request whose body turned out to be malformed."""
    await send_problem(scope, send, Refused(Outcome.MALFORMED_HTTP))


class _Lingering(asyncio.Protocol):
    """Takes the place of a connection's protocol that has said its last, until the caller closes or LINGER_S are over."""

    def __init__(self, protocol: CouponProtocol) -> None:
        self._protocol = protocol
        self._timer = protocol.loop.call_later(LINGER_S, protocol.transport.abort)

    def data_received(self, data: bytes) -> None:
        """Nobody reads it."""

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        self._protocol.connection_lost(exc)


class _Full:
    """In the place of the Api on a connection beyond the bound: says so, in HTTP, and that the process lives.

    A connection that is not accepted, or closed unheard, would look like a process that is dead.
    """

    draining = True
    """Each answer is its connection's last."""

    def __init__(self, api: Api) -> None:
        self._api = api

    def hot_endpoint(self, url: bytes) -> None:
        return None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/healthz":
            await self._api(scope, receive, send)
        else:
            await send_problem(scope, send, Refused(Outcome.TOO_MANY_CONNECTIONS))
