"""The protocol, walked through exhaustively within small bounds: it keeps its promises, and every safeguard is needed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from coupon_svc.resources import resource_folder
from coupon_svc.writer.crash import CRASH_POINTS
from tests.model import in_step
from tests.model.explore import stuck, walk
from tests.model.faults import RESTARTS, TAMPERING
from tests.model.safeguards import BY_HAND, LIMITS, SAFEGUARDS
from tests.model.scopes import LEDGER_ONLY, SCOPES, WIDE
from tests.model.state import Bounds

MODES = ("ledger", "redis")
ONE_MODE = {
    "failovers": "redis",
    "two_recoverers": "ledger",
    "delays": "ledger",
    "interrupted": "redis",
    "reports": "redis",
    "upgrade": "redis",
} | dict.fromkeys(LEDGER_ONLY, "ledger")
"""Scopes that tests walk in one mode: they take longest, or hold in that mode alone."""
LONG = {
    "failovers-redis", "interrupted-redis", "swaps-ledger", "tampering-redis", "two_recoverers-ledger", "redeems-redis",
    "delays-ledger",  # scopes
    "attempt", "late_epoch", "mark", "redemption_user", "run",  # safeguards
}  # fmt: skip
"""Walks through the most states, seconds of a core each: `make chaos` has them."""


def cases(names: Iterable[str]) -> list[Any]:
    return [pytest.param(*name.split("-"), id=name, marks=pytest.mark.chaos if name in LONG else ()) for name in names]


@pytest.mark.parametrize(
    ("scope", "mode"),
    cases(f"{scope}-{mode}" for scope in SCOPES for mode in MODES if ONE_MODE.get(scope, mode) == mode),
)
def test_the_protocol_keeps_its_promises(scope: str, mode: str) -> None:
    walked = walk(SCOPES[scope]._replace(mode=mode))
    assert walked.broken == "", walked.history
    assert walked.states > 500


@pytest.mark.parametrize("name", cases(name for name in SAFEGUARDS if name not in BY_HAND))
def test_without_a_safeguard_a_promise_is_broken(name: str) -> None:
    safeguard = SAFEGUARDS[name]
    off = {name, safeguard.also} - {""}
    walked = walk(safeguard.bounds._replace(off=frozenset(off)))
    assert walked.broken
    assert walked.history


@pytest.mark.parametrize("name", cases(name for name in SAFEGUARDS if SAFEGUARDS[name].also and name not in BY_HAND))
def test_a_safeguard_that_another_covers_is_missed_by_nobody_alone(name: str) -> None:
    walked = walk(SAFEGUARDS[name].bounds._replace(off=frozenset({name})))
    assert walked.broken == ""


@pytest.mark.parametrize("name", LIMITS)
def test_a_known_limit_is_one(name: str) -> None:
    assert walk(LIMITS[name]).broken


@pytest.mark.chaos
@pytest.mark.parametrize("mode", MODES)
def test_from_every_state_a_recovery_can_finish(mode: str) -> None:
    bounds = Bounds(mode=mode, kinds=frozenset((*RESTARTS, *TAMPERING)), users=1, tries=1)
    assert stuck(bounds).broken == ""


def test_a_shard_that_nobody_can_recover_would_be_seen() -> None:
    """Two that commit alike stop the shard when a commit does not compare positions: nothing leads out of that."""
    bounds = Bounds(users=1, tries=1, faults=0, off=frozenset({"commit_position"}))
    assert stuck(bounds).broken


def test_wide_bounds_are_of_the_same_scopes() -> None:
    assert SCOPES.keys() == WIDE.keys()


# --- in step with the service


def test_the_model_knows_every_point_at_which_a_writer_may_die() -> None:
    assert in_step.MODELLED_CRASH_POINTS ^ in_step.OTHER_CRASH_POINTS.keys() == set(CRASH_POINTS)


def test_the_model_knows_every_script() -> None:
    lua = resource_folder("lua")
    scripts = {path.stem for path in (*lua.glob("*.lua"), *lua.glob("operations/*.lua"))} - {"call"}
    assert in_step.MODELLED_SCRIPTS ^ in_step.OTHER_SCRIPTS.keys() == scripts


@pytest.mark.parametrize("name", SAFEGUARDS)
def test_a_safeguard_stands_where_the_model_says(name: str) -> None:
    root = Path(__file__).parents[2]
    assert [path for path in SAFEGUARDS[name].stands_in.split(", ") if not (root / path).is_file()] == []


# --- the command


def test_the_command_tells_the_shortest_history_and_fails() -> None:
    done = _command("--without", "replay")
    assert done.returncode == 1
    assert "P5" in done.stdout
    assert "user 0 asks process 0" in done.stdout


def test_the_command_tells_which_safeguard_covers_for_another() -> None:
    done = _command("--without", "commit_owner")
    assert done.returncode == 1
    alone, both = done.stdout.split("commit_position covers for it; without both:")
    assert "no violation" in alone
    assert "stopped" in both


def test_the_command_is_content_with_the_protocol() -> None:
    done = _command("--scope", "receipts", "--mode", "ledger")
    assert done.returncode == 0, done.stdout
    assert "no violation" in done.stdout


def _command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.model", *arguments],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
