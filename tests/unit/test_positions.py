"""Requests that wait for the ledger are woken by the position that they wait for, and by no other."""

from __future__ import annotations

import asyncio

import pytest

from coupon_svc.domain.outcomes import Outcome, Refused
from coupon_svc.redis.positions import OVERDUE_S, Positions

WAIT_S = 5.0


class Clock:
    now = 1000.0


@pytest.fixture
async def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of the event loop, which goes on only when it is told to."""
    clock = Clock()
    monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: clock.now)
    return clock


@pytest.fixture
def positions() -> Positions:
    return Positions(2, int(1000 * WAIT_S))


async def waiting(positions: Positions, shard: int, epoch: int, seq: int) -> asyncio.Task[None]:
    """Somebody who has begun to wait."""
    task = asyncio.create_task(positions.wait(shard, epoch, seq))
    await asyncio.sleep(0)
    return task


async def answer_of(task: asyncio.Task[None]) -> str:
    """What the one who waits was told: "durable", an outcome, or "waits" for nothing yet."""
    await asyncio.sleep(0)
    if not task.done():
        return "waits"
    error = task.exception()
    assert error is None or isinstance(error, Refused)
    return "durable" if error is None else error.outcome


async def test_a_position_wakes_who_waits_for_it_or_for_one_before(positions: Positions) -> None:
    third, first, second = [await waiting(positions, 0, 4, seq) for seq in (3, 1, 2)]
    positions.advance(0, 4, 2)
    assert [await answer_of(task) for task in (first, second, third)] == ["durable", "durable", "waits"]
    positions.advance(0, 4, 3)
    assert await answer_of(third) == "durable"


async def test_what_the_ledger_has_is_not_waited_for(positions: Positions) -> None:
    positions.advance(0, 4, 7)
    await asyncio.wait_for(positions.wait(0, 4, 7), 1)
    assert positions.committed(0) == (4, 7)
    assert positions.committed(1) == (0, 0)


async def test_a_position_says_nothing_of_another_shard(positions: Positions) -> None:
    task = await waiting(positions, 1, 4, 1)
    positions.advance(0, 4, 9)
    assert await answer_of(task) == "waits"
    task.cancel()


async def test_who_waits_in_an_epoch_that_is_over_learns_that_the_outcome_is_unknown(positions: Positions) -> None:
    old, new = await waiting(positions, 0, 4, 1), await waiting(positions, 0, 5, 2)
    positions.advance(0, 5, 1)
    assert await answer_of(old) == Outcome.OUTCOME_UNKNOWN
    assert await answer_of(new) == "waits"
    with pytest.raises(Refused) as refused:
        await positions.wait(0, 4, 1)
    assert refused.value.outcome is Outcome.OUTCOME_UNKNOWN
    new.cancel()


async def test_a_position_that_comes_late_changes_nothing(positions: Positions) -> None:
    positions.advance(0, 5, 3)
    task = await waiting(positions, 0, 5, 4)
    positions.advance(0, 4, 99)
    positions.advance(0, 5, 2)
    assert positions.committed(0) == (5, 3)
    assert await answer_of(task) == "waits"
    task.cancel()


async def test_a_wait_ends_in_time(positions: Positions, clock: Clock) -> None:
    early = await waiting(positions, 0, 4, 1)
    clock.now += 1.0
    late = await waiting(positions, 1, 4, 1)
    clock.now += WAIT_S - 1.0 - 0.01
    positions.expire()
    assert [await answer_of(task) for task in (early, late)] == ["waits", "waits"]
    clock.now += 0.01
    positions.expire()
    assert [await answer_of(task) for task in (early, late)] == [Outcome.OUTCOME_UNKNOWN, "waits"]
    positions.advance(1, 4, 1)
    assert await answer_of(late) == "durable"


async def test_who_waits_longer_than_a_commit_takes_may_have_missed_a_message(
    positions: Positions, clock: Clock
) -> None:
    assert not positions.expire()
    task = await waiting(positions, 0, 4, 1)
    clock.now += OVERDUE_S - 0.01
    assert not positions.expire()
    clock.now += 0.02
    assert positions.expire()
    positions.advance(0, 4, 1)
    assert await answer_of(task) == "durable"
    assert not positions.expire()


async def test_who_has_given_up_is_in_nobodys_way(positions: Positions) -> None:
    gone, patient = await waiting(positions, 0, 4, 1), await waiting(positions, 0, 4, 1)
    gone.cancel()
    await asyncio.sleep(0)
    positions.advance(0, 4, 1)
    assert await answer_of(patient) == "durable"
