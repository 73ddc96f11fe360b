"""wipe_keys: every reply, and what is written."""

from __future__ import annotations

from coupon_svc.redis.control import KEYS_PER_CALL_MAX
from tests.scripts.every_script import worn
from tests.scripts.runner import Shard, assert_shut_by


def test_the_keys_that_are_named_are_dropped_whatever_their_type(shard: Shard) -> None:
    book = worn(shard)
    shard.shut_shard()
    names = shard.snapshot().keys() - {"meta", f"free:{book}"}
    assert names == {
        "events",
        f"book:{book}",
        f"holders:{book}",
        f"quarantine:{book}",
        f"lock:{book}:B-2",
        f"idem:1:{book}:key 1",
        "coupons:1:u",
        "coupons:1:v",
    }
    with shard.writes(*names):
        assert shard.wipe_keys([shard.keys.prefix + name for name in names]) == ["ok"]
    assert shard.snapshot().keys() == {"meta", f"free:{book}"}


def test_keys_may_be_sent_twice_and_may_be_gone(shard: Shard) -> None:
    book = worn(shard)
    shard.shut_shard()
    for _ in range(2):
        assert shard.wipe_keys([shard.keys.events, shard.keys.free(book)]) == ["ok"]
    with shard.writes_nothing():
        assert shard.wipe_keys([shard.keys.events, shard.keys.free(book), shard.keys.lock(book, "none")]) == ["ok"]


def test_as_many_keys_as_a_call_may_hold_are_dropped(shard: Shard) -> None:
    assert KEYS_PER_CALL_MAX == 500
    shard.shut_shard()
    doomed = [shard.keys.lock("b", str(number)) for number in range(KEYS_PER_CALL_MAX)]
    shard.redis.mset(dict.fromkeys(doomed, "t"))
    assert shard.wipe_keys(doomed) == ["ok"]
    assert shard.snapshot().keys() == {"meta"}


def test_only_who_shut_the_shard_drops_keys(shard: Shard) -> None:
    book = worn(shard)
    assert_shut_by(shard, lambda generation: shard.wipe_keys([shard.keys.free(book)], generation))
