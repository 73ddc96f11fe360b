"""Faults of Postgres: killed, stopped, its backends held or ended, its disk full, its connections taken, its data read-only.

None of them may turn an event into a dead letter: they say nothing about the data.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator

import asyncpg

from tests.chaos.fault import Fault
from tests.chaos.machine import PostgresStack, fill_disk, lacks_mount, own_postgres_stage, small_postgres_disk_stage
from tests.chaos.probe import Probe, probing, under_load
from tests.chaos.run import Run
from tests.harness import until

GOES_ON_S = 20.0

_BACKENDS = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
_END_BACKENDS = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'coupon-%'"


@contextlib.asynccontextmanager
async def without_a_ledger(run: Run) -> AsyncIterator[Probe]:
    """Within the block Postgres is out of order, under load; after it a redeem and assigns of both kinds succeed again, and
    nothing was taken for a fault of the data."""
    async with probing(run) as probe, under_load(run):
        yield probe
        held = await probe.goes_on(GOES_ON_S)

        async def redeemed() -> bool:
            return (await probe.redeem(held)).outcome == "ok"

        await until(redeemed, GOES_ON_S, "a redeem should succeed again")
    assert not await run.stack.ledger("SELECT FROM dead_letters"), "an event was blamed for what Postgres did"


async def refused_for_the_ledger(probe: Probe) -> None:
    """Wait until an assign that needs the ledger is not answered with success."""

    async def refused() -> bool:
        attempt = await probe.assign("ledger")
        return attempt.answer.get("code") in ("ledger_behind", "outcome_unknown")

    await until(refused, 15.0, "the ledger should be missed")


async def postgres_killed(run: Run) -> None:
    postgres = PostgresStack.of(run).postgres
    async with without_a_ledger(run) as probe:
        postgres.kill()
        await refused_for_the_ledger(probe)
        postgres.start()  # waits for the children that the killed one has left


async def postgres_stopped(run: Run) -> None:
    """As an operator stops it: "fast" ends sessions and writes a checkpoint, "immediate" leaves a crash to recover from."""
    postgres = PostgresStack.of(run).postgres
    how = run.random.choice((signal.SIGINT, signal.SIGQUIT))
    async with without_a_ledger(run) as probe:
        assert postgres.process is not None
        postgres.process.send_signal(how)
        await asyncio.to_thread(postgres.process.wait, 10)
        await refused_for_the_ledger(probe)
        postgres.start()


async def every_backend_stopped(run: Run) -> None:
    """All sessions stand still for a while, also those that are opened meanwhile: no time-out of the server reaches them."""
    stopped: set[int] = set()
    async with without_a_ledger(run) as probe:
        watcher = await asyncpg.connect(run.stack.database_url)
        try:
            refused = asyncio.create_task(refused_for_the_ledger(probe))
            until_s = time.monotonic() + 4.0
            while time.monotonic() < until_s or not refused.done():
                for row in await watcher.fetch(_BACKENDS):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(row["pid"], signal.SIGSTOP)
                        stopped.add(row["pid"])
                await asyncio.sleep(0.1)
            await refused
        finally:
            for pid in stopped:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
            await watcher.close()
    assert len(stopped) > 5, "the backends were to be found"


async def backends_ended_again_and_again(run: Run) -> None:
    ended = 0
    async with without_a_ledger(run):
        watcher = await asyncpg.connect(run.stack.database_url)
        began = time.monotonic()
        while time.monotonic() < began + 4.0 or ended < 20:
            assert time.monotonic() < began + 20.0, f"only {ended} backends were ended"
            ended += len(await watcher.fetch(_END_BACKENDS + " AND datname = current_database()"))
            await asyncio.sleep(run.random.uniform(0.0, 0.2))
        await watcher.close()


async def postgres_read_only(run: Run) -> None:
    """Sessions begun meanwhile stay read-only when the setting is taken back: they must be given up."""
    async with without_a_ledger(run) as probe:
        watcher = await asyncpg.connect(
            run.stack.database_url, server_settings={"default_transaction_read_only": "off"}
        )
        name = await watcher.fetchval("SELECT current_database()")
        await watcher.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
        try:
            await watcher.execute(_END_BACKENDS + " AND datname = current_database()")
            await refused_for_the_ledger(probe)
            await asyncio.sleep(3.0)
        finally:
            await watcher.execute(f"ALTER DATABASE {name} RESET default_transaction_read_only")
            await watcher.close()


async def connections_exhausted(run: Run) -> None:
    """Others have all places at Postgres, those for superusers too."""
    stack = PostgresStack.of(run)
    async with without_a_ledger(run) as probe:
        taken = [await asyncpg.connect(stack.database_url)]
        refusals = 0
        try:
            refused = asyncio.create_task(refused_for_the_ledger(probe))
            began = time.monotonic()
            while time.monotonic() < began + 4.0 or not refused.done() or refusals < 3:
                assert time.monotonic() < began + 20.0, f"{len(taken)} places taken, {refusals} refusals"
                await taken[0].execute(_END_BACKENDS)
                try:
                    taken.append(await asyncpg.connect(stack.database_url))
                except asyncpg.TooManyConnectionsError:
                    refusals += 1
                    await asyncio.sleep(0.05)
            await refused
        finally:
            for connection in taken:
                connection.terminate()


async def postgres_disk_full(run: Run) -> None:
    """It may refuse what needs space, or crash and be unable to start: then it is started when there is space again."""
    postgres = PostgresStack.of(run).postgres
    async with without_a_ledger(run) as probe:
        filler = fill_disk(postgres.directory, leaving=8192)

        async def full() -> bool:
            return b"No space left on device" in postgres.log.read_bytes()

        try:
            await refused_for_the_ledger(probe)
            await until(full, GOES_ON_S, "the disk of Postgres should be full")
            await asyncio.sleep(2.0)
        finally:
            filler.unlink()
        if not postgres.running:
            postgres.start()


POSTGRES_FAULTS = [
    Fault(postgres_killed, own_postgres_stage),
    Fault(postgres_stopped, own_postgres_stage),
    Fault(every_backend_stopped),
    Fault(backends_ended_again_and_again),
    Fault(postgres_read_only),
    Fault(connections_exhausted, own_postgres_stage),
    Fault(postgres_disk_full, small_postgres_disk_stage, lacks_mount),
]
