"""open_shard: every reply, their order, and what is written."""

from __future__ import annotations

import time

import pytest

from tests.scripts.runner import EPOCH, GENERATION, OWNER, RUN_ID, Owner, Shard

NEWER = Owner(EPOCH, GENERATION + 3)  # 10: compared as a number, not as text


def test_a_new_owner_takes_over_what_its_predecessor_certified(shard: Shard) -> None:
    book = shard.new_book("A-1", "B-2")
    shard.assign_coupon(book, "u")
    shard.publish_position(1)
    shard.assign_coupon(book, "u")
    meta, before = shard.meta(), shard.now_ms()
    with shard.writes("meta"):
        assert shard.open_shard(NEWER, committed=1, backlog_max=500) == ["ok", 2]
    after = shard.meta()
    assert before <= int(after.pop("ledger_at_ms")) <= shard.now_ms()
    assert before <= int(after.pop("owner_at_ms")) <= shard.now_ms()
    del meta["ledger_at_ms"], meta["owner_at_ms"]
    assert after == {**meta, "generation": "10", "backlog_max": "500", "committed": "1", "seq": "2"}
    assert len(shard.events()) == 2


def test_the_older_owner_is_fenced_from_then_on(shard: Shard) -> None:
    assert shard.open_shard(NEWER) == ["ok", 0]
    with shard.writes_nothing():
        assert shard.open_shard(OWNER) == ["fenced"]
        assert shard.publish_position(0) == ["suspect", "owner"]
        assert shard.shut_shard() == ["fenced"]
    assert shard.publish_position(0, NEWER) == ["ok", 0]


def test_opening_a_shard_again_loses_nothing(shard: Shard) -> None:
    book = shard.new_book("A-1", "B-2")
    shard.assign_coupon(book, "u")
    shard.assign_coupon(book, "u")
    for _ in range(2):
        time.sleep(0.002)  # all that changes is the time
        with shard.writes("meta"):
            assert shard.open_shard(committed=1) == ["ok", 2]
        assert (shard.meta()["seq"], shard.meta()["committed"]) == ("2", "1")
    assert len(shard.events()) == 2


@pytest.mark.parametrize("committed", [0, 1])
def test_an_empty_shard_is_suspect_and_stays_empty(unopened: Shard, committed: int) -> None:
    with unopened.writes_nothing():
        assert unopened.open_shard(committed=committed) == ["suspect", "epoch"]
    assert unopened.snapshot() == {}


def test_a_shard_whose_meta_alone_is_gone_is_suspect(shard: Shard) -> None:
    book = shard.assigned()
    shard.redis.delete(shard.keys.meta)
    with shard.writes_nothing():
        assert shard.open_shard() == ["suspect", "epoch"]
    assert shard.holders(book).keys() == {"A-1"}


def test_a_shard_of_another_epoch_is_suspect(shard: Shard) -> None:
    for epoch in (EPOCH - 1, EPOCH + 1):
        with shard.writes_nothing():
            assert shard.open_shard(Owner(epoch, GENERATION + 1)) == ["suspect", "epoch"]


@pytest.mark.parametrize(("run_id", "replid"), [("run-2", ""), (RUN_ID, "repl-2"), ("run-2", "repl-2")])
def test_a_shard_that_was_certified_on_another_redis_is_suspect(shard: Shard, run_id: str, replid: str) -> None:
    """A restart changes the run_id, a change of master the replid: either may have lost the last writes."""
    for owner in (OWNER, NEWER):
        with shard.writes_nothing():
            assert shard.open_shard(owner, run_id=run_id, replid=replid) == ["suspect", "server"]
    assert shard.open_shard() == ["ok", 0]


def test_a_shard_behind_the_ledger_is_suspect(shard: Shard) -> None:
    book = shard.new_book("A-1")
    shard.assign_coupon(book, "u")
    with shard.writes_nothing():
        assert shard.open_shard(committed=2) == ["suspect", "position"]
    assert shard.open_shard(committed=1) == ["ok", 1]


def test_a_shard_that_is_shut_or_in_doubt_is_suspect(shard: Shard) -> None:
    shard.doubt_shard()
    with shard.writes_nothing():
        assert shard.open_shard(NEWER) == ["suspect", "epoch"]
    shard.shut_shard()
    with shard.writes_nothing():
        assert shard.open_shard(NEWER) == ["suspect", "epoch"]
    shard.certify_shard()
    assert shard.open_shard(NEWER) == ["ok", 0]


def test_fenced_comes_before_suspect(shard: Shard) -> None:
    with shard.writes_nothing():
        assert shard.open_shard(Owner(EPOCH + 1, GENERATION - 1), committed=9, run_id="run-2") == ["fenced"]


def test_big_numbers_stay_exact(shard: Shard) -> None:
    seq = 2**53 - 10
    shard.set_meta(seq=seq)
    assert shard.open_shard(committed=seq) == ["ok", seq]
    assert shard.meta()["committed"] == str(seq)
    assert shard.open_shard(committed=seq + 1) == ["suspect", "position"]
