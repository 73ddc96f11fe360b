"""doubt_shard: every reply, what is written, and that nothing is decided in a shard that is in doubt."""

from __future__ import annotations

import pytest

from tests.scripts.every_script import KEYED, api_requests, owner_requests, recovery_requests, worn
from tests.scripts.runner import CALLER, EPOCH, GENERATION, OWNER, Caller, Owner, Shard, assert_fenced


def test_only_the_epoch_is_taken_from_the_shard(shard: Shard) -> None:
    worn(shard)
    meta = shard.meta()
    with shard.writes("meta"):
        assert shard.doubt_shard() == ["ok"]
    assert shard.meta() == {**meta, "epoch": "doubt", "was": meta["epoch"]}


def test_doubting_twice_changes_nothing_more(shard: Shard) -> None:
    shard.doubt_shard()
    with shard.writes_nothing():
        assert shard.doubt_shard() == ["suspect", "epoch"]


def test_a_shard_of_another_epoch_or_behind_is_not_doubted(shard: Shard) -> None:
    """Who comes from an older epoch knows nothing of this one."""
    worn(shard)
    assert_fenced(shard, shard.doubt_shard)


def test_a_recovery_is_not_disturbed(shard: Shard) -> None:
    shard.shut_shard()
    for epoch in (EPOCH, EPOCH + 1):
        with shard.writes_nothing():
            assert shard.doubt_shard(Caller(epoch)) == ["suspect", "epoch"]
    assert shard.certify_shard() == ["ok"]


def test_every_script_of_the_api_answers_suspect(shard: Shard) -> None:
    book = worn(shard)
    shard.doubt_shard()
    for name, ask in api_requests(shard, book).items():
        for caller in (CALLER, KEYED, Caller(EPOCH + 1), Caller(seen_seq=2)):
            with shard.writes_nothing():
                assert ask(caller) == ["suspect", "epoch"], (name, caller)


def test_every_script_of_the_owner_answers_suspect(shard: Shard) -> None:
    book = worn(shard)
    shard.doubt_shard()
    for name, ask in owner_requests(shard, book).items():
        for owner in (OWNER, Owner(EPOCH + 1), Owner(EPOCH, GENERATION + 1)):
            with shard.writes_nothing():
                assert ask(owner) == ["suspect", "epoch"], (name, owner)


def test_it_must_be_shut_before_it_is_restored(shard: Shard) -> None:
    book = worn(shard)
    shard.doubt_shard()
    steps = recovery_requests(shard, book)
    shut = steps.pop("shut_shard")
    for name, step in steps.items():
        with shard.writes_nothing():
            assert step(GENERATION) == ["fenced"], name
    assert shut(GENERATION) == ["ok"]


@pytest.mark.parametrize("lost", ["free", "holders"])
def test_missing_codes_are_doubted_and_recovered_by_the_scripts_alone(shard: Shard, lost: str) -> None:
    """Whoever finds it says so; then nobody is answered from what is left."""
    book = worn(shard)
    shard.redis.delete(f"{shard.keys.prefix}{lost}:{book}")
    assert shard.read_book(book) == ["suspect", "counts"]
    assert shard.doubt_shard() == ["ok"]
    assert shard.list_coupons("u") == ["suspect", "epoch"]
    shard.shut_shard()
    shard.restore_book(book, lent=2)
    shard.restore_coupons(book, {"A-1": "4-1 0 1 u", "B-2": "4-2 0 1 v"})
    shard.certify_shard(Owner(EPOCH + 1))
    assert shard.read_book(book, Caller(EPOCH + 1))[4] == 2
