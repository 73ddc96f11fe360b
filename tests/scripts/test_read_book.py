"""read_book: every reply and their order; it writes nothing."""

from __future__ import annotations

import pytest

from tests.scripts.runner import EPOCH, STRANGER, Obstacle, Shard, assert_fenced, book_is_shut, book_is_unknown, peel


def test_the_rules_and_the_live_counters_are_told(shard: Shard) -> None:
    book = shard.new_book("A-1", "B-2", "C-3", unlent=4, stored='{"name":"ä"}')
    shard.put_book(book, 5, known=True, total=7)
    shard.assign_coupon(book, "u")
    shard.assign_coupon(book, "v")
    shard.redeem_coupon(book, "A-1")
    shard.set_rule(book, quarantined=2)
    with shard.writes_nothing():
        assert shard.read_book(book) == ["ok", "5", '{"name":"ä"}', "7", 2, "1", "2", 1]


@pytest.mark.parametrize(("uses_max", "redeemed"), [("1", "2"), ("2", "1"), ("", "0")])
def test_every_use_is_a_redemption(shard: Shard, uses_max: str, redeemed: str) -> None:
    book = shard.new_book("A-1", "B-2", max_redemptions_per_code=uses_max)
    for code in ("A-1", "B-2", "B-2"):
        shard.assign_coupon(book, "u")
        shard.redeem_coupon(book, code)
    redemptions = sum(1 for event in shard.events() if event.uses is not None)
    assert shard.read_book(book)[4:] == [2, redeemed, "0", redemptions]
    assert redemptions == (2 if uses_max == "1" else 3)


def test_a_book_of_an_older_version_has_the_redemptions_that_it_counted(shard: Shard) -> None:
    book = shard.assigned()
    shard.redeem_coupon(book, "A-1")
    shard.redis.hdel(shard.keys.book(book), "partly_redeemed")
    assert shard.read_book(book)[5:] == ["1", "0", 1]


def test_a_new_book_has_counters_at_zero(shard: Shard) -> None:
    assert shard.read_book(shard.new_book()) == ["ok", "1", "{}", "0", 0, "0", "0", 0]


def test_a_book_that_is_shut_is_read_all_the_same(shard: Shard) -> None:
    book = shard.assigned()
    book_is_shut(shard, book)
    assert shard.read_book(book)[:2] == ["ok", "1"]


def test_replies_come_in_the_documented_order(shard: Shard) -> None:
    book = shard.assigned()
    shard.set_meta(epoch=EPOCH + 1)
    doubt = Obstacle("suspect", lambda: shard.set_meta(epoch=EPOCH))
    shard.set_rule(book, lent=2)
    missing = Obstacle("suspect", lambda: shard.set_rule(book, lent=1))
    assert peel(shard, lambda: shard.read_book(book), [doubt, *book_is_unknown(shard, book), missing])[0] == "ok"


@pytest.mark.parametrize("lost", ["free", "holders", "both"])
def test_codes_that_are_missing_are_suspect(shard: Shard, lost: str) -> None:
    book = shard.new_book("A-1", "B-2")
    shard.assign_coupon(book, "u")
    for name in ("free", "holders") if lost == "both" else (lost,):
        shard.redis.delete(f"{shard.keys.prefix}{name}:{book}")
    with shard.writes_nothing():
        assert shard.read_book(book) == ["suspect", "counts"]


def test_a_shard_in_doubt_is_suspect(shard: Shard) -> None:
    book = shard.assigned()
    assert_fenced(shard, lambda caller: shard.read_book(book, caller))


def test_a_book_of_another_tenant_does_not_exist(shard: Shard) -> None:
    assert shard.read_book(shard.assigned(), STRANGER) == ["book_not_found"]
