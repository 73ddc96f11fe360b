"""How long an assign takes while requests come at a rate, whatever the service does (open loop)."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from bench.figures import Figure
from bench.requests import NextRequest
from bench.stand import Process
from bench.turns import Ledger, describe
from coupon_svc.load.client import Connections, Reply

PART_OF_HIGHEST = 0.7
COMMIT_CYCLES = 2.5
"""What an answer may wait for the ledger: the commit that is under way, its own, and the way back."""
_CONNECTIONS = 256
_TICK_S = 0.001


async def measure_tails(
    api: Process,
    echo: Process,
    makers: Mapping[str, NextRequest],
    ask_echo: NextRequest,
    highest: Mapping[str, float],
    rounds: int,
    seconds: float,
    ledger: Ledger,
    say: Callable[[str], None],
) -> list[Figure]:
    """The 99th percentile of an assign at PART_OF_HIGHEST of the highest rate, against the echo's at that part of its own;
    with `ack = ledger` against the echo's and COMMIT_CYCLES. In rounds of the echo and each ack."""
    figures = {ack: _figure(ack, PART_OF_HIGHEST * highest[ack]) for ack in makers}
    seen: dict[str, list[str]] = {ack: [] for ack in makers}
    for _ in range(rounds):
        latencies, _ = await open_loop(echo.port, ask_echo, PART_OF_HIGHEST * highest["echo"], seconds)
        echo_ms = percentile_ms(latencies, 0.99)
        for ack, make in makers.items():
            commits = await ledger.commits()
            latencies, bad = await open_loop(api.port, make, PART_OF_HIGHEST * highest[ack], seconds)
            cycle_ms = 1000 * seconds / max(1, await ledger.commits() - commits)
            await ledger.caught_up()
            if bad or not latencies:
                figures[ack].failed = f"not all answers were good: {dict(bad)}"
                continue
            p99_ms = percentile_ms(latencies, 0.99)
            allowed_ms = echo_ms + (COMMIT_CYCLES * cycle_ms if ack == "ledger" else 0.0)
            figures[ack].samples.append(p99_ms / allowed_ms)
            seen[ack].append(f"{p99_ms:.0f} ms (echo {echo_ms:.0f}, a commit {cycle_ms:.0f})")
            say(f"ack = {ack}: p99 {seen[ack][-1]}")
    for ack, figure in figures.items():
        figure.note += "; ".join(seen[ack])
    return list(figures.values())


def _figure(ack: str, rate: float) -> Figure:
    beside = f" and {COMMIT_CYCLES} commit cycles" if ack == "ledger" else ""
    return Figure(
        id=f"p99_{ack}",
        what=f"p99 of an assign at {PART_OF_HIGHEST:.0%} of the highest rate, `ack = {ack}`, against the echo's{beside}",
        goal=1.0,
        less_is_better=True,
        note=f"{rate:,.0f}/s came, each counted from when it was due: ",
    )


def percentile_ms(latencies: Sequence[float], part: float) -> float:
    """Of latencies in seconds."""
    return sorted(latencies)[int(len(latencies) * part)] * 1000


async def open_loop(
    port: int, next_request: NextRequest, rate: float, seconds: float
) -> tuple[list[float], Counter[str]]:
    """Send `rate` requests a second, evenly. Returns the seconds from when each good one was due until it was answered,
    and what came instead of the others."""
    clock = time.perf_counter  # uvloop's own counts milliseconds
    latencies: list[float] = []
    bad: Counter[str] = Counter()
    connections = Connections("127.0.0.1", port, _CONNECTIONS)
    await connections.open()
    total, sent, answered = int(rate * seconds), 0, asyncio.Event()
    began = clock()

    def send(due: float) -> None:
        def done(reply: Reply) -> None:
            if 200 <= reply.status < 300:
                latencies.append(clock() - due)
            else:
                bad[describe(reply)] += 1
            if len(latencies) + bad.total() == total:
                answered.set()

        connections.submit(next_request(), done)

    try:
        while sent < total:
            now = clock()
            while sent < total and (due := began + sent / rate) <= now:
                sent += 1
                send(due)
            await asyncio.sleep(_TICK_S)
        await answered.wait()  # every request ends, with a failure at the latest
    finally:
        connections.close()
    return latencies, bad
