"""The fault suite would notice: with a safeguard taken out (tests/unsafe.py) its runs fail, and say why."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.chaos.suite import run_once

SEEDS = range(3)


@pytest.mark.parametrize(
    ("safeguard", "fault", "broken"),
    [
        ("quarantine", "redis_rolled_back", "P1"),
        ("replay", "api_killed", "P5"),
        ("lock", "api_cut_from_postgres", "no order of its requests"),
        ("replid", "old_master_back_while_a_process_sleeps", "a shard was stopped"),
    ],
)
async def test_the_suite_fails_without(
    safeguard: str, fault: str, broken: str, postgres_url: str, tmp_path: Path
) -> None:
    """A fault does not bite in every run; of three at once one must."""
    runs = [run_once(postgres_url, tmp_path / str(seed), fault, seed, without=safeguard) for seed in SEEDS]
    results = await asyncio.gather(*runs, return_exceptions=True)
    assert any(isinstance(result, AssertionError) and broken in str(result) for result in results), results
