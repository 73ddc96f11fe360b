"""`python -m tests.chaos --runs 100 [--fault NAME] [--seed N]`: a seed for each run; one that fails prints its own.

A run is one fault under load, from an empty stack to the last check.
"""

from __future__ import annotations

import argparse
import asyncio
import secrets
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest

from coupon_svc.dev.servers import EmbeddedPostgres
from tests.chaos.suite import FAULTS, run_once

AT_ONCE = 3
"""Runs at a time: they mostly wait. A fault that needs its moment is kinder to a machine with nothing else to do."""


async def _tell(postgres_url: str, place: Path, fault: str, seed: int, without: str) -> bool:
    """One run, and a line on what became of it. Returns whether it passed."""
    began = time.monotonic()
    try:
        run = await run_once(postgres_url, place, fault, seed, without)
    except (Exception, pytest.fail.Exception) as error:
        print(f"FAIL {fault}, {time.monotonic() - began:.0f} s: {type(error).__name__}: {error}")
        print(f"     repeat: python -m tests.chaos --runs 1 --fault {fault} --seed {seed}")
        _show_logs(place)
        return False
    counts = Counter(attempt.outcome for attempt in run.history)
    doubts = sum(attempt.in_doubt for attempt in run.history)
    seconds = time.monotonic() - began
    print(f"ok   {fault} --seed {seed}, {seconds:.0f} s: {dict(counts)}, {doubts} in doubt at first", flush=True)
    return True


def _show_logs(place: Path) -> None:
    """What the parts of the service said at last."""
    for log in sorted(place.glob("*.log")):
        print("     " + "\n     ".join(log.read_text().splitlines()[-15:]), flush=True)


async def _run_all(args: argparse.Namespace, faults: dict[int, str], folder: Path, postgres_url: str) -> int:
    """The runs by their seeds, a few at a time. Returns how many passed."""
    places = asyncio.Semaphore(args.at_once)

    async def run(seed: int, fault: str) -> bool:
        async with places:
            passed = await _tell(postgres_url, folder / str(seed), fault, seed, args.without)
            shutil.rmtree(folder / str(seed), ignore_errors=True)
            return passed

    return sum(await asyncio.gather(*(run(seed, fault) for seed, fault in faults.items())))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--fault", choices=sorted(FAULTS))
    parser.add_argument("--without", default="", metavar="SAFEGUARD", help="take a safeguard out: see tests/unsafe.py")
    parser.add_argument("--seed", type=int, default=None, help="of the first run; the next ones count up")
    parser.add_argument("--at-once", type=int, default=AT_ONCE, help="runs at a time")
    args = parser.parse_args()
    playable = [name for name in sorted(FAULTS) if not FAULTS[name].lacks()]
    for name in sorted(FAULTS.keys() - set(playable)):
        print(f"skip {name}: {FAULTS[name].lacks()}")
    first = args.seed if args.seed is not None else secrets.randbelow(10**6)
    faults = {seed: args.fault or playable[seed % len(playable)] for seed in range(first, first + args.runs)}
    began = time.monotonic()
    places = (f"max_connections={40 * (args.at_once + 1)}",)
    with tempfile.TemporaryDirectory() as folder, EmbeddedPostgres(Path(folder) / "postgres", extra=places) as postgres:
        passed = asyncio.run(_run_all(args, faults, Path(folder), postgres.admin_url))
    print(
        f"{args.runs} runs of {len(set(faults.values()))} different faults in {time.monotonic() - began:.0f} s:"
        f" {passed} passed, {args.runs - passed} failed; {len(FAULTS) - len(playable)} faults skipped"
    )
    return 0 if passed == args.runs else 1


if __name__ == "__main__":
    sys.exit(main())
