"""The fast path of hot operations answers as ASGI does, whatever the connection does meanwhile."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import httpx
import pytest
import uvicorn
from starlette.routing import Route, Router

from coupon_svc.hot import Slot
from coupon_svc.http.endpoint import Endpoint
from coupon_svc.http.limits import Limits
from coupon_svc.http.metrics import Metrics
from coupon_svc.http.response import Response
from coupon_svc.http.routes import OPERATIONS, Api
from coupon_svc.http.server import HOT_BODY_BYTES_MAX, SERVER_SETTINGS, CouponProtocol, _HotCycle
from tests.harness import Stack, until
from tests.http.helpers import make_book

HOT_PATHS = [operation.path for operation in OPERATIONS if operation.hot]


class Answered(NamedTuple):
    """One response as it came over the wire. The headers' names are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes


class Wire:
    """A connection on which a test says exactly what is sent, and when."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def answer(self) -> Answered:
        """The next response."""
        head = (await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), 10)).decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
        assert "x-request-id" in headers
        body = await self.reader.readexactly(int(headers.get("content-length", 0)))
        return Answered(int(head[0].split()[1]), headers, body)

    async def ended(self) -> bool:
        """Whether the server has closed the connection, waiting for it."""
        return await asyncio.wait_for(self.reader.read(), 10) == b""


async def dial(base_url: str) -> Wire:
    url = httpx.URL(base_url)
    return Wire(*await asyncio.open_connection(url.host, url.port))


def post(path: str, body: bytes, *headers: str, version: str = "1.1") -> bytes:
    """A request with Content-Length: it takes the fast path, unless something else about it is unusual."""
    lines = [f"POST {path} HTTP/{version}", "Host: test", "Content-Type: application/json", *headers]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body


def chunked(path: str, body: bytes, *headers: str) -> bytes:
    """The same request in chunks: it goes by ASGI."""
    lines = [f"POST {path} HTTP/1.1", "Host: test", "Content-Type: application/json", *headers]
    head = "\r\n".join([*lines, "Transfer-Encoding: chunked", "", ""]).encode()
    return head + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)


# --- the server alone: endpoints that answer with what they were called with, and by which way


class Told(Endpoint):
    """Answers with what it was given."""

    def __init__(self) -> None:
        super().__init__(None, Metrics(), lambda *_: None)  # type: ignore[arg-type]
        self.slow: asyncio.Event | None = None
        self.slots: list[Slot[None]] = []
        self.request_ids: list[str] = []

    async def respond(
        self, request_id: bytes, method: str, path: Any, query_string: bytes, headers: Any, body: Any, *_: Any
    ) -> Response:
        by_asgi = not isinstance(body, bytes)
        if by_asgi:
            message = await body()
            body = message["body"]
        if self.slow is not None and b"slow" in body:
            await self.slow.wait()
        if b"slot" in body:
            slot = Slot[None]()
            self.slots.append(slot)
            try:
                await slot
            except asyncio.CancelledError:
                return Response(503, [], b"")
        told = {"asgi": by_asgi, "path": dict(path), "query": query_string.decode(), "body": body.decode()}
        self.request_ids.append(request_id.decode())
        return Response(200, [(b"content-type", b"application/json")], json.dumps(told).encode())


class Served(NamedTuple):
    base_url: str
    endpoint: Told
    server: uvicorn.Server


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    """All hot paths on one endpoint of the test's."""
    endpoint = Told()
    hot = dict.fromkeys(HOT_PATHS, endpoint)
    api = Api(Router([Route(path, endpoint) for path in HOT_PATHS]), hot, Limits(keep_alive_s=1))
    settings = {**SERVER_SETTINGS, "loop": "none", "lifespan": "off"}
    server = uvicorn.Server(uvicorn.Config(api, http=CouponProtocol, **settings))
    listener = socket.create_server(("127.0.0.1", 0))
    task = asyncio.create_task(server._serve(sockets=[listener]))
    yield Served(f"http://127.0.0.1:{listener.getsockname()[1]}", endpoint, server)
    server.should_exit = True
    await task
    listener.close()


async def ask(served: Served, request: bytes) -> dict[str, Any]:
    """What the endpoint was told of a request on a connection of its own."""
    wire = await dial(served.base_url)
    wire.writer.write(request)
    answer = await wire.answer()
    wire.writer.close()
    assert answer.status == 200
    told: dict[str, Any] = json.loads(answer.body)
    return told


@pytest.mark.parametrize("path", HOT_PATHS)
async def test_a_plain_post_takes_the_fast_path(path: str, served: Served) -> None:
    told = await ask(served, post(path.format(code="A-1"), b'{"a": 1}'))
    assert told == {"asgi": False, "path": {"code": "A-1"} if "{" in path else {}, "query": "", "body": '{"a": 1}'}


@pytest.mark.parametrize(
    ("request_bytes", "code"),
    [
        (chunked("/coupons/redeem/A-1", b"{}"), "A-1"),
        (post("/coupons/redeem/A-1?dry", b"{}"), "A-1"),
        (post("/coupons/redeem/A%2D1", b"{}"), "A-1"),
        (post("/coupons/redeem/A%2F1", b"{}"), "A/1"),
        (post("/coupons/redeem/A-1", b"{}", version="1.0"), "A-1"),
        (post("/coupons/redeem/A-1", b"[" + b" " * HOT_BODY_BYTES_MAX + b"]"), "A-1"),
    ],
    ids=["chunks", "query", "escaped", "escaped slash", "HTTP/1.0", "long body"],
)
async def test_what_is_unusual_goes_by_asgi(request_bytes: bytes, code: str, served: Served) -> None:
    told = await ask(served, request_bytes)
    assert (told["asgi"], told["path"]) == (True, {"code": code})


async def test_expect_is_answered_before_the_body_is_sent(served: Served) -> None:
    wire = await dial(served.base_url)
    wire.writer.write(post("/coupons/assign", b"{}", "Expect: 100-continue")[:-2])
    assert await wire.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    wire.writer.write(b"{}")
    assert (await wire.answer()).status == 200
    wire.writer.close()


async def test_a_request_may_come_byte_by_byte(served: Served) -> None:
    wire = await dial(served.base_url)
    for byte in post("/coupons/lock/A-1", b'{"x": "y"}'):
        wire.writer.write(bytes([byte]))
        await wire.writer.drain()
        await asyncio.sleep(0)
    assert json.loads((await wire.answer()).body)["body"] == '{"x": "y"}'
    wire.writer.close()


async def test_pipelined_requests_are_answered_in_their_order(served: Served) -> None:
    """The first takes the fast path and is slow; those behind it wait, whichever way they go."""
    served.endpoint.slow = asyncio.Event()
    wire = await dial(served.base_url)
    bodies = ["slow 0", *map(str, range(1, 6))]
    wire.writer.write(
        b"".join((chunked if number == 3 else post)("/coupons/assign", b.encode()) for number, b in enumerate(bodies))
    )
    await asyncio.sleep(0.1)
    served.endpoint.slow.set()
    assert [json.loads((await wire.answer()).body)["body"] for _ in bodies] == bodies
    wire.writer.write(post("/coupons/assign", b"last"))
    assert json.loads((await wire.answer()).body) == {"asgi": False, "path": {}, "query": "", "body": "last"}
    wire.writer.close()


async def test_each_of_pipelined_requests_has_its_own_id_whichever_way_it_goes(served: Served) -> None:
    """The first is slow: meanwhile the heads of all others are read."""
    served.endpoint.slow = asyncio.Event()
    wire = await dial(served.base_url)
    sent = [f"X-Request-Id: caller-{number}" for number in range(4)]
    bad = (
        b"POST /coupons/assign HTTP/1.1\r\nHost: t\r\nX-Request-Id: bad\r\nTransfer-Encoding: chunked\r\n\r\nno hex\r\n"
    )
    wire.writer.write(
        post("/coupons/assign", b"slow", sent[0])
        + chunked("/coupons/assign", b"1", sent[1])
        + post("/coupons/assign", b"2", sent[2])
        + post("/coupons/assign", b"3")
        + bad
    )
    await asyncio.sleep(0.1)
    served.endpoint.slow.set()
    answers = [await wire.answer() for _ in range(5)]
    ids = [answer.headers["x-request-id"] for answer in answers]
    assert ids[:3] == ["caller-0", "caller-1", "caller-2"]
    assert ids[3].startswith("req_")
    assert served.endpoint.request_ids == ids[:4]
    assert (answers[4].status, ids[4], json.loads(answers[4].body)["request_id"]) == (400, "bad", "bad")
    wire.writer.close()


async def test_a_connection_is_closed_when_the_caller_asks_for_it(served: Served) -> None:
    wire = await dial(served.base_url)
    wire.writer.write(post("/coupons/assign", b"{}", "Connection: close"))
    assert (await wire.answer()).headers["connection"] == "close"
    assert await wire.ended()
    wire.writer.close()


async def test_an_idle_connection_is_closed_and_a_busy_one_is_not(served: Served) -> None:
    idle, busy = await dial(served.base_url), await dial(served.base_url)
    loop = asyncio.get_running_loop()
    idle.writer.write(post("/coupons/assign", b"{}"))
    await idle.answer()
    began = loop.time()
    over = asyncio.create_task(idle.ended())
    while not over.done():
        busy.writer.write(post("/coupons/assign", b"{}"))
        assert (await busy.answer()).status == 200
        await asyncio.sleep(0.2)
    assert 0.8 < loop.time() - began < 5
    busy.writer.write(post("/coupons/assign", b"{}"))
    assert (await busy.answer()).status == 200
    for wire in (idle, busy):
        wire.writer.close()


@pytest.mark.parametrize("body", [b"slow", b"slot"])
async def test_a_request_under_way_is_answered_when_the_server_stops(body: bytes, served: Served) -> None:
    served.endpoint.slow = asyncio.Event()
    wire = await dial(served.base_url)
    wire.writer.write(post("/coupons/assign", body))
    await asyncio.sleep(0.1)
    served.server.should_exit = True
    await asyncio.sleep(0.3)
    served.endpoint.slow.set()
    for slot in served.endpoint.slots:
        slot.set_result(None)
    answer = await wire.answer()
    assert (answer.status, answer.headers["connection"]) == (200, "close")
    assert await wire.ended()
    wire.writer.close()


async def test_what_is_still_under_way_when_the_server_gives_up_is_told_so(served: Served) -> None:
    served.server.config.timeout_graceful_shutdown = 0
    wires = [await dial(served.base_url) for _ in range(3)]
    for wire in wires:
        wire.writer.write(post("/coupons/assign", b"slot, and is told"))
    await asyncio.sleep(0.1)
    assert len(served.server.server_state.tasks) == 3
    served.server.should_exit = True
    for wire in wires:
        assert (await wire.answer()).status == 503
        wire.writer.close()


async def test_nothing_is_done_for_a_request_behind_the_last_response(served: Served) -> None:
    served.server.config.app.draining = True  # type: ignore[union-attr]
    wire = await dial(served.base_url)
    wire.writer.write(post("/coupons/assign", b"1") + post("/coupons/assign", b"2") + chunked("/coupons/assign", b"3"))
    assert (await wire.answer()).headers["connection"] == "close"
    assert await wire.ended()
    assert len(served.endpoint.request_ids) == 1
    wire.writer.close()


async def test_a_caller_who_hangs_up_harms_nobody(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    served.endpoint.slow = asyncio.Event()
    whole = post("/coupons/assign", b"slow")
    for length in (10, len(whole) - 2, len(whole)):
        wire = await dial(served.base_url)
        wire.writer.write(whole[:length])
        await asyncio.sleep(0.05)
        wire.writer.transport.abort()
    await asyncio.sleep(0.1)
    served.endpoint.slow.set()
    await asyncio.sleep(0.1)
    assert (await ask(served, post("/coupons/assign", b"{}")))["asgi"] is False
    assert not served.server.server_state.tasks
    assert not caplog.records


async def test_a_request_that_was_waited_for_leaves_nothing_to_the_garbage_collector(served: Served) -> None:
    """Else it would stay until a full collection, which comes seldom: with thousands of callers that is much."""
    gc.collect()
    gc.disable()
    try:
        wires = [await dial(served.base_url) for _ in range(3)]
        for wire in wires:
            wire.writer.write(post("/coupons/assign", b"slot"))
        await until(lambda: asyncio.sleep(0, len(served.endpoint.slots) == 3))
        while served.endpoint.slots:
            served.endpoint.slots.pop().set_result(None)
        for wire in wires:
            assert (await wire.answer()).status == 200
            wire.writer.close()
        await until(lambda: asyncio.sleep(0, not served.server.server_state.connections))
        assert [one for one in gc.get_objects() if type(one) is _HotCycle] == []
    finally:
        gc.enable()


# --- the whole service: both ways to one answer


async def test_both_ways_lead_to_the_same_answers(service: Stack, client: httpx.AsyncClient) -> None:
    book_id = await make_book(client, codes=["A-1", "B-2"])
    authorization = f"Authorization: {client.headers['authorization']}"
    assign = json.dumps({"book_id": book_id, "user_id": "u"}).encode()
    sent = [
        ("/coupons/assign", assign, (authorization, "Idempotency-Key: k1")),
        ("/coupons/assign", assign, (authorization, "Idempotency-Key: k1")),
        ("/coupons/assign", b'{"book_id": 5}', (authorization,)),
        ("/coupons/assign", assign, ("Authorization: Bearer no",)),
        ("/coupons/redeem/NOBODYS", b"{}", (authorization,)),
        ("/coupons/unlock/A-1", b'{"lock_token": "lk_x"}', (authorization,)),
        ("/coupons/assign", b"{", (authorization,)),
    ]
    wire = await dial(service.base_url)
    first = True
    for path, body, headers in sent:
        answers = []
        for make in (post, chunked):
            wire.writer.write(make(path, body, *headers))
            answer = await wire.answer()
            shown = json.loads(answer.body or b"{}")
            shown.pop("request_id", None)
            own = ("date", "content-length", "x-request-id")
            told = {name: value for name, value in answer.headers.items() if name not in own}
            if first:  # the second of these is a replay of the first
                told["idempotent-replayed"] = "true"
            answers.append((answer.status, told, shown))
        first = False
        assert answers[0] == answers[1], path
    wire.writer.close()
