"""read_codes: every reply and their order; it writes nothing."""

from __future__ import annotations

import pytest

from tests.scripts.runner import EPOCH, STRANGER, Obstacle, Shard, assert_fenced, book_is_shut, book_is_unknown, peel


def test_holders_and_locks_are_told_in_the_order_asked(shard: Shard) -> None:
    book = shard.new_book("A-1", "B-2", "C-3", "D-4", max_redemptions_per_code="3", ack="redis")
    first, second = (shard.assign_coupon(book, user_id)[2] for user_id in ("u", "a user: {x}"))
    shard.redeem_coupon(book, "B-2")
    shard.lock_coupon(book, "A-1", ttl_ms=60_000)
    before = shard.now_ms()
    with shard.writes_nothing():
        outcome, now_ms, ack, uses_max, holders, locks, book_status = shard.read_codes(
            book, ["D-4", "B-2", "X-9", "A-1"]
        )
    assert (outcome, ack, uses_max, book_status) == ("ok", "redis", "3", "active")
    assert before <= int(now_ms) <= shard.now_ms()
    assert holders == ["", f"4-2/4-3 1 {second} a user: {{x}}", "", f"4-1 0 {first} u"]
    assert locks[:3] == [-2, -2, -2]
    assert 50_000 < locks[3] <= 60_000


def test_codes_in_quarantine_are_told(shard: Shard) -> None:
    """But a coupon is its holder's, whatever else is said of its code."""
    book = shard.new_book("A-1", "B-2")
    at_ms = shard.assign_coupon(book, "u")[2]
    shard.quarantine(book, "Q-1", "A-1")
    with shard.writes_nothing():
        holders = shard.read_codes(book, ["Q-1", "A-1", "B-2", "X-9"])[4]
    assert holders == ["quarantined", f"4-1 0 {at_ms} u", "", ""]


def test_a_book_without_a_redemption_limit_says_so(shard: Shard) -> None:
    book = shard.assigned(max_redemptions_per_code="")
    assert shard.read_codes(book, ["A-1"])[2:4] == ["ledger", ""]


def test_a_thousand_codes_are_read_at_once(shard: Shard) -> None:
    codes = [f"{number:04d}" + "X" * 60 for number in range(1000)]
    book = shard.new_book()
    for start in (0, 500):
        shard.load_codes(book, codes[start : start + 500])
    shard.assign_code(book, "u", codes[999])
    shard.lock_coupon(book, codes[999])
    holders, locks = shard.read_codes(book, codes)[4:6]
    assert holders[:999] == [""] * 999
    assert holders[999].endswith(" u")
    assert [lock > 0 for lock in locks] == [False] * 999 + [True]


def test_a_book_that_is_shut_is_read_all_the_same_and_its_status_told_by_the_clock_of_redis(shard: Shard) -> None:
    """In the order in which assign, lock and redeem are refused."""
    book = shard.assigned()
    for shut in book_is_shut(shard, book):
        outcome, *_, book_status = shard.read_codes(book, ["A-1"])
        assert (outcome, f"book_{book_status}") == ("ok", shut.reply)
        shut.remove()
    assert shard.read_codes(book, ["A-1"])[6] == "active"


def test_no_lock_is_told_to_outlive_its_book(shard: Shard) -> None:
    """The end of the book was moved after the lock was made."""
    book = shard.new_book("A-1", "B-2")
    shard.assign_coupon(book, "u")
    shard.lock_coupon(book, "A-1", ttl_ms=60_000)
    shard.set_rule(book, expires_at_ms=shard.now_ms() + 30_000)
    locks = shard.read_codes(book, ["A-1", "B-2"])[5]
    assert 20_000 < locks[0] <= 30_000
    assert locks[1] == -2
    shard.set_rule(book, expires_at_ms=shard.now_ms() - 1)
    assert shard.read_codes(book, ["A-1"])[5][0] < 0


def test_replies_come_in_the_documented_order(shard: Shard) -> None:
    book = shard.assigned()
    shard.set_meta(epoch=EPOCH + 1)
    shard.set_rule(book, lent=2)
    doubt = Obstacle("suspect", lambda: shard.set_meta(epoch=EPOCH))
    missing = Obstacle("suspect", lambda: shard.set_rule(book, lent=1))
    obstacles = [doubt, *book_is_unknown(shard, book), missing]
    assert peel(shard, lambda: shard.read_codes(book, ["A-1"]), obstacles)[0] == "ok"


@pytest.mark.parametrize("lost", ["free", "holders"])
def test_codes_that_are_missing_are_suspect(shard: Shard, lost: str) -> None:
    book = shard.new_book("A-1", "B-2")
    shard.assign_coupon(book, "u")
    shard.redis.delete(f"{shard.keys.prefix}{lost}:{book}")
    for code in ("A-1", "B-2", "X-9"):
        assert shard.read_codes(book, [code]) == ["suspect", "counts"]


def test_a_shard_in_doubt_is_suspect(shard: Shard) -> None:
    book = shard.assigned()
    assert_fenced(shard, lambda caller: shard.read_codes(book, ["A-1"], caller))


def test_a_book_of_another_tenant_does_not_exist(shard: Shard) -> None:
    assert shard.read_codes(shard.assigned(), ["A-1"], STRANGER) == ["book_not_found"]
