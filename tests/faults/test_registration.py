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
from tests.harness import fresh_database, until


@pytest.fixture
async def url(postgres_url: str) -> str:
    return await fresh_database(postgres_url, 1)


@pytest.fixture
async def ledger(url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(url)
    yield connection
    await connection.close()


@pytest.fixture
def plane() -> DataPlane:
    """Of an API process that has no Redis yet."""
    return DataPlane("redis://127.0.0.1:1", 1, Scripts())


@pytest.fixture
async def registration(url: str, plane: DataPlane) -> AsyncIterator[Registration]:
    registration = Registration(url, plane)
    yield registration
    await registration.stop()


async def registered(ledger: asyncpg.Connection, *, but: tuple[str, int] | None = None) -> tuple[str, int]:
    """(process, beat) as soon as one is registered, and not any more as it was before."""

    async def found() -> list[tuple[str, int]]:
        return [one for one in (await process_beats(ledger)).items() if one != but]

    return (await until(found, what="the process should register"))[0]


async def test_a_registration_that_has_lapsed_is_not_taken_up_again(
    ledger: asyncpg.Connection, registration: Registration
) -> None:
    """The shards' owners may have reported for the old one already; what is answered now must be asked of a new one."""
    await registration.start()
    old, beat = await registered(ledger)
    while not await count_as_gone(ledger, old, beat):  # it was renewed just now
        old, beat = await registered(ledger)
    new, _ = await registered(ledger)
    assert new != old
    assert await gone_processes(ledger) == [old]


async def test_a_registration_that_was_renewed_meanwhile_is_not_counted_as_gone(
    ledger: asyncpg.Connection, registration: Registration
) -> None:
    await registration.start()
    process_id, beat = await registered(ledger)
    assert (await registered(ledger, but=(process_id, beat)))[0] == process_id
    assert not await count_as_gone(ledger, process_id, beat)
    assert await gone_processes(ledger) == []
    assert list(await process_beats(ledger)) == [process_id]


async def test_early_answers_end_a_second_before_the_row_does(
    plane: DataPlane, registration: Registration, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured from before the row was asked for, so that a slow Postgres shortens it."""
    asked_at = boot_s()
    assert not plane.may_answer_early(plane.views[0], 1), "it was never registered"
    registered_until: list[float] = []
    register_until = plane.register_until

    def note(until_s: float) -> None:
        registered_until.append(until_s)
        register_until(until_s)

    async def noted() -> bool:
        return bool(registered_until)

    monkeypatch.setattr(plane, "register_until", note)
    await registration.start()
    await until(noted, what="the process should register")
    assert plane.may_answer_early(plane.views[0], 1)
    assert asked_at < registered_until[0] - (PROCESS_TTL_S - 1) < boot_s()


async def test_nothing_is_answered_early_when_the_time_is_over(plane: DataPlane) -> None:
    plane.register_until(boot_s() - 0.001)
    assert not plane.may_answer_early(plane.views[0], 1)
