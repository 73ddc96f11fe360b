"""The fault suite would notice: with a safeguard taken out (tests/unsafe.py) its runs fail, and say why."""

from __future__ import annotations

import asyncio
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import NamedTuple

import pytest

from tests.chaos.suite import FAULTS
from tests.unsafe import SAFEGUARDS

AT_ONCE = 3
TRIES = 5


class Case(NamedTuple):
    """A safeguard, a fault that it is to withstand, and a pattern of what is said when the promise breaks without it."""

    safeguard: str
    fault: str
    broken: str


CASES = [
    Case("quarantine", "redis_rolled_back_and_api_killed", "P1"),
    Case("replay", "api_killed", "P5"),
    Case("overlay", "scripts_flushed", "P1|a shard was stopped"),
    Case("lease", "redis_rolled_back", "P1|was not lent|every book should deal again"),
    Case("epoch", "request_comes_after_a_recovery", "P6"),
    Case("seen_position", "keys_put_back", "P1|a shard was stopped"),
    Case("fenced_load", "lender_paused_across_a_recovery", "was not lent|no order of its requests"),
    Case("position", "backend_stopped_in_a_commit", "P2"),
    Case("shard_result", "backend_stopped_in_a_commit", "P2|the ledger should have caught up"),
    Case("after", "entry_added_at_the_next_position", "P4: it was believed"),
    Case("own_epoch", "redis_lost", "P2|P5"),
    Case("registration", "registration_lapses", "P2"),
    Case("stop_flag", "shard_stopped_by_hand", "P6"),
    Case("room", "backlog_reaches_its_bound", "P7"),
    Case("lock", "api_cut_from_postgres", "no order of its requests"),
    Case("told_position", "keys_put_back_unseen", "P1|P6"),
    Case("tip", "keys_put_back_unheard", "P1|P2|P6"),
    Case("installation", "another_installation_comes", "P6|whose Redis this is"),
    Case("clocks", "redis_clock_jumps_days", "P5|nothing should be decided"),
    Case("in_touch", "writer_cut_from_redis", "should serve every shard"),
    Case("replid", "old_master_back_while_a_process_sleeps", "P1|a shard was stopped"),
]
IN_MAKE_TEST = ("epoch",)
"""The one in which chance has no say. The others are marked `chaos`, and run in `make chaos`: each starts several
services."""
WITHOUT_A_FAULT = {
    "position_and_epoch": "what breaks differs from run to run; each of the two has its test in tests/test_ledger_events.py",
    "record_epoch": "the history needs chance on its side; tests/faults/test_records_and_epochs.py plays it step by step",
    "rebuild": "what it guards is not told apart by the recorded answers yet",
}
"""Safeguards that can be taken out by hand (`python -m tests.chaos --without`), and why no case here does."""


def broke(case: Case, found: list[str]) -> bool:
    """Whether one of the runs has failed with the promise that the case names."""
    return any(
        re.search(f"^FAIL [^:]*: AssertionError: .*({case.broken})", said, re.DOTALL | re.MULTILINE) for said in found
    )


async def play(case: Case, seed: int) -> str:
    """What one run says of itself. In a process of its own: a run that breaks a promise ends where it stands, and leaves its
    connections open."""
    options = ("--runs", "1", "--fault", case.fault, "--seed", str(seed), "--without", case.safeguard)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.chaos", *options, stdout=asyncio.subprocess.PIPE
    )
    try:
        said, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGINT)
            await process.wait()
    return said.decode().partition("     repeat: ")[0]  # logs follow


@pytest.fixture(scope="module")
async def results(request: pytest.FixtureRequest) -> AsyncIterator[dict[Case, asyncio.Task[list[str]]]]:
    """What became of the runs of each case, a few at a time, since they mostly wait. Each test awaits its own."""
    places = asyncio.Semaphore(AT_ONCE)

    async def tried(case: Case) -> list[str]:
        found: list[str] = []
        while len(found) < TRIES and not broke(case, found):
            async with places:
                found.append(await play(case, len(found)))
        return found

    asked = {
        item.callspec.params["case"]
        for item in request.session.items
        if isinstance(item, pytest.Function) and "results" in item.fixturenames
    }
    tasks = {
        case: asyncio.create_task(tried(case)) for case in CASES if case in asked and not FAULTS[case.fault].lacks()
    }
    yield tasks
    for task in tasks.values():
        task.cancel()
    await asyncio.gather(*tasks.values(), return_exceptions=True)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.safeguard, marks=() if case.safeguard in IN_MAKE_TEST else pytest.mark.chaos)
        for case in CASES
    ],
)
async def test_the_suite_fails_without(case: Case, results: dict[Case, asyncio.Task[list[str]]]) -> None:
    """Each fault holds with all safeguards in place; with one out it breaks the promise named. Where chance has a say, or
    the machine is too slow for the fault to strike, it is tried again with the next seed.
    """
    if lacking := FAULTS[case.fault].lacks():
        pytest.skip(lacking)
    found = await results[case]
    assert broke(case, found), found


TAKE_OUT_EACH = """
import os
from tests import unsafe
for name, take_out in unsafe.SAFEGUARDS.items():
    if child := os.fork():
        if os.waitpid(child, 0)[1]:
            print(name)
        continue
    take_out()
    unsafe.store_scripts.Scripts()
    os._exit(0)
"""


def test_every_safeguard_is_still_where_it_is_taken_out() -> None:
    """Else its case above would take minutes to say so. A fork takes each out, and the service is imported once."""
    ran = subprocess.run([sys.executable, "-c", TAKE_OUT_EACH], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (0, ""), ran.stderr


def test_every_safeguard_has_a_case_or_a_reason() -> None:
    assert {case.safeguard for case in CASES} | WITHOUT_A_FAULT.keys() == SAFEGUARDS.keys()
