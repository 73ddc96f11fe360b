"""`coupon-svc verify` finds what it is there to find: each kind of damage is done, and must be told."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import NamedTuple

import asyncpg
import pytest
from redis.asyncio import Redis

from coupon_svc.config import load_settings
from coupon_svc.domain.holding import Holding
from coupon_svc.domain.position import Epoch
from coupon_svc.invariants import stores as stores_module
from coupon_svc.invariants.ledger import LedgerCheck
from coupon_svc.invariants.stores import RedisCheck, Report, Verifier
from coupon_svc.postgres.database import open_connection
from tests.conftest import SHARDS
from tests.harness import Stack, running_stack


class Damaged(NamedTuple):
    """Where damage can be done."""

    ledger: asyncpg.Connection
    redis: Redis


async def report_of(stack: Stack) -> Report:
    settings = load_settings(stack.environment)
    connection = await open_connection(settings.database_url, "test")
    redis = Redis.from_url(settings.redis_url, decode_responses=True)
    try:
        return await Verifier(settings, connection, redis, show_progress=False).verify()
    finally:
        await redis.aclose()
        connection.terminate()


TABLES = ("entries", "old_events", "coupons", "redemptions", "books", "codes", "shards", "quarantine", "late_events")


@pytest.fixture(scope="module")
async def stack(tmp_path_factory: pytest.TempPathFactory, postgres_url: str) -> AsyncIterator[Stack]:
    """A service at rest, with coupons held, redeemed and free; its writer is stopped, so that nothing mends the damage."""
    async with running_stack(tmp_path_factory.mktemp("verify"), postgres_url, SHARDS) as stack:
        async with await stack.client() as http:
            rules = {"name": "b", "max_codes_per_user": 2, "generate": {"pattern": "V-########", "total": 20}}
            book_id = (await http.post("/coupons", json=rules)).json()["book_id"]
            for number in range(6):
                answer = await http.post("/coupons/assign", json={"book_id": book_id, "user_id": f"u{number}"})
                if number < 3:
                    await http.post(f"/coupons/redeem/{answer.json()['code']}")
        await stack.drained()
        for part in stack.parts:
            part.stop()
        yield stack


@pytest.fixture
async def damaged(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Damaged]:
    """Both stores, to be damaged: they are as they were when the test is over."""
    monkeypatch.setattr(stores_module, "ARRIVAL_WAIT_S", 0.3)
    ledger = await asyncpg.connect(stack.database_url)
    await ledger.execute("SET session_replication_role = replica")  # foreign keys are whole again in the end
    for table in TABLES:
        await ledger.execute(f"CREATE TABLE saved_{table} AS TABLE {table}")
    async with stack.redis() as redis, Redis.from_url(stack.redis_admin_url) as raw:
        dumps = {key: await raw.dump(key) async for key in redis.scan_iter()}
        yield Damaged(ledger, redis)
        await redis.flushall()
        for key, dump in dumps.items():
            await redis.restore(key, 0, dump or b"")
    for table in TABLES:
        await ledger.execute(f"DELETE FROM {table}; INSERT INTO {table} TABLE saved_{table}; DROP TABLE saved_{table}")
    await ledger.execute("DELETE FROM code_ranges; DELETE FROM computed_patterns")
    await ledger.close()


async def _key(redis: Redis, pattern: str) -> str:
    """The first of the keys that a pattern finds."""
    return min([str(key) async for key in redis.scan_iter(pattern)])


async def _holder(redis: Redis) -> tuple[str, str, Holding]:
    """A key of holders, a code in it, and who holds the code."""
    key = await _key(redis, "cb:*:holders:*")
    code, holder = min((await redis.hgetall(key)).items())
    return key, str(code), Holding.parse(str(holder))


async def another_holder(redis: Redis) -> None:
    key, code, holder = await _holder(redis)
    await redis.hset(key, code, holder._replace(user_id="thief").format())


async def a_free_code_held(redis: Redis, epochs_ago: int = 0) -> None:
    """By an event that the ledger never gets."""
    key, _, holder = await _holder(redis)
    position = holder.last._replace(epoch=Epoch(holder.last.epoch - epochs_ago))
    code = (await redis.zpopmin(await _key(redis, "cb:*:free:*")))[0][0]
    await redis.hset(key, code, holder._replace(assigned=position, last=position, uses=0).format())


async def a_free_code_held_since_an_older_epoch(redis: Redis) -> None:
    await a_free_code_held(redis, epochs_ago=1)


async def a_held_code_free(redis: Redis) -> None:
    _, code, _ = await _holder(redis)
    await redis.zadd(await _key(redis, "cb:*:free:*"), {code: 1})


async def a_users_list_gone(redis: Redis) -> None:
    await redis.delete(await _key(redis, "cb:*:coupons:*"))


async def a_foreign_code_free(redis: Redis) -> None:
    await redis.zadd(await _key(redis, "cb:*:free:*"), {"NOBODYS-CODE": 1})


async def a_free_code_gone(redis: Redis) -> None:
    await redis.zpopmin(await _key(redis, "cb:*:free:*"))


async def a_redemption_miscounted(redis: Redis) -> None:
    await redis.hincrby(await _key(redis, "cb:*:book:*"), "partly_redeemed", 1)


IN_LEDGER = {
    LedgerCheck.POSITIONS: "DELETE FROM entries WHERE seq = 2",
    LedgerCheck.ENTRY_BEFORE: "UPDATE entries SET after = 'x' WHERE seq = 2",
    LedgerCheck.EVENTS: "UPDATE entries SET events = '[' WHERE seq = 2",
    LedgerCheck.LATE_EVENT: """
        INSERT INTO old_events (shard, epoch, seq, event, book_id, code, user_id, at_ms)
        VALUES (0, 0, 1, 'coupon_assigned', 'b', 'c', 'u', 1);
        INSERT INTO late_events (shard, epoch, seq, link, event, book_id, code, user_id, at_ms, recorded)
        VALUES (0, 0, 1, NULL, 'coupon_assigned', 'b', 'c', 'thief', 1, true)""",
    LedgerCheck.END: "UPDATE shards SET committed = committed + 1 WHERE committed > 0",
    LedgerCheck.COUPON: """
        UPDATE coupons SET user_id = 'thief' WHERE user_id = 'u5'""",
    LedgerCheck.USES: "UPDATE coupons SET uses = 0 WHERE user_id = 'u0'",
    LedgerCheck.CONFIRMED: """
        INSERT INTO late_events (shard, epoch, seq, link, event, book_id, code, user_id, at_ms, recorded)
        SELECT shard, 0, 1, NULL, 'coupon_confirmed', book_id, 'c', 'thief', 1, true FROM books LIMIT 1""",
    LedgerCheck.REDEMPTION: "DELETE FROM coupons WHERE user_id = 'u0'",
    LedgerCheck.USES_MAX: "UPDATE coupons SET uses = 2 WHERE user_id = 'u0'",
    LedgerCheck.COUNTS: "UPDATE books SET total = total + 1",
    LedgerCheck.RANGE_COUNTS: """
        INSERT INTO code_ranges SELECT 1, 0, 10, book_id, 10, 10, 5, 0 FROM books""",
    LedgerCheck.RANGES: """
        INSERT INTO computed_patterns (tenant_id, pattern, symbols, sealed_key, master_key_id, taken)
        SELECT tenant_id, '######', 'AB', '', 'another', 9 FROM books;
        INSERT INTO code_ranges SELECT pattern_id, 0, 10, book_id, 10, 10, 0, 0 FROM books, computed_patterns""",
    LedgerCheck.PLACES: """
        INSERT INTO codes SELECT tenant_id, 'LEFT-BEHIND', book_id, -2 FROM books""",
    LedgerCheck.LENT: "DELETE FROM codes WHERE code IN (SELECT code FROM coupons LIMIT 1)",
    LedgerCheck.OUTSTANDING: "UPDATE books SET accounted_upto = leased_upto",
    LedgerCheck.QUARANTINE: """
        INSERT INTO quarantine (book_id, code, shard, epoch) SELECT book_id, code, 0, 1 FROM codes LIMIT 1""",
}
IN_REDIS: dict[RedisCheck, Callable[[Redis], Awaitable[None]]] = {
    RedisCheck.HELD: another_holder,
    RedisCheck.OLDER_EPOCH: a_free_code_held_since_an_older_epoch,
    RedisCheck.ARRIVED: a_free_code_held,
    RedisCheck.REDEMPTIONS: a_redemption_miscounted,
    RedisCheck.FREE: a_held_code_free,
    RedisCheck.LISTED: a_users_list_gone,
    RedisCheck.FREE_LENT: a_foreign_code_free,
    RedisCheck.COUNTS: a_free_code_gone,
}
"""What is found, and the damage that it is found by."""
OF_COMPUTED_BOOKS = {
    RedisCheck.COMPUTED_LENT,
    RedisCheck.NUMBERS,
}
"""Their damage is done in tests/faults/test_computed_books.py."""


async def test_a_service_at_rest_is_in_order(stack: Stack) -> None:
    report = await report_of(stack)
    assert report.holds, report
    assert (report.shards, report.books, report.codes_held, report.codes_free) == (SHARDS, 1, 6, 14)


@pytest.mark.parametrize("check", IN_LEDGER)
async def test_damage_in_the_ledger_is_found(stack: Stack, damaged: Damaged, check: LedgerCheck) -> None:
    await damaged.ledger.execute(IN_LEDGER[check])
    assert check in found_in(await report_of(stack))


@pytest.mark.parametrize("check", IN_REDIS)
async def test_damage_in_redis_is_found(stack: Stack, damaged: Damaged, check: RedisCheck) -> None:
    await IN_REDIS[check](damaged.redis)
    assert check in found_in(await report_of(stack))


def found_in(report: Report) -> set[str]:
    return {finding.what for finding in report.findings}


def test_every_check_of_the_ledger_has_its_damage() -> None:
    assert IN_LEDGER.keys() == set(LedgerCheck)


def test_every_check_of_redis_has_its_damage() -> None:
    assert set(RedisCheck) == IN_REDIS.keys() | OF_COMPUTED_BOOKS
