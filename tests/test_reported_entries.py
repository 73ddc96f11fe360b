"""API processes are the second copy of what they answered before the ledger knew: a Redis that is lost loses none of it."""

from __future__ import annotations

import asyncio
import shutil
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import httpx
import pytest

from tests.harness import Part, Stack, until

MakeStack = Callable[[], Awaitable[Stack]]
CODES = 200


@pytest.fixture
async def clients() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


async def book_of(http: httpx.AsyncClient) -> str:
    rules = {"name": "b", "ack": "redis", "generate": {"pattern": "RE-########", "total": CODES}}
    return str((await http.post("/coupons", json=rules)).json()["book_id"])


async def assign(http: httpx.AsyncClient, book_id: str, user: str) -> dict[str, Any]:
    answer = await http.post(
        "/coupons/assign", json={"book_id": book_id, "user_id": user}, headers={"Idempotency-Key": f"key-{user}"}
    )
    assert answer.status_code == 201, answer.text
    body: dict[str, Any] = answer.json()
    return body


async def lose_redis(stack: Stack, writer: Part, work: Callable[[], Awaitable[None]]) -> None:
    """Let Redis forget everything that was done by `work`, and whose events the ledger has not."""
    assert stack.redis_server is not None
    writer.signal(signal.SIGSTOP)
    await work()
    stack.redis_server.kill()
    for folder in stack.redis_server.directory.rglob("appendonlydir"):
        shutil.rmtree(folder)
    stack.redis_server.start()
    writer.signal(signal.SIGCONT)


async def counters(http: httpx.AsyncClient, book_id: str, timeout: float = 30) -> dict[str, int]:
    async def recovered() -> dict[str, int] | None:
        answer = await http.get(f"/coupons/{book_id}")
        return answer.json()["codes"] if answer.status_code == 200 else None

    found = await until(recovered, timeout)
    assert found is not None
    return found


async def test_a_lost_redis_loses_no_answer_of_processes_that_live(
    make_stack: MakeStack, clients: AsyncExitStack
) -> None:
    stack = await make_stack()
    writer = stack.writer()
    stack.api()
    await stack.ready()
    first = await clients.enter_async_context(await stack.client("shop"))
    stack.api(1)
    await stack.ready()
    second = await clients.enter_async_context(await stack.client("shop"))
    book_id = await book_of(first)
    answered: list[dict[str, Any]] = []

    async def work() -> None:
        users = [f"u{number}" for number in range(40)]
        clients = (first, second)
        answered.extend(await asyncio.gather(*(assign(clients[i % 2], book_id, u) for i, u in enumerate(users))))

    await assign(first, book_id, "before")
    await lose_redis(stack, writer, work)
    assert not any(one["durable"] for one in answered)
    assert (await counters(first, book_id)) == {
        "total": CODES, "available": CODES - 41, "assigned": 41, "redeemed": 0, "quarantined": 0,
    }  # fmt: skip
    for one in answered:  # the record of the key is back, too
        again = await assign(second, book_id, one["user_id"])
        assert (again["code"], again["position"]) == (one["code"], one["position"])
        assert again["durable"]
    assert await stack.ledger("SELECT FROM reported_entries") == []


async def test_what_a_silent_process_may_have_answered_is_quarantined_and_nothing_else(
    make_stack: MakeStack, clients: AsyncExitStack
) -> None:
    stack = await make_stack()
    writer = stack.writer()
    stack.api()
    await stack.ready()
    living = await clients.enter_async_context(await stack.client("shop"))
    dying = stack.api(1)
    await stack.ready()
    lost = await clients.enter_async_context(await stack.client("shop"))
    book_id = await book_of(living)
    kept: list[dict[str, Any]] = []

    async def work() -> None:
        kept.append(await assign(living, book_id, "alice"))
        await assign(lost, book_id, "nobody")
        kept.append(await assign(living, book_id, "bob"))
        dying.kill()

    await assign(living, book_id, "before")
    await lose_redis(stack, writer, work)
    found = await counters(living, book_id)
    assert found["assigned"] == 3
    assert found["quarantined"] >= 1
    for one in kept:
        assert (await assign(living, book_id, one["user_id"]))["code"] == one["code"]


async def test_a_process_that_ends_leaves_what_it_has_answered(make_stack: MakeStack, clients: AsyncExitStack) -> None:
    stack = await make_stack()
    writer = stack.writer()
    stack.api()
    await stack.ready()
    living = await clients.enter_async_context(await stack.client("shop"))
    ending = stack.api(1)
    await stack.ready()
    other = await clients.enter_async_context(await stack.client("shop"))
    book_id = await book_of(living)
    kept: list[dict[str, Any]] = []

    async def work() -> None:
        kept.append(await assign(other, book_id, "alice"))
        ending.stop()

    await assign(living, book_id, "before")
    await lose_redis(stack, writer, work)
    assert (await counters(living, book_id))["quarantined"] == 0
    assert (await assign(living, book_id, "alice"))["code"] == kept[0]["code"]


async def test_a_report_of_another_history_than_the_ledgers_stops_the_shard(
    make_stack: MakeStack, clients: AsyncExitStack
) -> None:
    stack = await make_stack()
    writer = stack.writer()
    stack.api()
    await stack.ready()
    http = await clients.enter_async_context(await stack.client("shop"))
    book_id = await book_of(http)
    one = await assign(http, book_id, "alice")
    await stack.drained()
    shard, _, position = one["position"].partition(":")
    epoch, _, seq = position.partition("-")
    await stack.ledger(
        "INSERT INTO reported_entries SELECT shard, epoch, seq, n, after, 'another', at_ms, events FROM entries"
        f" WHERE shard = {int(shard)} AND epoch = {int(epoch)} AND seq = {int(seq)}"
    )
    writer.stop()
    await stack.ledger(f"UPDATE shards SET epoch = epoch + 1, committed = 0 WHERE shard = {int(shard)}")
    stack.writer()

    async def stopped() -> str | None:
        rows = await stack.ledger(f"SELECT stopped FROM shards WHERE shard = {int(shard)}")
        reason: str | None = rows[0]["stopped"]
        return reason

    reason = await until(stopped, 30)
    assert reason is not None
    assert "has answered from another entry" in reason
