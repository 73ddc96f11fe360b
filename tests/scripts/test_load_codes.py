"""load_codes: every reply, what is written, and that a code gets into the pool once."""

from __future__ import annotations

import pytest

from coupon_svc.redis.control import CODES_PER_CALL_MAX
from tests.scripts.runner import Shard, assert_owned


def test_codes_come_into_the_pool_with_their_scores(shard: Shard) -> None:
    book = shard.new_book(unlent=9)
    with shard.writes(f"book:{book}", f"free:{book}"):
        assert shard.load_codes(book, ["A-1", "B-2"], kept_back=7, scores=[2**53 - 1, 3]) == ["ok", 2, 2]
    assert shard.redis.zrange(shard.keys.free(book), 0, -1, withscores=True) == [("B-2", 3), ("A-1", 2**53 - 1)]


def test_of_the_book_only_lent_and_unlent_move(shard: Shard) -> None:
    book = shard.new_book("A-1", unlent=9)
    before = shard.book(book)
    shard.load_codes(book, ["B-2", "C-3"], kept_back=7)
    assert shard.book(book) == {**before, "lent": "3", "unlent": "7"}


def test_codes_may_be_sent_twice_and_keep_their_place(shard: Shard) -> None:
    book = shard.new_book("A-1", "B-2", "C-3")
    with shard.writes_nothing():
        assert shard.load_codes(book, ["C-3", "B-2", "A-1"]) == ["ok", 0, 3]
    assert shard.free(book) == ["A-1", "B-2", "C-3"]
    assert shard.load_codes(book, ["C-3", "D-4"], scores=[0, 9]) == ["ok", 1, 4]
    assert shard.book(book)["lent"] == "4"


def test_codes_in_somebodys_hands_are_skipped(shard: Shard) -> None:
    book = shard.new_book("A-1", "B-2", "C-3")
    shard.assign_coupon(book, "u")
    shard.assign_coupon(book, "v")
    shard.redeem_coupon(book, "B-2")
    with shard.writes_nothing():
        assert shard.load_codes(book, ["A-1", "B-2", "C-3"]) == ["ok", 0, 1]
    assert shard.load_codes(book, ["A-1", "D-4", "B-2", "E-5"], scores=[5, 6, 7, 8]) == ["ok", 2, 3]
    scores = shard.redis.zrange(shard.keys.free(book), 0, -1, withscores=True)
    assert scores == [("C-3", 2), ("D-4", 6), ("E-5", 8)]
    assert shard.book(book)["lent"] == "5"


def test_a_code_that_is_named_twice_is_loaded_once(shard: Shard) -> None:
    book = shard.new_book()
    assert shard.load_codes(book, ["A-1", "A-1", "B-2"]) == ["ok", 2, 2]
    assert shard.book(book)["lent"] == "2"


def test_no_codes_only_tell_how_many_are_kept_back(shard: Shard) -> None:
    book = shard.new_book("A-1", unlent=5)
    with shard.writes(f"book:{book}"):
        assert shard.load_codes(book, [], kept_back=4) == ["ok", 0, 1]
    assert shard.book(book)["unlent"] == "4"


def test_as_many_codes_as_a_call_may_hold_are_loaded_and_sent_again(shard: Shard) -> None:
    assert CODES_PER_CALL_MAX == 500
    book = shard.new_book()
    codes = [f"{number:04d}" + "X" * 60 for number in range(CODES_PER_CALL_MAX)]
    assert shard.load_codes(book, codes) == ["ok", 500, 500]
    assert shard.free(book) == codes
    assert [shard.assign_coupon(book, "u")[0] for _ in range(3)] == ["ok"] * 3
    assert shard.load_codes(book, codes) == ["ok", 0, 497]
    assert shard.book(book)["lent"] == "500"


def test_a_book_that_is_not_there_gets_no_codes(shard: Shard) -> None:
    with shard.writes_nothing():
        assert shard.load_codes("bk_000000000000000000", ["A-1"]) == ["book_not_loaded"]


def test_only_the_owner_loads_codes(shard: Shard) -> None:
    book = shard.new_book("A-1")
    assert_owned(shard, lambda owner: shard.load_codes(book, ["B-2"], owner, kept_back=3))


def test_suspect_comes_before_book_not_loaded(shard: Shard) -> None:
    shard.set_meta(generation=99)
    assert shard.load_codes("bk_000000000000000000", ["A-1"]) == ["suspect", "owner"]


def test_a_code_goes_to_one_user_though_its_holders_were_deleted_before_a_load_is_sent_again(shard: Shard) -> None:
    book = shard.new_book("A-1", "B-2")
    first = shard.assign_coupon(book, "u")
    shard.redis.delete(shard.keys.holders(book))
    with shard.writes_nothing():
        assert shard.load_codes(book, ["A-1", "B-2"]) == ["suspect", "counts"]
    others = [shard.assign_coupon(book, "v") for _ in range(2)]
    assert first[1] not in [reply[1] for reply in others if reply[0] == "ok"]


@pytest.mark.parametrize("lost", ["free", "holders", "both"])
def test_no_codes_come_to_a_book_of_which_codes_are_missing(shard: Shard, lost: str) -> None:
    book = shard.new_book("A-1", "B-2")
    shard.assign_coupon(book, "u")
    for name in ("free", "holders") if lost == "both" else (lost,):
        shard.redis.delete(f"{shard.keys.prefix}{name}:{book}")
    for codes in ([], ["B-2"], ["C-3"]):
        with shard.writes_nothing():
            assert shard.load_codes(book, codes) == ["suspect", "counts"]


def test_no_codes_come_to_a_book_that_has_more_codes_than_were_brought(shard: Shard) -> None:
    """Somebody put one in by hand, or took the count back."""
    book = shard.new_book("A-1", "B-2")
    shard.set_rule(book, lent=1)
    with shard.writes_nothing():
        assert shard.load_codes(book, ["C-3"]) == ["suspect", "counts"]
