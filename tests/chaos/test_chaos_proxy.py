"""The fault suite's proxy does to connections what it says, and nothing else."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import NamedTuple

import pytest

from tests.chaos.proxy import PostgresMessages, Proxy, RedisMessages, Side
from tests.harness import until


class Wire(NamedTuple):
    """A client's connection to a server that repeats each line, with its own name before it; through the proxy."""

    proxy: Proxy
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    got: list[bytes]
    other: str

    async def ask(self, line: bytes) -> bytes:
        self.writer.write(line + b"\n")
        return await asyncio.wait_for(self.reader.readline(), 5)

    async def silent(self) -> bool:
        try:
            return not await asyncio.wait_for(self.reader.readline(), 0.2)
        except TimeoutError:
            return True


@pytest.fixture
async def wire() -> AsyncIterator[Wire]:
    got: list[bytes] = []
    writers = []

    async def serve(name: bytes) -> asyncio.Server:
        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writers.append(writer)
            try:
                while line := await reader.readline():
                    got.append(line)
                    writer.write(name + line)
            except ConnectionError:
                pass

        return await asyncio.start_server(talk, "127.0.0.1", 0)

    servers = [await serve(b"one "), await serve(b"two ")]
    urls = [f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}" for server in servers]
    with Proxy(urls[0]) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        yield Wire(proxy, reader, writer, got, urls[1])
        writer.close()
    for server in servers:
        server.close()
    for writer in writers:
        writer.close()


async def test_bytes_pass_both_ways(wire: Wire) -> None:
    assert await wire.ask(b"a") == b"one a\n"


async def test_a_cut_connection_is_reset_and_a_refused_one_too_until_healed(wire: Wire) -> None:
    await wire.ask(b"a")
    wire.proxy.cut(refuse=True)
    with pytest.raises(ConnectionResetError):
        await wire.reader.readline()
    with pytest.raises(ConnectionResetError):
        await _read_from(wire.proxy.port)
    wire.proxy.heal()
    reader, writer = await asyncio.open_connection("127.0.0.1", wire.proxy.port)
    writer.write(b"b\n")
    assert await reader.readline() == b"one b\n"
    writer.close()
    assert wire.proxy.cuts == 2


async def _read_from(port: int) -> bytes:
    """A line on a connection of its own. It may be reset as soon as it stands, or when it is read from."""
    reader, _ = await asyncio.open_connection("127.0.0.1", port)
    return await reader.readline()


async def test_held_requests_do_not_arrive_before_it_is_healed(wire: Wire) -> None:
    wire.proxy.treat(requests="hold")
    wire.writer.write(b"a\n")
    assert await wire.silent()
    assert wire.got == []
    wire.proxy.heal()
    assert await wire.reader.readline() == b"one a\n"
    assert wire.proxy.requests.held == 2


async def test_a_connection_that_ends_while_held_ends_for_the_server_after_what_was_kept(wire: Wire) -> None:
    wire.proxy.treat(requests="hold", replies="hold")
    wire.writer.write(b"late\n")
    await wire.writer.drain()
    wire.writer.close()
    assert await wire.silent()
    assert wire.got == []
    wire.proxy.heal()

    async def arrived() -> bool:
        return wire.got == [b"late\n"]

    await until(arrived)


async def test_replies_are_lost_and_requests_are_not(wire: Wire) -> None:
    wire.proxy.treat(replies="lose")
    wire.writer.write(b"a\n")
    assert await wire.silent()
    assert wire.got == [b"a\n"]
    assert wire.proxy.replies.lost == len(b"one a\n")
    wire.proxy.heal()  # nobody may read on behind a gap
    with pytest.raises(ConnectionResetError):
        await wire.reader.readline()


async def test_delayed_replies_keep_their_order_and_wait_side_by_side(wire: Wire) -> None:
    wire.proxy.delay_replies(0.8)
    started = time.monotonic()
    for line in (b"a\n", b"b\n", b"c\n"):
        wire.writer.write(line)
        await asyncio.sleep(0.01)
    wire.proxy.delay_replies(0.0)
    assert [await wire.ask(b"d"), *[await wire.reader.readline() for _ in range(3)]] == [
        b"one a\n",
        b"one b\n",
        b"one c\n",
        b"one d\n",
    ]
    assert 0.8 <= time.monotonic() - started < 2.4
    assert wire.proxy.replies.delayed


async def test_a_repointed_proxy_leads_to_the_other_server(wire: Wire) -> None:
    assert await wire.ask(b"a") == b"one a\n"
    wire.proxy.repoint(wire.other)
    with pytest.raises(ConnectionResetError):
        await wire.reader.readline()
    reader, writer = await asyncio.open_connection("127.0.0.1", wire.proxy.port)
    writer.write(b"b\n")
    assert await reader.readline() == b"two b\n"
    writer.close()


@pytest.mark.parametrize("side", ["before", "after"])
async def test_a_connection_is_cut_at_the_message_that_is_named(wire: Wire, side: Side) -> None:
    """Messages end nowhere near the ends of what is written at once."""
    with Proxy(wire.other, RedisMessages) as proxy:
        proxy.cut_at(3, side)
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        for part in (b"*1\r\n$3\r\nO\r\n\r\n*2\r\n$1\r", b"\na\r\n$1\r\nb\r\n*1\r\n$1\r\nc\r\n*1\r\n$1\r\nd\r\n"):
            writer.write(part)
            await asyncio.sleep(0.05)
        with pytest.raises(ConnectionResetError):
            await reader.read()
        expected = b"*1\r\n$3\r\nO\r\n\r\n*2\r\n$1\r\na\r\n$1\r\nb\r\n" + b"*1\r\n$1\r\nc\r\n" * (side == "after")

        async def arrived() -> bool:
            return b"".join(wire.got) == expected

        await until(arrived)
        assert proxy.cut_message() == b"*1\r\n$1\r\nc\r\n"
        assert proxy.cut_message() is None
        assert proxy.cuts == 1


def test_a_message_of_postgres_ends_with_what_the_server_acts_on() -> None:
    tls, start = b"\0\0\0\x08\x04\xd2\x16\x2f", b"\0\0\0\x0b\0\x03\0\0u\0\0"
    query, statement = b"Q\0\0\0\x06;\0", b"B\0\0\0\x05SE\0\0\0\x04S\0\0\0\x04"
    messages, sent = PostgresMessages(), tls + start + query + statement
    assert [found for at in range(len(sent)) for found in messages.whole(sent[at : at + 1])] == [
        tls, start, query, statement,
    ]  # fmt: skip
    assert list(PostgresMessages().whole(sent)) == [tls, start, query, statement]
