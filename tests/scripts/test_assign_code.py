"""assign_code: every reply, their order, and what is written."""

from __future__ import annotations

import json

import pytest

from coupon_svc.domain.events import Event
from tests.scripts.runner import (
    CALLER,
    DAY_MS,
    STRANGER,
    TENANT,
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


def test_the_named_code_is_assigned_and_leaves_the_pool(shard: Shard) -> None:
    book = shard.new_book("A-1", "B-2", "C-3", max_redemptions_per_code="2", ack="redis")
    before = shard.now_ms()
    with shard.writes("meta", f"free:{book}", f"holders:{book}", "coupons:1:u", "events"):
        outcome, code, at_ms, position, ack, left = shard.assign_code(book, "u", "B-2")
    assert (outcome, code, position, ack, left) == ("ok", "B-2", "4-1", "redis", "2")
    assert before <= int(at_ms) <= shard.now_ms()
    assert shard.free(book) == ["A-1", "C-3"]
    assert shard.holders(book) == {"B-2": f"4-1 0 {at_ms} u"}
    assert shard.coupons("u") == [f"{book}:B-2"]
    assert shard.events() == [Event(4, 1, "coupon_assigned", book, "B-2", "u", int(at_ms))]
    assert list(shard.entries()[0][1]) == ["n", "after", "tip", "at_ms", "events"]


def test_of_the_meta_only_the_seq_moves_and_of_the_book_nothing(shard: Shard) -> None:
    book = shard.new_book("A-1")
    meta, rules = shard.meta(), shard.book(book)
    shard.assign_code(book, "u", "A-1")
    assert shard.meta() == {**meta, "seq": "1", "tip": shard.tip()}
    assert shard.book(book) == rules


def test_what_is_the_users_already_is_told_and_not_written(shard: Shard) -> None:
    book = shard.new_book("A-1", max_redemptions_per_code="3")
    first = shard.assign_code(book, "u", "A-1")
    with shard.writes_nothing():
        assert shard.assign_code(book, "u", "A-1") == ["already_yours", *first[1:]]


def test_what_is_the_users_already_tells_how_many_uses_are_left(shard: Shard) -> None:
    book = shard.new_book("A-1", "B-2", max_redemptions_per_code="3")
    at_ms = shard.assign_code(book, "u", "A-1")[2]
    shard.redeem_coupon(book, "A-1")
    assert shard.assign_code(book, "u", "A-1") == ["already_yours", "A-1", at_ms, "4-1/4-2", "ledger", "2"]
    shard.redeem_coupon(book, "A-1")
    assert shard.assign_code(book, "u", "A-1") == ["already_yours", "A-1", at_ms, "4-1/4-3", "ledger", "1"]
    shard.set_rule(book, max_redemptions_per_code="")
    assert shard.assign_code(book, "u", "A-1")[5] == ""


def test_what_is_the_users_already_stays_so_whatever_the_book(shard: Shard) -> None:
    """Shut, at its limit, without room: none of it matters, since nothing is given."""
    book = shard.new_book("A-1", max_codes_per_user="1")
    first = shard.assign_code(book, "u", "A-1")
    book_is_shut(shard, book)
    no_room(shard)
    with shard.writes_nothing():
        assert shard.assign_code(book, "u", "A-1") == ["already_yours", *first[1:]]


def test_what_is_the_users_already_is_confirmed_by_an_event_under_an_idempotency_key(shard: Shard) -> None:
    """So the key's answer is kept in the ledger, too: how many uses are left changes later."""
    book = shard.new_book("A-1", max_redemptions_per_code="3")
    at_ms = shard.assign_code(book, "u", "A-1")[2]
    shard.redeem_coupon(book, "A-1")
    answer = ["A-1", at_ms, "4-1/4-3", "ledger", "2"]
    with shard.writes("meta", "events", f"idem:1:{book}:key 1"):
        assert shard.assign_code(book, "u", "A-1", KEYED) == ["confirmed", *answer]
    event = shard.events()[-1]
    assert event == Event(4, 3, "coupon_confirmed", book, "A-1", "u", event.at_ms, 1, idem="key 1", fingerprint="f1")
    key = shard.idem_key(book, "key 1")
    assert json.loads(shard.redis.get(key)) == ["f1", *answer, "already_yours"]
    assert DAY_MS - 60_000 < shard.redis.pttl(key) <= DAY_MS
    shard.redeem_coupon(book, "A-1")
    with shard.writes_nothing():
        assert shard.assign_code(book, "u", "A-1", KEYED) == ["replayed", *answer, "already_yours"]


def test_what_is_the_users_already_is_confirmed_whatever_the_book_where_there_is_room(shard: Shard) -> None:
    book = shard.new_book("A-1", max_codes_per_user="1")
    shard.assign_code(book, "u", "A-1")
    book_is_shut(shard, book)
    room = no_room(shard)
    assert peel(shard, lambda: shard.assign_code(book, "u", "A-1", KEYED), room)[:2] == ["confirmed", "A-1"]


def test_the_same_request_again_is_replayed(shard: Shard) -> None:
    book = shard.new_book("A-1")
    with shard.writes("meta", f"free:{book}", f"holders:{book}", "coupons:1:u", "events", f"idem:1:{book}:key 1"):
        first = shard.assign_code(book, "u", "A-1", KEYED)
    key = shard.idem_key(book, "key 1")
    assert json.loads(shard.redis.get(key)) == ["f1", *first[1:]]
    assert DAY_MS - 60_000 < shard.redis.pttl(key) <= DAY_MS
    assert (shard.events()[0].idem, shard.events()[0].fingerprint) == ("key 1", "f1")
    with shard.writes_nothing():
        assert shard.assign_code(book, "u", "A-1", KEYED) == ["replayed", *first[1:]]
    with shard.writes_nothing():
        assert shard.assign_code(book, "u", "A-1", KEYED._replace(fingerprint="f2")) == ["idempotency_key_reused"]


def test_replies_come_in_the_documented_order(shard: Shard) -> None:
    book = shard.new_book("A-1", max_codes_per_user="1")
    shard.assign_code(book, "u", "A-1")
    known = seen_before(shard, book, KEYED, "A-1", "1", "4-1", "ledger", "1")
    shut = book_is_shut(shard, book)
    room = no_room(shard)
    shard.quarantine(book, "A-1")
    holder = shard.holders(book)["A-1"]

    def give_to_another() -> None:
        shard.redis.hset(shard.keys.holders(book), "A-1", holder[:-1] + "v")

    def lend() -> None:
        shard.set_meta(backlog_max=1000)
        assert shard.load_codes(book, ["A-1"]) == ["ok", 1, 1]
        shard.set_meta(backlog_max=0)

    ours = [Obstacle("backlog_full", give_to_another)]
    code = [
        Obstacle("already_assigned", lambda: shard.redis.hdel(shard.keys.holders(book), "A-1")),
        Obstacle("code_quarantined", lambda: shard.redis.srem(shard.keys.quarantine(book), "A-1")),
        Obstacle("user_code_limit", lambda: shard.set_rule(book, max_codes_per_user="")),
        Obstacle("suspect", lambda: shard.set_rule(book, lent=0)),
        Obstacle("not_lent", lend),
    ]
    unknown = book_is_unknown(shard, book)
    obstacles = [*known, *unknown, *ours, *shut, *code, *room]
    assert peel(shard, lambda: shard.assign_code(book, "u", "A-1", KEYED), obstacles)[:2] == ["ok", "A-1"]


def test_a_replay_comes_before_already_yours(shard: Shard) -> None:
    book = shard.new_book("A-1", max_redemptions_per_code="2")
    first = shard.assign_code(book, "u", "A-1", KEYED)
    shard.redeem_coupon(book, "A-1")
    assert shard.assign_code(book, "u", "A-1", KEYED) == ["replayed", *first[1:]]
    assert shard.assign_code(book, "u", "A-1")[0] == "already_yours"


def test_a_shard_in_doubt_is_suspect(shard: Shard) -> None:
    book = shard.new_book("A-1", "B-2")
    shard.assign_code(book, "u", "A-1")
    assert_fenced(shard, lambda caller: shard.assign_code(book, "u", "A-1", caller))
    assert_fenced(shard, lambda caller: shard.assign_code(book, "u", "B-2", caller))


@pytest.mark.parametrize("lost", ["free", "holders"])
def test_a_code_is_not_taken_for_unlent_while_codes_are_missing(shard: Shard, lost: str) -> None:
    book = shard.new_book("A-1", "B-2")
    shard.assign_code(book, "u", "A-1")
    shard.redis.delete(f"{shard.keys.prefix}{lost}:{book}")
    with shard.writes_nothing():
        assert shard.assign_code(book, "v", "A-1" if lost == "holders" else "B-2") == ["suspect", "counts"]


def test_a_code_that_is_not_here_must_be_lent_first(shard: Shard) -> None:
    book = shard.new_book("A-1", unlent=1)
    with shard.writes_nothing():
        assert shard.assign_code(book, "u", "B-2") == ["not_lent"]
    shard.load_codes(book, ["B-2"])
    assert shard.assign_code(book, "u", "B-2")[:2] == ["ok", "B-2"]


def test_a_book_that_is_not_there_is_not_loaded(shard: Shard) -> None:
    with shard.writes_nothing():
        assert shard.assign_code("bk_000000000000000000", "u", "A-1") == ["book_not_loaded"]


def test_a_book_of_another_tenant_does_not_exist_even_for_its_holder(shard: Shard) -> None:
    book = shard.new_book("A-1", "B-2")
    shard.assign_code(book, "u", "A-1")
    for code in ("A-1", "B-2", "C-3"):
        with shard.writes_nothing():
            assert shard.assign_code(book, "u", code, STRANGER) == ["book_not_found"]


def test_a_code_of_another_user_is_refused_and_not_told_whose_it_is(shard: Shard) -> None:
    book = shard.new_book("A-1")
    shard.assign_code(book, "u", "A-1")
    with shard.writes_nothing():
        assert shard.assign_code(book, "v", "A-1") == ["already_assigned"]


def test_a_code_in_quarantine_is_refused_to_everybody_and_stays_there(shard: Shard) -> None:
    """Also while its book has codes in the pool, and when it is in the pool by mistake."""
    book = shard.new_book("A-1", "B-2")
    shard.quarantine(book, "Q-1", "B-2")
    for code in ("Q-1", "B-2"):
        for caller in (CALLER, KEYED):
            with shard.writes_nothing():
                assert shard.assign_code(book, "u", code, caller) == ["code_quarantined"]
    assert shard.assign_code(book, "u", "A-1")[0] == "ok"


def test_a_user_holds_no_more_codes_than_the_book_allows(shard: Shard) -> None:
    book = shard.new_book("A-1", "B-2", "C-3", max_codes_per_user="2")
    shard.assign_coupon(book, "u")
    assert shard.assign_code(book, "u", "B-2")[0] == "ok"
    with shard.writes_nothing():
        assert shard.assign_code(book, "u", "C-3") == ["user_code_limit", 2, 2]
    with shard.writes_nothing():
        assert shard.assign_code(book, "u", "D-4") == ["user_code_limit", 2, 2]
    assert shard.coupons("u", TENANT) == [f"{book}:A-1", f"{book}:B-2"]


def test_a_full_backlog_and_a_ledger_that_is_away_leave_the_code_in_the_pool(shard: Shard) -> None:
    book, quick = shard.new_book("A-1"), shard.new_book("B-2", ack="redis")
    no_room(shard)
    for name, code in ((book, "A-1"), (quick, "B-2")):
        with shard.writes_nothing():
            assert shard.assign_code(name, "u", code) == ["backlog_full"]
    shard.set_meta(backlog_max=10)
    with shard.writes_nothing():
        assert shard.assign_code(book, "u", "A-1") == ["ledger_behind"]
    assert shard.assign_code(quick, "u", "B-2")[0] == "ok"
