"""unlock_coupon: every reply, their order, and what is written."""

from __future__ import annotations

import json

from tests.scripts.runner import (
    DAY_MS,
    STRANGER,
    Caller,
    Obstacle,
    Shard,
    assert_fenced,
    book_is_shut,
    book_is_unknown,
    no_room,
    peel,
    seen_before,
)

KEYED = Caller(idem="key 1", fingerprint="f1")


def locked(shard: Shard) -> str:
    """A book whose only code is assigned and locked with `t1`."""
    book = shard.assigned()
    assert shard.lock_coupon(book, "A-1", new_token="t1")[0] == "ok"
    return book


def test_a_lock_is_given_up_with_its_token(shard: Shard) -> None:
    book = locked(shard)
    with shard.writes(f"lock:{book}:A-1"):
        assert shard.unlock_coupon(book, "A-1", "t1") == ["ok"]
    assert not shard.redis.exists(shard.keys.lock(book, "A-1"))
    assert shard.lock_coupon(book, "A-1")[0] == "ok"


def test_no_lock_is_as_good_as_one_that_was_given_up(shard: Shard) -> None:
    book = shard.assigned()
    with shard.writes_nothing():
        assert shard.unlock_coupon(book, "A-1", "t1") == ["ok"]


def test_somebody_elses_lock_stays(shard: Shard) -> None:
    book = locked(shard)
    with shard.writes_nothing():
        assert shard.unlock_coupon(book, "A-1", "t2") == ["lock_not_held"]


def test_the_same_request_again_is_replayed_though_somebody_else_has_locked(shard: Shard) -> None:
    book = locked(shard)
    with shard.writes(f"lock:{book}:A-1", f"idem:1:{book}:key 1"):
        assert shard.unlock_coupon(book, "A-1", "t1", KEYED) == ["ok"]
    key = shard.idem_key(book, "key 1")
    assert json.loads(shard.redis.get(key)) == ["f1"]
    assert DAY_MS - 60_000 < shard.redis.pttl(key) <= DAY_MS
    shard.lock_coupon(book, "A-1", new_token="t2")
    with shard.writes_nothing():
        assert shard.unlock_coupon(book, "A-1", "t1", KEYED) == ["replayed"]
    with shard.writes_nothing():
        assert shard.unlock_coupon(book, "A-1", "t2", KEYED._replace(fingerprint="f2")) == ["idempotency_key_reused"]


def test_replies_come_in_the_documented_order(shard: Shard) -> None:
    book = locked(shard)
    asked = {"token": "t2"}
    known = seen_before(shard, book, KEYED)
    theirs = [Obstacle("lock_not_held", lambda: asked.update(token="t1"))]
    unknown = book_is_unknown(shard, book)
    ask = lambda: shard.unlock_coupon(book, "A-1", asked["token"], KEYED)  # noqa: E731
    assert peel(shard, ask, [*known, *unknown, *theirs]) == ["ok"]


def test_it_goes_on_in_a_book_that_is_shut_and_without_room(shard: Shard) -> None:
    for reason in range(4):
        book = locked(shard)
        for obstacle in book_is_shut(shard, book)[:reason]:
            obstacle.remove()
        no_room(shard)
        assert shard.unlock_coupon(book, "A-1", "t1") == ["ok"]
        shard.open_shard()
        shard.keep_ledger_at_hand()


def test_a_shard_in_doubt_is_suspect(shard: Shard) -> None:
    book = locked(shard)
    assert_fenced(shard, lambda caller: shard.unlock_coupon(book, "A-1", "t1", caller))


def test_a_book_that_is_not_there_is_not_loaded(shard: Shard) -> None:
    with shard.writes_nothing():
        assert shard.unlock_coupon("bk_000000000000000000", "A-1", "t1") == ["book_not_loaded"]


def test_a_book_of_another_tenant_does_not_exist(shard: Shard) -> None:
    book = locked(shard)
    with shard.writes_nothing():
        assert shard.unlock_coupon(book, "A-1", "t1", STRANGER) == ["book_not_found"]
