"""Makes callers arrive: at a rate, whatever the service does (open loop), or each as soon as the last has gone (closed).

In the open loop a call's latency counts from when it was due. So a stall counts for every caller who would have come
meanwhile (no coordinated omission).
"""

from __future__ import annotations

import asyncio

import msgspec

from coupon_svc.load.client import Connections
from coupon_svc.load.scenarios import Scenario

DRAIN_S = 7.0
"""How long journeys that are under way at the end may take; the service lets nobody wait for its ledger longer than 5 s."""
UNDER_WAY_MAX = 20_000
"""Journeys that may be under way in the open loop; who arrives beyond is turned away and counted."""
LATE_S = 0.05
_PUSHED_BACK_PAUSE_S = 0.05
_TICK_S = 0.001


class Arrivals(msgspec.Struct):
    """How the callers of an open loop came."""

    due: int = 0
    started: int = 0
    turned_away: int = 0
    late: int = 0
    """started more than LATE_S after they were due: this process, or its machine, was too busy"""
    waited_in_line_max: int = 0
    """callers who waited for a connection at the same time"""
    unfinished: int = 0
    """journeys that were still under way DRAIN_S after the end"""


async def closed_loop(scenario: Scenario, connections: int, stop: asyncio.Event) -> Arrivals:
    """`connections` callers at a time, until `stop` is set or nobody is left."""
    arrivals = Arrivals()
    now = asyncio.get_running_loop().time

    async def callers() -> None:
        while not stop.is_set() and not scenario.finished:
            arrivals.started += 1
            if not await scenario.journey(now()):
                await asyncio.sleep(_PUSHED_BACK_PAUSE_S)

    tasks = {asyncio.create_task(callers()) for _ in range(connections)}
    await _until_stopped_or_done(tasks, stop)
    arrivals.due = arrivals.started
    arrivals.unfinished = await _drain(tasks)
    return arrivals


async def open_loop(scenario: Scenario, rate: float, connections: Connections, stop: asyncio.Event) -> Arrivals:
    """`rate` callers a second, evenly spaced, until `stop` is set or nobody is left."""
    arrivals = Arrivals()
    loop = asyncio.get_running_loop()
    under_way: set[asyncio.Task[bool]] = set()
    failed: list[BaseException] = []

    def ended(task: asyncio.Task[bool]) -> None:
        under_way.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            failed.append(error)

    began = loop.time()
    while not stop.is_set() and not scenario.finished and not failed:
        now = loop.time()
        while (due := began + arrivals.due / rate) <= now and not scenario.finished:
            arrivals.due += 1
            if len(under_way) >= UNDER_WAY_MAX:
                arrivals.turned_away += 1
                continue
            arrivals.started += 1
            arrivals.late += now - due > LATE_S
            task = loop.create_task(scenario.journey(due))
            under_way.add(task)
            task.add_done_callback(ended)
        await asyncio.sleep(max(_TICK_S, min(0.1, due - loop.time())))
        arrivals.waited_in_line_max = max(arrivals.waited_in_line_max, connections.waiting)
    arrivals.unfinished = await _drain(under_way)
    if failed:
        raise failed[0]
    return arrivals


async def _until_stopped_or_done(tasks: set[asyncio.Task[None]], stop: asyncio.Event) -> None:
    """Raises what a journey raised, at once."""
    stopped = asyncio.create_task(stop.wait())
    left = set(tasks)
    while left and not stop.is_set():
        done, _ = await asyncio.wait({stopped, *left}, return_when=asyncio.FIRST_COMPLETED)
        for task in left & done:
            task.result()
        left -= done
    stopped.cancel()


async def _drain(tasks: set[asyncio.Task[None]] | set[asyncio.Task[bool]]) -> int:
    """Let journeys end, for DRAIN_S at most. Returns how many did not. Raises what a journey raised."""
    waited: set[asyncio.Task[None] | asyncio.Task[bool]] = set(tasks)
    if not waited:
        return 0
    done, pending = await asyncio.wait(waited, timeout=DRAIN_S)
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)
    for task in done:
        task.result()
    return len(pending)
