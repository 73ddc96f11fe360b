"""All faults by name, and one seeded run of one of them."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from tests.chaos.call_faults import CALL_FAULTS
from tests.chaos.fault import Fault
from tests.chaos.fencing_faults import FENCING_FAULTS
from tests.chaos.handover_faults import HANDOVER_FAULTS
from tests.chaos.machine_faults import MACHINE_FAULTS
from tests.chaos.network_faults import NETWORK_FAULTS
from tests.chaos.postgres_faults import POSTGRES_FAULTS
from tests.chaos.process_faults import PROCESS_FAULTS
from tests.chaos.recovery_faults import RECOVERY_FAULTS
from tests.chaos.run import Run
from tests.chaos.stranger_faults import STRANGER_FAULTS

LOAD_S = 2.0

LISTS = [
    PROCESS_FAULTS,
    NETWORK_FAULTS,
    MACHINE_FAULTS,
    POSTGRES_FAULTS,
    HANDOVER_FAULTS,
    FENCING_FAULTS,
    RECOVERY_FAULTS,
    STRANGER_FAULTS,
    CALL_FAULTS,
]
FAULTS: dict[str, Fault] = {fault.name: fault for faults in LISTS for fault in faults}


async def run_once(postgres_url: str, folder: Path, fault: str, seed: int, without: str = "") -> Run:
    """One run from an empty stack to the last check, `without` one of tests.unsafe's safeguards.

    Raises AssertionError with what broke.
    """
    os.makedirs(folder, exist_ok=True)
    async with FAULTS[fault].stage(postgres_url, folder) as stack:
        if without:
            stack.module = ("tests.unsafe", without)
        run = Run(stack, seed)
        try:
            await run.start()
            await run.prepare()
            load = asyncio.create_task(run.load(LOAD_S))
            await asyncio.sleep(run.random.uniform(0.3, 1.2))  # the moment of the fault is drawn
            await FAULTS[fault].strike(run)
            await load
            await run.heal()
            await run.check()
            return run
        finally:
            stack.close()
