"""assign_coupon: every reply, their order, and what is written."""

from __future__ import annotations

import json

import pytest

from coupon_svc.domain.events import Event
from coupon_svc.redis.codec import ListRecord
from tests.scripts.runner import (
    CALLER,
    DAY_MS,
    EPOCH,
    STRANGER,
    Caller,
    Obstacle,
    Reply,
    Shard,
    assert_fenced,
    book_is_shut,
    book_is_unknown,
    no_room,
    peel,
    seen_before,
)

KEYED = Caller(idem="key 1", fingerprint="f1")


def test_the_next_code_of_the_pool_is_assigned(shard: Shard) -> None:
    book = shard.new_book("B-2", "A-1", max_redemptions_per_code="3")
    before = shard.now_ms()
    with shard.writes("meta", f"free:{book}", f"holders:{book}", "coupons:1:u", "events"):
        outcome, code, at_ms, position, ack, left = shard.assign_coupon(book, "u")
    assert (outcome, code, position, ack, left) == ("ok", "B-2", "4-1", "ledger", "3")
    assert before <= int(at_ms) <= shard.now_ms()
    assert shard.free(book) == ["A-1"]
    assert shard.holders(book) == {"B-2": f"4-1 0 {at_ms} u"}
    assert shard.coupons("u") == [f"{book}:B-2"]
    events = f'[["coupon_assigned","{book}","B-2","u","",""]]'
    assert shard.entries() == [
        ("4-1", {"n": "1", "after": "", "tip": shard.tip(), "at_ms": at_ms, "events": events}),
    ]
    assert shard.events() == [Event(4, 1, "coupon_assigned", book, "B-2", "u", int(at_ms))]


def test_of_the_meta_only_the_seq_moves_and_of_the_book_nothing(shard: Shard) -> None:
    book = shard.new_book("A-1")
    meta, rules = shard.meta(), shard.book(book)
    shard.assign_coupon(book, "u")
    assert shard.meta() == {**meta, "seq": "1", "tip": shard.tip()}
    assert shard.book(book) == rules


def test_codes_are_dealt_by_score_and_positions_have_no_gap(shard: Shard) -> None:
    book = shard.new_book()
    assert shard.load_codes(book, ["A-1", "B-2", "C-3"], scores=[2**53, 5, 70]) == ["ok", 3, 3]
    replies = [shard.assign_coupon(book, "u") for _ in range(3)]
    assert [reply[1] for reply in replies] == ["B-2", "C-3", "A-1"]
    assert [reply[3] for reply in replies] == ["4-1", "4-2", "4-3"]
    assert [event.code for event in shard.events()] == ["B-2", "C-3", "A-1"]
    assert shard.coupons("u") == [f"{book}:A-1", f"{book}:B-2", f"{book}:C-3"]


def test_a_book_without_a_redemption_limit_says_so(shard: Shard) -> None:
    book = shard.new_book("A-1", max_redemptions_per_code="", ack="redis")
    assert shard.assign_coupon(book, "u")[4:] == ["redis", ""]


def test_the_idempotency_key_is_kept_for_a_day_with_the_answer(shard: Shard) -> None:
    book = shard.new_book("A-1", "B-2")
    with shard.writes("meta", f"free:{book}", f"holders:{book}", "coupons:1:u", "events", f"idem:1:{book}:key 1"):
        reply = shard.assign_coupon(book, "u", KEYED)
    key = shard.idem_key(book, "key 1")
    assert json.loads(shard.redis.get(key)) == ["f1", *reply[1:]]
    assert DAY_MS - 60_000 < shard.redis.pttl(key) <= DAY_MS
    assert (shard.events()[0].idem, shard.events()[0].fingerprint) == ("key 1", "f1")


def test_the_same_request_again_is_replayed(shard: Shard) -> None:
    book = shard.new_book("A-1", "B-2")
    first = shard.assign_coupon(book, "u", KEYED)
    with shard.writes_nothing():
        assert shard.assign_coupon(book, "u", KEYED) == ["replayed", *first[1:]]


def test_another_request_with_the_same_idempotency_key_is_refused(shard: Shard) -> None:
    book = shard.new_book("A-1", "B-2")
    shard.assign_coupon(book, "u", KEYED)
    with shard.writes_nothing():
        assert shard.assign_coupon(book, "v", KEYED._replace(fingerprint="f2")) == ["idempotency_key_reused"]


def test_a_refusal_is_not_remembered(shard: Shard) -> None:
    book = shard.new_book(unlent=0)
    with shard.writes_nothing():
        assert shard.assign_coupon(book, "u", KEYED) == ["book_exhausted"]
    shard.load_codes(book, ["A-1"])
    assert shard.assign_coupon(book, "u", KEYED)[0] == "ok"


def test_another_idempotency_key_or_book_is_another_request(shard: Shard) -> None:
    book, other = shard.new_book("A-1", "B-2"), shard.new_book("C-3")
    assert shard.assign_coupon(book, "u", KEYED)[1] == "A-1"
    assert shard.assign_coupon(book, "u", KEYED._replace(idem="key 2"))[:2] == ["ok", "B-2"]
    assert shard.assign_coupon(other, "u", KEYED)[:2] == ["ok", "C-3"]


def test_replies_come_in_the_documented_order(shard: Shard) -> None:
    book = shard.new_book("A-1", max_codes_per_user="1")
    assert shard.assign_coupon(book, "u")[0] == "ok"
    known = seen_before(shard, book, KEYED, "A-1", "1", "4-1", "ledger", "1")
    shut = book_is_shut(shard, book)
    room = no_room(shard)
    shard.set_rule(book, lent=2, unlent=0)
    pool = [
        Obstacle("user_code_limit", lambda: shard.set_rule(book, max_codes_per_user="")),
        Obstacle("suspect", lambda: shard.set_rule(book, lent=1)),
        Obstacle("book_exhausted", lambda: shard.set_rule(book, unlent=1)),
        Obstacle("refilling", lambda: shard.load_codes(book, ["B-2"], kept_back=1)),
    ]
    unknown = book_is_unknown(shard, book)
    last = peel(shard, lambda: shard.assign_coupon(book, "u", KEYED), [*known, *unknown, *shut, *pool, *room])
    assert last[:2] == ["ok", "B-2"]


def test_a_replay_comes_first_whatever_has_become_of_the_book(shard: Shard) -> None:
    book = shard.new_book("A-1")
    first = shard.assign_coupon(book, "u", KEYED)
    book_is_shut(shard, book)
    no_room(shard)
    shard.hide(shard.keys.book(book))
    with shard.writes_nothing():
        assert shard.assign_coupon(book, "u", KEYED) == ["replayed", *first[1:]]


def test_a_shard_in_doubt_is_suspect(shard: Shard) -> None:
    book = shard.new_book("A-1", "B-2")
    shard.assign_coupon(book, "u", KEYED)
    assert_fenced(shard, lambda caller: shard.assign_coupon(book, "v", caller))


def test_a_shard_in_doubt_replays_nothing(shard: Shard) -> None:
    book = shard.new_book("A-1", "B-2")
    shard.assign_coupon(book, "u", KEYED)
    assert_fenced(shard, lambda caller: shard.assign_coupon(book, "u", caller), KEYED)


@pytest.mark.parametrize("lost", ["free", "holders", "both"])
def test_codes_that_are_gone_are_no_sold_out_book(shard: Shard, lost: str) -> None:
    codes = ["A-1", "B-2", "C-3"]
    book = shard.new_book(*codes)
    dealt = codes if lost == "holders" else codes[:2]
    for _ in dealt:
        shard.assign_coupon(book, "u")
    if lost in ("free", "both"):
        shard.redis.delete(shard.keys.free(book))
    if lost in ("holders", "both"):
        shard.redis.delete(shard.keys.holders(book))
    with shard.writes_nothing():
        assert shard.assign_coupon(book, "v") == ["suspect", "counts"]


def test_a_book_that_is_not_there_is_not_loaded(shard: Shard) -> None:
    with shard.writes_nothing():
        assert shard.assign_coupon("bk_000000000000000000", "u") == ["book_not_loaded"]


def test_a_book_of_another_tenant_does_not_exist(shard: Shard) -> None:
    book = shard.new_book("A-1")
    with shard.writes_nothing():
        assert shard.assign_coupon(book, "u", STRANGER) == ["book_not_found"]


def test_a_book_opens_and_ends_by_the_clock_of_the_server(shard: Shard) -> None:
    book, now_ms = shard.new_book("A-1"), shard.now_ms()
    shard.set_rule(book, starts_at_ms=now_ms + 60_000)
    assert shard.assign_coupon(book, "u") == ["book_not_started"]
    shard.set_rule(book, starts_at_ms=now_ms, expires_at_ms=now_ms)
    assert shard.assign_coupon(book, "u") == ["book_expired"]
    shard.set_rule(book, expires_at_ms=now_ms + 60_000)
    assert shard.assign_coupon(book, "u")[0] == "ok"


def test_a_user_holds_no_more_codes_than_the_book_allows(shard: Shard) -> None:
    book = shard.new_book("A-1", "B-2", "C-3", "D-4", max_codes_per_user="2")
    assert [shard.assign_coupon(book, "u")[0] for _ in range(2)] == ["ok", "ok"]
    with shard.writes_nothing():
        assert shard.assign_coupon(book, "u") == ["user_code_limit", 2, 2]
    assert shard.assign_coupon(book, "v")[0] == "ok"


def test_a_limit_that_was_lowered_tells_how_many_are_held(shard: Shard) -> None:
    book = shard.new_book("A-1", "B-2", "C-3", max_codes_per_user="2")
    shard.assign_coupon(book, "u")
    shard.assign_coupon(book, "u")
    shard.put_book(book, 2, known=True, max_codes_per_user="1")
    assert shard.assign_coupon(book, "u") == ["user_code_limit", 1, 2]


def test_codes_of_other_books_do_not_count_for_the_limit(shard: Shard) -> None:
    """Also of books whose id sorts next to this one's."""
    book = shard.new_book("A-1", max_codes_per_user="1")
    last = book[-1]
    for neighbour in (
        book + "a",
        book[:-1],
        book + "0",
        book + "~",
        book[:-1] + chr(ord(last) + 1),
        book[:-1] + chr(ord(last) - 1),
    ):
        shard.put_book(neighbour, 1, total=1)
        shard.load_codes(neighbour, ["B-2"])
        assert shard.assign_coupon(neighbour, "u")[0] == "ok"
    assert shard.assign_coupon(book, "u")[0] == "ok"
    assert shard.assign_coupon(book, "u")[0] == "user_code_limit"


def test_an_empty_pool_is_refilled_while_postgres_keeps_codes_back(shard: Shard) -> None:
    book = shard.new_book("A-1", unlent=1)
    shard.assign_coupon(book, "u")
    with shard.writes_nothing():
        assert shard.assign_coupon(book, "u") == ["refilling"]
    assert shard.load_codes(book, ["B-2"], kept_back=0) == ["ok", 1, 1]
    assert shard.assign_coupon(book, "u")[1] == "B-2"
    with shard.writes_nothing():
        assert shard.assign_coupon(book, "u") == ["book_exhausted"]


def test_codes_in_quarantine_are_never_dealt_and_do_not_count_as_missing(shard: Shard) -> None:
    book = shard.new_book("A-1")
    shard.quarantine(book, "Q-1", "Q-2")
    assert shard.assign_coupon(book, "u")[:2] == ["ok", "A-1"]
    with shard.writes_nothing():
        assert shard.assign_coupon(book, "u") == ["book_exhausted"]
    shard.set_rule(book, unlent=1)
    with shard.writes_nothing():
        assert shard.assign_coupon(book, "u") == ["refilling"]


def test_the_backlog_has_its_bound_and_the_code_stays_in_the_pool(shard: Shard) -> None:
    assert shard.open_shard(backlog_max=2) == ["ok", 0]
    shard.keep_ledger_at_hand()
    book = shard.new_book("A-1", "B-2", "C-3")
    assert [shard.assign_coupon(book, "u")[0] for _ in range(2)] == ["ok", "ok"]
    with shard.writes_nothing():
        assert shard.assign_coupon(book, "u") == ["backlog_full"]
    assert shard.publish_position(1) == ["ok", 2]
    assert shard.assign_coupon(book, "u")[0] == "ok"


@pytest.mark.parametrize("ack", ["ledger", "redis"])
def test_a_ledger_that_is_away_stops_only_books_that_wait_for_it(shard: Shard, ack: str) -> None:
    book = shard.new_book("A-1", ack=ack)
    assert shard.publish_position(0, ledger="away") == ["ok", 0]
    if ack == "ledger":
        with shard.writes_nothing():
            assert shard.assign_coupon(book, "u") == ["ledger_behind"]
    else:
        assert shard.assign_coupon(book, "u")[0] == "ok"


def test_a_ledger_that_was_not_seen_for_three_seconds_is_behind(shard: Shard) -> None:
    book = shard.new_book("A-1", "B-2")
    shard.set_meta(ledger_at_ms=shard.now_ms() - 3001)
    assert shard.assign_coupon(book, "u") == ["ledger_behind"]
    shard.publish_position(0)
    assert shard.assign_coupon(book, "u")[0] == "ok"


def test_big_numbers_stay_exact_text(shard: Shard) -> None:
    seq = 2**53 - 10
    shard.set_meta(seq=seq, committed=seq - 1)
    book = shard.new_book("A-1")
    _, _, at_ms, position, _, _ = shard.assign_coupon(book, "u", KEYED._replace(seen_seq=seq))
    assert position == f"{EPOCH}-{seq + 1}"
    assert len(at_ms) == 13
    assert at_ms.isdigit()
    assert shard.entries()[0][0] == position
    assert shard.entries()[0][1]["at_ms"] == at_ms
    assert shard.assign_coupon(book, "u", KEYED)[2:4] == [at_ms, position]
    assert shard.assign_coupon(book, "u", Caller(seen_seq=seq + 2)) == ["suspect", "position"]
    assert shard.assign_coupon(book, "u", Caller(seen_seq=seq + 1)) == ["book_exhausted"]


def assign_of_list(shard: Shard, book: str, user: str, index: int, fingerprint: str = "f1") -> Reply:
    """One user of a list with the Idempotency-Key `list`."""
    return shard._call(
        "assign_coupon",
        CALLER,
        book_id=book,
        user_id=user,
        idempotency_key=f"list/{index}",
        list_idempotency_key="list",
        fingerprint=fingerprint,
    )


def test_the_first_effect_of_a_list_takes_its_key(shard: Shard) -> None:
    book = shard.new_book("A-1", "B-2", max_codes_per_user="1")
    shard.assign_coupon(book, "u")
    with shard.writes_nothing():
        assert assign_of_list(shard, book, "u", 0)[0] == "user_code_limit"
    assert assign_of_list(shard, book, "v", 1)[0] == "ok"
    key = shard.idem_key(book, "list")
    assert shard.redis.get(key) == ListRecord("f1").encode()
    assert DAY_MS - 60_000 < shard.redis.pttl(key) <= DAY_MS


def test_a_user_of_a_list_is_replayed_and_the_next_one_is_not(shard: Shard) -> None:
    book = shard.new_book("A-1", "B-2")
    first = assign_of_list(shard, book, "u", 0)
    with shard.writes_nothing():
        assert assign_of_list(shard, book, "u", 0) == ["replayed", *first[1:]]
    assert assign_of_list(shard, book, "u", 1)[:2] == ["ok", "B-2"]


def test_a_key_is_for_one_list_or_for_one_request(shard: Shard) -> None:
    book = shard.new_book("A-1", "B-2", "C-3")
    assign_of_list(shard, book, "u", 0)
    shard.assign_coupon(book, "w", KEYED)
    with shard.writes_nothing():
        assert assign_of_list(shard, book, "u", 1, "f2") == ["idempotency_key_reused"]
        assert shard.assign_coupon(book, "u", KEYED._replace(idem="list", fingerprint="f2")) == [
            "idempotency_key_reused"
        ]
        assert shard._call(
            "assign_coupon", CALLER, book_id=book, user_id="u", idempotency_key="key 1/0", list_idempotency_key="key 1",
            fingerprint="f2",
        ) == ["idempotency_key_reused"]  # fmt: skip
