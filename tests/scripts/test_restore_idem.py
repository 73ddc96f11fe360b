"""restore_idem: every reply, and what is written."""

from __future__ import annotations

from coupon_svc.redis.control import KEYS_PER_CALL_MAX
from tests.scripts.runner import DAY_MS, Shard, assert_shut_by, wait_until_gone

BOOK = "bk_000123456789abcdef"


def test_records_come_back_and_end_when_they_would_have_ended(shard: Shard) -> None:
    shard.shut_shard()
    records = {"key 1": ('["f1","ä"]', DAY_MS), 'a "key": {x}': ('["f2"]', 60_000)}
    with shard.writes(f"idem:1:{BOOK}:key 1", f'idem:1:{BOOK}:a "key": {{x}}'):
        assert shard.restore_idem(BOOK, records) == ["ok"]
    for idem, (record, ttl_ms) in records.items():
        assert shard.redis.get(shard.idem_key(BOOK, idem)) == record
        assert ttl_ms - 30_000 < shard.redis.pttl(shard.idem_key(BOOK, idem)) <= ttl_ms


def test_a_record_of_which_a_moment_is_left_is_gone_in_a_moment(shard: Shard) -> None:
    shard.shut_shard()
    assert shard.restore_idem(BOOK, {"key 1": ('["f1"]', 1)}) == ["ok"]
    wait_until_gone(shard, shard.idem_key(BOOK, "key 1"))


def test_records_may_be_sent_twice(shard: Shard) -> None:
    shard.shut_shard()
    for _ in range(2):
        assert shard.restore_idem(BOOK, {"key 1": ('["f1"]', DAY_MS)}) == ["ok"]
    assert shard.snapshot().keys() == {"meta", f"idem:1:{BOOK}:key 1"}
    assert shard.redis.get(shard.idem_key(BOOK, "key 1")) == '["f1"]'


def test_as_many_records_as_a_call_may_hold_are_restored(shard: Shard) -> None:
    shard.shut_shard()
    records = {f"key {number}": (f'["f{number}"]', DAY_MS + number) for number in range(KEYS_PER_CALL_MAX)}
    assert shard.restore_idem(BOOK, records) == ["ok"]
    kept = shard.redis.mget([shard.idem_key(BOOK, idem) for idem in records])
    assert kept == [record for record, _ in records.values()]


def test_only_who_shut_the_shard_restores_records(shard: Shard) -> None:
    assert_shut_by(shard, lambda generation: shard.restore_idem(BOOK, {"key 1": ('["f1"]', DAY_MS)}, generation))
