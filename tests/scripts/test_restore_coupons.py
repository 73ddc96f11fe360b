"""restore_coupons: every reply, and what is written."""

from __future__ import annotations

from coupon_svc.redis.control import KEYS_PER_CALL_MAX
from tests.scripts.runner import Shard, assert_shut_by

BOOK = "bk_000123456789abcdef"
COUPONS = {"A-1": "3-9 0 1700000000001 u", "B-2": "2-7 1 1700000000002 a user: {x}", "C-3": "3-1 2 1700000000003 u"}


def test_coupons_come_back_to_their_holders(shard: Shard) -> None:
    shard.shut_shard()
    with shard.writes(f"holders:{BOOK}", "coupons:1:u", "coupons:1:a user: {x}"):
        assert shard.restore_coupons(BOOK, COUPONS) == ["ok"]
    assert shard.holders(BOOK) == COUPONS
    assert shard.coupons("u") == [f"{BOOK}:A-1", f"{BOOK}:C-3"]
    assert shard.coupons("a user: {x}") == [f"{BOOK}:B-2"]


def test_coupons_may_be_sent_twice_and_in_parts(shard: Shard) -> None:
    shard.shut_shard()
    for code, holder in COUPONS.items():
        assert shard.restore_coupons(BOOK, {code: holder}) == ["ok"]
    with shard.writes_nothing():
        assert shard.restore_coupons(BOOK, COUPONS) == ["ok"]


def test_what_redis_had_of_them_is_replaced(shard: Shard) -> None:
    book = shard.assigned("A-1", "u")
    shard.shut_shard()
    with shard.writes(f"holders:{book}"):
        assert shard.restore_coupons(book, {"A-1": "3-9 1 1700000000001 u"}) == ["ok"]
    assert shard.holders(book) == {"A-1": "3-9 1 1700000000001 u"}


def test_as_many_coupons_as_a_call_may_hold_are_restored(shard: Shard) -> None:
    shard.shut_shard()
    coupons = {f"{number:04d}": f"3-{number} 0 1 user {number % 7}" for number in range(KEYS_PER_CALL_MAX)}
    assert shard.restore_coupons(BOOK, coupons) == ["ok"]
    assert shard.holders(BOOK) == coupons
    assert sum(len(shard.coupons(f"user {number}")) for number in range(7)) == KEYS_PER_CALL_MAX
    assert shard.coupons("user 3")[:2] == [f"{BOOK}:0003", f"{BOOK}:0010"]


def test_only_who_shut_the_shard_restores_coupons(shard: Shard) -> None:
    assert_shut_by(shard, lambda generation: shard.restore_coupons(BOOK, COUPONS, generation))
