"""lock_coupon: every reply, their order, and what is written."""

from __future__ import annotations

import json

import pytest

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
    wait_until_gone,
)

KEYED = Caller(idem="key 1", fingerprint="f1")


def test_a_lock_is_a_key_with_a_real_ttl(shard: Shard) -> None:
    book = shard.assigned(lock_ttl_ms=90_000, ack="redis")
    before = shard.now_ms()
    with shard.writes(f"lock:{book}:A-1"):
        outcome, user_id, token, until_ms, ttl_ms, position, ack = shard.lock_coupon(book, "A-1", new_token="t1")
    assert (outcome, user_id, token, ttl_ms, position, ack) == ("ok", "u", "t1", "90000", "4-1", "redis")
    assert before + 90_000 <= int(until_ms) <= shard.now_ms() + 90_000
    assert len(until_ms) == 13
    assert shard.redis.get(shard.keys.lock(book, "A-1")) == "t1"
    assert 80_000 < shard.redis.pttl(shard.keys.lock(book, "A-1")) <= 90_000


def test_the_caller_may_choose_the_ttl(shard: Shard) -> None:
    book = shard.assigned()
    assert shard.lock_coupon(book, "A-1", ttl_ms=3_600_000)[4] == "3600000"
    assert 3_500_000 < shard.redis.pttl(shard.keys.lock(book, "A-1")) <= 3_600_000


def test_no_lock_outlives_its_book(shard: Shard) -> None:
    ends_at = shard.now_ms() + 30_000
    book = shard.assigned(expires_at_ms=ends_at)
    for token in ("", "t1"):  # made, and renewed
        _, _, _, until_ms, ttl_ms, *_ = shard.lock_coupon(book, "A-1", KEYED, token=token, new_token="t1")
        assert until_ms == str(ends_at)
        assert 20_000 < int(ttl_ms) <= 30_000
        assert 20_000 < shard.redis.pttl(shard.keys.lock(book, "A-1")) <= 30_000
        replayed = shard.lock_coupon(book, "A-1", KEYED, token=token)
        assert replayed[:5] == ["replayed", "u", "t1", until_ms, ttl_ms]
        shard.redis.delete(shard.idem_key(book, "key 1"))
    assert shard.lock_coupon(book, "A-1", token="t1", ttl_ms=5_000)[4] == "5000"


def test_a_lock_ends_with_its_book_by_the_clock_of_redis(shard: Shard) -> None:
    ends_at = shard.now_ms() + 300
    book = shard.assigned(expires_at_ms=ends_at)
    assert shard.lock_coupon(book, "A-1", new_token="t1")[3] == str(ends_at)
    wait_until_gone(shard, shard.keys.lock(book, "A-1"))
    assert shard.now_ms() >= ends_at
    assert shard.lock_coupon(book, "A-1") == ["book_expired"]


def test_a_locked_coupon_is_refused_with_the_time_that_is_left(shard: Shard) -> None:
    book = shard.assigned()
    shard.lock_coupon(book, "A-1", new_token="t1")
    for user_id in ("", "u"):  # holding a lock means showing its token, also for the coupon's own user
        with shard.writes_nothing():
            outcome, left_ms = shard.lock_coupon(book, "A-1", user_id=user_id, new_token="t2")
        assert outcome == "locked"
        assert 110_000 < left_ms <= 120_000


def test_a_lock_is_renewed_with_its_token_and_keeps_it(shard: Shard) -> None:
    book = shard.assigned()
    shard.lock_coupon(book, "A-1", new_token="t1", ttl_ms=60_000)
    before = shard.now_ms()
    with shard.writes(f"lock:{book}:A-1"):
        outcome, user_id, token, until_ms, ttl_ms, position, ack = shard.lock_coupon(
            book, "A-1", token="t1", new_token="t2", ttl_ms=180_000
        )
    assert (outcome, user_id, token, ttl_ms, position, ack) == ("renewed", "u", "t1", "180000", "4-1", "ledger")
    assert int(until_ms) >= before + 180_000
    assert shard.redis.get(shard.keys.lock(book, "A-1")) == "t1"
    assert 170_000 < shard.redis.pttl(shard.keys.lock(book, "A-1")) <= 180_000


@pytest.mark.parametrize("there", [True, False])
def test_a_token_that_is_not_the_locks_is_refused(shard: Shard, there: bool) -> None:
    book = shard.assigned()
    if there:
        shard.lock_coupon(book, "A-1", new_token="t1")
    with shard.writes_nothing():
        assert shard.lock_coupon(book, "A-1", token="t0") == ["lock_not_held"]


def test_a_lock_that_ran_out_is_nobodys(shard: Shard) -> None:
    book = shard.assigned()
    shard.lock_coupon(book, "A-1", new_token="t1", ttl_ms=1)
    wait_until_gone(shard, shard.keys.lock(book, "A-1"))
    with shard.writes_nothing():
        assert shard.lock_coupon(book, "A-1", token="t1") == ["lock_not_held"]
    assert shard.lock_coupon(book, "A-1", new_token="t2")[:3] == ["ok", "u", "t2"]


def test_the_same_request_again_is_replayed(shard: Shard) -> None:
    book = shard.assigned()
    with shard.writes(f"lock:{book}:A-1", f"idem:1:{book}:key 1"):
        first = shard.lock_coupon(book, "A-1", KEYED, new_token="t1")
    key = shard.idem_key(book, "key 1")
    assert json.loads(shard.redis.get(key)) == ["f1", *first[1:]]
    assert DAY_MS - 60_000 < shard.redis.pttl(key) <= DAY_MS
    with shard.writes_nothing():
        assert shard.lock_coupon(book, "A-1", KEYED, new_token="t2") == ["replayed", *first[1:]]
    with shard.writes_nothing():
        assert shard.lock_coupon(book, "A-1", KEYED._replace(fingerprint="f2")) == ["idempotency_key_reused"]


def test_a_renewal_is_replayed_too(shard: Shard) -> None:
    book = shard.assigned()
    shard.lock_coupon(book, "A-1", new_token="t1")
    first = shard.lock_coupon(book, "A-1", KEYED, token="t1")
    with shard.writes_nothing():
        assert shard.lock_coupon(book, "A-1", KEYED, token="t1") == ["replayed", *first[1:]]


def test_replies_come_in_the_documented_order(shard: Shard) -> None:
    book = shard.assigned()
    shard.lock_coupon(book, "A-1", new_token="t1")
    asked = {"user_id": "v", "token": "t0"}
    known = seen_before(shard, book, KEYED, "u", "t1", "1", "1", "4-1", "ledger")
    shut = book_is_shut(shard, book)
    room = no_room(shard, ledger=False)
    held = f"4-1 1 {shard.now_ms()} u"
    shard.redis.delete(shard.keys.holders(book))
    shard.quarantine(book, "A-1")
    coupon = [
        Obstacle("code_quarantined", lambda: shard.redis.srem(shard.keys.quarantine(book), "A-1")),
        Obstacle("suspect", lambda: shard.set_rule(book, lent=0)),
        Obstacle("not_assigned", lambda: shard.redis.hset(shard.keys.holders(book), "A-1", held)),
        Obstacle("not_holder", lambda: asked.update(user_id="u")),
        Obstacle("already_redeemed", lambda: shard.set_rule(book, max_redemptions_per_code=2)),
        Obstacle("lock_not_held", lambda: asked.update(token="")),
        Obstacle("locked", lambda: asked.update(token="t1")),
    ]
    unknown = book_is_unknown(shard, book)
    last = peel(
        shard,
        lambda: shard.lock_coupon(book, "A-1", KEYED, **asked),
        [*known, *unknown, *shut, *coupon, *room],
    )
    assert last[:3] == ["renewed", "u", "t1"]


def test_a_shard_in_doubt_is_suspect(shard: Shard) -> None:
    book = shard.assigned()
    assert_fenced(shard, lambda caller: shard.lock_coupon(book, "A-1", caller))


@pytest.mark.parametrize("lost", ["free", "holders"])
def test_a_code_is_not_taken_for_unassigned_while_codes_are_missing(shard: Shard, lost: str) -> None:
    book = shard.new_book("A-1", "B-2")
    shard.assign_code(book, "u", "A-1")
    with shard.writes_nothing():
        assert shard.lock_coupon(book, "B-2") == ["not_assigned"]
    shard.redis.delete(f"{shard.keys.prefix}{lost}:{book}")
    for code in ("A-1", "B-2") if lost == "holders" else ("B-2",):
        with shard.writes_nothing():
            assert shard.lock_coupon(book, code) == ["suspect", "counts"]


def test_a_book_that_is_not_there_is_not_loaded(shard: Shard) -> None:
    with shard.writes_nothing():
        assert shard.lock_coupon("bk_000000000000000000", "A-1") == ["book_not_loaded"]


def test_a_book_of_another_tenant_does_not_exist(shard: Shard) -> None:
    book = shard.assigned()
    with shard.writes_nothing():
        assert shard.lock_coupon(book, "A-1", STRANGER) == ["book_not_found"]


def test_a_code_in_quarantine_is_refused(shard: Shard) -> None:
    book = shard.new_book("A-1")
    shard.quarantine(book, "Q-1")
    for user_id, token in (("", ""), ("u", ""), ("", "t1")):
        with shard.writes_nothing():
            assert shard.lock_coupon(book, "Q-1", KEYED, user_id=user_id, token=token) == ["code_quarantined"]
    with shard.writes_nothing():
        assert shard.lock_coupon(book, "A-1") == ["not_assigned"]


def test_only_the_holder_may_be_named(shard: Shard) -> None:
    book = shard.assigned()
    with shard.writes_nothing():
        assert shard.lock_coupon(book, "A-1", user_id="v") == ["not_holder"]
    assert shard.lock_coupon(book, "A-1", user_id="u")[0] == "ok"


def test_a_spent_coupon_cannot_be_locked_and_a_partly_used_one_can(shard: Shard) -> None:
    book = shard.assigned(max_redemptions_per_code="2")
    shard.redeem_coupon(book, "A-1")
    assert shard.lock_coupon(book, "A-1", new_token="t1")[5] == "4-1/4-2"
    shard.redeem_coupon(book, "A-1", token="t1")
    with shard.writes_nothing():
        assert shard.lock_coupon(book, "A-1") == ["already_redeemed"]


def test_a_coupon_without_a_redemption_limit_can_always_be_locked(shard: Shard) -> None:
    book = shard.assigned(max_redemptions_per_code="")
    shard.redeem_coupon(book, "A-1")
    assert shard.lock_coupon(book, "A-1")[0] == "ok"


def test_a_full_backlog_refuses_a_lock_and_a_ledger_that_is_away_does_not(shard: Shard) -> None:
    book = shard.assigned()
    no_room(shard)
    with shard.writes_nothing():
        assert shard.lock_coupon(book, "A-1") == ["backlog_full"]
    shard.set_meta(backlog_max=10)
    assert shard.lock_coupon(book, "A-1")[0] == "ok"
