"""What each process pays for an assign, as part of what a bare echo costs: with one book, and with many over all shards."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping

import msgspec
import uvloop

from bench.figures import BenchError, Expectation, Figure
from bench.over_http import GROW_LEASE_S
from bench.requests import NextRequest, Requests
from bench.stand import Process, Stand
from bench.tail import open_loop, percentile_ms
from bench.turns import Ledger, Turn, open_ledger, take_turn
from coupon_svc.load.processes import cpu_s
from coupon_svc.postgres.database import LedgerConnection, open_connection
from coupon_svc.redis.connection import Connection, connect

PROCESSES = ("API", "Redis", "writer", "Postgres")
GOALS = {
    "redis": {"API": 1.1, "Redis": 0.4, "writer": 0.15, "Postgres": 0.2},
    "ledger": {"API": 1.2, "Redis": 0.45, "writer": 0.25, "Postgres": 0.3},
}
RATE_GOALS = {"redis": 0.8, "ledger": 0.7}
_RATE_ASSUMED_MAX = 9_000
STATED_RATES = (500, 1_000, 2_000)
"""Assigns a second at which a reader is told how long one takes."""
STATED_TURNS, STATED_S = 5, 2.0
"""In several turns, of which the median counts: one halt of 0.2 s in ten seconds delays one answer in a hundred."""
ECHO_S = 1.0


class TollPlan(msgspec.Struct, frozen=True):
    """`rounds` of eight turns: each ack with one book and with `books`, and the echo before or after it, in turns."""

    rounds: int = 11
    seconds: float = 2.0
    connections: int = 64
    books: int = 64


class TollTurn(msgspec.Struct, kw_only=True):
    """A turn, and what the processes used until the ledger had all of it."""

    turn: Turn
    cpu: Mapping[str, float]
    """Seconds of processor time, by process."""
    entries: int = 0
    """Stream entries that were added."""
    commits: int = 0
    wal_bytes: int = 0

    def cores(self, process: str) -> float:
        """Cores for a thousand good answers a second."""
        return 1000 * self.cpu[process] / max(1, self.turn.good)


class Tolls(msgspec.Struct, kw_only=True):
    """All turns, by a name as `ledger, 64 books`: one for each round."""

    assigns: dict[str, list[TollTurn]] = {}
    echoes: dict[str, list[TollTurn]] = {}
    """Those of the echo beside them."""
    latencies: dict[str, dict[int, list[list[float]]]] = {}
    """Seconds that each assign took at each of STATED_RATES, of each turn."""
    ledger_bytes: dict[str, float] = {}
    """What Postgres keeps on disk for each assign, in its tables with their indexes."""


_SIZES = """
SELECT 'coupon', pg_total_relation_size('coupons')::float8 / count(*) FROM coupons
UNION ALL
SELECT 'event', (SELECT sum(pg_total_relation_size(relid)) FROM pg_partition_tree('entries'))::float8 / sum(n) FROM entries
"""


class _Meter:
    """Reads what all processes have used, and what both stores have counted."""

    def __init__(self, pids: Mapping[str, int], ledger: LedgerConnection, redis: Connection) -> None:
        self._pids = {name: [pid] for name, pid in pids.items()}
        self._ledger = ledger
        self._redis = redis

    async def read(self) -> tuple[dict[str, float], int, int, int]:
        """(seconds of processor time by process, XADDs, commits, bytes of WAL), all since the beginning."""
        stats: str = await self._redis.ask("INFO", "commandstats")
        added = next((line for line in stats.splitlines() if line.startswith("cmdstat_xadd:")), "calls=0,")
        row = await self._ledger.fetchrow(
            "SELECT pg_stat_clear_snapshot(), (SELECT sum(xact_commit) FROM pg_stat_database)::bigint AS commits,"
            " pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::bigint AS wal"
        )
        assert row is not None
        return cpu_s(self._pids), int(added.partition("calls=")[2].partition(",")[0]), row["commits"], row["wal"]


def bench_toll(plan: TollPlan, say: Callable[[str], None]) -> Tolls:
    """Take all turns. Raises BenchError."""
    with Stand() as stand:
        say("starting the service and the echo; making books")
        writer, api, echo = stand.writer(), stand.api(), stand.serve("echo")
        stand.await_ready(api)
        stand.await_answers(echo)
        requests = Requests(stand.key)
        codes = int((plan.rounds * plan.seconds + GROW_LEASE_S) * _RATE_ASSUMED_MAX)
        makers: dict[str, NextRequest] = {}
        for ack in GOALS:
            for number in (1, plan.books):
                books = [stand.make_book(api, ack, codes // number + 100) for _ in range(number)]
                makers[_name(ack, number)] = requests.assign_in_turn(books, with_key=True)
        pids = {"API": api.pid, "Redis": stand.redis.pid, "writer": writer.pid, "Postgres": stand.postgres.pid}
        return uvloop.run(_measure(stand, plan, requests, {"api": api, "echo": echo}, makers, pids, say))


async def _measure(
    stand: Stand,
    plan: TollPlan,
    requests: Requests,
    served: Mapping[str, Process],
    makers: Mapping[str, NextRequest],
    pids: Mapping[str, int],
    say: Callable[[str], None],
) -> Tolls:
    ledger = await open_ledger(*stand.stores)
    looking = await open_connection(stand.postgres.url, "coupon-bench")
    redis = await connect(stand.redis.admin_url, "coupon-bench")
    meter = _Meter(pids, looking, redis)
    echo_meter = _Meter({"API": served["echo"].pid}, looking, redis)

    async def take(
        process: Process, make: NextRequest, its_ledger: Ledger | None, of: _Meter, seconds: float
    ) -> TollTurn:
        cpu, added, commits, wal = await of.read()
        turn = await take_turn(process.port, process.pid, make, seconds, its_ledger, connections=plan.connections)
        if turn.bad:
            raise BenchError(f"not all answers were good: {dict(turn.bad)}")
        after, added_then, commits_then, wal_then = await of.read()
        return TollTurn(
            turn=turn,
            cpu={name: after[name] - cpu[name] for name in cpu},
            entries=added_then - added,
            commits=commits_then - commits,
            wal_bytes=wal_then - wal,
        )

    try:
        for make in makers.values():  # the blocks of codes that a book is lent grow with demand
            await take_turn(served["api"].port, pids["API"], make, GROW_LEASE_S, ledger, connections=plan.connections)
        tolls = Tolls()
        for number in range(1, plan.rounds + 1):
            for name, make in makers.items():
                for whose in ("echo", "assigns") if number % 2 else ("assigns", "echo"):
                    if whose == "echo":
                        taken = await take(served["echo"], requests.echo(), None, echo_meter, ECHO_S)
                        tolls.echoes.setdefault(name, []).append(taken)
                    else:
                        taken = await take(served["api"], make, ledger, meter, plan.seconds)
                        tolls.assigns.setdefault(name, []).append(taken)
            say(f"round {number} of {plan.rounds}: {_last_rates(tolls)}")
        for name, make in STATED_TURNS * list(makers.items()):
            for rate in STATED_RATES:
                latencies, bad = await open_loop(served["api"].port, make, rate, STATED_S)
                if bad:
                    raise BenchError(f"not all answers were good: {dict(bad)}")
                tolls.latencies.setdefault(name, {}).setdefault(rate, []).append(latencies)
                await ledger.caught_up()
        for table, size in await looking.fetch(_SIZES):
            tolls.ledger_bytes[table] = size
        return tolls
    finally:
        redis.abort()
        await looking.close()
        await ledger.close()


def _last_rates(tolls: Tolls) -> str:
    return ", ".join(
        f"{name} {turns[-1].turn.rate:,.0f}/s (echo {tolls.echoes[name][-1].turn.rate:,.0f})"
        for name, turns in tolls.assigns.items()
    )


def _name(ack: str, books: int) -> str:
    return f"{ack}, {books} book{'s' if books > 1 else ''}"


def toll_figures(tolls: Tolls) -> list[Figure]:
    """A line for each process, ack and number of books; the echo is the one beside each turn."""
    figures = []
    for name, turns in tolls.assigns.items():
        ack = name.partition(",")[0]
        for process, goal in GOALS[ack].items():
            ours = [turn.cores(process) for turn in turns]
            theirs = [turn.cores("API") for turn in tolls.echoes[name]]
            samples = [a / b for a, b in zip(ours, theirs, strict=True)]
            note = f"{1000 * statistics.median(ours):.0f} µs; the echo {1000 * statistics.median(theirs):.0f} µs"
            what = f"{process}, `ack = {ack}`, {name.partition(', ')[2]}"
            figures.append(
                Figure(
                    id=f"toll_{process.lower()}_{ack}",
                    what=what,
                    samples=samples,
                    goal=goal,
                    less_is_better=True,
                    note=note,
                )
            )
        rates = [turn.turn.rate / echo.turn.rate for turn, echo in zip(turns, tolls.echoes[name], strict=True)]
        note = f"{statistics.median(turn.turn.rate for turn in turns):,.0f} assigns a second"
        figures.append(
            Figure(
                id=f"toll_rate_{ack}",
                what=f"assigns a second, against echoes, `ack = {ack}`, {name.partition(', ')[2]}",
                samples=rates,
                goal=RATE_GOALS[ack],
                note=note,
            )
        )
    return figures


def expectations(tolls: Tolls) -> list[Expectation]:
    """A line for each ack and number of books."""
    return [
        Expectation(
            name=name,
            rates=[turn.turn.rate for turn in turns],
            cores={process: statistics.median(turn.cores(process) for turn in turns) for process in PROCESSES},
            latency_ms={
                rate: tuple(statistics.median(percentile_ms(turn, part) for turn in taken) for part in (0.5, 0.99))
                for rate, taken in tolls.latencies[name].items()
            },
        )
        for name, turns in tolls.assigns.items()
    ]


def counts(tolls: Tolls) -> list[str]:
    """What the stores counted, a line for each ack and number of books."""
    lines = []
    for name, turns in tolls.assigns.items():
        good = sum(turn.turn.good for turn in turns)
        seconds = sum(turn.turn.seconds for turn in turns)
        entries, commits = (sum(getattr(turn, field) for turn in turns) for field in ("entries", "commits"))
        lines.append(
            f"{name}: {good / max(1, entries):.1f} events an entry, {commits / seconds:.0f} transactions a second"
            f" ({good / max(1, commits):.1f} events each), {sum(turn.wal_bytes for turn in turns) / good:.0f} bytes of WAL"
            " an event"
        )
    return lines
