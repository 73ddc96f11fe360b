"""Assign over HTTP against Postgres alone, lock and redeem against the echo, and how long an assign takes under load."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import msgspec
import uvloop

from bench import postgres_only
from bench.figures import BenchError, Figure, rate_text, ratios
from bench.requests import NextRequest, Pairs, Requests
from bench.stand import Process, Stand
from bench.tail import measure_tails
from bench.turns import Ledger, Turn, open_ledger, take_turn

_POSTGRES_RATE_ASSUMED_MAX = 5_000
_CODES_FIRST = 60_000
_CODES_SPARE = 1.5
"""Before a round a book has this many times the codes that its fastest turns would take."""
WARM_UP_S = 1.0
GROW_LEASE_S = 2.5
"""How long a new book is dealt from before it counts: the blocks of codes that it is lent grow with demand, which is
what the first seconds of a sale see, too, and what a longer one does not."""

ACKS = ("redis", "ledger")


class HttpPlan(msgspec.Struct, frozen=True):
    """How long it takes: `rounds` of six turns, then `tail_rounds` of three turns in the open loop. All requests have an
    Idempotency-Key."""

    rounds: int = 11
    seconds: float = 2.0
    tail_rounds: int = 5
    tail_seconds: float = 4.0

    @property
    def codes_postgres(self) -> int:
        return int((WARM_UP_S + self.rounds * self.seconds) * _POSTGRES_RATE_ASSUMED_MAX)


class _Book(msgspec.Struct):
    """A book that never runs out: what is left is counted, and topped up between rounds."""

    book_id: str
    left: int = _CODES_FIRST
    highest: float = 0.0
    """codes a second in its fastest turn"""


class _Parts(msgspec.Struct):
    """The processes under load, and what they are loaded with."""

    stand: Stand
    requests: Requests
    api: Process
    echo: Process
    postgres: Process
    books: dict[str, _Book]
    coupons: list[bytes] = []
    """answers of assigns whose coupon was not redeemed yet"""

    def assign(self, ack: str) -> NextRequest:
        return self.requests.assign(self.books[ack].book_id, with_key=True)

    def top_up(self, seconds: float) -> None:
        """Let the books last for so many seconds more of turns."""
        for book in self.books.values():
            missing = int(_CODES_SPARE * seconds * book.highest) - book.left
            if missing > 0:
                self.stand.add_codes(self.api, book.book_id, missing)
                book.left += missing


class _Rounds:
    """Samples of every line, by name; a name that failed once keeps its reason."""

    def __init__(self) -> None:
        self.turns: dict[str, list[Turn]] = {}
        self.echoes: list[float] = []
        self.failed: dict[str, str] = {}
        self.load_shares: list[float] = []

    def take(self, name: str, turn: Turn) -> None:
        """A turn of a line, which must have had good answers alone."""
        self.turns.setdefault(name, []).append(turn)
        self.load_shares.append(turn.load_share)
        if turn.bad or not turn.good:
            self.fail(name, f"not all answers were good: {dict(turn.bad) or 'there were none'}")

    def fail(self, name: str, why: str) -> None:
        self.failed.setdefault(name, why)

    def rates(self, name: str) -> list[float]:
        return [turn.rate for turn in self.turns.get(name, [])]


def bench_http(plan: HttpPlan, say: Callable[[str], None]) -> tuple[list[Figure], list[float], float]:
    """The figures; the part of a core that the load took in each turn; and pairs a second. Raises BenchError."""
    with Stand() as stand:
        say("starting the service, the echo and the Postgres-only service; making books")
        database = stand.other_database("postgres_only")
        uvloop.run(postgres_only.fill(database, plan.codes_postgres))
        stand.writer()
        parts = _Parts(
            stand,
            Requests(stand.key),
            stand.api(),
            stand.serve("echo"),
            stand.serve("postgres-only", COUPON_DATABASE_URL=database),
            {},
        )
        stand.await_ready(parts.api)
        stand.await_answers(parts.echo)
        stand.await_answers(parts.postgres)
        parts.books = {ack: _Book(stand.make_book(parts.api, ack, _CODES_FIRST)) for ack in ACKS}
        return uvloop.run(_measure(parts, plan, say))


async def _measure(
    parts: _Parts, plan: HttpPlan, say: Callable[[str], None]
) -> tuple[list[Figure], list[float], float]:
    ledger = await open_ledger(*parts.stand.stores)
    rounds = _Rounds()
    try:
        await _warm_up(parts, ledger)
        for number in range(1, plan.rounds + 1):
            parts.top_up(plan.seconds)
            await _round(parts, plan, ledger, rounds)
            say(f"round {number} of {plan.rounds}: {_summary(rounds)}")
        figures = _figures(rounds)
        parts.top_up(plan.tail_rounds * plan.tail_seconds)
        highest = {"echo": statistics.median_high(rounds.echoes)}
        highest |= {ack: statistics.median_high(rounds.rates(ack)) for ack in ACKS}
        makers = {ack: parts.assign(ack) for ack in ACKS}
        figures += await measure_tails(
            parts.api,
            parts.echo,
            makers,
            parts.requests.echo(),
            highest,
            plan.tail_rounds,
            plan.tail_seconds,
            ledger,
            say,
        )
        return figures, rounds.load_shares, statistics.median(rounds.rates("pair"))
    finally:
        await ledger.close()


async def _warm_up(parts: _Parts, ledger: Ledger) -> None:
    """Nothing of it counts, refusals neither: a pool may run dry while the first blocks are small."""
    api, requests = parts.api, parts.requests
    await take_turn(parts.echo.port, parts.echo.pid, requests.echo(), WARM_UP_S, None)
    for ack, book in parts.books.items():
        turn = await take_turn(api.port, api.pid, parts.assign(ack), GROW_LEASE_S, ledger)
        book.left, book.highest = book.left - turn.good, turn.rate
    request = requests.assign(postgres_only.BOOK_ID, with_key=True)
    await take_turn(parts.postgres.port, parts.postgres.pid, request, WARM_UP_S, None)


async def _round(parts: _Parts, plan: HttpPlan, ledger: Ledger, rounds: _Rounds) -> None:
    """Each ack, Postgres alone, echo, pairs, echo."""

    async def echo() -> Turn:
        turn = await take_turn(parts.echo.port, parts.echo.pid, parts.requests.echo(), plan.seconds, None)
        rounds.load_shares.append(turn.load_share)
        if turn.bad:
            raise BenchError(f"the echo itself did not answer: {dict(turn.bad)}")
        return turn

    for ack, book in parts.books.items():
        keep = parts.coupons.append
        turn = await take_turn(parts.api.port, parts.api.pid, parts.assign(ack), plan.seconds, ledger, on_good=keep)
        rounds.take(ack, turn)
        book.left, book.highest = book.left - turn.good, max(book.highest, turn.rate)
    alone = parts.requests.assign(postgres_only.BOOK_ID, with_key=True)
    rounds.take("postgres", await take_turn(parts.postgres.port, parts.postgres.pid, alone, plan.seconds, None))
    before = await echo()
    pairs = Pairs(parts.requests, parts.coupons, with_key=True)
    turn = await take_turn(
        parts.api.port, parts.api.pid, pairs.next_request, plan.seconds, ledger, on_good=pairs.take_answer
    )
    if pairs.ran_out:
        rounds.fail("pair", "there were not enough coupons to lock")
    turn.good = pairs.redeemed  # pairs, not answers
    rounds.take("pair", turn)
    after = await echo()
    rounds.echoes.append((before.rate + after.rate) / 2)


def _summary(rounds: _Rounds) -> str:
    parts = [f"{name} {turns[-1].rate:,.0f}/s" for name, turns in rounds.turns.items()]
    return ", ".join([f"echo {rounds.echoes[-1]:,.0f}/s", *parts])


def _figures(rounds: _Rounds) -> list[Figure]:
    figures = []

    def add(names: list[str], samples: list[float], figure: Figure) -> None:
        figure.samples = samples
        figure.failed = next((rounds.failed[name] for name in names if name in rounds.failed), None)
        figures.append(figure)

    for ack, goal in (("ledger", 3.0), ("redis", 4.0)):
        note = f"{rate_text(rounds.rates(ack))} against {rate_text(rounds.rates('postgres'))}"
        what = f"assigns a second, `ack = {ack}`, against Postgres alone; the backlog drained"
        figure = Figure(id=f"postgres_{ack}", what=what, goal=goal, note=note)
        add([ack, "postgres"], ratios(rounds.rates(ack), rounds.rates("postgres")), figure)
    figure = Figure(
        id="pair",
        what="lock + redeem, against two echoes; the backlog drained",
        goal=0.5,
        note=f"{rate_text(rounds.rates('pair'))} pairs",
    )
    add(["pair"], [2 * ratio for ratio in ratios(rounds.rates("pair"), rounds.echoes)], figure)
    return figures
