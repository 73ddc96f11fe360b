"""API processes are the second copy of what they answered before the ledger knew: a Redis that is lost loses none of it."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from tests.chaos.network import events_made, promote, replica_stage
from tests.conftest import SHARDS
from tests.harness import Part, Stack, running_stack, until

MakeStack = Callable[[], Awaitable[Stack]]
CODES = 200
COMPUTED_CODES = 200_000
"""More than are lent at once."""


async def book_of(http: httpx.AsyncClient, ack: str = "redis", total: int = CODES) -> str:
    rules = {
        "name": "b",
        "ack": ack,
        "max_redemptions_per_code": 3,
        "generate": {"pattern": f"{ack}-########", "total": total},
    }
    return str((await http.post("/coupons", json=rules)).json()["book_id"])


async def assign(http: httpx.AsyncClient, book_id: str, user: str) -> dict[str, Any]:
    answer = await http.post(
        "/coupons/assign", json={"book_id": book_id, "user_id": user}, headers={"Idempotency-Key": f"key-{user}"}
    )
    assert answer.status_code == 201, answer.text
    body: dict[str, Any] = answer.json()
    return body


class Shop(NamedTuple):
    """A writer and two API processes, with a client of each."""

    stack: Stack
    writer: Part
    first: httpx.AsyncClient
    second_process: Part
    second: httpx.AsyncClient


@contextlib.asynccontextmanager
async def opened(stack: Stack) -> AsyncIterator[Shop]:
    """The shop on a stack that runs; what a test before this one has ended is started again."""
    first_process = next(part for part in stack.parts if part.base_url)
    second_process, writer = stack.newest(serves=True), stack.newest(serves=False)
    if writer.process.poll() is not None:
        writer = stack.writer()
    if second_process is first_process or second_process.process.poll() is not None:
        second_process = stack.api(1)
    await stack.ready()
    async with await stack.client("shop") as first, await stack.client("shop") as second:
        first.base_url = first_process.base_url
        yield Shop(stack, writer, first, second_process, second)


@pytest.fixture(scope="module")
async def stack(tmp_path_factory: pytest.TempPathFactory, postgres_url: str) -> AsyncIterator[Stack]:
    async with running_stack(tmp_path_factory.mktemp("shop"), postgres_url, SHARDS) as stack:
        yield stack


@pytest.fixture
async def shop(stack: Stack) -> AsyncIterator[Shop]:
    async with opened(stack) as shop:
        yield shop


async def lose_redis(stack: Stack, writer: Part, work: Callable[[], Awaitable[None]]) -> None:
    """Let Redis forget everything that was done by `work`, and whose events the ledger has not."""
    writer.signal(signal.SIGSTOP)
    await work()
    restart_redis(stack, None)
    writer.signal(signal.SIGCONT)


def restart_redis(stack: Stack, copy: Path | None) -> None:
    """Kill Redis, and let it come back as it was when its files were copied, or empty."""
    assert stack.redis_server is not None
    stack.redis_server.kill()
    for folder in stack.redis_server.directory.rglob("appendonlydir"):
        shutil.rmtree(folder)
        if copy is not None:
            shutil.copytree(copy, folder)
    stack.redis_server.start()


async def counters(http: httpx.AsyncClient, book_id: str, timeout: float = 30) -> dict[str, int]:
    async def recovered() -> dict[str, int] | None:
        answer = await http.get(f"/coupons/{book_id}")
        return answer.json()["codes"] if answer.status_code == 200 else None

    found = await until(recovered, timeout)
    assert found is not None
    return found


async def test_a_lost_redis_loses_no_answer_of_processes_that_live(shop: Shop) -> None:
    book_id = await book_of(shop.first)
    answered: list[dict[str, Any]] = []

    async def work() -> None:
        clients = (shop.first, shop.second)
        answered.extend(await asyncio.gather(*(assign(clients[n % 2], book_id, f"u{n}") for n in range(40))))

    await assign(shop.first, book_id, "before")
    await lose_redis(shop.stack, shop.writer, work)
    await all_are_back(shop, book_id, answered)


async def all_are_back(shop: Shop, book_id: str, answered: list[dict[str, Any]]) -> None:
    """Check that each answer was early, that its record and that of its key are in the ledger now, and that nothing else of
    the book is gone. One more code was assigned before."""
    assert not any(one["durable"] for one in answered)
    assigned = len(answered) + 1
    assert (await counters(shop.first, book_id)) == {
        "total": CODES, "available": CODES - assigned, "assigned": assigned, "redeemed": 0, "quarantined": 0,
    }  # fmt: skip
    await shop.stack.ready()  # the second process, too
    for one in answered:
        again = await assign(shop.second, book_id, one["user_id"])
        assert (again["code"], again["position"]) == (one["code"], one["position"])
        assert again["durable"]
    assert await shop.stack.ledger("SELECT FROM reported_entries") == []


async def test_a_stale_replica_loses_no_answer_of_processes_that_live(tmp_path: Path, postgres_url: str) -> None:
    """The master dies with forty answers that the replica has not. The writer dies, too: one that is only stopped finds
    events in its socket when it goes on."""
    async with replica_stage(postgres_url, tmp_path) as network:
        assert network.replica is not None
        try:
            network.writer()
            network.api()
            async with opened(network) as shop:
                book_id = await book_of(shop.first)
                await assign(shop.first, book_id, "before")
                await network.drained()
                shop.writer.kill()
                network.link.cut(refuse=True)
                clients = (shop.first, shop.second)
                answered = await asyncio.gather(*(assign(clients[n % 2], book_id, f"u{n}") for n in range(40)))
                assert await events_made(network.master) - await events_made(network.replica) == 40
                network.master.kill()
                await promote(network.replica)
                network.lead_to(network.replica)
                network.writer()
                await all_are_back(shop, book_id, answered)
        finally:
            network.close()


async def test_a_redis_that_lacks_no_more_than_the_answer_of_a_key_is_not_kept(shop: Shop, tmp_path: Path) -> None:
    """Its coupons are those of the ledger, and its counts, too."""
    book_id = await book_of(shop.first)
    code = (await assign(shop.first, book_id, "ann"))["code"]
    body = {"user_id": "ann"}

    async def named() -> httpx.Response:
        return await shop.second.post(f"/coupons/assign/{code}", json=body, headers={"Idempotency-Key": "named"})

    await shop.stack.drained()
    assert shop.stack.redis_server is not None
    async with shop.stack.redis() as redis:
        admin: Any = redis
        await admin.execute_command("WAITAOF", 1, 0, 5_000)
    (files,) = shop.stack.redis_server.directory.rglob("appendonlydir")
    shutil.copytree(files, tmp_path / "copy")
    shop.writer.kill()  # one that is only stopped finds the event in its socket when it goes on
    first = await named()
    assert (first.status_code, first.json()["durable"]) == (200, False)
    restart_redis(shop.stack, tmp_path / "copy")
    shop.stack.writer()
    await counters(shop.first, book_id)
    assert (await shop.first.post(f"/coupons/redeem/{code}", json=body)).status_code == 201
    again = await named()
    assert again.headers["idempotent-replayed"] == "true"
    assert again.json() == {**first.json(), "durable": True}


async def test_what_a_silent_process_may_have_answered_is_quarantined(tmp_path: Path, postgres_url: str) -> None:
    """That is each code that was lent and has no record, and none of a book that waits for the ledger.

    On a stack of its own: until the process is given up, each recovery has to suspect it.
    """
    async with running_stack(tmp_path, postgres_url, 1) as stack, opened(stack) as shop:
        book_id = await book_of(shop.first, total=COMPUTED_CODES)
        waits_for_ledger = await book_of(shop.first, "ledger")
        kept: list[dict[str, Any]] = []

        async def work() -> None:
            kept.append(await assign(shop.first, book_id, "alice"))
            await assign(shop.second, book_id, "nobody")
            kept.append(await assign(shop.first, book_id, "bob"))
            shop.second_process.kill()

        await assign(shop.first, book_id, "before")
        (lent,) = await shop.stack.ledger("SELECT lent FROM books WHERE book_id = $1", book_id)
        assert lent["lent"] < COMPUTED_CODES
        await lose_redis(shop.stack, shop.writer, work)
        found = await counters(shop.first, book_id)
        assert (found["assigned"], found["quarantined"]) == (3, lent["lent"] - 3)
        assert (await counters(shop.first, waits_for_ledger))["quarantined"] == 0
        for one in kept:
            assert (await assign(shop.first, book_id, one["user_id"]))["code"] == one["code"]


async def test_a_process_that_ends_leaves_what_it_has_answered(shop: Shop) -> None:
    book_id = await book_of(shop.first)
    kept: list[dict[str, Any]] = []

    async def work() -> None:
        kept.append(await assign(shop.second, book_id, "alice"))
        shop.second_process.stop()

    await assign(shop.first, book_id, "before")
    await lose_redis(shop.stack, shop.writer, work)
    assert (await counters(shop.first, book_id))["quarantined"] == 0
    assert (await assign(shop.first, book_id, "alice"))["code"] == kept[0]["code"]


async def test_a_report_of_another_history_stops_the_shard(make_stack: MakeStack) -> None:
    """One that ends where an entry of the ledger ends, or amid its events."""
    stack = await make_stack()
    writer = stack.writer()
    stack.api()
    await stack.ready()
    shards: list[int] = []
    async with await stack.client() as http:
        while len(shards) < 2:
            book_id = await book_of(http)
            if int(book_id[3:5]) not in shards:
                shards.append(int(book_id[3:5]))
                users = {"book_id": book_id, "user_ids": ["alice", "bob", "carol"]}
                assert (await http.post("/coupons/assignments", json=users)).json()["assigned"] == 3
    await stack.drained()
    for behind, shard in enumerate(shards):
        await stack.ledger(
            "INSERT INTO reported_entries SELECT shard, epoch, seq - $2, n, after, 'another', at_ms, events FROM entries"
            " WHERE shard = $1",
            shard,
            behind,
        )
    writer.stop()
    await stack.ledger("UPDATE shards SET epoch = epoch + 1 WHERE shard = ANY ($1)", shards)
    stack.writer()

    async def stopped() -> list[str]:
        rows = await stack.ledger("SELECT stopped FROM shards WHERE shard = ANY ($1) AND stopped IS NOT NULL", shards)
        return [row["stopped"] for row in rows] if len(rows) == len(shards) else []

    for reason in await until(stopped, 30):
        assert "has answered from another entry" in reason
