"""Faults of handing over: shards that go back and forth between writers, and parts that are told to end under load."""

from __future__ import annotations

import asyncio
import signal

from tests.chaos.fault import Fault
from tests.chaos.probe import probing, under_load
from tests.chaos.process_faults import one_owner, writers_standing_still
from tests.chaos.run import HEAL_S, Run
from tests.harness import Part, until

GRACE_S = 8.0
IN_FLIGHT = 6
TRIES = 5
AT_ONCE_S = 3.0
"""Less than it takes for a row to end."""


async def shards_go_back_and_forth(run: Run) -> None:
    """One writer after the other is paused until the other has all shards, and wakes up as their owner."""
    async with under_load(run):
        for paused in run.writers:
            before = await _generations(run)
            paused.signal(signal.SIGSTOP)
            try:
                await until(lambda: one_owner(run), HEAL_S, "the other writer should have all shards")
            finally:
                paused.signal(signal.SIGCONT)
            assert sum(await _generations(run)) > sum(before), "no shard was taken over"
            await run.share_shards()


async def _generations(run: Run) -> list[int]:
    return [row["generation"] for row in await run.stack.ledger("SELECT generation FROM shards")]


async def writer_told_to_end(run: Run) -> None:
    """One of the two or both. They give their shards up: the next writer need not wait for their rows to end."""
    async with under_load(run):
        ending = run.some(run.writers)
        before = await _writers(run)
        for number in ending:
            run.writers[number].signal(signal.SIGTERM)
        for number in ending:
            status = await run.writers[number].died(GRACE_S)
            assert status == 0, f"the writer was to end by itself, not with status {status}"
        left = await _writers(run)
        assert len(before - left) == len(ending), "the next writer would wait for this row to end"
        assert await _owners(run) <= {*left, None}, "the shards were to be nobody's, or the other's"
        if left:
            await until(lambda: one_owner(run), AT_ONCE_S, "the other writer should take the shards at its next turn")
        for number in ending:
            run.start_writer(number)
        await run.share_shards()


async def _writers(run: Run) -> set[str]:
    return {row["writer_id"] for row in await run.stack.ledger("SELECT writer_id FROM writers")}


async def _owners(run: Run) -> set[str | None]:
    return {row["owner"] for row in await run.stack.ledger("SELECT owner FROM shards")}


async def writers_come_and_go(run: Run) -> None:
    """A third writer joins, one of the first two leaves and comes back, and the third leaves: told to or killed. Nobody dies
    of it."""
    async with under_load(run):
        for leaving in (0, 1):
            third = run.stack.writer(2, COUPON_LEASE_CODES_MIN="20")
            await until(lambda third=third: _registered(run, third), HEAL_S, "it should take part")  # type: ignore[misc]
            _leave(run, run.writers[leaving])
            await until(lambda third=third: _owns(run, third), HEAL_S, "it should be given shards")  # type: ignore[misc]
            run.start_writer(leaving)
            await asyncio.sleep(run.random.uniform(1.0, 3.0))  # the new one takes part already, or comes too late
            assert third.process.poll() is None, "the third writer has died"
            _leave(run, third)
            await run.share_shards()
            died = [writer.process.poll() for writer in run.writers]
            assert died == [None] * len(died), f"a writer has died of it: {died}"


def _leave(run: Run, writer: Part) -> None:
    if run.random.random() < 0.7:
        writer.stop()
    else:
        writer.kill()


async def _registered(run: Run, writer: Part) -> bool:
    return any(writer.said(name) for name in await _writers(run))


async def _owns(run: Run, writer: Part) -> bool:
    return any(owner and writer.said(owner) for owner in await _owners(run))


async def api_told_to_end(run: Run) -> None:
    """One of the two is. What it has accepted is answered, though that takes a while; then it ends by itself, in time."""
    async with probing(run) as probe:
        for _ in range(TRIES):
            await probe.goes_on()
            async with writers_standing_still(run):  # whatever waits for the ledger is under way now
                asked = await probe.decided("ledger", IN_FLIGHT)
                if asked.done():
                    continue
                run.apis[0].signal(signal.SIGTERM)
                await asyncio.sleep(1.0)
                assert run.apis[0].process.poll() is None, "it was to wait for what it has accepted"
                break
        else:
            raise AssertionError("Redis should have decided")
        answered = await asked
        # On a machine that is slow it may be told that the outcome is unknown; but told it is.
        assert all(attempt.answer for attempt in answered), f"a connection was broken: {answered}"
    status = await run.apis[0].died(GRACE_S)
    assert status in (0, -signal.SIGTERM), f"the API was to end by itself, not with status {status}"
    await run.start_api(0)


HANDOVER_FAULTS = [
    Fault(shards_go_back_and_forth),
    Fault(writer_told_to_end),
    Fault(writers_come_and_go),
    Fault(api_told_to_end),
]
