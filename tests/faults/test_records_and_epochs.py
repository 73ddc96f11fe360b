"""A record acts only on what belongs to its own epoch: a code that was dealt again is somebody else's to have lost."""

from __future__ import annotations

from collections.abc import AsyncIterator

import asyncpg
import pytest

from coupon_svc.domain.events import COUPON_ASSIGNED, COUPON_REDEEMED, Event
from coupon_svc.domain.position import Epoch, Position, Seq
from coupon_svc.domain.receipts import Receipt
from coupon_svc.postgres import late_events
from coupon_svc.postgres.epochs import NewEpoch
from coupon_svc.postgres.events import commit_batches, contradicts, first_data_error
from coupon_svc.postgres.late_events import redeem_receipt
from coupon_svc.postgres.quarantine import deal_again
from coupon_svc.postgres.shards import OwnedShard
from tests.entries import batch_of
from tests.harness import fresh_database

BOOK, CODE = "bk_000123456789abcdef", "A-1"
LOST_IN = 2
"""The epoch in which the code was lent when its record was lost for the second time."""


@pytest.fixture
async def ledger(postgres_url: str) -> AsyncIterator[asyncpg.Connection]:
    """Of a shard in recovery. One of its codes was dealt to ann in epoch 1, to bob in epoch 2, and is in quarantine now."""
    connection = await asyncpg.connect(await fresh_database(postgres_url, 1))
    await connection.execute("INSERT INTO tenants (name) VALUES ('t')")
    await connection.execute(
        "INSERT INTO books (book_id, shard, tenant_id, name, lock_ttl_seconds, ack, metadata, created_at_ms, total,"
        " quarantined) VALUES ($1, 0, 1, 'b', 60, 'redis', '{}', 1, 1, 1)",
        BOOK,
    )
    await connection.execute("INSERT INTO codes (tenant_id, code, book_id, place) VALUES (1, $1, $2, -1)", CODE, BOOK)
    await connection.execute(
        "INSERT INTO quarantine (book_id, code, shard, epoch) VALUES ($1, $2, 0, $3)", BOOK, CODE, LOST_IN
    )
    await connection.execute(
        "UPDATE shards SET epoch = 4, owner = 'w', generation = 1, certified_epoch = 3, settled_epoch = 3"
    )
    yield connection
    await connection.close()


BEGUN = NewEpoch(OwnedShard(0, 4, 0, 1, bytes(32), ""), 0, False)


async def holder(ledger: asyncpg.Connection) -> str | None:
    user: str | None = await ledger.fetchval("SELECT user_id FROM coupons WHERE code = $1", CODE)
    return user


async def test_a_late_event_gives_a_code_to_its_user_only_in_its_own_epoch(ledger: asyncpg.Connection) -> None:
    event = Event(1, 1, COUPON_ASSIGNED, BOOK, CODE, "ann", 1)
    for _ in range(2):  # a recovery may die and be run again
        await late_events.take_late(ledger, "w", BEGUN, 1, [event])
        assert await holder(ledger) is None, "P1: the code was answered to bob"
    await late_events.take_late(ledger, "w", BEGUN, LOST_IN, [event._replace(epoch=LOST_IN, user_id="bob")])
    assert await holder(ledger) == "bob"
    notes = await ledger.fetch("SELECT epoch, user_id, recorded FROM late_events ORDER BY link")
    assert [tuple(note) for note in notes] == [(1, "ann", False), (2, "bob", True)]


async def test_a_receipt_brings_back_only_what_was_lost_in_its_epoch(ledger: asyncpg.Connection) -> None:
    async with ledger.transaction():
        assert not await redeem_receipt(ledger, 0, BOOK, CODE, Receipt("ann", Position.parse("1-1"), 1))
    assert await holder(ledger) is None
    async with ledger.transaction():
        assert await redeem_receipt(ledger, 0, BOOK, CODE, Receipt("bob", Position(Epoch(LOST_IN), Seq(1)), 1))
    assert await holder(ledger) == "bob"
    async with ledger.transaction():
        assert not await redeem_receipt(ledger, 0, BOOK, CODE, Receipt("ann", Position.parse("1-1"), 1))


async def test_a_receipt_whose_position_is_another_events_is_for_an_operator(ledger: asyncpg.Connection) -> None:
    await ledger.execute(
        "INSERT INTO old_events (shard, epoch, seq, event, book_id, code, user_id, at_ms)"
        " VALUES (0, $1, 1, 'coupon_assigned', $2, 'B-2', 'eve', 1)",
        LOST_IN,
        BOOK,
    )
    async with ledger.transaction():
        assert not await redeem_receipt(ledger, 0, BOOK, CODE, Receipt("bob", Position(Epoch(LOST_IN), Seq(1)), 1))
    assert await ledger.fetchval("SELECT count(*) FROM quarantine") == 1


async def test_an_operator_decides_what_is_in_quarantine_whatever_its_epoch(ledger: asyncpg.Connection) -> None:
    assert await deal_again(ledger, BOOK) == 1
    async with ledger.transaction():
        assert not await redeem_receipt(ledger, 0, BOOK, CODE, Receipt("bob", Position(Epoch(LOST_IN), Seq(1)), 1))
    assert await ledger.fetchval("SELECT decision FROM quarantine_decisions") == "dealt_again"


# --- a redemption is the holder's


def redemption(seq: int, user: str, code: str = CODE) -> Event:
    return Event(4, seq, COUPON_REDEEMED, BOOK, code, user, 1, uses=1)


async def test_a_redemption_by_another_than_the_holder_contradicts_the_ledger(ledger: asyncpg.Connection) -> None:
    assigned = [Event(4, seq, COUPON_ASSIGNED, BOOK, code, "ann", 1) for seq, code in ((1, CODE), (2, "B-2"))]
    _, heads = await commit_batches(ledger, "w", [batch_of(0, 4, 1, 0, assigned)])
    wrong = batch_of(0, 4, 1, 2, [redemption(3, "ann"), redemption(4, "bob", "B-2")], chain=heads[0])
    error = await first_data_error(ledger, "w", wrong)
    assert error is not None
    assert contradicts(error)
    assert await ledger.fetchval("SELECT sum(uses) FROM coupons") == 0
    right = wrong._replace(events=[redemption(3, "ann"), redemption(4, "ann", "B-2")])
    assert (await commit_batches(ledger, "w", [right]))[0] == {0: "moved"}
    assert await ledger.fetchval("SELECT sum(uses) FROM coupons") == 2
