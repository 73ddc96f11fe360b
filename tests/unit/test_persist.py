"""What the writer commits of what it reads: entries that follow each other, over all shards no more than ends in time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from coupon_svc.domain.books import Ack
from coupon_svc.domain.events import COUPON_ASSIGNED, Event, MalformedEntry
from coupon_svc.domain.position import Epoch, Position, Seq
from coupon_svc.postgres.errors import LedgerUnavailable
from coupon_svc.postgres.events import Batch
from coupon_svc.postgres.shards import OwnedShard
from coupon_svc.redis.codec import StreamEntry
from coupon_svc.redis.control import Published, ShardControl
from coupon_svc.redis.scripts import Scripts
from coupon_svc.redis.server import Identity
from coupon_svc.writer import persist
from coupon_svc.writer.clock import LedgerClock
from coupon_svc.writer.persist import Persister, Rewritten, following_batch
from coupon_svc.writer.pool import Pool
from coupon_svc.writer.portion import BYTES_PER_COMMIT_MAX, ENTRIES_MAX, EVENTS_PER_COMMIT_MAX, Portion
from coupon_svc.writer.shard import Hole, Shard
from tests.entries import as_read, entry_of
from tests.owned import open_shard

CHAIN = bytes(32)
SHARDS = 16


def test_what_comes_before_a_hole_is_committed() -> None:
    """Else the shard is found in order by its next entry, opened, and shut again by the persister, for ever."""
    shard = Shard(OwnedShard(0, 3, 7, 1, CHAIN, "t7"))
    event = Event(3, 8, COUPON_ASSIGNED, "b", "A-1", "u", 1)
    follows = entry_of(event, event._replace(seq=9), after="t7", tip="t9")
    other = entry_of(event._replace(seq=10), after="x", tip="t10")
    entries = [as_read(follows), as_read(other), StreamEntry(Position.parse("4-7"), [b"by", b"hand"])]
    batch = following_batch(shard, entries, Portion())
    assert (batch.committed, batch.upto, len(batch.events), batch.last_tip) == (7, 9, 2, "t9")
    with pytest.raises(Hole, match="event 3-8 is missing, 3-10 came instead"):
        following_batch(shard, entries[1:], Portion())
    with pytest.raises(MalformedEntry):
        following_batch(shard, entries[2:], Portion())
    with pytest.raises(Rewritten):
        following_batch(shard, [as_read(follows._replace(after="x"))], Portion())


def test_a_commit_takes_so_many_events_and_the_next_one_goes_on_from_there() -> None:
    shard = Shard(OwnedShard(0, 3, 0, 1, CHAIN, "t0"))
    each = EVENTS_PER_COMMIT_MAX // 4
    event = Event(3, 0, COUPON_ASSIGNED, "b", "A-1", "u", 1)
    entries = [
        entry_of(*(event._replace(seq=each * no + one + 1) for one in range(each)), after=f"t{no}", tip=f"t{no + 1}")
        for no in range(6)
    ]
    batch = following_batch(shard, [as_read(entry) for entry in entries], Portion())
    assert (len(batch.events), batch.upto, batch.last_tip) == (EVENTS_PER_COMMIT_MAX, 4 * each, "t4")
    shard.advanced(shard.term, batch.upto, CHAIN, batch.last_tip)
    batch = following_batch(shard, [as_read(entry) for entry in entries[4:]], Portion())
    assert (batch.committed, batch.upto, len(batch.events)) == (4 * each, 6 * each, 2 * each)


# --- a backlog over all shards


class Streams(ShardControl):
    """A Redis with a backlog in each shard: entries of one event, each about this large."""

    def __init__(self, lengths: Sequence[int], size: int) -> None:
        super().__init__("redis://127.0.0.1:1", SHARDS, Scripts())
        event = Event(1, 1, COUPON_ASSIGNED, "b", "A-1", "u" * size, 1)
        self._fields = as_read(entry_of(event)).fields
        self._lengths = lengths
        self.read = 0
        self.shards = {
            n: open_shard(OwnedShard(n, 1, 0, 1, CHAIN, ""), Identity("run", "replid")) for n in range(SHARDS)
        }
        self.caught_up = asyncio.Event()

    async def read_events(self, after: Mapping[int, Position], _: int, count: int) -> dict[int, list[StreamEntry]]:
        await asyncio.sleep(0)
        streams = {
            number: [
                StreamEntry(Position(Epoch(1), Seq(seq)), self._fields)
                for seq in range(committed + 1, min(committed + count, self._lengths[number]) + 1)
            ]
            for number, (_, committed) in after.items()
        }
        self.read = max(self.read, sum(map(len, streams.values())))
        return {number: stream for number, stream in streams.items() if stream}

    async def publish_positions(self, published: Sequence[Published], *_: Any, **__: Any) -> list[Any]:
        if all(self.shards[number].committed == length for number, length in enumerate(self._lengths)):
            self.caught_up.set()
        return [one.committed for one in published]


class Ledger:
    """A Postgres that takes no more bytes than this in time."""

    def __init__(self, in_time: float) -> None:
        self._in_time = in_time
        self.commits: list[Sequence[Batch]] = []

    @asynccontextmanager
    async def work(self, _: float) -> AsyncIterator[None]:
        yield

    async def commit(self, _: Any, __: str, batches: Sequence[Batch]) -> tuple[dict[int, str], dict[int, bytes]]:
        if sum(len(entry.body) for batch in batches for entry in batch.entries) > self._in_time:
            raise LedgerUnavailable
        self.commits.append(batches)
        return {batch.shard: "moved" for batch in batches}, {batch.shard: CHAIN for batch in batches}


async def persist_all(streams: Streams, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    persister = Persister("", "wr", streams, streams.shards, lambda *_: None, LedgerClock())
    monkeypatch.setattr(persist, "commit_batches", ledger.commit)
    monkeypatch.setattr(persister, "session", ledger)
    running = asyncio.create_task(persister.run())
    async with asyncio.timeout(20):
        await streams.caught_up.wait()
    running.cancel()


KIB = 1024


@pytest.mark.parametrize("in_time", [float("inf"), BYTES_PER_COMMIT_MAX // 2], ids=["fast", "slow"])
async def test_a_backlog_of_large_events_in_all_shards_is_caught_up(
    in_time: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one commit they would not end in time: it would be tried again for ever."""
    streams, ledger = Streams([40] * SHARDS, 64 * KIB), Ledger(in_time)
    await persist_all(streams, ledger, monkeypatch)
    largest = max(sum(len(entry.body) for batch in batches for entry in batch.entries) for batches in ledger.commits)
    assert largest < BYTES_PER_COMMIT_MAX + SHARDS * 65 * KIB
    assert streams.read * 64 * KIB < 5 * BYTES_PER_COMMIT_MAX, "no more is read than a few commits take"


async def test_a_long_backlog_of_one_shard_holds_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    streams, ledger = Streams([20_000, *[300] * (SHARDS - 1)], 1), Ledger(float("inf"))
    await persist_all(streams, ledger, monkeypatch)
    sizes = [sum(len(batch.events) for batch in batches) for batches in ledger.commits]
    assert max(sizes) < EVENTS_PER_COMMIT_MAX + SHARDS
    assert all(len(batches) == SHARDS for batches in ledger.commits[:5])
    assert len(sizes) < 60, "small entries are read many at a time"


async def test_what_a_full_commit_left_over_waits_for_no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though fewer entries were read than might have been, and nobody waits for them."""
    monkeypatch.setattr(persist, "PACE_S", 60.0)
    streams, ledger = Streams([5] * SHARDS, 1024 * KIB), Ledger(float("inf"))
    for shard in streams.shards.values():
        shard.pools["b"] = Pool(Ack.REDIS, 1)
    await persist_all(streams, ledger, monkeypatch)
    assert len(ledger.commits) > 1


def test_less_is_read_when_not_all_of_it_was_committed() -> None:
    portion = Portion()
    for _ in range(10):
        portion.begin()
        portion.committed(portion.entries, all_of_it=True)
    assert portion.entries == ENTRIES_MAX
    portion.committed(portion.entries, all_of_it=False)
    assert portion.entries == ENTRIES_MAX // 2
    portion.begin()
    portion.take(EVENTS_PER_COMMIT_MAX // 2, 1)
    portion.committed(portion.entries, all_of_it=True)
    assert portion.entries == ENTRIES_MAX // 2
