"""How long an assign takes while requests come at a rate, whatever the service does (open loop)."""

from __future__ import annotations

import asyncio
import statistics
from collections import Counter
from collections.abc import Callable

from coupon_svc.load.client import Connections, Reply
from coupon_svc.ops.bench.figures import Figure
from coupon_svc.ops.bench.requests import NextRequest
from coupon_svc.ops.bench.stand import Process
from coupon_svc.ops.bench.turns import Ledger, describe

PART_OF_HIGHEST = 0.7
_CONNECTIONS = 256
_TICK_S = 0.001
_GOALS_MS = {"redis": 10.0, "ledger": 25.0}


async def measure_tail(
    api: Process,
    next_request: NextRequest,
    ack: str,
    highest: float,
    rounds: int,
    seconds: float,
    ledger: Ledger,
    beside: str,
    say: Callable[[str], None],
) -> Figure:
    """The 99th percentile at PART_OF_HIGHEST of the highest rate, once a round, told with `beside`. Raises BenchError."""
    rate = PART_OF_HIGHEST * highest
    figure = Figure(
        id=f"p99_{ack}",
        what=f"p99 of an assign with an Idempotency-Key at {PART_OF_HIGHEST:.0%} of the highest rate, `ack = {ack}`",
        unit="ms",
        goal=_GOALS_MS[ack],
        less_is_better=True,
        note=f"{rate:,.0f}/s came, each counted from when it was due; {beside}",
    )
    for _ in range(rounds):
        latencies, bad = await open_loop(api.port, next_request, rate, seconds)
        await ledger.caught_up()
        if bad or not latencies:
            figure.failed = f"not all answers were good: {dict(bad)}"
            continue
        figure.samples.append(_p99_ms(latencies))
        say(f"ack = {ack} at {rate:,.0f}/s: p99 {figure.samples[-1]:.1f} ms")
    return figure


async def echo_tail(echo: Process, next_request: NextRequest, rate: float, rounds: int, seconds: float) -> str:
    """The same of the echo at PART_OF_HIGHEST of its rate, in words: what the machine itself lets nobody be quicker than."""
    tails = [
        _p99_ms((await open_loop(echo.port, next_request, PART_OF_HIGHEST * rate, seconds))[0]) for _ in range(rounds)
    ]
    return f"the echo's own, at {PART_OF_HIGHEST:.0%} of its rate: {statistics.median_high(tails):.0f} ms"


def _p99_ms(latencies: list[float]) -> float:
    return sorted(latencies)[int(len(latencies) * 0.99)] * 1000


async def open_loop(
    port: int, next_request: NextRequest, rate: float, seconds: float
) -> tuple[list[float], Counter[str]]:
    """Send `rate` requests a second, evenly. Returns the seconds from when each good one was due until it was answered,
    and what came instead of the others."""
    loop = asyncio.get_running_loop()
    latencies: list[float] = []
    bad: Counter[str] = Counter()
    connections = Connections("127.0.0.1", port, _CONNECTIONS)
    await connections.open()
    total, sent, answered = int(rate * seconds), 0, asyncio.Event()
    began = loop.time()

    def send(due: float) -> None:
        def done(reply: Reply) -> None:
            if 200 <= reply.status < 300:
                latencies.append(loop.time() - due)
            else:
                bad[describe(reply)] += 1
            if len(latencies) + bad.total() == total:
                answered.set()

        connections.submit(next_request(), done)

    try:
        while sent < total:
            now = loop.time()
            while sent < total and (due := began + sent / rate) <= now:
                sent += 1
                send(due)
            await asyncio.sleep(_TICK_S)
        await answered.wait()  # every request ends, with a failure at the latest
    finally:
        connections.close()
    return latencies, bad
