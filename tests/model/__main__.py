"""python -m tests.model: walk through the protocol; print the number of states, and the shortest way to a broken promise.

Without a safeguard: as far as is needed to see that it is one. With all of them: every scope, or one. Exits with 1 when a
promise is broken.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from tests.model.explore import Walked, stuck, walk
from tests.model.safeguards import SAFEGUARDS
from tests.model.scopes import LEDGER_ONLY, SCOPES, WIDE
from tests.model.state import Bounds

MODES = ("ledger", "redis")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.model", description=__doc__)
    parser.add_argument("--mode", choices=MODES, help="ack of the book; both without it")
    parser.add_argument("--without", choices=sorted(SAFEGUARDS), action="append", default=[], metavar="NAME")
    parser.add_argument("--scope", choices=sorted(SCOPES), action="append", default=[], metavar="NAME")
    parser.add_argument("--wide", action="store_true", help="minutes instead of seconds")
    parser.add_argument("--stuck", action="store_true", help="look for states that no recovery leads out of, instead")
    parser.add_argument("--list", action="store_true", help="name the scopes and the safeguards")
    for name in ("codes", "users", "epochs", "faults", "processes", "tries", "redeems", "takeovers", "lapses"):
        parser.add_argument(f"--{name}", type=int)
    return parser.parse_args()


def main() -> int:
    """Exit status: 1 when a promise was broken."""
    given = _arguments()
    if given.list:
        for name, safeguard in SAFEGUARDS.items():
            print(f"{name:16} {safeguard.does}")
        print("scopes:", *SCOPES)
        return 0
    off = frozenset(given.without)
    wanted: dict[str, Bounds] = dict(WIDE if given.wide else SCOPES)
    if given.scope:
        wanted = {name: wanted[name] for name in given.scope}
    elif len(given.without) == 1:
        wanted = {given.without[0]: SAFEGUARDS[given.without[0]].bounds}
    broken = False
    for name, bounds in wanted.items():
        alone = bool(given.without) and not given.scope and not given.mode
        for mode in (given.mode,) if given.mode else (bounds.mode,) if alone or name in LEDGER_ONLY else MODES:
            bounds = bounds._replace(mode=mode, off=off, **_changes(given))
            broken |= _walk(name, bounds, only_stuck=given.stuck)
            if alone and (also := _covers(off)):
                print(f"{also} covers for it; without both:")
                broken |= _walk(name, bounds._replace(off=off | {also}), only_stuck=given.stuck)
    return int(broken)


def _covers(off: frozenset[str]) -> str:
    """The safeguard that must be out as well for this one to be missed; "" for none."""
    return SAFEGUARDS[min(off)].also if len(off) == 1 else ""


def _changes(given: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(given).items() if name in Bounds._fields and isinstance(value, int)}


def _walk(name: str, bounds: Bounds, *, only_stuck: bool) -> bool:
    begun = time.process_time()
    found: Walked = (stuck if only_stuck else walk)(bounds)
    without = f" without {', '.join(sorted(bounds.off))}" if bounds.off else ""
    spent = time.process_time() - begun
    print(
        f"{name}, ack = {bounds.mode}{without}: {found.states} states, {spent:.1f} s: {found.broken or 'no violation'}"
    )
    for number, label in enumerate(found.history, 1):
        print(f"  {number:3} {label}")
    sys.stdout.flush()
    return bool(found.broken)


if __name__ == "__main__":
    sys.exit(main())
