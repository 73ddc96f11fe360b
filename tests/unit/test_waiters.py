"""Requests that wait for the ledger are woken by the position or the entry that they wait for, and by no other."""

from __future__ import annotations

import asyncio

import pytest

from coupon_svc.domain.outcomes import Outcome, Refused
from coupon_svc.hot import drive
from coupon_svc.redis import waiters as waiters_module
from coupon_svc.redis.waiters import ASKED_AT_ONCE_MAX, HEARD_KEPT_S, OVERDUE_S, DurabilityWaiters, EntryKey

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


# --- entries of one's own


MINE = EntryKey(0, 4, 7, "tip-of-mine")


async def waiting_for(waiters: DurabilityWaiters, entry: EntryKey = MINE) -> asyncio.Task[None]:
    task = asyncio.create_task(waiters.wait_for_entry(entry, Clock.now + WAIT_S))
    await asyncio.sleep(0)
    return task


async def test_the_message_with_its_tip_wakes_all_who_made_an_entry_and_nobody_else(waiters: DurabilityWaiters) -> None:
    mine = [await waiting_for(waiters) for _ in range(3)]
    other = await waiting_for(waiters, MINE._replace(tip="another"))
    waiters.advance(0, 4, 9)
    assert [await answer_of(task) for task in [*mine, other]] == ["waits"] * 4, (
        "a position does not tell whose entry it is"
    )
    waiters.hear(["unknown", MINE.tip])
    assert [await answer_of(task) for task in [*mine, other]] == ["durable"] * 3 + ["waits"]
    other.cancel()


async def test_a_message_that_comes_before_the_reply_counts_and_is_forgotten_in_time(
    waiters: DurabilityWaiters, clock: Clock
) -> None:
    waiters.hear([MINE.tip])
    for _ in range(2):
        assert await answer_of(await waiting_for(waiters)) == "durable"
        clock.now += HEARD_KEPT_S - 0.01
        waiters.expire()
    assert await answer_of(await waiting_for(waiters)) == "durable"
    clock.now += HEARD_KEPT_S
    waiters.expire()
    task = await waiting_for(waiters)
    assert await answer_of(task) == "waits"
    task.cancel()


async def test_who_misses_the_message_is_asked_for_ever_less_often(waiters: DurabilityWaiters, clock: Clock) -> None:
    begun = clock.now
    tasks = [await waiting_for(waiters) for _ in range(2)]
    asked = []
    while clock.now < begun + 4:
        clock.now += 0.01
        if overdue := waiters.unheard():
            assert overdue == [MINE]
            asked.append(clock.now - begun)
    assert asked == [pytest.approx(OVERDUE_S * 2**n, rel=0.15) for n in range(6)]
    for task in tasks:
        task.cancel()


async def test_what_is_asked_for_at_once_has_a_bound(waiters: DurabilityWaiters, clock: Clock) -> None:
    tasks = [await waiting_for(waiters, MINE._replace(tip=str(n))) for n in range(ASKED_AT_ONCE_MAX + 1)]
    clock.now += OVERDUE_S
    assert len(waiters.unheard()) == ASKED_AT_ONCE_MAX
    assert len(waiters.unheard()) == 1
    assert waiters.unheard() == []
    for task in tasks:
        task.cancel()


@pytest.mark.parametrize(
    ("found", "ledger_epoch", "answer"),
    [
        ({(0, 4, 7): MINE.tip}, 4, "durable"),
        ({(0, 4, 7): MINE.tip}, 5, "durable"),
        ({(0, 4, 7): "another"}, 4, Outcome.OUTCOME_UNKNOWN),
        ({(1, 4, 7): MINE.tip, (0, 4, 8): MINE.tip}, 4, "waits"),
        ({}, 4, "waits"),
        ({}, 5, Outcome.OUTCOME_UNKNOWN),
    ],
)
async def test_postgres_decides_where_no_message_came(
    found: dict[tuple[int, int, int], str], ledger_epoch: int, answer: str, waiters: DurabilityWaiters, clock: Clock
) -> None:
    tasks = [await waiting_for(waiters) for _ in range(2)]
    waiters.advance(0, ledger_epoch, 9)
    clock.now += OVERDUE_S
    waiters.learn(waiters.unheard(), found)
    assert [await answer_of(task) for task in tasks] == [answer] * 2
    for task in tasks:
        task.cancel()


async def test_a_wait_for_an_entry_ends_in_time(waiters: DurabilityWaiters, clock: Clock) -> None:
    patient, gone = await waiting_for(waiters), await waiting_for(waiters)
    gone.cancel()
    clock.now += OVERDUE_S
    assert waiters.expire(), "a message may be lost"
    clock.now += WAIT_S - OVERDUE_S - 0.01
    waiters.expire()
    assert await answer_of(patient) == "waits"
    clock.now += 0.01
    waiters.expire()
    assert await answer_of(patient) == Outcome.OUTCOME_UNKNOWN
    assert waiters.unheard() == []
    assert not waiters.expire()


async def test_who_is_woken_may_wait_again_at_once(waiters: DurabilityWaiters, clock: Clock) -> None:
    """A driven request goes on within the call that wakes it, and must not be lost from the table that is being read."""
    woken: list[str] = []

    async def twice() -> None:
        for _ in range(2):
            try:
                await waiters.wait(0, 4, 1, clock.now + WAIT_S)
                woken.append("durable")
            except Refused as refused:
                woken.append(refused.outcome)

    drive(twice(), lambda _: None)
    clock.now += WAIT_S
    waiters.expire()
    assert woken == [Outcome.OUTCOME_UNKNOWN]
    waiters.advance(0, 4, 1)
    assert woken == [Outcome.OUTCOME_UNKNOWN, "durable"]
