"""Callers who are slow, silent, confused or too many: each is held to the limits, and nobody else feels it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import signal
import socket
import statistics
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.conftest import SHARDS
from tests.harness import Stack, running_stack, until
from tests.http.helpers import make_book, refused
from tests.http.test_fast_path import Answered, Wire, chunked, dial, post

WINDOW_S = 1.0
SHORT = {
    "COUPON_HEAD_TIMEOUT_MS": "1000",
    "COUPON_BODY_TIMEOUT_MS": "1000",
    "COUPON_BODY_BYTES_PER_S_MIN": "1000",
    "COUPON_KEEP_ALIVE_MS": "600000",
    "COUPON_CONNECTIONS_MAX": "6000",
}
HEALTH = b"GET /healthz HTTP/1.1\r\nHost: test\r\n\r\n"


@pytest.fixture(scope="module")
async def stack(tmp_path_factory: pytest.TempPathFactory, postgres_url: str) -> AsyncIterator[Stack]:
    async with running_stack(tmp_path_factory.mktemp("door"), postgres_url, SHARDS, **SHORT) as stack:
        yield stack


@pytest.fixture(scope="module", autouse=True)
async def idle_since(stack: Stack) -> AsyncIterator[tuple[Wire, float]]:
    """A connection that was answered once, before the other tests, and when."""
    wire = await dial(stack.base_url)
    wire.writer.write(HEALTH)
    assert (await wire.answer()).status == 200
    yield wire, time.monotonic()
    wire.writer.transport.abort()


@contextlib.asynccontextmanager
async def wired(stack: Stack) -> AsyncIterator[Wire]:
    wire = await dial(stack.base_url)
    try:
        yield wire
    finally:
        wire.writer.transport.abort()


@pytest.fixture
async def wire(stack: Stack) -> AsyncIterator[Wire]:
    async with wired(stack) as wire:
        yield wire


def problem(answer: Answered, status: int, code: str) -> None:
    assert (answer.status, answer.headers["content-type"]) == (status, "application/problem+json")
    assert answer.headers["connection"] == "close"
    body = json.loads(answer.body)
    assert body["code"] == code
    assert body["request_id"] == answer.headers["x-request-id"]


async def drip(wire: Wire, data: bytes, pause: float) -> None:
    """Send byte by byte, until the server has had enough."""
    with contextlib.suppress(ConnectionError):
        for byte in data:
            wire.writer.write(bytes([byte]))
            await wire.writer.drain()
            await asyncio.sleep(pause)


async def timed(wire: Wire, *, first: bytes, then: bytes = b"", pause: float = 0.1) -> tuple[Answered, float]:
    """Send `first` at once and `then` drop by drop: the answer, and how long it took."""
    began = time.monotonic()
    wire.writer.write(first)
    dripping = asyncio.create_task(drip(wire, then, pause))
    answer = await wire.answer()
    took = time.monotonic() - began
    dripping.cancel()
    await asyncio.gather(dripping, return_exceptions=True)
    return answer, took


async def test_a_head_that_drips_is_timed_out(wire: Wire) -> None:
    answer, took = await timed(wire, first=b"", then=HEALTH[:-2] + b"X: " + b"x" * 1000)
    problem(answer, 408, "request_timeout")
    assert 0.8 * WINDOW_S < took < 5
    assert await wire.ended()


async def test_the_head_of_a_later_request_is_timed_out_from_its_first_byte(wire: Wire) -> None:
    wire.writer.write(HEALTH)
    assert (await wire.answer()).status == 200
    await asyncio.sleep(1.5 * WINDOW_S)  # idle, which is another matter
    answer, took = await timed(wire, first=HEALTH[:20])
    problem(answer, 408, "request_timeout")
    assert 0.8 * WINDOW_S < took < 5


async def test_the_head_behind_a_whole_request_is_timed_out(wire: Wire) -> None:
    wire.writer.write(HEALTH + HEALTH[:20])
    assert (await wire.answer()).status == 200
    problem(await wire.answer(), 408, "request_timeout")
    assert await wire.ended()


async def test_a_connection_that_never_says_a_word_is_closed(wire: Wire) -> None:
    began = time.monotonic()
    assert await wire.ended()
    assert 0.8 * WINDOW_S < time.monotonic() - began < 5


@pytest.mark.parametrize("path", ["/coupons/assign", "/coupons"], ids=["fast path", "ASGI"])
async def test_a_body_that_stalls_is_timed_out(stack: Stack, wire: Wire, path: str) -> None:
    request = post(path, b"{" + b" " * 500, f"Authorization: Bearer {await stack.key()}")
    answer, took = await timed(wire, first=request[:-1])
    problem(answer, 408, "request_timeout")
    assert 0.8 * WINDOW_S < took < 5
    assert await wire.ended()


async def test_a_body_below_the_least_rate_is_timed_out_and_one_above_it_is_not(stack: Stack) -> None:
    key = f"Authorization: Bearer {await stack.key()}"
    request = post("/coupons/assign", b" " * 8000 + b"{}", key)
    head = request.index(b"\r\n\r\n") + 4
    async with wired(stack) as slow, wired(stack) as steady:
        lagging = asyncio.create_task(timed(slow, first=request[:head], then=request[head:], pause=0.05))
        began = time.monotonic()
        steady.writer.write(request[:head])
        for start in range(head, len(request), 400):
            steady.writer.write(request[start : start + 400])
            await asyncio.sleep(0.1)
        assert (await steady.answer()).status == 422
        assert time.monotonic() - began > 1.5 * WINDOW_S
        answer, took = await lagging
        problem(answer, 408, "request_timeout")
        assert took < 5


async def test_what_was_answered_before_a_request_is_late_is_not_answered_twice(stack: Stack, wire: Wire) -> None:
    """The key is judged before the body is there."""
    wire.writer.write(post("/coupons", b" " * 20_000)[:-1])
    assert (await wire.answer()).status == 401
    assert await wire.ended()


async def test_many_idle_connections_cost_little_memory_and_nobody_time(stack: Stack) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    number = min(5_000, (hard if hard > 0 else 20_000) - 500)
    if number < 500:
        pytest.skip(f"only {hard} files may be open")
    if soft < number + 500:
        resource.setrlimit(resource.RLIMIT_NOFILE, (number + 500, hard))
    pid = stack.parts[-1].process.pid

    def memory() -> int:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()

    async def quickness(wire: Wire) -> float:
        times = []
        for _ in range(200):
            began = time.perf_counter()
            wire.writer.write(HEALTH)
            assert (await wire.answer()).status == 200
            times.append(time.perf_counter() - began)
        return statistics.quantiles(times, n=100)[98]

    port = int(stack.base_url.rpartition(":")[2])
    idle: list[socket.socket] = []
    before = memory()
    try:
        async with wired(stack) as wire:
            alone = await quickness(wire)
            for count in range(number):
                connection = socket.create_connection(("127.0.0.1", port))
                connection.sendall(HEALTH)
                idle.append(connection)
                if count % 100 == 99:
                    await asyncio.sleep(0)
            for connection in idle:  # answered: they are idle, not waiting for their first request
                assert connection.recv(12) == b"HTTP/1.1 200"
            await asyncio.sleep(1.5 * WINDOW_S)
            beside = await quickness(wire)
        assert (memory() - before) / number < 20_000
        assert beside < max(0.05, 10 * alone)
        for connection in (idle[0], idle[-1]):
            connection.settimeout(10)
            connection.recv(4096)
            connection.sendall(HEALTH)
            assert connection.recv(12) == b"HTTP/1.1 200"
    finally:
        for connection in idle:
            connection.close()


@pytest.mark.parametrize(
    "noise",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(200)),
        b"\x00\xff" * 400,
        b"hello\r\n\r\n",
        b"GET /\xe6\x97\xa5 HTTP/1.1\r\nHost: test\r\n\r\n",
        b"POST /coupons/assign HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\nnot hexadecimal\r\n",
    ],
    ids=["TLS", "bytes", "a word", "raw UTF-8", "a bad chunk"],
)
async def test_malformed_http_is_answered_400(wire: Wire, noise: bytes) -> None:
    wire.writer.write(noise)
    problem(await wire.answer(), 400, "malformed_http")
    assert await wire.ended()


async def test_a_head_of_forty_megabytes_is_refused_and_not_kept(stack: Stack, wire: Wire) -> None:
    wire.writer.write(b"GET /healthz HTTP/1.1\r\nX: ")
    with contextlib.suppress(ConnectionError):
        for _ in range(40):
            wire.writer.write(b"x" * 1024 * 1024)
            await asyncio.wait_for(wire.writer.drain(), 10)
    problem(await wire.answer(), 400, "malformed_http")


async def test_chunks_beyond_the_limit_of_a_body_are_refused(stack: Stack, wire: Wire) -> None:
    wire.writer.write(chunked("/coupons", b" " * (2 * 1024 * 1024 + 1), f"Authorization: Bearer {await stack.key()}"))
    assert (await wire.answer()).status == 413
    wire.writer.write(HEALTH)
    assert (await wire.answer()).status == 200


async def test_a_body_without_end_that_was_answered_is_not_read_for_ever(stack: Stack, wire: Wire) -> None:
    head = f"POST /coupons HTTP/1.1\r\nHost: test\r\nAuthorization: Bearer {await stack.key()}\r\n"
    wire.writer.write(f"{head}Content-Length: 1000000000\r\n\r\n".encode())

    async def send() -> None:
        for _ in range(1000):
            wire.writer.write(b" " * 1024 * 1024)
            await asyncio.wait_for(wire.writer.drain(), 10)

    with pytest.raises(ConnectionError):
        await send()


async def test_pipelined_requests_and_a_bad_one_behind_them_are_answered_in_order(wire: Wire) -> None:
    bad = b"POST /coupons HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\nnot hexadecimal\r\n"
    wire.writer.write(HEALTH + post("/coupons/assign", b"{}") + bad)
    assert [(await wire.answer()).status for _ in range(3)] == [200, 401, 400]
    assert await wire.ended()


async def test_who_closes_his_side_after_a_request_is_answered(stack: Stack) -> None:
    for request, status in ((HEALTH, 200), (post("/coupons/assign", b"{}"), 401)):
        async with wired(stack) as wire:
            wire.writer.write(request)
            wire.writer.write_eof()
            assert (await wire.answer()).status == status
            assert await wire.ended()
    async with wired(stack) as wire:
        wire.writer.write(HEALTH[:10])
        wire.writer.write_eof()
        assert await wire.ended()


async def test_a_reset_in_the_middle_of_anything_harms_nobody(stack: Stack) -> None:
    whole = chunked("/coupons/assign", b'{"user_id": "u"}', f"Authorization: Bearer {await stack.key()}")
    for length in (3, 60, len(whole) - 8, len(whole)):
        async with wired(stack) as wire:
            wire.writer.write(whole[:length])
            await asyncio.sleep(0.02)
            wire.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    async with wired(stack) as wire:
        wire.writer.write(HEALTH)
        assert (await wire.answer()).status == 200
    assert "Traceback" not in (stack.folder / "api.log").read_text()


async def test_a_slow_reader_gets_all_and_one_who_never_reads_is_given_up(stack: Stack) -> None:
    port = int(stack.base_url.rpartition(":")[2])
    asked = b"GET /openapi.json HTTP/1.1\r\nHost: test\r\n\r\n"
    size = 0
    async with wired(stack) as wire:
        wire.writer.write(asked)
        size = len((await wire.answer()).body)
    loop = asyncio.get_running_loop()
    number = 8 * 1024 * 1024 // size  # more than the kernel keeps for both ends
    never, slow = socket.socket(), socket.socket()
    for caller in (never, slow):
        caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        caller.setblocking(False)
        await loop.sock_connect(caller, ("127.0.0.1", port))
        await loop.sock_sendall(caller, asked * (number if caller is never else 60))
    seen, taken = b"", 0
    deadline = time.monotonic() + 2.5 * WINDOW_S
    while time.monotonic() < deadline and len(seen) < 60 * size:
        seen += await loop.sock_recv(slow, 100_000)
        await asyncio.sleep(0.02)
    for caller in (never, slow):  # what is left may come as fast as it can
        caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024 * 1024)
    while seen.count(b"HTTP/1.1 200 OK") < 60 or not seen.endswith(b"}"):
        part = await asyncio.wait_for(loop.sock_recv(slow, 1_000_000), 10)
        assert part, "the connection was closed on a slow reader"
        seen += part
    with contextlib.suppress(ConnectionError):
        while part := await asyncio.wait_for(loop.sock_recv(never, 65536), 10):
            taken += len(part)
    assert taken < number * size / 2
    never.close()
    slow.close()


# --- processes of their own


async def test_beyond_its_connections_a_process_says_so_and_that_it_lives(stack: Stack) -> None:
    base_url = stack.base_url
    part = stack.api(**{**SHORT, "COUPON_CONNECTIONS_MAX": "10"})
    try:
        await stack.ready()
        async with contextlib.AsyncExitStack() as open_wires:
            wires = [await open_wires.enter_async_context(wired(stack)) for _ in range(10)]
            for wire in wires:
                wire.writer.write(HEALTH)
                assert (await wire.answer()).status == 200
            for path, status in (("/healthz", 200), ("/readyz", 503), ("/coupons", 503)):
                async with wired(stack) as wire:
                    wire.writer.write(f"GET {path} HTTP/1.1\r\nHost: test\r\n\r\n".encode())
                    answer = await wire.answer()
                    assert (answer.status, answer.headers["connection"]) == (status, "close")
                    if status == 503:
                        problem(answer, 503, "too_many_connections")
                        assert answer.headers["retry-after"] == "1"
                        assert answer.headers["x-request-id"] in (stack.folder / "api.log").read_text()
                    assert await wire.ended()
            async with wired(stack) as wire:
                wire.writer.write(post("/coupons/assign", b"{}"))
                problem(await wire.answer(), 503, "too_many_connections")
            wires[0].writer.write(HEALTH)
            assert (await wires[0].answer()).status == 200
        await stack.ready()
    finally:
        part.kill()
        stack.base_url = base_url


async def test_who_guesses_codes_is_told_to_wait_and_customers_are_not(stack: Stack) -> None:
    base_url = stack.base_url
    part = stack.api(**{**SHORT, "COUPON_UNKNOWN_CODES_PER_S": "1"})
    try:
        await stack.ready()
        async with await stack.client() as shop, await stack.client() as other:
            book = await make_book(shop, codes=["MET-1", "COLD-1"])
            assert (await shop.post("/coupons/assign/MET-1", json={"user_id": "u"})).status_code == 201
            statuses = {(await shop.get(f"/coupons/codes/NO-{number}")).status_code for number in range(100)}
            assert statuses == {404, 429}
            for number in range(10):  # where the machine is slow, a second's worth has come back
                await shop.get(f"/coupons/codes/NO-{number}")
            for path in ("assign", "lock", "unlock", "redeem"):
                answer = await shop.post(f"/coupons/{path}/COLD-1", json={"no": "body"})
                assert refused(answer, 429, "too_many_unknown_codes")["retry_after_seconds"] <= 2
            assert (await shop.post("/coupons/redeem/MET-1", json={})).status_code == 201
            assert (await shop.get(f"/coupons/{book}")).status_code == 200
            refused(await other.get("/coupons/codes/NO-1"), 404, "code_not_found")
    finally:
        part.kill()
        stack.base_url = base_url


async def test_where_requests_are_limited_a_tenant_has_its_own_share(stack: Stack) -> None:
    base_url = stack.base_url
    part = stack.api(**{**SHORT, "COUPON_REQUESTS_PER_S": "1"})
    try:
        await stack.ready()
        async with await stack.client() as busy, await stack.client() as other:
            first, *more = [await busy.get("/coupons") for _ in range(10)]
            assert first.status_code == 200
            assert any(answer.status_code == 429 and refused(answer, 429, "rate_limited") for answer in more)
            assert (await other.get("/coupons")).status_code == 200
    finally:
        part.kill()
        stack.base_url = base_url


@pytest.mark.parametrize("workers", [0, 2], ids=["--fd", "workers"])
async def test_sigterm_drains_and_then_ends_whoever_stalls(stack: Stack, workers: int) -> None:
    base_url = stack.base_url
    settings = {**SHORT, "COUPON_DRAIN_MS": "1200", "COUPON_BODY_TIMEOUT_MS": "60000"}
    part = stack.api(**settings)
    if workers:
        part.kill()
        port = int(stack.base_url.rpartition(":")[2])
        part = type(part)(
            ["api", "--port", str(port), "--workers", str(workers)],
            {**stack.environment, **settings},
            stack.folder / "api.log",
        )
        stack.parts.append(part)
    try:
        await stack.ready()
        key = f"Authorization: Bearer {await stack.key()}"
        async with wired(stack) as idle, wired(stack) as stalled, wired(stack) as nearly:
            idle.writer.write(HEALTH)
            assert (await idle.answer()).status == 200
            whole = post("/coupons", b'{"name": "x"' + b" " * 9000 + b"}", key)
            for wire in (stalled, nearly):
                wire.writer.write(whole[:-1])
            await asyncio.sleep(0.3)
            began = time.monotonic()
            part.signal(signal.SIGTERM)

            async def unready() -> bool:
                async with wired(stack) as wire:
                    wire.writer.write(b"GET /readyz HTTP/1.1\r\nHost: test\r\n\r\n")
                    answer = await wire.answer()
                    return answer.status == 503 and json.loads(answer.body)["code"] == "shutting_down"

            await until(unready, 1.1)
            idle.writer.write(HEALTH)  # who is served meanwhile is told to go elsewhere next time
            answer = await idle.answer()
            assert (answer.status, answer.headers["connection"]) == (200, "close")
            await asyncio.sleep(max(0.0, began + 1.8 - time.monotonic()))
            nearly.writer.write(b"}")
            assert (await nearly.answer()).status == 201
            problem(await stalled.answer(), 503, "shutting_down")
        assert await part.died(8) in (0, -signal.SIGTERM)
        assert 1.1 < time.monotonic() - began < 8
    finally:
        part.kill()
        stack.base_url = base_url


async def test_an_idle_connection_is_answered_after_longer_than_uvicorn_keeps_it(
    idle_since: tuple[Wire, float],
) -> None:
    wire, since = idle_since
    await asyncio.sleep(since + 5.5 - time.monotonic())
    wire.writer.write(HEALTH)
    assert (await wire.answer()).status == 200
