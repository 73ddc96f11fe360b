"""A shard whose history contradicts itself is stopped for a person to look at, and not opened by the next writer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from coupon_svc.config import load_settings
from coupon_svc.domain.events import COUPON_ASSIGNED, Event
from coupon_svc.redis.keys import ShardKeys
from coupon_svc.writer.shard import Stopped
from coupon_svc.writer.writer import Writer
from tests.entries import entry_of, fields_of
from tests.harness import Stack, until


async def test_a_stopped_shard_is_shut_when_it_would_be_opened(make_stack: Callable[[], Awaitable[Stack]]) -> None:
    stack = await make_stack()
    meta = ShardKeys(0, stack.shards).meta
    redis = stack.redis()
    first = stack.writer()

    async def certified() -> bool:
        return await redis.hget(meta, "epoch") == "1"

    await until(certified)
    first.stop()
    await stack.ledger("UPDATE shards SET stopped = 'a person looks' WHERE shard = 0")
    writer = Writer(load_settings(stack.environment))
    connection = await writer.owning.session.connection()
    await writer.owning.renew(connection)
    try:
        await writer.opener.try_to_open(writer.shards[0], writer.owning.session)
        assert writer.shards[0].state == Stopped("a person looks")
        assert await redis.hget(meta, "epoch") == "recovering", "nobody decides anything there"
        await writer.opener.try_to_open(writer.shards[1], writer.owning.session)
        assert writer.shards[1].is_open, "the others are opened"
    finally:
        writer.close()
        await redis.aclose()


async def test_an_event_that_contradicts_the_ledger_stops_its_shard(make_stack: Callable[[], Awaitable[Stack]]) -> None:
    """A second assignment of a code, at a position of its own: no script of ours makes one."""
    stack = await make_stack()
    stack.writer()
    stack.api()
    await stack.ready()
    async with await stack.client() as http:
        book = {"name": "b", "generate": {"pattern": "F-########", "total": 5}}
        book_id = (await http.post("/coupons", json=book)).json()["book_id"]
        given = (await http.post("/coupons/assign", json={"book_id": book_id, "user_id": "ann"})).json()["code"]
        shard = int(book_id[3:5])
        keys, redis = ShardKeys(shard, stack.shards), stack.redis()
        epoch, seq = str(await redis.hget(keys.meta, "epoch")), await redis.hincrby(keys.meta, "seq", 1)
        twice = Event(int(epoch), seq, COUPON_ASSIGNED, book_id, given, "bob", 1)
        entry: Any = fields_of(entry_of(twice, after=str(await redis.hget(keys.meta, "tip")), tip="made up"))
        await redis.hset(keys.meta, "tip", "made up")
        await redis.xadd(keys.events, entry, id=f"{epoch}-{seq}")

        async def stopped() -> str | None:
            (row,) = await stack.ledger("SELECT stopped FROM shards WHERE shard = $1", shard)
            reason: str | None = row["stopped"]
            return reason

        assert "contradicts the ledger" in str(await until(stopped))

        async def shut() -> bool:
            answer = await http.post("/coupons/assign", json={"book_id": book_id, "user_id": "carl"})
            return bool(answer.json().get("code") == "recovering")

        await until(shut, what="nobody should decide anything there any more")
        await redis.aclose()
    rows = await stack.ledger("SELECT user_id FROM coupons WHERE code = $1", given)
    assert [row["user_id"] for row in rows] == ["ann"]
