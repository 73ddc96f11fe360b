"""`coupon-svc verify` finds what it is there to find: each kind of damage is done, and must be told."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
from redis.asyncio import Redis

from coupon_svc.config import load_settings
from coupon_svc.ops import verify as verify_module
from coupon_svc.ops.verify import Report, Verifier
from coupon_svc.postgres.database import open_connection
from tests.harness import Stack

Damage = Callable[[Stack, Redis], Awaitable[None]]


async def report_of(stack: Stack) -> Report:
    settings = load_settings(stack.environment)
    connection = await open_connection(settings.database_url, "test")
    redis = Redis.from_url(settings.redis_url, decode_responses=True)
    try:
        return await Verifier(settings, connection, redis, show_progress=False).verify()
    finally:
        await redis.aclose()
        connection.terminate()


@pytest.fixture
async def stack(make_stack: Callable[[], Awaitable[Stack]]) -> Stack:
    """A service at rest, with coupons held, redeemed and free; its writer is stopped, so that nothing mends the damage."""
    stack = await make_stack()
    writer = stack.writer()
    stack.api()
    await stack.ready()
    async with await stack.client() as http:
        rules = {"name": "b", "max_codes_per_user": 2, "generate": {"pattern": "V-########", "total": 20}}
        book_id = (await http.post("/coupons", json=rules)).json()["book_id"]
        for number in range(6):
            answer = await http.post("/coupons/assign", json={"book_id": book_id, "user_id": f"u{number}"})
            if number < 3:
                await http.post(f"/coupons/redeem/{answer.json()['code']}")
    await stack.drained()
    writer.stop()
    return stack


async def one(redis: Redis, pattern: str) -> str:
    key: str = [key async for key in redis.scan_iter(pattern)][0]  # noqa: RUF015  # an async comprehension
    return key


async def another_holder(stack: Stack, redis: Redis) -> None:
    key = await one(redis, "cb:*:holders:*")
    code, holder = next(iter((await redis.hgetall(key)).items()))
    await redis.hset(key, code, str(holder).rpartition(" ")[0] + " thief")


async def a_held_code_free(stack: Stack, redis: Redis) -> None:
    code = str(next(iter(await redis.hkeys(await one(redis, "cb:*:holders:*")))))
    await redis.zadd(await one(redis, "cb:*:free:*"), {code: 1})


async def a_users_list_gone(stack: Stack, redis: Redis) -> None:
    await redis.delete(await one(redis, "cb:*:coupons:*"))


async def a_foreign_code_free(stack: Stack, redis: Redis) -> None:
    await redis.zadd(await one(redis, "cb:*:free:*"), {"NOBODYS-CODE": 1})


async def a_free_code_gone(stack: Stack, redis: Redis) -> None:
    await redis.zpopmin(await one(redis, "cb:*:free:*"))


async def a_redemption_miscounted(stack: Stack, redis: Redis) -> None:
    await redis.hincrby(await one(redis, "cb:*:book:*"), "partly_redeemed", 1)


async def an_event_gone(stack: Stack, redis: Redis) -> None:
    await stack.ledger("DELETE FROM events WHERE seq = 2")


async def a_coupon_moved(stack: Stack, redis: Redis) -> None:
    await stack.ledger("UPDATE coupons SET user_id = 'thief' WHERE user_id = 'u5'")


async def a_use_forgotten(stack: Stack, redis: Redis) -> None:
    await stack.ledger("UPDATE coupons SET uses = 0 WHERE user_id = 'u0'")


async def a_use_too_many(stack: Stack, redis: Redis) -> None:
    await stack.ledger("UPDATE coupons SET uses = 2 WHERE user_id = 'u0'")


async def a_count_wrong(stack: Stack, redis: Redis) -> None:
    await stack.ledger("UPDATE books SET total = total + 1")


async def a_code_deleted(stack: Stack, redis: Redis) -> None:
    await stack.ledger("DELETE FROM codes WHERE code IN (SELECT code FROM coupons LIMIT 1)")


async def a_code_never_placed(stack: Stack, redis: Redis) -> None:
    await stack.ledger("INSERT INTO codes SELECT tenant_id, 'LEFT-BEHIND', book_id, -2 FROM books")


async def a_position_moved(stack: Stack, redis: Redis) -> None:
    await stack.ledger("UPDATE shards SET committed = committed + 1 WHERE committed > 0")


DAMAGES = (
    another_holder, a_held_code_free, a_users_list_gone, a_foreign_code_free, a_free_code_gone, a_redemption_miscounted,
    an_event_gone,     a_coupon_moved, a_use_forgotten, a_use_too_many, a_count_wrong, a_code_deleted, a_position_moved,
    a_code_never_placed,
)  # fmt: skip


async def test_each_damage_is_found(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_module, "ARRIVAL_WAIT_S", 0.3)
    assert (await report_of(stack)).holds
    async with stack.redis() as redis, Redis.from_url(stack.redis_admin_url) as raw:
        for damage in DAMAGES:
            dumps = {key: await raw.dump(key) async for key in redis.scan_iter()}
            tables = ("events", "coupons", "books", "codes", "shards")
            for table in tables:
                await stack.ledger(f"CREATE TABLE saved_{table} AS TABLE {table}")
            await damage(stack, redis)
            report = await report_of(stack)
            assert report.findings, f"{damage.__name__} was not found"
            await redis.flushall()
            for key, dump in dumps.items():
                await redis.restore(key, 0, dump or b"")
            await _restore(stack, tables)
        assert (await report_of(stack)).holds


async def _restore(stack: Stack, tables: tuple[str, ...]) -> None:
    import asyncpg

    connection = await asyncpg.connect(stack.database_url)
    await connection.execute("SET session_replication_role = replica")  # foreign keys are whole again in the end
    for table in tables:
        await connection.execute(
            f"DELETE FROM {table}; INSERT INTO {table} TABLE saved_{table}; DROP TABLE saved_{table}"
        )
    await connection.close()
