"""Entries lie in the part of their month, and the parts of the next months are there before they begin."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime

import asyncpg
import pytest

from coupon_svc.postgres.parts import make_parts, month_names
from tests.harness import fresh_database

PARTS = "SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = 'entries'::regclass ORDER BY 1"


@pytest.fixture
async def ledger(postgres_url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(await fresh_database(postgres_url, 1))
    yield connection
    await connection.close()


async def test_parts_of_the_months_to_come_are_made_once(ledger: asyncpg.Connection) -> None:
    ahead = [name for name, _, _ in month_names(datetime.now(UTC))]
    there = [row[0] for row in await ledger.fetch(PARTS)]
    assert there == [f"entries_{datetime.now(UTC):%Y_%m}", *ahead, "entries_else"]
    assert await make_parts(ledger) == []
    await ledger.execute(f"DROP TABLE {ahead[-1]}")
    assert await make_parts(ledger) == [ahead[-1]]


async def test_an_entry_lies_in_the_part_of_its_month(ledger: asyncpg.Connection) -> None:
    await ledger.execute(
        "INSERT INTO entries (shard, epoch, seq, n, after, tip, at_ms, keyed, events, chain)"
        " VALUES (0, 1, 1, 1, '', 'a', 1, false, '[]', '')"
    )
    part = await ledger.fetchval("SELECT tableoid::regclass::text FROM entries")
    assert part == f"entries_{datetime.now(UTC):%Y_%m}"
