"""Faults of handing over: shards that go back and forth between writers, and parts that are told to end under load."""

from __future__ import annotations

import asyncio
import signal

from tests.chaos.fault import Fault
from tests.chaos.probe import Probe, probing, under_load
from tests.chaos.run import HEAL_S, Run
from tests.harness import until

GRACE_S = 8.0
IN_FLIGHT = 6


async def shards_go_back_and_forth(run: Run) -> None:
    """Two writers live; one after the other is paused until the other has all shards, and wakes up as their owner."""
    first, second = run.stack.parts[0], run.stack.writer(COUPON_LEASE_CODES_MIN="20")
    async with under_load(run):
        await until(lambda: _owners(run, 2), HEAL_S, "two writers should share the shards")
        for paused in (first, second):
            before = await _generations(run)
            paused.signal(signal.SIGSTOP)
            try:
                await until(lambda: _owners(run, 1), HEAL_S, "the other writer should have all shards")
            finally:
                paused.signal(signal.SIGCONT)
            assert sum(await _generations(run)) > sum(before), "no shard was taken over"
            await until(lambda: _owners(run, 2), HEAL_S, "the writer that woke up should be given shards again")


async def _owners(run: Run, number: int) -> bool:
    rows = await run.stack.ledger(
        "SELECT count(DISTINCT owner) AS owners, count(*) FILTER (WHERE owner IS NULL) AS idle FROM shards"
    )
    return bool(rows[0]["owners"] == number and rows[0]["idle"] == 0)


async def _generations(run: Run) -> list[int]:
    return [row["generation"] for row in await run.stack.ledger("SELECT generation FROM shards")]


async def writer_told_to_end(run: Run) -> None:
    """It gives its shards up: the next writer need not wait for its row to end."""
    async with under_load(run):
        writer = run.stack.parts[0]
        writer.signal(signal.SIGTERM)
        status = await writer.died(GRACE_S)
        assert status == 0, f"the writer was to end by itself, not with status {status}"
        assert await _idle(run), "the shards were to be nobody's"
        assert not await run.stack.ledger("SELECT FROM writers"), "the next writer would wait for this row to end"
        run.stack.parts[0] = run.stack.writer(COUPON_LEASE_CODES_MIN="20")

        async def taken() -> bool:
            return not await _idle(run)

        await until(taken, HEAL_S, "the next writer should take the shards")


async def _idle(run: Run) -> bool:
    rows = await run.stack.ledger("SELECT FROM shards WHERE owner IS NOT NULL")
    return not rows


async def api_told_to_end(run: Run) -> None:
    """What it has accepted is answered, though that takes a while; then it ends by itself, within its grace."""
    api, writer = run.stack.parts[1], run.stack.parts[0]
    async with probing(run) as probe:
        writer.signal(signal.SIGSTOP)  # whatever waits for the ledger is under way now
        try:
            asked = [asyncio.create_task(probe.assign("ledger")) for _ in range(IN_FLIGHT)]
            await until(lambda: _decided(probe), HEAL_S, "Redis should have decided")
            api.signal(signal.SIGTERM)
            await asyncio.sleep(1.0)
            assert api.process.poll() is None, "it was to wait for what it has accepted"
        finally:
            writer.signal(signal.SIGCONT)
        answered = await asyncio.gather(*asked)
        # On a machine that is slow it may be told that the outcome is unknown; but told it is.
        assert all(attempt.answer for attempt in answered), f"a connection was broken: {answered}"
    status = await api.died(GRACE_S)
    assert status in (0, -signal.SIGTERM), f"the API was to end by itself, not with status {status}"
    run.stack.parts[1] = run.stack.api()
    await run.stack.ready()


async def _decided(probe: Probe) -> bool:
    """Whether something is under way: Redis has decided, and the ledger does not know."""
    return (await probe.in_redis("ledger"))[1] > 0


HANDOVER_FAULTS = [
    Fault(shards_go_back_and_forth),
    Fault(writer_told_to_end),
    Fault(api_told_to_end),
]
