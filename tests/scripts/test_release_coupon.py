"""release_coupon: every reply, their order, and what is written."""

from __future__ import annotations

from tests.scripts.runner import (
    EPOCH,
    STRANGER,
    Obstacle,
    Shard,
    assert_fenced,
    book_is_shut,
    book_is_unknown,
    no_room,
    peel,
)

HOLDER = "3-9 0 1700000000000 a user: {x}"
USER = "a user: {x}"


def quarantined(shard: Shard) -> str:
    """A book with A-1 in somebody's hands, B-2 in the pool, and Q-1 and Q-2 in quarantine."""
    book = shard.new_book("A-1", "B-2", max_redemptions_per_code="2", max_codes_per_user="1")
    assert shard.assign_coupon(book, "u")[1] == "A-1"
    shard.quarantine(book, "Q-1", "Q-2")
    return book


def test_a_code_leaves_the_quarantine_for_its_holders_hands(shard: Shard) -> None:
    book = quarantined(shard)
    before = shard.book(book)
    with shard.writes(f"book:{book}", f"quarantine:{book}", f"holders:{book}", f"coupons:1:{USER}"):
        assert shard.release_coupon(book, "Q-1", HOLDER) == ["ok"]
    assert shard.quarantined(book) == {"Q-2"}
    assert shard.holders(book).keys() == {"A-1", "Q-1"}
    assert shard.holders(book)["Q-1"] == HOLDER
    assert shard.coupons(USER) == [f"{book}:Q-1"]
    assert shard.book(book) == {**before, "quarantined": "1", "lent": "3"}


def test_the_counts_agree_afterwards(shard: Shard) -> None:
    """None of the scripts that compare them takes a released code for a loss."""
    book = quarantined(shard)
    shard.release_coupon(book, "Q-1", HOLDER)
    assert shard.read_book(book)[4:] == [2, "0", "1", 0]
    assert shard.read_codes(book, ["Q-1", "Q-2", "B-2"])[4] == [HOLDER, "quarantined", ""]
    assert shard.load_codes(book, ["C-3"]) == ["ok", 1, 2]
    assert shard.redeem_coupon(book, "B-2") == ["not_assigned"]


def test_a_released_coupon_is_like_any_other(shard: Shard) -> None:
    book = quarantined(shard)
    shard.release_coupon(book, "Q-1", HOLDER)
    assert shard.assign_code(book, USER, "Q-1") == ["already_yours", "Q-1", "1700000000000", "3-9", "ledger", "2"]
    assert shard.assign_code(book, "v", "Q-1") == ["already_assigned"]
    assert shard.assign_coupon(book, USER) == ["user_code_limit", 1, 1]
    assert shard.lock_coupon(book, "Q-1", new_token="t1")[:3] == ["ok", USER, "t1"]
    reply = shard.redeem_coupon(book, "Q-1", token="t1")
    assert (reply[:2], reply[3:]) == (["ok", USER], ["4-2", "1", "1"])
    assert shard.holders(book)["Q-1"] == f"3-9/4-2 1 1700000000000 {USER}"
    assert shard.list_coupons(USER) == ["ok", [f"{book}:Q-1"]]


def test_releasing_twice_changes_nothing_more(shard: Shard) -> None:
    """Also after the coupon was used in between, and by whatever holder the second one names."""
    book = quarantined(shard)
    shard.release_coupon(book, "Q-1", HOLDER)
    shard.redeem_coupon(book, "Q-1")
    for holder in (HOLDER, "3-8 0 1700000000000 v"):
        with shard.writes_nothing():
            assert shard.release_coupon(book, "Q-1", holder) == ["ok"]


def test_a_code_that_is_not_in_quarantine_stays_where_it_is(shard: Shard) -> None:
    book = quarantined(shard)
    for code in ("A-1", "B-2", "X-9"):
        with shard.writes_nothing():
            assert shard.release_coupon(book, code, HOLDER) == ["ok"]


def test_the_last_code_takes_the_quarantine_with_it(shard: Shard) -> None:
    book = quarantined(shard)
    shard.release_coupon(book, "Q-1", HOLDER)
    shard.release_coupon(book, "Q-2", "3-8 0 1700000000000 v")
    assert not shard.redis.exists(shard.keys.quarantine(book))
    assert (shard.book(book)["quarantined"], shard.book(book)["lent"]) == ("0", "4")


def test_it_goes_on_in_a_book_that_is_shut_and_without_room(shard: Shard) -> None:
    """The ledger has the record already: Redis only follows."""
    book = quarantined(shard)
    book_is_shut(shard, book)
    no_room(shard)
    assert shard.release_coupon(book, "Q-1", HOLDER) == ["ok"]
    assert "Q-1" in shard.holders(book)


def test_replies_come_in_the_documented_order(shard: Shard) -> None:
    book = quarantined(shard)
    shard.set_meta(epoch=EPOCH + 1)
    doubt = Obstacle("suspect", lambda: shard.set_meta(epoch=EPOCH))
    obstacles = [doubt, *book_is_unknown(shard, book)]
    assert peel(shard, lambda: shard.release_coupon(book, "Q-1", HOLDER), obstacles) == ["ok"]
    assert shard.quarantined(book) == {"Q-2"}


def test_a_shard_in_doubt_is_suspect(shard: Shard) -> None:
    book = quarantined(shard)
    assert_fenced(shard, lambda caller: shard.release_coupon(book, "Q-1", HOLDER, caller))


def test_a_book_that_is_not_there_is_not_loaded(shard: Shard) -> None:
    with shard.writes_nothing():
        assert shard.release_coupon("bk_000000000000000000", "Q-1", HOLDER) == ["book_not_loaded"]


def test_a_book_of_another_tenant_does_not_exist(shard: Shard) -> None:
    book = quarantined(shard)
    with shard.writes_nothing():
        assert shard.release_coupon(book, "Q-1", HOLDER, STRANGER) == ["book_not_found"]
