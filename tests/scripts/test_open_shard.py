"""open_shard: every reply, their order, and what is written."""

from __future__ import annotations

from tests.scripts.runner import EPOCH, GENERATION, OWNER, Owner, Shard


def test_a_new_shard_is_certified(unopened: Shard) -> None:
    before = unopened.now_ms()
    with unopened.writes("meta"):
        assert unopened.open_shard(fresh="fresh", backlog_max=500) == ["ok", 0]
    meta = unopened.meta()
    assert before <= int(meta.pop("ledger_at_ms")) <= unopened.now_ms()
    assert meta == {
        "epoch": str(EPOCH),
        "generation": str(GENERATION),
        "seq": "0",
        "committed": "0",
        "run_id": "run-1",
        "replid": "repl-1",
        "backlog_max": "500",
    }


def test_an_empty_shard_that_was_open_before_is_suspect(unopened: Shard) -> None:
    with unopened.writes_nothing():
        assert unopened.open_shard() == ["suspect"]


def test_a_shard_whose_meta_alone_is_gone_is_not_fresh(shard: Shard) -> None:
    book = shard.assigned()
    shard.redis.delete(shard.keys.meta)
    for fresh in ("fresh", ""):
        with shard.writes_nothing():
            assert shard.open_shard(fresh=fresh) == ["suspect"]
    assert shard.holders(book).keys() == {"A-1"}


def test_opening_a_shard_again_loses_nothing(shard: Shard) -> None:
    book = shard.new_book("A-1", "B-2")
    shard.assign_coupon(book, "u")
    shard.publish_position(1)
    shard.assign_coupon(book, "u")
    for fresh in ("", "fresh"):
        with shard.writes("meta"):
            assert shard.open_shard(fresh=fresh, committed=1) == ["ok", 2]
        assert (shard.meta()["seq"], shard.meta()["committed"]) == ("2", "1")
    assert len(shard.events()) == 2


def test_a_newer_owner_takes_the_shard_and_the_older_one_is_fenced(shard: Shard) -> None:
    newer = Owner(EPOCH, GENERATION + 3)  # 10: compared as a number, not as text
    assert shard.open_shard(newer, backlog_max=9) == ["ok", 0]
    assert (shard.meta()["generation"], shard.meta()["backlog_max"]) == ("10", "9")
    with shard.writes_nothing():
        assert shard.open_shard(OWNER) == ["fenced"]
    assert shard.open_shard(newer) == ["ok", 0]


def test_a_shard_of_another_epoch_is_suspect(shard: Shard) -> None:
    for epoch in (EPOCH - 1, EPOCH + 1):
        for fresh in ("", "fresh"):
            with shard.writes_nothing():
                assert shard.open_shard(Owner(epoch, GENERATION + 1), fresh=fresh) == ["suspect"]


def test_a_shard_behind_the_ledger_is_suspect(shard: Shard) -> None:
    book = shard.new_book("A-1")
    shard.assign_coupon(book, "u")
    with shard.writes_nothing():
        assert shard.open_shard(committed=2) == ["suspect"]
    assert shard.open_shard(committed=1) == ["ok", 1]


def test_an_empty_shard_behind_the_ledger_is_suspect_and_stays_empty(unopened: Shard) -> None:
    # BUG in open_shard.lua: it writes seq = 0 into the empty meta before it compares with `committed`.
    with unopened.writes_nothing():
        assert unopened.open_shard(fresh="fresh", committed=1) == ["suspect"]


def test_fenced_comes_before_suspect(shard: Shard) -> None:
    with shard.writes_nothing():
        assert shard.open_shard(Owner(EPOCH + 1, GENERATION - 1), committed=9) == ["fenced"]


def test_big_numbers_stay_exact(shard: Shard) -> None:
    seq = 2**53 - 10
    shard.set_meta(seq=seq)
    assert shard.open_shard(committed=seq) == ["ok", seq]
    assert shard.meta()["committed"] == str(seq)
    assert shard.open_shard(committed=seq + 1) == ["suspect"]
