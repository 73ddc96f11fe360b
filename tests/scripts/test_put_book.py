"""put_book: every reply, their order, and what is written."""

from __future__ import annotations

import pytest

from tests.scripts.runner import Shard, assert_owned, new_rules

BOOK = "bk_000123456789abcdef"


def test_a_new_book_has_its_rules_and_empty_counters(shard: Shard) -> None:
    with shard.writes(f"book:{BOOK}"):
        assert shard.put_book(BOOK, 3, stored='{"name":"Sommer ☀ {07}"}') == ["ok"]
    rules = {name: str(value) for name, value in new_rules().items()}
    counters = {"lent": "0", "redeemed": "0", "partly_redeemed": "0", "quarantined": "0"}
    assert shard.book(BOOK) == {**rules, **counters, "stored": '{"name":"Sommer ☀ {07}"}', "version": "3"}


def test_a_newer_version_replaces_rules_and_keeps_counters(shard: Shard) -> None:
    book = shard.new_book("A-1", "B-2")
    shard.assign_coupon(book, "u")
    shard.redeem_coupon(book, "A-1")
    before = shard.book(book)
    with shard.writes(f"book:{book}"):
        assert shard.put_book(book, 10, known=True, status="paused", max_codes_per_user="4") == ["ok"]
    assert shard.book(book) == {**before, "status": "paused", "max_codes_per_user": "4", "version": "10"}
    assert (before["lent"], before["redeemed"]) == ("2", "1")


@pytest.mark.parametrize("known", [True, False])
def test_the_same_or_an_older_version_is_stale(shard: Shard, known: bool) -> None:
    shard.put_book(BOOK, 10)
    for version in (10, 9, 2):  # 9 and 2 are greater than 10 as text
        with shard.writes_nothing():
            assert shard.put_book(BOOK, version, known=known, status="closed") == ["stale"]


def test_a_book_may_be_sent_twice(shard: Shard) -> None:
    assert shard.put_book(BOOK, 1) == ["ok"]
    shard.load_codes(BOOK, ["A-1"])
    with shard.writes_nothing():
        assert shard.put_book(BOOK, 1) == ["stale"]
    assert shard.put_book(BOOK, 2) == ["ok"]
    assert shard.book(BOOK)["lent"] == "1"


def test_a_book_that_was_loaded_before_and_is_not_here_is_gone(shard: Shard) -> None:
    with shard.writes_nothing():
        assert shard.put_book(BOOK, 2, known=True) == ["gone"]


def test_only_the_owner_puts_a_book(shard: Shard) -> None:
    assert_owned(shard, lambda owner: shard.put_book(BOOK, 1, owner))


def test_suspect_comes_before_gone_and_stale(shard: Shard) -> None:
    shard.put_book(BOOK, 2)
    shard.set_meta(generation=99)
    for book in (BOOK, BOOK[:-1] + "0"):
        with shard.writes_nothing():
            assert shard.put_book(book, 1, known=True) == ["suspect", "owner"]


def test_versions_are_compared_exactly(shard: Shard) -> None:
    newest = 2**53 - 1
    shard.put_book(BOOK, newest - 1)
    assert shard.put_book(BOOK, newest, known=True) == ["ok"]
    assert shard.put_book(BOOK, newest, known=True) == ["stale"]
    assert shard.book(BOOK)["version"] == str(newest)
