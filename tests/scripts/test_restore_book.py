"""restore_book: every reply, and what is written."""

from __future__ import annotations

from coupon_svc.redis.control import CODES_PER_CALL_MAX
from tests.scripts.every_script import worn
from tests.scripts.runner import Shard, assert_shut_by, new_rules

BOOK = "bk_000123456789abcdef"


def test_a_book_comes_back_with_its_counters_and_its_quarantine_and_an_empty_pool(shard: Shard) -> None:
    shard.shut_shard()
    with shard.writes(f"book:{BOOK}", f"quarantine:{BOOK}"):
        assert shard.restore_book(
            BOOK, version=3, lent=2, redeemed=1, partly_redeemed=3, quarantined=["Q-1", "Q-2"], total=9
        ) == ["ok"]
    rules = {name: str(value) for name, value in new_rules().items()}
    counters = {"lent": "2", "redeemed": "1", "partly_redeemed": "3", "total": "9", "version": "3"}
    assert shard.book(BOOK) == {**rules, **counters, "quarantined": "2"}
    assert shard.quarantined(BOOK) == {"Q-1", "Q-2"}


def test_a_book_without_a_quarantine_has_no_such_key(shard: Shard) -> None:
    shard.shut_shard()
    with shard.writes(f"book:{BOOK}"):
        assert shard.restore_book(BOOK) == ["ok"]


def test_of_a_book_that_is_here_pool_and_quarantine_are_replaced_and_holders_kept(shard: Shard) -> None:
    book = worn(shard)
    shard.shut_shard()
    before, holders = shard.book(book), shard.holders(book)
    with shard.writes(f"book:{book}", f"free:{book}", f"quarantine:{book}"):
        assert shard.restore_book(book, version=7, lent=2, quarantined=["C-3"], status="paused") == ["ok"]
    assert shard.free(book) == []
    assert shard.quarantined(book) == {"C-3"}
    assert shard.holders(book) == holders
    after = shard.book(book)
    assert after.keys() == before.keys()
    assert {name: after[name] for name in ("version", "lent", "quarantined", "status")} == {
        "version": "7",
        "lent": "2",
        "quarantined": "1",
        "status": "paused",
    }


def test_an_older_version_is_restored_too(shard: Shard) -> None:
    """The ledger is right: a version that it has not was never committed."""
    book = shard.new_book()
    shard.put_book(book, 9, known=True, status="closed")
    shard.shut_shard()
    shard.restore_book(book, version=2)
    assert (shard.book(book)["version"], shard.book(book)["status"]) == ("2", "active")


def test_a_book_may_be_sent_twice(shard: Shard) -> None:
    shard.shut_shard()
    shard.restore_book(BOOK, quarantined=["Q-1"], lent=2)
    with shard.writes_nothing():
        assert shard.restore_book(BOOK, quarantined=["Q-1"], lent=2) == ["ok"]


def test_as_many_codes_as_a_call_may_hold_are_quarantined(shard: Shard) -> None:
    shard.shut_shard()
    codes = [f"{number:04d}" + "X" * 60 for number in range(CODES_PER_CALL_MAX)]
    assert shard.restore_book(BOOK, quarantined=codes) == ["ok"]
    assert shard.quarantined(BOOK) == set(codes)


def test_more_codes_of_its_quarantine_follow_and_replace_nothing(shard: Shard) -> None:
    shard.shut_shard()
    shard.restore_book(BOOK, quarantined=["Q-1"], lent=2)
    for codes in (["Q-2", "Q-3"], ["Q-4"]):
        with shard.writes(f"quarantine:{BOOK}"):
            assert shard.restore_quarantine(BOOK, codes) == ["ok"]
        with shard.writes_nothing():
            assert shard.restore_quarantine(BOOK, codes) == ["ok"]
    assert shard.quarantined(BOOK) == {"Q-1", "Q-2", "Q-3", "Q-4"}


def test_only_who_shut_the_shard_adds_to_a_quarantine(shard: Shard) -> None:
    assert_shut_by(shard, lambda generation: shard.restore_quarantine(BOOK, ["Q-1"], generation))


def test_only_who_shut_the_shard_restores_a_book(shard: Shard) -> None:
    assert_shut_by(shard, lambda generation: shard.restore_book(BOOK, generation, quarantined=["Q-1"]))


def test_codes_are_dealt_from_a_restored_book_as_from_a_new_one(shard: Shard) -> None:
    shard.shut_shard()
    shard.restore_book(BOOK, quarantined=["Q-1"], unlent=1)
    shard.certify()
    assert shard.assign_coupon(BOOK, "u") == ["refilling"]
    assert shard.load_codes(BOOK, ["A-1"]) == ["ok", 1, 1]
    assert shard.assign_coupon(BOOK, "u")[:2] == ["ok", "A-1"]
    assert shard.assign_coupon(BOOK, "u") == ["book_exhausted"]
    assert shard.read_book(BOOK)[4:] == [1, "0", "1", 0]
