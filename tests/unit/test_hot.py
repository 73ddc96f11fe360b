"""The driver of hot requests: a coroutine goes on within the callback that resolves what it waits for."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from coupon_svc.hot import Slot, Withdrawn, drive, in_a_task


class Broken(Exception):
    pass


@pytest.fixture
def done() -> list[Any]:
    """What `on_done` was called with."""
    return []


async def test_a_coroutine_that_waits_for_nothing_is_done_at_once(done: list[Any]) -> None:
    async def work() -> str:
        return "result"

    drive(work(), done.append)
    assert done == ["result"]


async def test_a_coroutine_goes_on_within_the_call_that_resolves_its_slot(done: list[Any]) -> None:
    first, second = Slot[int](), Slot[int]()

    async def work() -> int:
        return await first + await second

    drive(work(), done.append)
    first.set_result(1)
    assert done == []
    second.set_result(2)
    assert done == [3]


async def test_a_slot_that_is_resolved_already_is_not_waited_for(done: list[Any]) -> None:
    async def work() -> int:
        total = 0
        for number in range(10_000):  # far beyond the depth of Python's stack
            slot = Slot[int]()
            slot.set_result(number)
            total += await slot
        return total

    drive(work(), done.append)
    assert done == [sum(range(10_000))]


async def test_an_exception_of_a_slot_is_raised_where_it_is_waited_for(done: list[Any]) -> None:
    slot = Slot[int]()

    async def work() -> str:
        try:
            await slot
        except Broken:
            return "caught"
        return "not raised"

    drive(work(), done.append)
    slot.set_exception(Broken())
    assert done == ["caught"]


async def test_who_resolves_a_slot_first_decides(done: list[Any]) -> None:
    slot = Slot[int]()

    async def work() -> int:
        return await slot

    drive(work(), done.append)
    slot.set_result(1)
    slot.set_result(2)
    slot.set_exception(Broken())
    assert not slot.cancel()
    assert done == [1]


@pytest.mark.parametrize("in_task", [False, True])
async def test_what_a_coroutine_raises_is_logged_and_stays_with_it(
    in_task: bool, done: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    slot = Slot[int]()

    async def work() -> None:
        if in_task:
            await in_a_task()
        await slot
        raise Broken("SECRET-CODE")

    with caplog.at_level(logging.ERROR):
        drive(work(), done.append)
        await asyncio.sleep(0)
        slot.set_result(1)
        await turns()
    assert done == [None]
    assert "Broken at" in caplog.text
    assert "SECRET-CODE" not in caplog.text


async def test_an_ordinary_task_may_wait_for_a_slot() -> None:
    early, late, broken = Slot[str](), Slot[str](), Slot[str]()
    early.set_result("early")

    async def work() -> tuple[str, str]:
        found = (await early, await late)
        with pytest.raises(Broken):
            await broken
        return found

    task = asyncio.create_task(work())
    await turns()
    late.set_result("late")
    assert not task.done(), "a Task goes on in a turn of its own"
    await turns()
    broken.set_exception(Broken())
    assert await task == ("early", "late")


async def test_a_task_that_waits_for_a_slot_can_be_cancelled_and_timed_out() -> None:
    slot = Slot[int]()

    async def work() -> None:
        await slot

    task = asyncio.create_task(work())
    await turns()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert slot.done()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await Slot[int]()


async def test_slots_can_be_gathered() -> None:
    slots = [Slot[int]() for _ in range(3)]

    async def wait_for(slot: Slot[int]) -> int:
        return await slot

    gathered = asyncio.ensure_future(asyncio.gather(*map(wait_for, slots)))
    await turns()
    for number, slot in enumerate(slots):
        slot.set_result(number)
    assert await gathered == [0, 1, 2]


async def test_what_belongs_to_a_task_has_one_from_there_on(done: list[Any]) -> None:
    before, after = Slot[str](), Slot[str]()
    tasks: list[asyncio.Task[Any] | None] = []

    async def work() -> list[str]:
        found = [await before]
        tasks.append(asyncio.current_task())
        await in_a_task()
        tasks.append(asyncio.current_task())
        await asyncio.sleep(0.001)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.001):
                await asyncio.sleep(10)
        found.append(await after)
        return found

    async def resolve_in_another_task() -> None:
        before.set_result("before")

    drive(work(), done.append)
    other = asyncio.create_task(resolve_in_another_task())
    await other
    after.set_result("after")
    for _ in range(200):
        if not done:
            await asyncio.sleep(0.01)
    assert done == [["before", "after"]]
    assert tasks[0] is other, "a driven coroutine runs wherever its slot is resolved"
    assert tasks[1] not in (None, other)


async def test_a_future_hands_the_coroutine_to_a_task_too(done: list[Any]) -> None:
    loop = asyncio.get_running_loop()
    future, broken = loop.create_future(), loop.create_future()

    async def work() -> str:
        found: str = await future
        with pytest.raises(Broken):
            await broken
        await asyncio.sleep(0)
        return found

    drive(work(), done.append)
    await turns()
    future.set_result("of a future")
    await turns()
    broken.set_exception(Broken())
    await turns()
    assert done == ["of a future"]


@pytest.mark.parametrize("waits_for", ["slot", "task that has not begun", "future in a task", "slot in a task"])
async def test_a_driven_coroutine_can_be_cancelled_whatever_it_waits_for(waits_for: str, done: list[Any]) -> None:
    slot, future = Slot[int](), asyncio.get_running_loop().create_future()

    async def work() -> str:
        try:
            if waits_for == "slot in a task":
                await in_a_task()
            await (slot if "slot" in waits_for else future)
        except asyncio.CancelledError:
            return "told"
        return "not told"

    driven = drive(work(), done.append)
    if waits_for != "task that has not begun":
        await turns()
    driven.cancel("the server stops")
    assert done == [], "whoever cancels may be iterating over what the end changes"
    await turns()
    assert done == ["told"]


async def test_a_cancellation_that_nobody_catches_ends_the_coroutine(done: list[Any]) -> None:
    slot = Slot[int]()

    async def work() -> int:
        return await slot

    drive(work(), done.append).cancel()
    await turns()
    slot.set_result(1)
    assert done == [None]


async def test_a_slot_is_for_one_coroutine(done: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    slot = Slot[int]()

    async def work() -> int:
        return await slot

    drive(work(), done.append)
    drive(work(), done.append)
    assert done == [None]
    assert "RuntimeError" in caplog.text
    slot.set_result(1)
    assert done == [None, 1]


async def test_cancelling_what_is_over_does_nothing(done: list[Any]) -> None:
    async def work() -> int:
        return 1

    drive(work(), done.append).cancel()
    await turns()
    assert done == [1]


async def test_a_coroutine_may_resolve_what_another_one_and_itself_wait_for(done: list[Any]) -> None:
    mine, others = Slot[str](), Slot[str]()

    async def other() -> str:
        found = await others
        mine.set_result("resolved before it is waited for")
        return found

    async def work() -> str:
        others.set_result("resolved by a running coroutine")
        return await mine

    drive(other(), done.append)
    drive(work(), done.append)
    assert done == ["resolved by a running coroutine", "resolved before it is waited for"]


async def turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.mark.parametrize("withdrawable", [True, False])
async def test_a_wait_is_withdrawn_only_where_nothing_was_done(withdrawable: bool, done: list[Any]) -> None:
    slot = Slot[str]()
    slot.withdrawable = withdrawable

    async def work() -> str:
        try:
            return await slot
        except Withdrawn:
            return "withdrawn"

    driven = drive(work(), done.append)
    driven.withdraw()
    slot.set_result("done")
    assert done == ["withdrawn" if withdrawable else "done"]
    driven.withdraw()


async def test_what_runs_in_a_task_is_not_withdrawn(done: list[Any]) -> None:
    waits = asyncio.Event()

    async def work() -> str:
        await in_a_task()
        await waits.wait()
        return "done"

    driven = drive(work(), done.append)
    await asyncio.sleep(0)
    driven.withdraw()
    waits.set()
    await asyncio.sleep(0.01)
    assert done == ["done"]
