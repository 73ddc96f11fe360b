"""How the rate of assigns changes as one thing grows: processes, connections, books, codes of a book."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import msgspec
import uvloop

from bench.figures import GrowthRow, GrowthTable
from bench.over_http import ACKS, GROW_LEASE_S
from bench.requests import NextRequest, Requests
from bench.stand import Process, Stand
from bench.turns import Turn, open_ledger, take_turn

_CONNECTIONS = 64
"""where a table is not about them"""

RATE_ASSUMED_MAX = 12_000
"""Assigns a second that books are made large enough for."""
CODES_A_BOOK_DEFAULT_MAX = 1_000_000


class GrowthPlan(msgspec.Struct, frozen=True):
    """How far, and how long: a turn of `seconds` for each ack, setting and round."""

    rounds: int = 3
    seconds: float = 2.0
    connections: tuple[int, ...] = (1, 8, 64, 256, 1_000)
    books: tuple[int, ...] = (1, 10, 100, 1_000)
    codes: tuple[int, ...] = (1_000, 10_000, 100_000, CODES_A_BOOK_DEFAULT_MAX)


class _Setting(msgspec.Struct):
    """One row: where its requests go."""

    ack: str
    name: str
    apis: Sequence[Process]
    connections: int
    next_request: NextRequest
    turns: list[Turn] = []


def bench_growth(plan: GrowthPlan, say: Callable[[str], None]) -> list[GrowthTable]:
    """The tables; the turns of a table's settings are interleaved. Raises BenchError."""
    with Stand() as stand:
        stand.writer()
        apis = [stand.api(), stand.api()]
        for api in apis:
            stand.await_ready(api)
        requests = Requests(stand.key)
        enough = int((plan.rounds * plan.seconds * 8 + GROW_LEASE_S) * RATE_ASSUMED_MAX)
        hot = {ack: stand.make_book(apis[0], ack, enough) for ack in ACKS}
        one = {ack: requests.assign(hot[ack], with_key=True) for ack in ACKS}
        uvloop.run(_warm_up(stand, apis, list(one.values())))
        tables = []

        def table(grows: str, settings: list[_Setting]) -> None:
            rows = uvloop.run(_measure(stand, settings, plan, say))
            tables.append(GrowthTable(grows=grows, rows=rows))

        table(
            "API processes (the machine has two cores for everything)",
            [_Setting(ack, f"{n}", apis[:n], _CONNECTIONS, one[ack]) for ack in ACKS for n in (1, 2)],
        )
        table(
            "connections",
            [_Setting(ack, f"{n:,}", apis[:1], n, one[ack]) for ack in ACKS for n in plan.connections],
        )
        say("making books")
        table("books, asked in turn", _of_books(stand, apis[0], requests, plan))
        say("making books")
        table("codes of a book, dealt to the last", _of_codes(stand, apis[0], requests, plan))
        return tables


def _of_books(stand: Stand, api: Process, requests: Requests, plan: GrowthPlan) -> list[_Setting]:
    settings = []
    for ack in ACKS:
        for number in plan.books:
            codes = int(plan.rounds * plan.seconds * RATE_ASSUMED_MAX / number) + 100
            books = [stand.make_book(api, ack, codes) for _ in range(number)]
            request = requests.assign_in_turn(books, with_key=True)
            settings.append(_Setting(ack, f"{number:,}", [api], _CONNECTIONS, request))
    return settings


def _of_codes(stand: Stand, api: Process, requests: Requests, plan: GrowthPlan) -> list[_Setting]:
    settings = []
    for ack in ACKS:
        for codes in plan.codes:
            wanted = -(-int(plan.rounds * plan.seconds * RATE_ASSUMED_MAX) // codes)
            books = [stand.make_book(api, ack, codes) for _ in range(wanted)]
            request = requests.assign_until_dealt(books, codes, with_key=True)
            settings.append(_Setting(ack, f"{codes:,}", [api], _CONNECTIONS, request))
    return settings


async def _warm_up(stand: Stand, apis: Sequence[Process], assigns: Sequence[NextRequest]) -> None:
    ledger = await open_ledger(*stand.stores)
    for next_request in assigns:
        await take_turn([api.port for api in apis], apis[0].pid, next_request, GROW_LEASE_S, ledger)
    await ledger.close()


async def _measure(
    stand: Stand, settings: Sequence[_Setting], plan: GrowthPlan, say: Callable[[str], None]
) -> list[GrowthRow]:
    ledger = await open_ledger(*stand.stores)
    try:
        for _ in range(plan.rounds):
            for setting in settings:
                turn = await take_turn(
                    [api.port for api in setting.apis],
                    setting.apis[0].pid,
                    setting.next_request,
                    plan.seconds,
                    ledger,
                    connections=setting.connections,
                )
                setting.turns.append(turn)
                say(f"ack = {setting.ack}, {setting.name}: {turn.rate:,.0f}/s")
    finally:
        await ledger.close()
    return [_row(setting) for setting in settings]


def _row(setting: _Setting) -> GrowthRow:
    row = GrowthRow(ack=setting.ack, setting=setting.name, samples=[turn.rate for turn in setting.turns])
    bad = sum((turn.bad for turn in setting.turns), Counter[str]())
    if bad:
        part = bad.total() / (bad.total() + sum(turn.good for turn in setting.turns))
        row.refused = f"{part:.2%} refused: {', '.join(sorted(bad))}"
    return row
