"""What the writer tells Redis once a second: one message for all shards, and a look at a stream that stands still."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pytest

from coupon_svc.postgres.database import LedgerConnection, LedgerSession
from coupon_svc.postgres.shards import OwnedShard
from coupon_svc.redis.codec import StreamEntry
from coupon_svc.redis.control import Published, ShardControl
from coupon_svc.redis.errors import ShardNotUsable
from coupon_svc.redis.scripts import Scripts
from coupon_svc.redis.server import Identity
from coupon_svc.writer.clock import LedgerClock
from coupon_svc.writer.shard import Shard
from coupon_svc.writer.showing import Showing
from tests.owned import open_shard

HERE = Identity("run", "replid")
CHAIN = bytes(32)


class TrimmedStore(ShardControl):
    """A Redis that has decided one event more than the ledger has, in each shard, and whose streams are empty."""

    def __init__(self) -> None:
        super().__init__("redis://127.0.0.1:1", 3, Scripts())
        self.identity = HERE
        self.messages: list[list[int]] = []

    async def connect(self) -> Identity:
        return HERE

    async def publish_positions(self, published: Sequence[Published], *_: Any, **__: Any) -> list[int | ShardNotUsable]:
        self.messages.append([one.term.shard for one in published])
        return [one.committed + 1 for one in published]

    async def stream_after(self, *_: Any, **__: Any) -> list[StreamEntry]:
        return []


class Answering:
    """A connection to Postgres that tells the time."""

    async def fetchval(self, _: str) -> int:
        return 0

    def terminate(self) -> None: ...


async def show(showing: Showing) -> None:
    await showing.show(cast(LedgerConnection, Answering()))


@pytest.fixture
def shards() -> dict[int, Shard]:
    return {number: open_shard(OwnedShard(number, 1, 0, 1, CHAIN, ""), HERE) for number in range(3)}


@pytest.fixture
def store() -> TrimmedStore:
    return TrimmedStore()


@pytest.fixture
def showing(shards: dict[int, Shard], store: TrimmedStore) -> Showing:
    async def show_away() -> None: ...

    return Showing(LedgerSession("", "test"), store, shards, LedgerClock(), gone=list, show_away=show_away)


async def test_all_shards_are_told_with_one_message(showing: Showing, store: TrimmedStore) -> None:
    await show(showing)
    assert store.messages == [[0, 1, 2]]


async def test_a_shard_whose_next_event_is_gone_is_shut_once_the_ledger_stands_still(
    showing: Showing, shards: dict[int, Shard]
) -> None:
    await show(showing)
    shards[1].advanced(shards[1].term, 1, CHAIN, "t1")
    await show(showing)
    assert [shards[number].is_open for number in range(3)] == [False, True, False]
    await show(showing)
    assert not shards[1].is_open


async def test_a_shard_of_another_server_is_told_nothing(
    showing: Showing, shards: dict[int, Shard], store: TrimmedStore
) -> None:
    store.identity = Identity("another run", "replid")
    await show(showing)
    assert store.messages == []
    assert not any(one.is_open for one in shards.values())
