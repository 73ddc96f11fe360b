"""Requests that wait for the ledger are woken by the position that they wait for, and by no other."""

from __future__ import annotations

import asyncio

import pytest

from coupon_svc.domain.outcomes import Outcome, Refused
from coupon_svc.redis import waiters as waiters_module
from coupon_svc.redis.waiters import OVERDUE_S, DurabilityWaiters

WAIT_S = 5.0


class Clock:
    now = 1000.0


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The monotonic clock, which goes on only when it is told to."""
    clock = Clock()
    monkeypatch.setattr(waiters_module, "monotonic", lambda: clock.now)
    return clock


@pytest.fixture
def waiters() -> DurabilityWaiters:
    return DurabilityWaiters(2)


async def waiting(
    waiters: DurabilityWaiters, shard: int, epoch: int, seq: int, begun: float = Clock.now
) -> asyncio.Task[None]:
    """Somebody who has begun to wait."""
    task = asyncio.create_task(waiters.wait(shard, epoch, seq, begun + WAIT_S))
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


async def test_a_position_wakes_who_waits_for_it_or_for_one_before(waiters: DurabilityWaiters) -> None:
    third, first, second = [await waiting(waiters, 0, 4, seq) for seq in (3, 1, 2)]
    waiters.advance(0, 4, 2)
    assert [await answer_of(task) for task in (first, second, third)] == ["durable", "durable", "waits"]
    waiters.advance(0, 4, 3)
    assert await answer_of(third) == "durable"


async def test_what_the_ledger_has_is_not_waited_for(waiters: DurabilityWaiters) -> None:
    waiters.advance(0, 4, 7)
    await asyncio.wait_for(waiters.wait(0, 4, 7, 0.0), 1)
    assert waiters.committed(0) == (4, 7)
    assert waiters.committed(1) == (0, 0)


async def test_a_position_says_nothing_of_another_shard(waiters: DurabilityWaiters) -> None:
    task = await waiting(waiters, 1, 4, 1)
    waiters.advance(0, 4, 9)
    assert await answer_of(task) == "waits"
    task.cancel()


async def test_who_waits_in_an_epoch_that_is_over_learns_that_the_outcome_is_unknown(
    waiters: DurabilityWaiters,
) -> None:
    old, new = await waiting(waiters, 0, 4, 1), await waiting(waiters, 0, 5, 2)
    waiters.advance(0, 5, 1)
    assert await answer_of(old) == Outcome.OUTCOME_UNKNOWN
    assert await answer_of(new) == "waits"
    with pytest.raises(Refused) as refused:
        await waiters.wait(0, 4, 1, 0.0)
    assert refused.value.outcome is Outcome.OUTCOME_UNKNOWN
    new.cancel()


async def test_a_position_that_comes_late_changes_nothing(waiters: DurabilityWaiters) -> None:
    waiters.advance(0, 5, 3)
    task = await waiting(waiters, 0, 5, 4)
    waiters.advance(0, 4, 99)
    waiters.advance(0, 5, 2)
    assert waiters.committed(0) == (5, 3)
    assert await answer_of(task) == "waits"
    task.cancel()


async def test_a_wait_ends_in_time(waiters: DurabilityWaiters, clock: Clock) -> None:
    early = await waiting(waiters, 0, 4, 1)
    clock.now += 1.0
    late = await waiting(waiters, 1, 4, 1, clock.now)
    clock.now += WAIT_S - 1.0 - 0.01
    waiters.expire()
    assert [await answer_of(task) for task in (early, late)] == ["waits", "waits"]
    clock.now += 0.01
    waiters.expire()
    assert [await answer_of(task) for task in (early, late)] == [Outcome.OUTCOME_UNKNOWN, "waits"]
    waiters.advance(1, 4, 1)
    assert await answer_of(late) == "durable"


async def test_who_waits_longer_than_a_commit_takes_may_have_missed_a_message(
    waiters: DurabilityWaiters, clock: Clock
) -> None:
    assert not waiters.expire()
    task = await waiting(waiters, 0, 4, 1)
    clock.now += OVERDUE_S - 0.01
    assert not waiters.expire()
    clock.now += 0.02
    assert waiters.expire()
    waiters.advance(0, 4, 1)
    assert await answer_of(task) == "durable"
    assert not waiters.expire()


async def test_who_has_given_up_is_in_nobodys_way(waiters: DurabilityWaiters) -> None:
    gone, patient = await waiting(waiters, 0, 4, 1), await waiting(waiters, 0, 4, 1)
    gone.cancel()
    await asyncio.sleep(0)
    waiters.advance(0, 4, 1)
    assert await answer_of(patient) == "durable"
