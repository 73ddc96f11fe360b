"""What a commit compares: each of the four comparisons alone turns a batch away."""

from __future__ import annotations

from collections.abc import AsyncIterator

import asyncpg
import pytest

from coupon_svc.domain.events import COUPON_ASSIGNED, Event
from coupon_svc.postgres.errors import NotOwner
from coupon_svc.postgres.events import Batch, write_batches
from tests.harness import fresh_database

OWNER = "wr_me"
GOOD = Batch(0, 3, 7, 0, 1, [Event(3, 1, COUPON_ASSIGNED, "bk_00x", "CODE-1", "ann", 1_795_357_061_878)])


@pytest.fixture
async def ledger(postgres_url: str) -> AsyncIterator[asyncpg.Connection]:
    """A ledger whose shard 0 is in epoch 3, of this owner's generation 7, with nothing committed."""
    connection = await asyncpg.connect(await fresh_database(postgres_url, 1))
    await connection.execute("UPDATE shards SET epoch = 3, generation = 7, owner = $1", OWNER)
    yield connection
    await connection.close()


async def write(ledger: asyncpg.Connection, owner: str, batch: Batch) -> None:
    async with ledger.transaction():
        await write_batches(ledger, owner, [batch])


async def test_a_batch_that_fits_is_committed_once(ledger: asyncpg.Connection) -> None:
    await write(ledger, OWNER, GOOD)
    assert await ledger.fetchval("SELECT committed FROM shards") == 1
    with pytest.raises(NotOwner):
        await write(ledger, OWNER, GOOD)
    assert await ledger.fetchval("SELECT count(*) FROM events") == 1


@pytest.mark.parametrize(
    ("owner", "batch"),
    [
        pytest.param("wr_other", GOOD, id="another owner"),
        pytest.param(OWNER, GOOD._replace(generation=6), id="an older generation"),
        pytest.param(OWNER, GOOD._replace(epoch=2), id="an older epoch"),
        pytest.param(OWNER, GOOD._replace(committed=1, upto=2), id="a position ahead"),
    ],
)
async def test_a_batch_is_thrown_away(ledger: asyncpg.Connection, owner: str, batch: Batch) -> None:
    with pytest.raises(NotOwner):
        await write(ledger, owner, batch)
    assert await ledger.fetchval("SELECT count(*) FROM events") == 0


async def test_nothing_is_committed_in_a_shard_that_was_stopped(ledger: asyncpg.Connection) -> None:
    await ledger.execute("UPDATE shards SET stopped = 'a person must look'")
    with pytest.raises(NotOwner):
        await write(ledger, OWNER, GOOD)
