"""What is lost between the parts: replies of a list's pieces, messages of commits, Redis's keys, and callers who hang up."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import msgspec
import pytest

from coupon_svc.service.assign import LIST_PIECE
from tests.chaos.network import Network, direct, events_made, running_network
from tests.harness import until
from tests.http.helpers import assign, make_book

FIRST = "who waits until the codes are there"
REPLIES_LATE_S = 0.8
RESET_AT_CLOSE = struct.pack("ii", 1, 0)
NO_MESSAGE_S = 2.5
"""Half of what a request waits for the ledger. Without a message it is answered within 0.3 s."""


@pytest.fixture(scope="module")
async def network(postgres_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Network]:
    async with running_network(postgres_url, tmp_path_factory.mktemp("lost")) as network:
        yield network


@pytest.fixture
async def http(network: Network) -> AsyncIterator[httpx.AsyncClient]:
    async with await network.client() as http:
        yield http
    network.redis_of["api"].heal()
    await network.ready()


async def ask(http: httpx.AsyncClient, book_id: str, users: list[str], key: str) -> httpx.Response:
    body = {"book_id": book_id, "user_ids": users}
    return await http.post("/coupons/assignments", json=body, headers={"Idempotency-Key": key})


def codes_of(answer: httpx.Response) -> list[str]:
    """Of a list whose users all have a code."""
    results = answer.json()["results"]
    assert {result["status"] for result in results} == {201}, answer.text
    return [result["code"] for result in results]


async def stocked_book(http: httpx.AsyncClient, **fields: Any) -> str:
    """A book whose codes are all in Redis: FIRST has one."""
    book_id = await make_book(http, generate={"pattern": "########", "total": 100}, **fields)

    async def assigned() -> bool:
        answer = await http.post("/coupons/assign", json={"book_id": book_id, "user_id": FIRST})
        return answer.status_code == 201

    await until(assigned, what="codes should be there")
    return book_id


async def held(network: Network, book_id: str) -> dict[str, str]:
    """The codes that the ledger has of the book, by user but FIRST. None has two."""
    await network.drained()
    rows = await network.ledger(
        "SELECT user_id, code FROM coupons WHERE book_id = $1 AND user_id <> $2", book_id, FIRST
    )
    assert len({row["user_id"] for row in rows}) == len(rows)
    return {row["user_id"]: row["code"] for row in rows}


async def lost_reply(network: Network, asked: asyncio.Task[httpx.Response], events: int) -> httpx.Response:
    """What is answered to a request when the connection breaks after Redis has made so many events, and before the last
    reply has come: replies are on their way for REPLIES_LATE_S."""

    async def made() -> bool:
        return await events_made(network.master) >= events

    await until(made, what="Redis should have decided")
    network.redis_of["api"].cut()
    return await asked


# --- a list


@pytest.mark.parametrize("users", [LIST_PIECE + 1, 3], ids=["of_the_last_piece", "of_the_only_piece"])
async def test_the_users_whose_reply_is_lost_are_unknown_and_a_retry_gives_all_their_code(
    users: int, network: Network, http: httpx.AsyncClient
) -> None:
    book = await stocked_book(http)
    names = [f"u{number}" for number in range(users)]
    known = users - users % LIST_PIECE
    before = await events_made(network.master)
    network.redis_of["api"].delay_replies(REPLIES_LATE_S)
    asked = asyncio.create_task(ask(http, book, names, "list-1"))
    first = await lost_reply(network, asked, before + users)
    network.redis_of["api"].heal()

    assert first.status_code == 200, first.text
    results = first.json()["results"]
    assert [result["status"] for result in results] == [201] * known + [503] * (users - known)
    assert {result["code"] for result in results[known:]} == {"outcome_unknown"}
    request = first.headers["x-request-id"]
    assert network.newest(serves=True).said(
        f"503 outcome_unknown in assign_coupons for {users - known} users, request {request}"
    )
    await network.ready()
    codes = codes_of(await ask(http, book, names, "list-1"))
    assert codes[:known] == [result["code"] for result in results[:known]]
    assert await held(network, book) == dict(zip(names, codes, strict=True)), "each has one, of the first time"


async def test_the_whole_list_is_refused_only_if_nothing_was_sent(network: Network, http: httpx.AsyncClient) -> None:
    book = await stocked_book(http)
    names = ["u", "v", "w"]
    before = await events_made(network.master)
    network.redis_of["api"].cut(refuse=True)
    refused = await ask(http, book, names, "list-1")
    assert (refused.status_code, refused.json()["code"]) == (503, "store_unavailable")
    assert await events_made(network.master) == before
    network.redis_of["api"].heal()
    await network.ready()
    assert await held(network, book) == {}
    codes = codes_of(await ask(http, book, names, "list-1"))
    assert await held(network, book) == dict(zip(names, codes, strict=True))


async def test_a_list_is_the_same_after_redis_has_lost_its_keys(network: Network, http: httpx.AsyncClient) -> None:
    book = await stocked_book(http)
    names = [f"u{number}" for number in range(LIST_PIECE + 8)]
    first = await ask(http, book, names, "list-1")
    async with direct(network.master) as redis:
        await redis.flushall()

    async def served() -> httpx.Response | None:
        answer = await ask(http, book, names, "list-1")
        return answer if answer.status_code == 200 else None

    again = await until(served, what="the shard should be recovered")
    assert again is not None
    assert codes_of(again) == codes_of(first)
    assert again.headers["idempotent-replayed"] == "true"
    assert await held(network, book) == dict(zip(names, codes_of(first), strict=True))


# --- a message


async def test_who_misses_the_message_of_a_commit_is_answered_by_the_ledger(
    network: Network, http: httpx.AsyncClient
) -> None:
    book = await stocked_book(http, ack="ledger")
    took: list[float] = []

    async def one(user: str) -> tuple[str, str]:
        begun = time.monotonic()
        answer = await http.post("/coupons/assign", json={"book_id": book, "user_id": user})
        took.append(time.monotonic() - begun)
        assert (answer.status_code, answer.json()["durable"]) == (201, True), answer.text
        return user, answer.json()["code"]

    async def break_subscriptions() -> None:
        async with direct(network.master) as redis:
            while True:
                for client in await redis.client_list(_type="pubsub"):
                    if client["name"] == "coupon-api-positions":
                        with contextlib.suppress(Exception):  # it is gone already
                            await redis.client_kill_filter(_id=client["id"])
                await asyncio.sleep(0.005)

    breaking = asyncio.create_task(break_subscriptions())
    try:
        answered = [pair for turn in range(4) for pair in await asyncio.gather(*(one(f"{turn} {n}") for n in range(5)))]
    finally:
        assert not breaking.done()
        breaking.cancel()
    assert max(took) < NO_MESSAGE_S, took
    coupons = await held(network, book)
    assert all(coupons[user] == code for user, code in answered)


# --- a caller


async def test_nothing_is_done_for_a_caller_who_hangs_up_before_its_operation_is_sent(
    network: Network, http: httpx.AsyncClient
) -> None:
    book = await stocked_book(http, ack="redis")
    network.redis_of["api"].treat(requests="hold")
    waiting = []
    for user in ("first", "second"):  # two calls are under way, and take no more
        waiting.append(asyncio.create_task(assign(http, book, user)))
        await asyncio.sleep(0.05)
    wires = [await begin(http, book, f"gone {number}") for number in range(50)]
    stays = asyncio.create_task(assign(http, book, "stays"))
    await asyncio.sleep(0.05)
    for number, wire in enumerate(wires):
        if number % 2:
            wire.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_AT_CLOSE)
        wire.close()
    await asyncio.sleep(0.3)
    network.redis_of["api"].heal()
    await asyncio.gather(*waiting, stays)
    assert set(await held(network, book)) == {"first", "second", "stays"}


async def begin(http: httpx.AsyncClient, book_id: str, user_id: str) -> Any:
    """Send an assign on a connection of its own. Returns the writer of it."""
    _, wire = await asyncio.open_connection(http.base_url.host, http.base_url.port)
    body = msgspec.json.encode({"book_id": book_id, "user_id": user_id})
    head = (
        f"POST /coupons/assign HTTP/1.1\r\nhost: x\r\nauthorization: {http.headers['Authorization']}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    wire.write(head.encode() + body)
    return wire
