"""Who guesses codes costs few statements, and makes nobody wait; who mistypes one is asked for at once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Collection, Iterable
from time import monotonic

import pytest

from coupon_svc.service.questions import (
    CODES_PER_STATEMENT_MAX,
    MISSES_FREE,
    MISSES_PER_S,
    PACED_PER_S,
    Asked,
    Questions,
)

GUESSER, OTHER = 1, 2


class Ledger:
    """Has every code that begins with `OLD`, of any tenant. Statements of tenants in `slow` wait to be let go."""

    def __init__(self) -> None:
        self.questions = Questions(self.find)
        self.statements: list[list[Asked]] = []
        self.slow: set[int] = set()
        self.go_on = asyncio.Event()
        self.added: set[str] = set()

    async def find(self, asked: Collection[Asked]) -> dict[Asked, str]:
        self.statements.append(list(asked))
        found = {one: "bk" for one in asked if one[1].startswith("OLD") or one[1] in self.added}
        if self.slow & {tenant_id for tenant_id, _ in asked}:
            await self.go_on.wait()
        else:
            await asyncio.sleep(0)
        return found

    def ask(self, tenant_id: int, codes: Iterable[str]) -> Awaitable[list[str | None]]:
        return asyncio.gather(*(asyncio.shield(self.questions.ask(tenant_id, code)) for code in codes))


@pytest.fixture
async def ledger() -> Ledger:
    return Ledger()


async def guess(ledger: Ledger, begin: int, count: int = MISSES_FREE + MISSES_PER_S) -> None:
    """Miss so often that the tenant is taken for one who guesses."""
    assert set(await ledger.ask(GUESSER, (f"NO-{begin + number}" for number in range(count)))) == {None}


async def test_five_hundred_guesses_in_a_moment_cost_a_statement_in_fifty_milliseconds(ledger: Ledger) -> None:
    await guess(ledger, 0)
    ledger.statements.clear()
    began = monotonic()
    asked = []
    for number in range(500):
        asked.append(asyncio.ensure_future(ledger.ask(GUESSER, [f"NEW-{number}"])))
        if number % 50 == 0:
            await asyncio.sleep(0.05)
    assert all(answer == [None] for answer in await asyncio.gather(*asked))
    assert len(ledger.statements) <= (monotonic() - began) * PACED_PER_S + 2
    assert sum(map(len, ledger.statements)) == 500


async def test_nobody_waits_for_the_statements_of_one_who_guesses(ledger: Ledger) -> None:
    await guess(ledger, 0)
    ledger.slow = {GUESSER}
    held = asyncio.ensure_future(ledger.ask(GUESSER, ["NO"]))
    await asyncio.sleep(2 / PACED_PER_S)
    assert await asyncio.wait_for(ledger.ask(OTHER, ["OLD-1", "NO"]), 1) == ["bk", None]
    assert not held.done()
    ledger.go_on.set()
    assert await held == [None]


async def test_a_mistyped_code_now_and_then_changes_nothing(ledger: Ledger) -> None:
    began = monotonic()
    for number in range(MISSES_FREE - 1):
        assert await ledger.ask(OTHER, [f"NO-{number}", f"OLD-{number}"]) == [None, "bk"]
    assert len(ledger.statements) == MISSES_FREE - 1
    assert monotonic() - began < (MISSES_FREE - 1) / PACED_PER_S / 2


async def test_who_stops_guessing_is_asked_for_at_once_again(ledger: Ledger) -> None:
    await guess(ledger, 0)
    await asyncio.sleep(1.2)
    began = monotonic()
    for number in range(10):
        assert await ledger.ask(GUESSER, [f"OLD-{number}"]) == ["bk"]
    assert monotonic() - began < 10 / PACED_PER_S / 2


async def test_a_code_that_was_added_meanwhile_is_found(ledger: Ledger) -> None:
    """A statement that began before says nothing to who asks after: both in the quick lane and in the other."""
    for begin in (0, MISSES_FREE):
        ledger.slow, ledger.go_on = {GUESSER}, asyncio.Event()
        early = asyncio.ensure_future(ledger.ask(GUESSER, [f"LATE-{begin}"]))
        await asyncio.sleep(2 / PACED_PER_S)
        ledger.added.add(f"LATE-{begin}")
        late = asyncio.ensure_future(ledger.ask(GUESSER, [f"LATE-{begin}"]))
        await asyncio.sleep(0)
        ledger.go_on.set()
        assert (await early, await late) == ([None], ["bk"])
        ledger.slow = set()
        await guess(ledger, begin)


async def test_who_asks_for_much_leaves_room_in_each_statement(ledger: Ledger) -> None:
    much = asyncio.ensure_future(ledger.ask(GUESSER, (f"OLD-{n}" for n in range(3 * CODES_PER_STATEMENT_MAX))))
    assert await ledger.ask(OTHER, ["OLD-1"]) == ["bk"]
    assert (OTHER, "OLD-1") in ledger.statements[0]
    assert set(await much) == {"bk"}
    assert max(map(len, ledger.statements)) <= CODES_PER_STATEMENT_MAX
