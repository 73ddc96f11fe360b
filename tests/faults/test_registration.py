"""Who is registered may answer before the ledger knows, for as long as its row is sure to be there, and no longer."""

from __future__ import annotations

from collections.abc import AsyncIterator

import asyncpg
import pytest

from coupon_svc.domain.clock import boot_s
from coupon_svc.postgres.processes import PROCESS_TTL_S, count_as_gone, gone_processes, process_beats
from coupon_svc.redis.data_plane import DataPlane
from coupon_svc.redis.scripts import Scripts
from coupon_svc.service.registration import Registration
from tests.harness import fresh_database


@pytest.fixture
async def ledger(postgres_url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(await fresh_database(postgres_url, 1))
    yield connection
    await connection.close()


@pytest.fixture
def plane() -> DataPlane:
    """Of an API process that has no Redis yet."""
    return DataPlane("redis://127.0.0.1:1", 1, Scripts())


async def test_a_registration_that_has_lapsed_is_not_taken_up_again(
    ledger: asyncpg.Connection, plane: DataPlane
) -> None:
    """The shards' owners may have reported for the old one already; what is answered now must be asked of a new one."""
    registration = Registration("", plane)
    await registration._renew(ledger)
    ((old, beat),) = (await process_beats(ledger)).items()
    assert await count_as_gone(ledger, old, beat)
    await registration._renew(ledger)
    assert await gone_processes(ledger) == [old]
    assert [process_id != old for process_id in await process_beats(ledger)] == [True]


async def test_a_registration_that_was_renewed_meanwhile_is_not_counted_as_gone(
    ledger: asyncpg.Connection, plane: DataPlane
) -> None:
    registration = Registration("", plane)
    await registration._renew(ledger)
    ((process_id, beat),) = (await process_beats(ledger)).items()
    await registration._renew(ledger)
    assert not await count_as_gone(ledger, process_id, beat)
    assert await gone_processes(ledger) == []
    assert list(await process_beats(ledger)) == [process_id]


async def test_early_answers_end_a_second_before_the_row_does(
    ledger: asyncpg.Connection, plane: DataPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured from before the row was asked for, so that a slow Postgres shortens it."""
    asked_at = boot_s()
    assert not plane.may_answer_early(plane.views[0], 1), "it was never registered"
    registered_until: list[float] = []
    register_until = plane.register_until

    def note(until_s: float) -> None:
        registered_until.append(until_s)
        register_until(until_s)

    monkeypatch.setattr(plane, "register_until", note)
    await Registration("", plane)._renew(ledger)
    assert plane.may_answer_early(plane.views[0], 1)
    assert asked_at < registered_until[0] - (PROCESS_TTL_S - 1) < boot_s()


async def test_nothing_is_answered_early_when_the_time_is_over(plane: DataPlane) -> None:
    plane.register_until(boot_s() - 0.001)
    assert not plane.may_answer_early(plane.views[0], 1)
