"""Keys of a moment ago are put back into the running server, whose identity and epoch are the certified ones."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from redis.asyncio import Redis

from coupon_svc.redis.keys import ShardKeys
from tests.conftest import SHARDS
from tests.harness import Stack, running_stack, until

MakeStack = Callable[[], Awaitable[Stack]]


async def keep(redis: Any, shard: int, shards: int) -> list[tuple[bytes, bytes]]:
    pattern = ShardKeys(shard, shards).pattern
    return [(key, dump) async for key in redis.scan_iter(pattern) if (dump := await redis.dump(key)) is not None]


async def put_back(redis: Any, kept: list[tuple[bytes, bytes]], shard: int, shards: int) -> None:
    now = [key async for key in redis.scan_iter(ShardKeys(shard, shards).pattern)]
    async with redis.pipeline(transaction=True) as pipe:
        pipe.delete(*now)
        for key, dump in kept:
            pipe.restore(key, 0, dump)
        await pipe.execute()


@pytest.fixture(scope="module")
async def stack(tmp_path_factory: pytest.TempPathFactory, postgres_url: str) -> AsyncIterator[Stack]:
    """With two API processes."""
    async with running_stack(tmp_path_factory.mktemp("two"), postgres_url, SHARDS) as stack:
        stack.api(1)
        await stack.ready()
        yield stack


@pytest.mark.parametrize("ack", ["ledger", "redis"])
async def test_a_process_that_saw_nothing_itself_is_not_told_that_its_event_is_durable(stack: Stack, ack: str) -> None:
    """The ledger holds positions that are beyond Redis now: an event made there would pass for one that it has."""
    async with await stack.client("shop") as first, await stack.client("shop") as second:
        first.base_url = next(part.base_url for part in stack.parts if part.base_url)
        async with Redis.from_url(stack.redis_admin_url) as raw:
            rules = {"name": "b", "ack": ack, "generate": {"pattern": "Q-########", "total": 40}}
            book_id = (await first.post("/coupons", json=rules)).json()["book_id"]
            shard = int(book_id[3:5])

            async def assign(http: Any, user: str) -> Any:
                return await http.post("/coupons/assign", json={"book_id": book_id, "user_id": user})

            assert (await assign(second, "warm")).status_code == 201
            await stack.drained()
            await asyncio.sleep(0.3)
            kept = await keep(raw, shard, stack.shards)
            given = [await assign(first, f"u{number}") for number in range(5)]
            assert [answer.status_code for answer in given] == [201] * 5
            await stack.drained()
            await asyncio.sleep(0.1)  # the message is on its way
            await put_back(raw, kept, shard, stack.shards)
            later = [await assign(second, f"v{number}") for number in range(5)]
            holders = {answer.json()["code"]: answer.json()["user_id"] for answer in given}
            for answer in later:
                if answer.status_code == 201:
                    assert answer.json()["code"] not in holders, "P1: a code was answered to two users"
            assert later[0].status_code == 503, "Redis went back, and was believed"

            async def deals() -> bool:
                answer = await assign(second, "after")
                return answer.status_code == 201 and answer.json()["code"] not in holders

            await until(deals, 30)
            await stack.drained()
            rows = await stack.ledger("SELECT code, user_id FROM coupons WHERE book_id = $1", book_id)
            assert holders.items() <= {row["code"]: row["user_id"] for row in rows}.items()


async def stopped(stack: Stack, book_id: str) -> bool:
    """Whether the book's shard was stopped for a history that is not the ledger's."""
    (row,) = await stack.ledger("SELECT stopped FROM shards WHERE shard = $1", int(book_id[3:5]))
    return "differs from the one in the ledger" in (row["stopped"] or "")


async def test_an_owner_sees_that_what_is_committed_is_not_what_redis_made(make_stack: MakeStack) -> None:
    """A server that went back has caught up, so no number shows it; and whoever opens the shard next looks as well."""
    stack = await make_stack()
    writer = stack.writer()
    stack.api()
    await stack.ready()
    async with await stack.client() as http, stack.redis() as client:
        redis: Any = client
        rules = {"name": "b", "generate": {"pattern": "Q-########", "total": 40}}
        book_id = (await http.post("/coupons", json=rules)).json()["book_id"]
        for number in range(3):
            answer = await http.post("/coupons/assign", json={"book_id": book_id, "user_id": f"u{number}"})
            assert answer.status_code == 201
        await stack.drained()
        keys = ShardKeys(int(book_id[3:5]), stack.shards)
        epoch = await redis.hget(keys.meta, "epoch")

        async def rewrite() -> None:
            ((_, last),) = await redis.xrange(keys.events, f"{epoch}-3", f"{epoch}-3")
            async with redis.pipeline(transaction=True) as pipe:
                pipe.delete(keys.events)
                pipe.xadd(
                    keys.events, {**last, "events": last["events"].replace('"u2"', '"somebody else"')}, id=f"{epoch}-3"
                )
                await pipe.execute()

        writer.stop()
        await rewrite()
        stack.writer()
        await until(lambda: stopped(stack, book_id), what="who opens the shard should compare the last event")


async def test_what_follows_in_another_history_is_not_committed(make_stack: MakeStack) -> None:
    """An event was made anew where the ledger ends, and one more: the next commit would pass for the next of ours."""
    stack = await make_stack()
    writer = stack.writer()
    stack.api()
    await stack.ready()
    async with await stack.client() as http, stack.redis() as client:
        redis: Any = client
        rules = {"name": "b", "generate": {"pattern": "Q-########", "total": 40}}
        book_id = (await http.post("/coupons", json=rules)).json()["book_id"]
        assert (await http.post("/coupons/assign", json={"book_id": book_id, "user_id": "u"})).status_code == 201
        await stack.drained()
        shard = int(book_id[3:5])
        keys = ShardKeys(shard, stack.shards)
        epoch = await redis.hget(keys.meta, "epoch")
        ((_, last),) = await redis.xrange(keys.events, f"{epoch}-1", f"{epoch}-1")
        writer.signal(signal.SIGSTOP)
        async with redis.pipeline(transaction=True) as pipe:
            pipe.delete(keys.events)
            pipe.xadd(
                keys.events, {**last, "events": last["events"].replace('"u"', '"x"'), "tip": "x"}, id=f"{epoch}-1"
            )
            pipe.xadd(
                keys.events,
                {**last, "events": last["events"].replace('"u"', '"y"'), "after": "x", "tip": "y"},
                id=f"{epoch}-2",
            )
            pipe.hset(keys.meta, mapping={"seq": 2, "tip": "y"})
            await pipe.execute()
        writer.signal(signal.SIGCONT)

        await until(lambda: stopped(stack, book_id))
        assert [row["user_id"] for row in await stack.ledger("SELECT user_id FROM events")] == ["u"]
