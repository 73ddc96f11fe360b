"""Answers whose bodies come in pieces, from a server alone: back-pressure, and how a caller sees that one is short."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, NamedTuple

import httpx
import pytest
import uvicorn
from starlette.routing import Route, Router

from coupon_svc.domain.errors import CouponError
from coupon_svc.http.call import Call, StreamedAnswer
from coupon_svc.http.endpoint import Endpoint
from coupon_svc.http.limits import Limits
from coupon_svc.http.metrics import Metrics
from coupon_svc.http.routes import OPERATIONS, Api
from coupon_svc.http.server import SERVER_SETTINGS, CouponProtocol
from tests.harness import until
from tests.http.test_fast_path import dial

LIST_CODES = next(operation for operation in OPERATIONS if operation.name == "list_codes")
PIECE = b"0123456789abcdef" * 8192  # 128 KiB: more than is given to the transport at once
PATH = "/coupons/bk_1/codes"


class _Keys:
    async def authenticate(self, authorization: bytes) -> Any:
        return type("Key", (), {"scopes": frozenset({"codes:read"}), "tenant_id": 1})


class Pieces:
    """Answers with `number` pieces, then `raised`."""

    def __init__(self) -> None:
        self.number, self.raised = 3, BaseException
        self.given = 0
        self.closed = False

    async def answer(self, call: Call) -> StreamedAnswer:
        return StreamedAnswer(200, [(b"content-type", b"text/csv")], self._pieces())

    async def _pieces(self) -> AsyncGenerator[bytes]:
        try:
            for _ in range(self.number):
                self.given += 1
                yield PIECE
            if self.raised is not BaseException:
                raise self.raised("SECRET-1")
        finally:
            self.closed = True


class Streaming(NamedTuple):
    base_url: str
    pieces: Pieces
    server: uvicorn.Server


@pytest.fixture
async def streaming() -> AsyncIterator[Streaming]:
    pieces = Pieces()
    endpoint = Endpoint(_Keys(), Metrics(), lambda *_: None)  # type: ignore[arg-type]
    endpoint.add(LIST_CODES, pieces.answer)
    api = Api(Router([Route(LIST_CODES.path, endpoint)]), {}, Limits(body_s=0.5))
    settings = {**SERVER_SETTINGS, "loop": "none", "lifespan": "off", "timeout_graceful_shutdown": 1}
    server = uvicorn.Server(uvicorn.Config(api, http=CouponProtocol, **settings))
    listener = socket.create_server(("127.0.0.1", 0))
    task = asyncio.create_task(server._serve(sockets=[listener]))
    yield Streaming(f"http://127.0.0.1:{listener.getsockname()[1]}", pieces, server)
    server.should_exit = True
    await task
    listener.close()


async def test_all_pieces_come_and_the_connection_stays(streaming: Streaming) -> None:
    async with httpx.AsyncClient(base_url=streaming.base_url) as client:
        for _ in range(2):
            answer = await client.get(PATH)
            assert (answer.status_code, answer.content) == (200, PIECE * 3)
            assert answer.headers["x-request-id"]
    assert streaming.pieces.closed
    assert len(streaming.server.server_state.connections) <= 1


async def test_head_reads_no_piece(streaming: Streaming) -> None:
    async with httpx.AsyncClient(base_url=streaming.base_url) as client:
        answer = await client.head(PATH)
    assert (answer.status_code, answer.content) == (200, b"")
    assert "content-length" not in answer.headers
    assert streaming.pieces.given == 0


@pytest.mark.parametrize("raised", [CouponError, KeyError], ids=["foreseen", "unforeseen"])
async def test_a_body_that_breaks_off_has_no_end(
    streaming: Streaming, raised: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    streaming.pieces.raised = raised
    async with httpx.AsyncClient(base_url=streaming.base_url) as client:
        with pytest.raises(httpx.RemoteProtocolError, match="incomplete chunked read"):
            await client.get(PATH, headers={"X-Request-Id": "its-id"})
    assert f"answer of list_codes to request its-id cut short: {raised.__name__}" in caplog.text
    assert "SECRET-1" not in caplog.text


async def test_a_caller_without_chunks_gets_the_pieces_as_they_are(streaming: Streaming) -> None:
    for head in ("", "Connection: keep-alive\r\n"):
        wire = await dial(streaming.base_url)
        wire.writer.write(f"GET {PATH} HTTP/1.0\r\n{head}\r\n".encode())
        headers, _, body = (await wire.reader.read()).partition(b"\r\n\r\n")
        assert headers.startswith(b"HTTP/1.1 200 OK\r\n")
        assert b"transfer-encoding" not in headers
        assert b"content-length" not in headers
        assert headers.endswith(b"connection: close")
        assert body == PIECE * 3
        wire.writer.close()


async def test_a_caller_without_chunks_sees_that_a_body_breaks_off(streaming: Streaming) -> None:
    """Its end is that of the connection: only a reset tells that there should be more."""
    streaming.pieces.raised = CouponError
    wire = await dial(streaming.base_url)
    wire.writer.write(f"GET {PATH} HTTP/1.0\r\n\r\n".encode())
    with pytest.raises(ConnectionResetError):
        await wire.reader.read()


async def test_nothing_is_read_ahead_of_a_caller_who_does_not_read(streaming: Streaming) -> None:
    streaming.pieces.number = 10_000
    wire = await dial(streaming.base_url)
    wire.writer.transport.pause_reading()  # type: ignore[attr-defined]
    wire.writer.write(f"GET {PATH} HTTP/1.1\r\nHost: test\r\n\r\n".encode())

    async def stalls() -> bool:
        before = streaming.pieces.given
        await asyncio.sleep(0.1)
        return 0 < before == streaming.pieces.given

    await until(stalls, what="the server should wait for its caller")
    assert streaming.pieces.given * len(PIECE) < 16 * 2**20, "what the kernel holds for both sides, and little more"
    (connection,) = streaming.server.server_state.connections
    assert connection.transport.get_write_buffer_size() <= 2**18
    # It is given up in the end, and with it the pieces.
    await until(lambda: _as_awaited(streaming.pieces.closed), what="the pieces should be closed")
    wire.writer.close()


async def _as_awaited(truth: bool) -> bool:
    return truth


async def test_a_caller_who_hangs_up_ends_the_pieces(streaming: Streaming) -> None:
    streaming.pieces.number = 1_000_000
    wire = await dial(streaming.base_url)
    wire.writer.write(f"GET {PATH} HTTP/1.1\r\nHost: test\r\n\r\n".encode())
    await wire.reader.readexactly(2 * len(PIECE))
    wire.writer.close()
    await until(lambda: _as_awaited(streaming.pieces.closed), what="the pieces should be closed")
    assert streaming.pieces.given < 10_000


async def test_a_server_that_stops_cuts_a_body_short(streaming: Streaming, caplog: pytest.LogCaptureFixture) -> None:
    streaming.pieces.number = 1_000_000
    async with httpx.AsyncClient(base_url=streaming.base_url) as client:
        asked = asyncio.create_task(client.get(PATH))
        await until(lambda: _as_awaited(streaming.pieces.given > 1), what="the answer should have begun")
        streaming.server.should_exit = True
        with pytest.raises(httpx.RemoteProtocolError, match="incomplete chunked read"):
            await asked
    assert streaming.pieces.closed
