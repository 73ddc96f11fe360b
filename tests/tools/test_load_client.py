"""The load's HTTP client against servers that behave well, badly, and not at all."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from coupon_svc.load.client import Connections, Failure, Reply, closed_loop

Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

# Of nobody: made for these tests, for the name localhost.
CERTIFICATE = Path(__file__).parent / "localhost.pem"


@asynccontextmanager
async def server(answer: Answer, context: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """A server whose every connection `answer` sees to. Yields its port."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await answer(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    running = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    try:
        yield running.sockets[0].getsockname()[1]
    finally:
        running.close()


def saying(*parts: bytes, gap_s: float = 0.0, times: int = 10**9) -> Answer:
    """Answers every request on a connection with these parts; hangs up after `times`."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(times):
            await reader.readuntil(b"\r\n\r\n")
            for part in parts:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(gap_s)

    return answer


async def ask(port: int, *, count: int = 1, timeout_s: float = 5.0) -> list[Reply]:
    """The answers to `count` requests sent at once over at most two connections, and to one more after them."""
    connections = Connections("127.0.0.1", port, 2, reply_timeout_s=timeout_s)
    try:
        first = await asyncio.gather(*(connections.send(b"GET", b"/x") for _ in range(count)))
        return [*first, await connections.send(b"GET", b"/x")]
    finally:
        connections.close()


PLAIN = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\nretry-after: 7\r\n\r\nhello"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3;x=y\r\nllo\r\n0\r\n\r\n"


@pytest.mark.parametrize(
    ("parts", "status", "body"),
    [
        ((PLAIN,), 200, b"hello"),
        ((PLAIN[:50], PLAIN[50:]), 200, b"hello"),
        ((PLAIN[:-5], PLAIN[-5:]), 200, b"hello"),
        (tuple(PLAIN[at : at + 1] for at in range(len(PLAIN))), 200, b"hello"),
        ((b"HTTP/1.1 409 Conflict\r\nCONTENT-Length:3\r\n\r\nabc",), 409, b"abc"),
        ((b"HTTP/1.1 201 Created\r\ncontent-length: 0\r\n\r\n",), 201, b""),
        ((b"HTTP/1.1 204 No Content\r\n\r\n",), 204, b""),
        ((b"HTTP/1.1 100 Continue\r\n\r\n" + PLAIN,), 200, b"hello"),
        ((CHUNKED,), 200, b"hello"),
        (tuple(CHUNKED[at : at + 1] for at in range(len(CHUNKED))), 200, b"hello"),
        ((b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok",), 200, b"ok"),
    ],
)
async def test_answers_of_every_form_are_read(parts: tuple[bytes, ...], status: int, body: bytes) -> None:
    async with server(saying(*parts, gap_s=0.001 if len(parts) > 1 else 0.0)) as port:
        replies = await ask(port, count=3)
    assert [(reply.status, reply.body) for reply in replies] == [(status, body)] * 4


async def test_a_header_is_found_whatever_its_case() -> None:
    async with server(saying(b"HTTP/1.1 503 X\r\nRetry-AFTER:  7 \r\ncontent-length: 0\r\n\r\n")) as port:
        reply = (await ask(port))[0]
    assert reply.header(b"retry-after") == b"7"
    assert reply.header(b"after") is None


async def test_a_body_without_a_length_ends_with_the_connection() -> None:
    async with server(saying(b"HTTP/1.1 200 OK\r\n\r\nhe", b"llo", gap_s=0.01, times=1)) as port:
        assert {reply.body for reply in await ask(port)} == {b"hello"}


async def test_a_refused_connection_is_an_answer_of_its_own() -> None:
    async with server(saying(PLAIN)) as port:
        pass
    assert {reply.failure for reply in await ask(port, count=5)} == {Failure.REFUSED}


async def test_a_connection_that_breaks_while_it_is_waited_for_says_so_and_the_next_request_has_a_new_one() -> None:
    connected = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connected
        connected += 1
        await saying(*((b"HTTP/1.1 200 OK\r\nconte",) if connected == 1 else (PLAIN,)), times=1)(reader, writer)

    async with server(answer) as port:
        first, second = await ask(port)
    assert (first.status, first.failure, second.status) == (0, Failure.RESET, 200)


async def test_a_server_that_hangs_up_between_requests_costs_none() -> None:
    async with server(saying(PLAIN, times=1)) as port:
        connections = Connections("127.0.0.1", port, 1)
        for _ in range(3):
            assert (await connections.send(b"GET", b"/")).status == 200
            await asyncio.sleep(0.02)  # the server's end of the connection arrives
        connections.close()


async def test_an_answer_that_is_overdue_is_not_waited_for() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with server(silent) as port:
        began = time.monotonic()
        replies = await ask(port, timeout_s=0.3)
    assert {reply.failure for reply in replies} == {Failure.TIMEOUT}
    assert 0.6 <= time.monotonic() - began < 5  # not the 15 s that it waits unless told


@pytest.mark.parametrize(
    "garbage", [b"SSH-2.0-OpenSSH_9\r\n\r\n", PLAIN + b"more", b"HTTP/1.1 200 OK\r\ncontent-length: many\r\n\r\n"]
)
async def test_what_is_no_http_is_no_answer(garbage: bytes) -> None:
    async with server(saying(garbage)) as port:
        assert {reply.failure for reply in await ask(port)} == {Failure.GARBLED}


async def test_requests_wait_in_line_for_a_connection() -> None:
    async with server(saying(PLAIN, gap_s=0.01)) as port:
        connections = Connections("127.0.0.1", port, 2)
        assert await connections.open()
        futures = [connections.send(b"GET", b"/") for _ in range(10)]
        assert connections.waiting == 8
        assert {(await future).status for future in futures} == {200}
        connections.close()


async def test_what_was_given_up_while_it_waited_in_line_is_not_sent() -> None:
    heard: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            heard.append((await reader.readuntil(b"\r\n\r\n")).split()[1])
            writer.write(PLAIN)

    async with server(answer) as port:
        connections = Connections("127.0.0.1", port, 1)
        await connections.open()
        futures = [connections.send(b"GET", b"/%d" % number) for number in range(3)]
        futures[1].cancel()
        assert (await futures[2]).status == 200
        connections.close()
    assert heard == [b"/0", b"/2"]


async def test_closing_answers_what_was_not_answered() -> None:
    async with server(saying()) as port:
        connections = Connections("127.0.0.1", port, 1)
        await connections.open()
        sent, waiting = connections.send(b"GET", b"/"), connections.send(b"GET", b"/")
        connections.close()
        assert ((await sent).failure, (await waiting).failure) == (Failure.RESET, Failure.REFUSED)


async def test_https_is_spoken_and_a_certificate_that_is_not_trusted_is_refused() -> None:
    own = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    own.load_cert_chain(CERTIFICATE)
    trusting = ssl.create_default_context(cafile=str(CERTIFICATE))
    async with server(saying(PLAIN), own) as port:
        for context, failure in ((trusting, None), (ssl.create_default_context(), Failure.REFUSED)):
            connections = Connections("localhost", port, 1, ssl_context=context)
            assert (await connections.send(b"GET", b"/")).failure == failure
            connections.close()


async def test_a_closed_loop_asks_until_its_time_is_over_and_survives_lost_connections() -> None:
    statuses: list[int] = []
    async with server(saying(PLAIN, times=5)) as port:
        began = time.monotonic()
        await closed_loop(
            port,
            lambda: b"GET / HTTP/1.1\r\nhost: x\r\n\r\n",
            lambda status, _: statuses.append(status),
            connections=3,
            seconds=0.3,
        )
    assert 0.3 <= time.monotonic() - began < 5
    assert statuses.count(200) > 30
    assert set(statuses) <= {0, 200}


async def test_a_closed_loop_on_a_dead_server_counts_refusals_slowly() -> None:
    async with server(saying(PLAIN)) as port:
        pass
    bodies: list[bytes] = []
    await closed_loop(port, lambda: b"", lambda _, body: bodies.append(body), connections=2, seconds=0.3)
    assert set(bodies) == {b"connection_refused"}
    assert len(bodies) < 20
