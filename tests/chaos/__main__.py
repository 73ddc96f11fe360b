"""`python -m tests.chaos --runs 100 [--fault NAME] [--seed N]`: a seed for each run; one that fails prints its own."""

from __future__ import annotations

import argparse
import asyncio
import secrets
import sys
import tempfile
from collections import Counter
from pathlib import Path

from coupon_svc.dev.servers import EmbeddedPostgres
from tests.chaos.suite import FAULTS, run_once


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--fault", choices=sorted(FAULTS))
    parser.add_argument("--without", default="", metavar="SAFEGUARD", help="take a safeguard out: see tests/unsafe.py")
    parser.add_argument("--seed", type=int, default=None, help="of the first run; the next ones count up")
    args = parser.parse_args()
    first = args.seed if args.seed is not None else secrets.randbelow(10**6)
    playable = [name for name in sorted(FAULTS) if not FAULTS[name].lacks()]
    for name in sorted(FAULTS.keys() - set(playable)):
        print(f"skip {name}: {FAULTS[name].lacks()}")
    failed = 0
    with tempfile.TemporaryDirectory() as folder, EmbeddedPostgres(Path(folder) / "postgres") as postgres:
        for number in range(args.runs):
            seed = first + number
            fault = args.fault or playable[seed % len(playable)]
            place = Path(folder) / f"run{number}"
            try:
                run = asyncio.run(run_once(postgres.admin_url, place, fault, seed, args.without))
                counts = Counter(attempt.outcome for attempt in run.history)
                doubts = sum(attempt.in_doubt for attempt in run.history)
                print(f"ok   {fault} --seed {seed}: {dict(counts)}, {doubts} in doubt at first", flush=True)
            except AssertionError as error:
                failed += 1
                print(
                    f"FAIL {fault}: {error}\n     repeat: python -m tests.chaos --runs 1 --fault {fault} --seed {seed}"
                )
                for log in ("writer.log", "api.log"):
                    print("     " + "\n     ".join((place / log).read_text().splitlines()[-15:]))
    print(f"{args.runs - failed} passed, {failed} failed, {len(FAULTS) - len(playable)} faults skipped")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
