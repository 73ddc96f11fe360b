"""Who waits for the same thing of a book stands in one line, and Redis is asked by the first one alone."""

from __future__ import annotations

import asyncio
from time import monotonic

import pytest

from coupon_svc.domain.outcomes import Outcome, Refused
from coupon_svc.hot import drive
from coupon_svc.redis.calls import bind_operation
from coupon_svc.redis.contract import Reply
from coupon_svc.redis.scripts import Scripts
from coupon_svc.service import polling
from coupon_svc.service.durability import PATIENCE_S
from coupon_svc.service.polling import Poll

REPLIES = bind_operation(Scripts().operations["assign_coupon"].contract)


class Pool:
    """A book's codes, and who has asked for one."""

    def __init__(self, codes: int = 0) -> None:
        self.codes = codes
        self.asked: list[int] = []

    async def take(self, caller: int) -> Reply:
        self.asked.append(caller)
        await asyncio.sleep(0)
        if not self.codes:
            return REPLIES.reply(["refilling"])
        self.codes -= 1
        return REPLIES.reply(["ok", "A-1", "5", "4-21", "redis", ""])


def stand_in_line(poll: Poll, pool: Pool, callers: int) -> list[asyncio.Task[str]]:
    async def one(caller: int) -> str:
        try:
            reply, lost = await poll.wait(lambda: pool.take(caller), monotonic())
        except Refused as refused:
            return refused.outcome
        assert not lost
        return reply.outcome

    return [asyncio.create_task(one(caller)) for caller in range(callers)]


def for_codes() -> Poll:
    return Poll("refilling", Outcome.REFILLING)


async def test_a_thousand_callers_at_a_dry_pool_ask_as_often_as_one() -> None:
    pool, poll = Pool(), for_codes()
    begun = monotonic()
    outcomes = await asyncio.gather(*stand_in_line(poll, pool, 1_000))
    assert set(outcomes) == {Outcome.REFILLING}
    assert 1 <= len(pool.asked) < 20
    assert PATIENCE_S <= monotonic() - begun < PATIENCE_S + 5
    assert poll.is_over


async def test_when_codes_come_all_get_theirs_at_once_and_in_their_order() -> None:
    pool, poll = Pool(), for_codes()
    tasks = stand_in_line(poll, pool, 200)
    await asyncio.sleep(0.05)
    before = len(pool.asked)
    pool.codes = 150
    begun = monotonic()
    await asyncio.gather(*tasks[:100])
    assert monotonic() - begun < 0.3
    outcomes = await asyncio.gather(*tasks)
    assert outcomes.count("ok") == 150
    assert outcomes.count(Outcome.REFILLING) == 50
    assert set(outcomes[:140]) == {"ok"}
    assert len(pool.asked) - before < 200 + 20


async def test_a_refusal_goes_down_the_line_too() -> None:
    poll = for_codes()

    async def recovering() -> Reply:
        raise Refused(Outcome.RECOVERING)

    async def one() -> str:
        with pytest.raises(Refused) as refused:
            await poll.wait(recovering, monotonic())
        return refused.value.outcome

    begun = monotonic()
    assert set(await asyncio.gather(*(one() for _ in range(100)))) == {Outcome.RECOVERING}
    assert monotonic() - begun < PATIENCE_S


async def test_who_gives_up_holds_up_nobody() -> None:
    pool, poll = Pool(), for_codes()
    tasks = stand_in_line(poll, pool, 10)
    await asyncio.sleep(0.02)
    for task in tasks[:9]:
        task.cancel()
    pool.codes = 1
    assert await asyncio.wait_for(tasks[9], 1) == "ok"
    await asyncio.gather(*tasks, return_exceptions=True)
    assert poll.is_over


@pytest.mark.parametrize("error", [Refused(Outcome.BOOK_NOT_FOUND), ValueError()])
async def test_what_all_are_to_be_told_is_asked_once(error: Exception) -> None:
    asked = 0

    async def ask(begun: float) -> bool:
        nonlocal asked
        asked += 1
        raise error

    pool, poll = Pool(), Poll("refilling", Outcome.RECOVERING, ask)
    told = await asyncio.gather(
        *(poll.wait(lambda: pool.take(0), monotonic()) for _ in range(50)), return_exceptions=True
    )
    assert {str(one) for one in told} == {str(error)}
    assert (asked, pool.asked) == (1, [])


async def test_what_was_there_and_is_not_found_is_lost() -> None:
    async def was_there(begun: float) -> bool:
        return True

    pool = Pool()
    reply, lost = await Poll("refilling", Outcome.RECOVERING, was_there).wait(lambda: pool.take(0), monotonic())
    assert (reply.outcome, lost, pool.asked) == ("refilling", True, [0])


async def test_a_driven_request_needs_no_task_to_stand_in_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polling, "FIRST_PAUSE_S", 0.001)
    pool, poll, done = Pool(codes=1), for_codes(), asyncio.Event()

    async def take() -> Reply:
        pool.asked.append(0)
        return REPLIES.reply(["ok", "A-1", "5", "4-21", "redis", ""])

    tasks = len(asyncio.all_tasks())
    driven = drive(poll.wait(take, monotonic()), lambda _: done.set())
    assert len(asyncio.all_tasks()) == tasks + 1, "the poll's own"
    await asyncio.wait_for(done.wait(), 1)
    assert driven._task is None
