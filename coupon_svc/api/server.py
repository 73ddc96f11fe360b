"""How the API is served: uvicorn, with a shorter way for the routes that a flash sale is made of.

ASGI costs a scope, an event, a route's match and three messages a request: more than a decision of Redis does. A POST on
a hot route whose body is announced and short goes from the parser to its endpoint, and its response leaves in one
write. Everything else, and whatever is out of the ordinary on a hot route (pipelining, `Expect`, chunks, an escaped
path, a caller who does not read), takes uvicorn's own way to the same endpoint.
"""

from __future__ import annotations

from asyncio.events import TimerHandle
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from coupon_svc.api.http import Endpoint, Response
from coupon_svc.api.problems import bad_request
from coupon_svc.api.routes import Api

SERVER_SETTINGS: dict[str, Any] = {
    "loop": "uvloop",
    "access_log": False,  # it would print codes
    "log_config": None,
    "server_header": False,
    "proxy_headers": False,  # nothing here depends on the caller's address
    "timeout_graceful_shutdown": 5,
}
HOT_BODY_BYTES_MAX = 16 * 1024
HEAD_BYTES_MAX = 64 * 1024
"""Of a request line and its headers that are not complete yet; the parser itself would keep as many as are sent."""


class _HotCycle:
    """A request on the short way, in the place of uvicorn's RequestResponseCycle, which asks these of it."""

    __slots__ = (
        "body",
        "disconnected",
        "endpoint",
        "keep_alive",
        "message_event",
        "more_body",
        "path",
        "response_complete",
    )

    def __init__(self, endpoint: Endpoint, path: dict[str, str], keep_alive: bool) -> None:
        self.endpoint = endpoint
        self.path = path
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
    """HTTP/1.1 for an Api. What is no valid HTTP is refused as a problem, and the connection closed."""

    app: Api
    cycle: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._idle_since: float | None = None
        self._idle_timer: TimerHandle | None = None
        self._head_bytes = 0
        self._in_body = False
        self._default_headers: Any = None
        self._default_lines = b""

    def data_received(self, data: bytes) -> None:
        self._head_bytes += len(data)
        super().data_received(data)
        if self._head_bytes > HEAD_BYTES_MAX and not self._in_body and not self.transport.is_closing():
            self.send_400_response("")

    # --- from the parser

    def on_message_begin(self) -> None:
        """No scope yet: a hot request needs none."""
        self.url = b""
        self.headers = []
        self.expect_100_continue = False

    def on_headers_complete(self) -> None:
        self._head_bytes, self._in_body = 0, True
        hot = self._hot_cycle()
        if hot is not None:
            self.cycle = hot
            return
        url, headers, expects = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        headers_of_scope: Any = headers
        self.url, self.headers, self.expect_100_continue = url, headers, expects
        self.scope["headers"] = headers_of_scope
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if type(self.cycle) is _HotCycle:
            self.cycle.body += body
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._head_bytes, self._in_body = 0, False
        cycle = self.cycle
        if type(cycle) is _HotCycle and cycle.more_body:
            cycle.more_body = False
            task = self.loop.create_task(self._answer(cycle, dict(self.headers)))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)
        else:
            super().on_message_complete()

    # --- the short way

    def _hot_cycle(self) -> _HotCycle | None:
        """The cycle of a request that may go the short way."""
        if self.cycle is not None and not self.cycle.response_complete:
            return None
        if self.expect_100_continue or self.flow.write_paused or self.parser.get_method() != b"POST":
            return None
        found = self.app.hot_endpoint(self.url)
        if found is None or self.parser.get_http_version() != "1.1" or self.parser.should_upgrade():
            return None
        length = next((value for name, value in self.headers if name == b"content-length"), b"")
        if not length.isdigit() or len(length) > 5 or int(length) > HOT_BODY_BYTES_MAX:
            return None
        return _HotCycle(*found, self.parser.should_keep_alive())

    async def _answer(self, cycle: _HotCycle, headers: dict[bytes, bytes]) -> None:
        response = await cycle.endpoint.respond("POST", cycle.path, b"", headers, cycle.body)
        cycle.response_complete = True
        if response is None or self.transport.is_closing():
            return
        self.transport.write(self._bytes_of(response, cycle.keep_alive))
        if not cycle.keep_alive:
            self.transport.close()
        self.on_response_complete()

    def _bytes_of(self, response: Response, keep_alive: bool) -> bytes:
        if self._default_headers is not self.server_state.default_headers:  # the date: anew each second
            self._default_headers = self.server_state.default_headers
            self._default_lines = b"".join(b"%b: %b\r\n" % header for header in self._default_headers)
        lines = [STATUS_LINE[response.status], self._default_lines]
        lines += [b"%b: %b\r\n" % header for header in response.headers]
        if response.status != 204:
            lines.append(b"content-length: %d\r\n" % len(response.body))
        lines.append(b"\r\n" if keep_alive else b"connection: close\r\n\r\n")
        lines.append(response.body)
        return b"".join(lines)

    # --- idle connections: one timer each, looked at when it is due, instead of a new one for every response

    def _unset_keepalive_if_required(self) -> None:
        self._idle_since = None

    def on_response_complete(self) -> None:
        if self.pipeline or self.transport.is_closing():
            super().on_response_complete()
            return
        self.server_state.total_requests += 1
        self.flow.resume_reading()
        self._idle_since = self.loop.time()
        if self._idle_timer is None:
            self._idle_timer = self.loop.call_later(self.timeout_keep_alive, self._close_if_idle)

    def _close_if_idle(self) -> None:
        self._idle_timer = None
        if self._idle_since is None or self.transport.is_closing():
            return
        left = self._idle_since + self.timeout_keep_alive - self.loop.time()
        if left <= 0:
            self.timeout_keep_alive_handler()
        else:
            self._idle_timer = self.loop.call_later(left, self._close_if_idle)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._idle_timer is not None:
            self._idle_timer.cancel()

    # --- what is no HTTP

    def send_400_response(self, msg: str) -> None:
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete and not self._in_body:
            # What came before is still under way, and its caller would take the refusal for its answer.
            cycle.keep_alive = False
            self.flow.pause_reading()
            return
        body = bad_request()
        head = (
            "HTTP/1.1 400 Bad Request\r\nContent-Type: application/problem+json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()
