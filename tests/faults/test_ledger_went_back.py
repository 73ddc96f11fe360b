"""A ledger that was put back to an older state is noticed, and no code goes to a second user."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import asyncpg

from coupon_svc.redis.keys import ShardKeys
from tests.harness import Stack


async def test_a_code_that_a_ledger_has_forgotten_is_not_dealt_again(
    make_stack: Callable[[], Awaitable[Stack]],
) -> None:
    stack = await make_stack()
    writer = stack.writer()
    stack.api()
    await stack.ready()
    async with await stack.client("shop") as http:
        rules = {"name": "b", "ack": "ledger", "generate": {"pattern": "Q-########", "total": 6}}
        book = (await http.post("/coupons", json=rules)).json()["book_id"]
        given = []
        for number in range(5):
            answer = await http.post("/coupons/assign", json={"book_id": book, "user_id": f"u{number}"})
            assert answer.status_code == 201
            given.append(answer.json()["code"])
        await stack.drained()
        writer.stop()
        ledger, redis = await asyncpg.connect(stack.database_url), stack.redis()
        try:
            shard = await ledger.fetchval("SELECT shard FROM books WHERE book_id = $1", book)
            async with ledger.transaction():  # as a restored backup would have it
                await ledger.execute("ALTER TABLE entries DISABLE TRIGGER USER")
                await ledger.execute("ALTER TABLE coupons DISABLE TRIGGER USER")
                await ledger.execute("DELETE FROM entries WHERE shard = $1 AND seq > 3", shard)
                await ledger.execute("DELETE FROM coupons WHERE code = ANY ($1)", given[3:])
                await ledger.execute(
                    "UPDATE shards SET committed = 3, chain = e.chain, tip = e.tip FROM entries e"
                    " WHERE shards.shard = $1 AND e.shard = $1 AND e.seq = 3",
                    shard,
                )
            keys = ShardKeys(shard, stack.shards)
            epoch = int(str(await redis.hget(keys.meta, "epoch")))
            await redis.xtrim(keys.events, minid=f"{epoch}-5", approximate=False)  # as after a minute
            stack.writer()
            for _ in range(150):
                stopped = await ledger.fetchval("SELECT stopped FROM shards WHERE shard = $1", shard)
                if stopped or await redis.hget(keys.meta, "epoch") == str(epoch + 1):
                    break
                await asyncio.sleep(0.1)
            await asyncio.sleep(1.5)
            later = [
                (await http.post("/coupons/assign", json={"book_id": book, "user_id": f"w{number}"})).json().get("code")
                for number in range(4)
            ]
            assert set(given).isdisjoint(later)
        finally:
            await ledger.close()
            await redis.aclose()
