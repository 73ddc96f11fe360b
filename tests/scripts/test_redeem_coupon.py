"""redeem_coupon: every reply, their order, and what is written."""

from __future__ import annotations

import json

import pytest

from coupon_svc.domain.events import Event
from coupon_svc.domain.holding import Holding
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


def test_a_coupon_is_redeemed(shard: Shard) -> None:
    book = shard.assigned()
    assigned_at_ms = Holding.parse(shard.holders(book)["A-1"]).at_ms
    before = shard.now_ms()
    with shard.writes("meta", f"book:{book}", f"holders:{book}", "events"):
        outcome, user_id, at_ms, position, uses, left = shard.redeem_coupon(
            book, "A-1", reference="order 1", metadata='{"a": 1}'
        )
    assert (outcome, user_id, position, uses, left) == ("ok", "u", "4-2", "1", "0")
    assert before <= int(at_ms) <= shard.now_ms()
    assert shard.holders(book) == {"A-1": f"4-1/4-2 1 {assigned_at_ms} u"}
    assert shard.events()[1] == Event(
        4, 2, "coupon_redeemed", book, "A-1", "u", int(at_ms), 1, "order 1", '{"a": 1}', None, None
    )


def test_of_the_meta_only_the_seq_moves_and_of_the_book_only_redeemed(shard: Shard) -> None:
    book = shard.assigned()
    meta, rules = shard.meta(), shard.book(book)
    shard.redeem_coupon(book, "A-1")
    assert shard.meta() == {**meta, "seq": "2", "tip": shard.tip()}
    assert shard.book(book) == {**rules, "redeemed": "1"}


def test_second_redeem_is_refused(shard: Shard) -> None:
    book = shard.assigned()
    shard.redeem_coupon(book, "A-1")
    with shard.writes_nothing():
        assert shard.redeem_coupon(book, "A-1") == ["already_redeemed"]


def test_a_code_is_counted_as_redeemed_with_its_last_use(shard: Shard) -> None:
    book = shard.assigned(max_redemptions_per_code="3")
    replies = []
    for redeemed, partly_redeemed in (("0", "1"), ("0", "2"), ("1", "2")):
        replies.append(shard.redeem_coupon(book, "A-1")[3:])
        fields = shard.book(book)
        assert (fields["redeemed"], fields["partly_redeemed"]) == (redeemed, partly_redeemed)
    assert replies == [["4-2", "1", "2"], ["4-3", "2", "1"], ["4-4", "3", "0"]]
    assert [event.uses for event in shard.events()[1:]] == [1, 2, 3]
    with shard.writes_nothing():
        assert shard.redeem_coupon(book, "A-1") == ["already_redeemed"]


def test_the_position_of_the_assignment_stays_in_front_of_the_last_ones(shard: Shard) -> None:
    book = shard.assigned(max_redemptions_per_code="")
    at_ms = Holding.parse(shard.holders(book)["A-1"]).at_ms
    for uses in (1, 2, 3):
        assert shard.redeem_coupon(book, "A-1")[3] == f"4-{uses + 1}"
        assert shard.holders(book) == {"A-1": f"4-1/4-{uses + 1} {uses} {at_ms} u"}


def test_a_coupon_without_a_limit_is_never_spent(shard: Shard) -> None:
    book = shard.assigned(max_redemptions_per_code="")
    assert [shard.redeem_coupon(book, "A-1")[4:] for _ in range(12)][-1] == ["12", ""]
    fields = shard.book(book)
    assert (fields["redeemed"], fields["partly_redeemed"]) == ("0", "12")


def test_the_lock_is_consumed(shard: Shard) -> None:
    book = shard.assigned(max_redemptions_per_code="2")
    shard.lock_coupon(book, "A-1", new_token="t1")
    with shard.writes("meta", f"book:{book}", f"holders:{book}", f"lock:{book}:A-1", "events"):
        assert shard.redeem_coupon(book, "A-1", token="t1")[0] == "ok"
    assert not shard.redis.exists(shard.keys.lock(book, "A-1"))
    with shard.writes_nothing():
        assert shard.redeem_coupon(book, "A-1", token="t1") == ["lock_not_held"]
    assert shard.redeem_coupon(book, "A-1")[0] == "ok"


def test_a_locked_coupon_is_refused_with_the_time_that_is_left(shard: Shard) -> None:
    book = shard.assigned()
    shard.lock_coupon(book, "A-1", new_token="t1")
    for user_id in ("", "u"):
        with shard.writes_nothing():
            outcome, left_ms = shard.redeem_coupon(book, "A-1", user_id=user_id)
        assert outcome == "locked"
        assert 110_000 < left_ms <= 120_000


def test_a_token_that_is_not_the_locks_is_refused(shard: Shard) -> None:
    book = shard.assigned()
    with shard.writes_nothing():
        assert shard.redeem_coupon(book, "A-1", token="t0") == ["lock_not_held"]
    shard.lock_coupon(book, "A-1", new_token="t1", ttl_ms=1)
    wait_until_gone(shard, shard.keys.lock(book, "A-1"))
    with shard.writes_nothing():
        assert shard.redeem_coupon(book, "A-1", token="t1") == ["lock_not_held"]
    shard.lock_coupon(book, "A-1", new_token="t2")
    with shard.writes_nothing():
        assert shard.redeem_coupon(book, "A-1", token="t1") == ["lock_not_held"]


def test_the_same_request_again_is_replayed(shard: Shard) -> None:
    book = shard.assigned()
    shard.lock_coupon(book, "A-1", new_token="t1")
    with shard.writes("meta", f"book:{book}", f"holders:{book}", f"lock:{book}:A-1", "events", f"idem:1:{book}:key 1"):
        first = shard.redeem_coupon(book, "A-1", KEYED, token="t1")
    key = shard.idem_key(book, "key 1")
    assert json.loads(shard.redis.get(key)) == ["f1", *first[1:]]
    assert DAY_MS - 60_000 < shard.redis.pttl(key) <= DAY_MS
    assert (shard.events()[1].idem, shard.events()[1].fingerprint) == ("key 1", "f1")
    with shard.writes_nothing():
        assert shard.redeem_coupon(book, "A-1", KEYED, token="t1") == ["replayed", *first[1:]]
    with shard.writes_nothing():
        assert shard.redeem_coupon(book, "A-1", KEYED._replace(fingerprint="f2")) == ["idempotency_key_reused"]


def test_replies_come_in_the_documented_order(shard: Shard) -> None:
    book = shard.assigned()
    shard.lock_coupon(book, "A-1", new_token="t1")
    asked = {"user_id": "v", "token": "t0"}
    known = seen_before(shard, book, KEYED, "u", "1", "4-2", "1", "0")
    shut = book_is_shut(shard, book)
    room = no_room(shard)
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
        lambda: shard.redeem_coupon(book, "A-1", KEYED, **asked),
        [*known, *unknown, *shut, *coupon, *room],
    )
    assert last[:2] == ["ok", "u"]
    assert last[3:] == ["4-2", "2", "0"]


def test_a_shard_in_doubt_is_suspect(shard: Shard) -> None:
    book = shard.assigned(max_redemptions_per_code="")
    assert_fenced(shard, lambda caller: shard.redeem_coupon(book, "A-1", caller))


@pytest.mark.parametrize("lost", ["free", "holders"])
def test_a_code_is_not_taken_for_unassigned_while_codes_are_missing(shard: Shard, lost: str) -> None:
    book = shard.new_book("A-1", "B-2")
    shard.assign_code(book, "u", "A-1")
    with shard.writes_nothing():
        assert shard.redeem_coupon(book, "B-2") == ["not_assigned"]
    shard.redis.delete(f"{shard.keys.prefix}{lost}:{book}")
    for code in ("A-1", "B-2") if lost == "holders" else ("B-2",):
        with shard.writes_nothing():
            assert shard.redeem_coupon(book, code) == ["suspect", "counts"]


def test_a_book_that_is_not_there_is_not_loaded(shard: Shard) -> None:
    with shard.writes_nothing():
        assert shard.redeem_coupon("bk_000000000000000000", "A-1") == ["book_not_loaded"]


def test_a_book_of_another_tenant_does_not_exist(shard: Shard) -> None:
    book = shard.assigned()
    with shard.writes_nothing():
        assert shard.redeem_coupon(book, "A-1", STRANGER) == ["book_not_found"]


def test_a_code_in_quarantine_is_refused(shard: Shard) -> None:
    book = shard.new_book("A-1")
    shard.quarantine(book, "Q-1")
    for user_id, token in (("", ""), ("u", ""), ("", "t1")):
        with shard.writes_nothing():
            assert shard.redeem_coupon(book, "Q-1", KEYED, user_id=user_id, token=token) == ["code_quarantined"]
    with shard.writes_nothing():
        assert shard.redeem_coupon(book, "A-1") == ["not_assigned"]


def test_only_the_holder_may_be_named(shard: Shard) -> None:
    book = shard.assigned()
    with shard.writes_nothing():
        assert shard.redeem_coupon(book, "A-1", user_id="v") == ["not_holder"]
    assert shard.redeem_coupon(book, "A-1", user_id="u")[0] == "ok"


def test_a_redeem_is_given_a_quarter_more_of_the_backlog_than_an_assign(shard: Shard) -> None:
    assert shard.open_shard(backlog_max=4) == ["ok", 0]
    shard.keep_ledger_at_hand()
    book = shard.new_book("A-1", "B-2", max_redemptions_per_code="", ack="redis")
    shard.assign_coupon(book, "u")
    assert [shard.redeem_coupon(book, "A-1")[0] for _ in range(3)] == ["ok"] * 3
    assert shard.assign_coupon(book, "u") == ["backlog_full"]
    assert shard.redeem_coupon(book, "A-1")[0] == "ok"
    with shard.writes_nothing():
        assert shard.redeem_coupon(book, "A-1") == ["backlog_full"]


@pytest.mark.parametrize("ack", ["ledger", "redis"])
def test_every_redeem_waits_for_the_ledger(shard: Shard, ack: str) -> None:
    book = shard.assigned(ack=ack)
    shard.publish_position(0, ledger="away")
    with shard.writes_nothing():
        assert shard.redeem_coupon(book, "A-1") == ["ledger_behind"]
    shard.publish_position(0)
    assert shard.redeem_coupon(book, "A-1")[0] == "ok"


def test_big_numbers_stay_exact_text(shard: Shard) -> None:
    book = shard.assigned(max_redemptions_per_code=str(2**53 - 1))
    seq, uses, at_ms = 2**53 - 10, 2**53 - 9, 9_999_999_999_999
    shard.set_meta(seq=seq, committed=seq)
    shard.redis.hset(shard.keys.holders(book), "A-1", f"4-{seq} {uses} {at_ms} u")
    assert shard.redeem_coupon(book, "A-1")[3:] == [f"4-{seq + 1}", str(uses + 1), "7"]
    assert shard.holders(book) == {"A-1": f"4-{seq}/4-{seq + 1} {uses + 1} {at_ms} u"}
