"""What a commit compares: each of the four comparisons alone turns a batch away."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import cast

import asyncpg
import pytest

from coupon_svc.domain.chain import CHAIN_START
from coupon_svc.domain.events import COUPON_ASSIGNED, COUPON_REDEEMED, Event
from coupon_svc.postgres.events import Batch, commit_batches, first_data_error
from coupon_svc.redis.control import ShardControl
from coupon_svc.writer.clock import LedgerClock
from coupon_svc.writer.persist import Persister
from tests.entries import batch_of, entry_of
from tests.harness import fresh_database

OWNER = "wr_me"
GOOD = batch_of(0, 3, 7, 0, [Event(3, 1, COUPON_ASSIGNED, "bk_00x", "CODE-1", "ann", 1_795_357_061_878)])


@pytest.fixture
async def ledger(postgres_url: str) -> AsyncIterator[asyncpg.Connection]:
    """A ledger whose shard 0 is in epoch 3, of this owner's generation 7, with nothing committed."""
    connection = await asyncpg.connect(await fresh_database(postgres_url, 1))
    await connection.execute("UPDATE shards SET epoch = 3, generation = 7, owner = $1", OWNER)
    yield connection
    await connection.close()


async def write(ledger: asyncpg.Connection, owner: str, *batches: Batch) -> dict[int, str]:
    outcomes, _ = await commit_batches(ledger, owner, batches)
    return dict(outcomes)


async def test_a_batch_that_fits_is_committed_once(ledger: asyncpg.Connection) -> None:
    assert await write(ledger, OWNER, GOOD) == {0: "moved"}
    assert await ledger.fetchval("SELECT committed FROM shards") == 1
    assert await write(ledger, OWNER, GOOD) == {0: "lost"}
    assert await ledger.fetchval("SELECT count(*) FROM events") == 1


@pytest.mark.parametrize(
    ("owner", "batch"),
    [
        pytest.param("wr_other", GOOD, id="another owner"),
        pytest.param(OWNER, GOOD._replace(generation=6), id="an older generation"),
        pytest.param(OWNER, GOOD._replace(epoch=2), id="an older epoch"),
        pytest.param(OWNER, GOOD._replace(committed=1, upto=2), id="a position ahead"),
        pytest.param(OWNER, GOOD._replace(tip="another"), id="behind another entry"),
    ],
)
async def test_a_batch_is_thrown_away(ledger: asyncpg.Connection, owner: str, batch: Batch) -> None:
    assert await write(ledger, owner, batch) == {0: "edited" if batch.tip else "lost"}
    assert await ledger.fetchval("SELECT count(*) FROM events") == 0


async def test_nothing_is_committed_in_a_shard_that_was_stopped(ledger: asyncpg.Connection) -> None:
    await ledger.execute("UPDATE shards SET stopped = 'a person must look'")
    assert await write(ledger, OWNER, GOOD) == {0: "lost"}


async def test_the_writer_plans_no_commit_anew(postgres_url: str) -> None:
    url = await fresh_database(postgres_url, 1)
    persister = Persister(url, OWNER, cast(ShardControl, None), {}, lambda *_: None, LedgerClock())
    async with persister.session.work(5) as session:
        await session.execute("UPDATE shards SET epoch = 3, generation = 7, owner = $1", OWNER)
        for committed in range(3):
            event = GOOD.events[0]._replace(seq=committed + 1, code=f"CODE-{committed}")
            assert await write(session, OWNER, batch_of(0, 3, 7, committed, [event])) == {0: "moved"}
            await session.execute("UPDATE shards SET chain = $1", CHAIN_START)
        plans = "SELECT custom_plans, generic_plans FROM pg_prepared_statements WHERE statement LIKE 'SELECT * FROM commit%'"
        assert [tuple(plan) for plan in await session.fetch(plans)] == [(0, 3)]
    persister.session.close()


# --- entries of several events, and shards that do not touch each other


def assigned(seq: int, book: str = "bk_00x", code: str = "", user: str = "ann") -> Event:
    return Event(3, seq, COUPON_ASSIGNED, book, code or f"CODE-{seq}", user, 1_795_357_061_878, idem=f"key-{seq}")


async def test_an_entry_is_one_row_and_its_events_are_seen(ledger: asyncpg.Connection) -> None:
    events = [
        assigned(1),
        assigned(2),
        Event(3, 3, COUPON_REDEEMED, "bk_00x", "CODE-1", "ann", 5, 1, "till", '{"a":1}'),
    ]
    entry = entry_of(*events, tip="a-1")
    batch = Batch(0, 3, 7, 0, 3, [entry], [e._replace(at_ms=entry.at_ms) for e in events])
    assert await write(ledger, OWNER, batch) == {0: "moved"}
    row = await ledger.fetchrow("SELECT seq, n, after, tip, keyed, events FROM entries")
    assert row is not None
    assert tuple(row) == (3, 3, "", "a-1", True, entry.body)
    seen = await ledger.fetch(
        "SELECT seq, event, code, user_id, uses, reference, metadata, idem FROM events ORDER BY seq"
    )
    assert [tuple(one) for one in seen] == [
        (1, "coupon_assigned", "CODE-1", "ann", None, None, None, "key-1"),
        (2, "coupon_assigned", "CODE-2", "ann", None, None, None, "key-2"),
        (3, "coupon_redeemed", "CODE-1", "ann", 1, "till", '{"a":1}', None),
    ]
    assert await ledger.fetchval("SELECT uses FROM coupons WHERE code = 'CODE-1'") == 1
    assert await ledger.fetchval("SELECT tip FROM shards WHERE shard = 0") == "a-1"


async def test_an_entry_whose_events_cannot_be_read_hides_no_other(ledger: asyncpg.Connection) -> None:
    good, bad = entry_of(assigned(1), tip="a"), entry_of(assigned(2), after="a", tip="b")._replace(body=b"\xff[")
    batch = Batch(0, 3, 7, 0, 2, [good, bad], [assigned(1)])
    assert await write(ledger, OWNER, batch) == {0: "moved"}
    assert [row["seq"] for row in await ledger.fetch("SELECT seq FROM events")] == [1]


async def test_a_shard_that_does_not_move_is_not_written_and_keeps_no_other_from_it(postgres_url: str) -> None:
    connection = await asyncpg.connect(await fresh_database(postgres_url, 3))
    await connection.execute("UPDATE shards SET epoch = 3, generation = 7, owner = $1", OWNER)
    await connection.execute("UPDATE shards SET generation = 8 WHERE shard = 0")
    await connection.execute("UPDATE shards SET chain = 'edited' WHERE shard = 1")
    batches = [batch_of(shard, 3, 7, 0, [assigned(1, f"bk_0{shard}x")]) for shard in range(3)]
    assert await write(connection, OWNER, *batches) == {0: "lost", 1: "edited", 2: "moved"}
    for table in ("entries", "events"):
        assert [row["shard"] for row in await connection.fetch(f"SELECT shard FROM {table}")] == [2]
    assert [row["book_id"] for row in await connection.fetch("SELECT book_id FROM coupons")] == ["bk_02x"]
    await connection.close()


async def test_what_an_event_contradicts_is_found_before_anything_is_written(ledger: asyncpg.Connection) -> None:
    twice = Batch(0, 3, 7, 0, 2, [entry_of(assigned(1), assigned(2, code="CODE-1"), tip="a")],
                  [assigned(1), assigned(2, code="CODE-1")])  # fmt: skip
    assert isinstance(await first_data_error(ledger, OWNER, twice), asyncpg.UniqueViolationError)
    assert await ledger.fetchval("SELECT count(*) FROM entries") == 0
    assert await ledger.fetchval("SELECT committed FROM shards") == 0
