"""ShardControl's recovery methods: more than one call may hold is sent in several, and nothing is lost between them."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import pytest
from redis import Redis

from coupon_svc.dev.servers import EmbeddedRedis
from coupon_svc.domain.holding import Holding
from coupon_svc.redis.control import KEYS_PER_CALL_MAX, ShardControl, Term
from coupon_svc.redis.errors import ShardNotUsable
from coupon_svc.redis.keys import ShardKeys
from coupon_svc.redis.scripts import Scripts
from coupon_svc.redis.server import Identity
from tests.scripts.runner import new_rules

SHARDS = 89  # tests elsewhere on these servers have greater numbers
BOOK = "bk_000123456789abcdef"
NUMBERS = itertools.count()


class Owned(NamedTuple):
    """A shard of this test's own that is shut, and a client that may do anything."""

    store: ShardControl
    term: Term
    keys: ShardKeys
    redis: Any


@pytest.fixture(params=["plain_redis", "cluster_redis"])
async def owned(request: pytest.FixtureRequest) -> AsyncIterator[Owned]:
    embedded: EmbeddedRedis = request.getfixturevalue(request.param)
    store = ShardControl(embedded.url, SHARDS, Scripts(), "inst-1")
    term = Term(next(NUMBERS), epoch=2, generation=3)
    await store.shut_shard(term)
    with Redis.from_url(embedded.admin_url, decode_responses=True) as client:
        yield Owned(store, term, ShardKeys(term.shard, SHARDS), client)
    store.close()


def fields(**others: int) -> dict[str, str]:
    counters = {"version": 1, "lent": 0, "redeemed": 0, "partly_redeemed": 0, "quarantined": 0}
    return {name: str(value) for name, value in {**new_rules(), **counters, **others}.items()}


async def test_a_quarantine_of_more_codes_than_a_call_may_hold_comes_back_whole(owned: Owned) -> None:
    store, term, keys, redis = owned
    codes = [f"Q-{number}" for number in range(2 * KEYS_PER_CALL_MAX + 1)]
    for _ in range(2):
        await store.restore_book(term, BOOK, fields(quarantined=len(codes)), codes)
        assert redis.smembers(keys.quarantine(BOOK)) == set(codes)


async def test_a_book_without_a_quarantine_comes_back(owned: Owned) -> None:
    store, term, keys, redis = owned
    redis.sadd(keys.quarantine(BOOK), "A-1")
    redis.zadd(keys.free(BOOK), {"B-2": 1})
    await store.restore_book(term, BOOK, fields(), [])
    assert redis.hgetall(keys.book(BOOK)) == fields()
    assert redis.exists(keys.quarantine(BOOK), keys.free(BOOK)) == 0


async def test_a_wipe_takes_every_key_of_the_shard_but_its_meta_and_no_other(owned: Owned) -> None:
    store, term, keys, redis = owned
    other = ShardKeys(term.shard + 1 + SHARDS // 2, SHARDS)
    names = [keys.events, keys.book(BOOK), keys.free("[a-z]*"), keys.coupons(1, "{x}\n"), keys.quarantine(BOOK)]
    names += [keys.lock(BOOK, str(number)) for number in range(3 * KEYS_PER_CALL_MAX)]
    for name in names:
        redis.set(name, "x")
    redis.set(other.lock(BOOK, "1"), "x")
    before = redis.hgetall(keys.meta)
    await store.wipe_shard(term)
    assert list(redis.scan_iter(keys.pattern, count=10_000)) == [keys.meta]
    assert redis.hgetall(keys.meta) == before
    assert redis.delete(other.lock(BOOK, "1")) == 1


async def test_a_rebuilt_shard_is_certified_and_taken_over(owned: Owned) -> None:
    store, term, keys, redis = owned
    coupons = [(f"A-{number}", Holding.parse(f"1-{number} 0 1 user {number}")) for number in range(KEYS_PER_CALL_MAX)]
    await store.restore_book(term, BOOK, fields(lent=len(coupons)), [])
    await store.restore_coupons(term, 1, BOOK, coupons)
    await store.restore_idem(term, 1, BOOK, [("key 1", '["f1"]', 60_000)])
    assert redis.hgetall(keys.holders(BOOK)) == {code: holding.format() for code, holding in coupons}
    assert redis.zrange(keys.coupons(1, "user 7"), 0, -1) == [f"{BOOK}:A-7"]
    assert redis.get(keys.idem(1, BOOK, "key 1")) == '["f1"]'
    await store.certify_shard(term, await store.connect(), 1000)
    identity = await store.connect()
    meta = await store.read_meta(term.shard)
    assert (meta.run_id, meta.replid) == (identity.run_id, identity.replid)
    assert (meta.epoch, meta.seq, meta.backlog_max) == (2, 0, 1000)
    assert await store.pool_counts(term.shard, BOOK) == (0, len(coupons), len(coupons))
    assert await store.open_shard(term._replace(generation=4), 0, "", 1000) == 0
    with pytest.raises(ShardNotUsable):
        await store.shut_shard(term)


async def test_nothing_is_wiped_or_restored_in_a_shard_that_is_not_shut(owned: Owned) -> None:
    store, term, keys, redis = owned
    await store.certify_shard(term, await store.connect(), 1000)
    redis.set(keys.lock(BOOK, "1"), "x")
    with pytest.raises(ShardNotUsable):
        await store.wipe_shard(term)
    with pytest.raises(ShardNotUsable):
        await store.restore_book(term, BOOK, fields(), ["Q-1"])
    with pytest.raises(ShardNotUsable):
        await store.restore_coupons(term, 1, BOOK, [("A-1", Holding.parse("1-1 0 1 u"))])
    with pytest.raises(ShardNotUsable):
        await store.restore_idem(term, 1, BOOK, [("key 1", "[]", 1000)])
    with pytest.raises(ShardNotUsable):
        await store.certify_shard(term, await store.connect(), 1000)
    assert sorted(redis.scan_iter(keys.pattern, count=10_000)) == sorted([keys.lock(BOOK, "1"), keys.meta])


async def test_what_is_certified_is_the_server_that_was_shut_whoever_answers_by_now(owned: Owned) -> None:
    """A server that took the other's place carries a certificate which is not its own: nobody trusts it."""
    store, term, _, _ = owned
    before = Identity("the run that was shut", (await store.connect()).replid)
    await store.certify_shard(term, before, 1000)
    meta = await store.read_meta(term.shard)
    assert meta.run_id == "the run that was shut" != (await store.connect()).run_id
    with pytest.raises(ShardNotUsable):
        await store.open_shard(term, 0, "", 1000)
