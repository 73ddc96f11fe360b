"""list_coupons: every reply, pages and bounds; it writes nothing."""

from __future__ import annotations

from tests.scripts.runner import STRANGER, Shard, assert_fenced


def test_a_users_coupons_are_listed_by_book_and_code(shard: Shard) -> None:
    books = sorted(shard.new_book("B-2", "A-1") for _ in range(3))
    for book in reversed(books):
        shard.assign_coupon(book, "u")
        shard.assign_coupon(book, "u")
    with shard.writes_nothing():
        assert shard.list_coupons("u") == ["ok", [f"{book}:{code}" for book in books for code in ("A-1", "B-2")]]


def test_a_user_without_coupons_has_an_empty_list(shard: Shard) -> None:
    with shard.writes_nothing():
        assert shard.list_coupons("nobody") == ["ok", []]


def test_pages_follow_each_other_without_a_gap(shard: Shard) -> None:
    codes = [f"C-{number:02d}" for number in range(7)]
    book = shard.new_book(*codes)
    for _ in codes:
        shard.assign_coupon(book, "u")
    listed: list[str] = []
    low = "-"
    while page := shard.list_coupons("u", low=low, limit=3)[1]:
        assert len(page) <= 3
        listed += page
        low = "(" + page[-1]
    assert listed == [f"{book}:{code}" for code in codes]


def test_the_bounds_cut_out_one_book(shard: Shard) -> None:
    book, other = shard.assigned("A-1"), shard.assigned("B-2")
    assert shard.list_coupons("u", low=f"[{book}:", high=f"({book};") == ["ok", [f"{book}:A-1"]]
    assert shard.list_coupons("u", low=f"[{other}:", high=f"({other};") == ["ok", [f"{other}:B-2"]]


def test_a_thousand_and_one_are_listed_at_once(shard: Shard) -> None:
    members = {f"bk_x:{number:04d}": 0 for number in range(1005)}
    shard.redis.zadd(shard.keys.coupons(1, "u"), members)
    assert shard.list_coupons("u", limit=1001) == ["ok", sorted(members)[:1001]]


def test_users_of_the_same_name_at_two_tenants_are_two(shard: Shard) -> None:
    shard.assigned("A-1", "u")
    assert shard.list_coupons("u", STRANGER) == ["ok", []]


def test_a_shard_in_doubt_is_suspect_and_its_list_not_empty(shard: Shard) -> None:
    shard.assigned()
    assert_fenced(shard, lambda caller: shard.list_coupons("u", caller))
    assert_fenced(shard, lambda caller: shard.list_coupons("nobody", caller))
