"""A selection of the fault suite, each fault once with a fixed seed. `make chaos` plays all of them, with many seeds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.chaos.run import Run
from tests.chaos.suite import FAULTS, run_once

SEED = 20_261_122
AT_ONCE = 2
SELECTED = ("redis_rolled_back", "another_installation_comes")
"""A recovery, and a fault that is no reason for one: the machinery works. What tests/faults/ does to a quiet service,
`make chaos` does under load."""


@pytest.fixture(scope="module")
async def runs(
    tmp_path_factory: pytest.TempPathFactory, postgres_url: str
) -> AsyncIterator[dict[str, asyncio.Task[Run]]]:
    """All runs, a few at a time, since they mostly wait. Each test awaits its own."""
    places = asyncio.Semaphore(AT_ONCE)
    folder = tmp_path_factory.mktemp("chaos")

    async def run(fault: str, place: Path) -> Run:
        async with places:
            return await run_once(postgres_url, place, fault, SEED)

    playable = [name for name in SELECTED if not FAULTS[name].lacks()]
    tasks = {fault: asyncio.create_task(run(fault, folder / fault)) for fault in playable}
    yield tasks
    for task in tasks.values():
        task.cancel()
    await asyncio.gather(*tasks.values(), return_exceptions=True)


@pytest.mark.parametrize("fault", SELECTED)
async def test_the_promises_hold_through(fault: str, runs: dict[str, asyncio.Task[Run]]) -> None:
    if lacking := FAULTS[fault].lacks():
        pytest.skip(lacking)
    run = await runs[fault]
    assert any(attempt.outcome == "ok" for attempt in run.history), "nothing was done: nothing was shown"
