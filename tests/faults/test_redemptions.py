"""The number of a book's redemptions survives what Redis does not."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from tests.harness import Stack, until
from tests.http.helpers import assign, make_book, redeem


async def test_redemptions_are_counted_from_the_ledger_where_redis_has_no_count_of_them(
    make_stack: Callable[[], Awaitable[Stack]],
) -> None:
    """After a disaster in Redis; and of a book that an older version brought there, once a new owner takes its shard."""
    stack = await make_stack()
    writer = stack.writer()
    stack.api()
    stack.patient = True
    await stack.ready()
    async with await stack.client() as client, stack.redis() as redis:
        book = await make_book(client, max_redemptions_per_code=3)
        whole, partly = await assign(client, book), await assign(client, book)
        for code in (whole, whole, whole, partly, partly):
            await redeem(client, code)

        async def counted() -> bool:
            read = await client.get(f"/coupons/{book}")
            return read.status_code == 200 and (read.json()["redemptions"], read.json()["codes"]["redeemed"]) == (5, 1)

        assert await counted()
        await redis.flushall()
        await until(counted, what="the count should be back")
        await redeem(client, partly)
        (key,) = [key async for key in redis.scan_iter(f"cb:*:book:{book}")]
        assert (await redis.hget(key, "redeemed"), await redis.hget(key, "partly_redeemed")) == ("2", "4")

        writer.stop()
        await redis.hdel(key, "partly_redeemed")
        stack.writer()

        async def restored() -> bool:
            return bool(await redis.hget(key, "partly_redeemed") == "4")

        await until(restored, what="a new owner should restore a count that it lacks")
        assert (await client.get(f"/coupons/{book}")).json()["redemptions"] == 6
