"""One fault of the suite, with a fixed seed. `make chaos` plays all of them, with many seeds."""

from __future__ import annotations

from pathlib import Path

from tests.chaos.suite import run_once

SEED = 20_261_122


async def test_the_promises_hold_through_a_recovery(tmp_path: Path, postgres_url: str) -> None:
    """It shows that the machinery works. What tests/faults/ does to a quiet service, `make chaos` does under load."""
    run = await run_once(postgres_url, tmp_path / "run", "redis_rolled_back", SEED)
    assert any(attempt.outcome == "ok" for attempt in run.history), "nothing was done: nothing was shown"
