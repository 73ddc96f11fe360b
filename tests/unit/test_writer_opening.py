"""The opener survives whatever happens to a shard under its hands."""

from __future__ import annotations

from typing import Any, cast

import pytest

from coupon_svc.domain.chain import CHAIN_START
from coupon_svc.domain.events import parse_entry
from coupon_svc.domain.position import Epoch, Position, Seq
from coupon_svc.postgres.database import LedgerSession
from coupon_svc.postgres.errors import HistoryForked, LedgerUnavailable, NotOwner
from coupon_svc.postgres.shards import OwnedShard
from coupon_svc.redis.codec import StreamEntry
from coupon_svc.redis.control import ShardControl, Term
from coupon_svc.redis.errors import ClocksApart, CountsDiffer, Fenced, NotSent
from coupon_svc.redis.meta import ShardMeta, meta_of
from coupon_svc.redis.server import Identity
from coupon_svc.writer.opening import Opener, is_entry, next_event_is_there, went_back
from coupon_svc.writer.shard import Open, Shard, Shut, State, Stopped

HERE = Identity("run", "history")
TAKEN = OwnedShard(3, 4, 7, 2, CHAIN_START, "")


@pytest.fixture
def opening(monkeypatch: pytest.MonkeyPatch) -> Opener:
    async def connection(_: LedgerSession) -> None: ...

    monkeypatch.setattr(LedgerSession, "connection", connection)
    nothing = cast(Any, None)
    return Opener([], "wr", nothing, {}, nothing, nothing, 1000)


SESSION = LedgerSession("", "test")


@pytest.mark.parametrize(
    ("error", "state", "wants_recovery", "done"),
    [
        (None, Open(HERE), False, True),
        (LedgerUnavailable("away"), Shut(), False, False),
        (NotSent("away"), Shut(), False, False),
        (NotOwner(), Shut(), False, False),
        (Fenced("open_shard"), Shut(), False, False),
        (ClocksApart("90 s"), Shut(), False, False),
        (CountsDiffer("book b is gone"), Shut(), True, False),
        (ValueError("torn"), Shut(), True, False),
        (HistoryForked("went back"), Stopped("went back"), False, True),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_what_becomes_of_a_shard_by_what_its_opening_met(
    opening: Opener,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception | None,
    state: State,
    wants_recovery: bool,
    done: bool,
) -> None:
    async def open_it(shard: Shard, _: object) -> None:
        if error is not None:
            raise error
        shard.opened(HERE)

    monkeypatch.setattr(opening, "_open", open_it)
    shard = Shard(TAKEN)

    assert await opening.try_to_open(shard, SESSION) is done

    assert shard.state == state
    assert (shard.recovery_wanted is not None) is wants_recovery


async def test_a_shard_that_is_stopped_and_released_meanwhile_is_tried_again(
    opening: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def open_it(shard: Shard, _: object) -> None:
        shard.stopped("forked")
        shard.superseded()
        shard.opened(HERE)

    monkeypatch.setattr(opening, "_open", open_it)
    shard = Shard(TAKEN)

    assert not await opening.try_to_open(shard, SESSION)

    assert shard.state == Shut()


async def test_a_shard_that_was_stopped_before_its_turn_is_left_alone(opening: Opener) -> None:
    shard = Shard(TAKEN)
    shard.stopped("forked")

    assert await opening.try_to_open(shard, SESSION)

    assert shard.state == Stopped("forked")


def meta(**fields: str) -> ShardMeta:
    return meta_of(fields)


@pytest.mark.parametrize(
    ("known", "says"),
    [
        (meta(), None),
        (meta(generation="2", epoch="4", recovery="2-4"), None),
        (meta(generation="3", epoch="4"), "redis knows of generation 3"),
        (meta(generation="2", epoch="5"), "redis knows of epoch 5"),
        (meta(generation="2", epoch="doubt", was="5"), "redis knows of epoch 5"),
        (meta(generation="2", epoch="recovering", recovery="2-6"), "redis knows of epoch 6"),
    ],
)
def test_a_ledger_that_knows_less_than_redis_has_gone_back(known: ShardMeta, says: str | None) -> None:
    reason = went_back(TAKEN, known)

    assert reason is None if says is None else reason is not None and reason.startswith(says)


@pytest.mark.parametrize(("seq", "after", "there"), [(3, "theirs", True), (3, "another", False), (4, "theirs", False)])
async def test_the_next_entry_must_follow_the_one_that_the_ledger_has(seq: int, after: str, there: bool) -> None:
    """An owner that opened the shard all the same would refuse the entry, and open it again, without end."""
    fields = [b"n", b"1", b"after", after.encode(), b"tip", b"new", b"at_ms", b"1", b"events", b"[]"]

    class Streams:
        async def stream_after(self, *_: object, count: int) -> list[StreamEntry]:
            return [StreamEntry(Position(Epoch(4), Seq(seq)), fields)]

    store = cast(ShardControl, Streams())
    assert await next_event_is_there(store, Term(3, 4, 7), 2, "theirs") is there


def test_an_entry_of_the_stream_is_the_ledgers_byte_for_byte() -> None:
    fields = [b"n", b"1", b"after", b"", b"tip", b"t", b"at_ms", b"1", b"events", b"[]"]
    found = StreamEntry(Position(Epoch(4), Seq(7)), fields)
    recorded = parse_entry(*found)
    assert is_entry(found, recorded)
    assert not is_entry(found, recorded._replace(body=b"[ ]"))
    assert not is_entry(found, None)
    assert not is_entry(found._replace(fields=[b"by", b"hand"]), recorded)
