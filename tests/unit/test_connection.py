"""The shared socket: replies go to their callbacks in the order of the commands."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from coupon_svc.redis import connection as connection_module
from coupon_svc.redis.connection import IN_FLIGHT_MAX, Connection
from coupon_svc.redis.errors import NotSent, OutcomeUnknown, ReplyError


class Transport(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []
        self.aborted = asyncio.Event()

    def write(self, data: Any) -> None:
        self.written.append(bytes(data))

    def abort(self) -> None:
        self.aborted.set()


@pytest.fixture
async def connected() -> tuple[Connection, Transport]:
    connection, transport = Connection(), Transport()
    connection.connection_made(transport)
    return connection, transport


async def test_what_is_submitted_in_one_turn_leaves_in_one_write(connected: tuple[Connection, Transport]) -> None:
    connection, transport = connected
    replies: list[Any] = []
    connection.submit(("GET", "a"), replies.append)
    connection.submit(("GET", b"b", 1), replies.append)
    assert transport.written == []
    await asyncio.sleep(0)
    assert len(transport.written) == 1
    connection.data_received(b"+one\r\n-ERR two\r\n")
    assert replies[0] == "one"
    assert isinstance(replies[1], ReplyError)


async def test_a_callback_that_raises_costs_nobody_else_a_reply(
    connected: tuple[Connection, Transport], caplog: pytest.LogCaptureFixture
) -> None:
    connection, _ = connected
    replies: list[Any] = []

    def broken(reply: Any) -> None:
        raise ValueError("SECRET-CODE")

    for callback in (broken, replies.append, broken, replies.append):
        connection.submit(("PING",), callback)
    connection.data_received(b"+1\r\n+2\r\n")
    connection.connection_lost(None)
    assert replies[0] == "2"
    assert isinstance(replies[1], OutcomeUnknown)
    assert "ValueError at" in caplog.text
    assert "SECRET-CODE" not in caplog.text


async def test_when_the_connection_breaks_what_was_submitted_is_unknown_and_the_rest_not_sent(
    connected: tuple[Connection, Transport],
) -> None:
    connection, _ = connected
    replies: list[Any] = []

    def send_again(reply: Any) -> None:
        with pytest.raises(NotSent):
            connection.submit(("PING",), replies.append)
        replies.append(reply)

    connection.submit(("PING",), send_again)
    slot = connection.send("PING")
    connection.connection_lost(None)
    assert [type(reply) for reply in replies] == [OutcomeUnknown]
    with pytest.raises(OutcomeUnknown):
        await slot


async def test_too_much_under_way_is_not_sent(connected: tuple[Connection, Transport]) -> None:
    connection, _ = connected
    for _ in range(IN_FLIGHT_MAX):
        connection.submit(("PING",), lambda reply: None)
    with pytest.raises(NotSent):
        connection.send("PING")


async def test_a_connection_that_answers_is_kept_however_long_it_takes_and_a_silent_one_is_broken(
    connected: tuple[Connection, Transport], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "SILENT_S", 1.0)
    connection, transport = connected
    connection.watch("tested")
    await asyncio.sleep(1.2)
    for _ in range(4):
        connection.submit(("GET", "a"), lambda _: None)
    for _ in range(3):
        await asyncio.sleep(0.5)
        connection.data_received(b"+late\r\n")
    assert not transport.aborted.is_set()
    await asyncio.wait_for(transport.aborted.wait(), 10)
    connection.connection_lost(None)
