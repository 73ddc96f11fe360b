"""Faults of the plain stage: processes killed and stopped, Redis emptied, rolled back and tampered with.

Each takes a run under load, does its harm, and shows that it bit.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import signal
from collections.abc import AsyncIterator, Sequence

from tests.chaos.fault import Fault, Strike
from tests.chaos.probe import probing, under_load
from tests.chaos.run import HEAL_S, Run, all_certified
from tests.harness import until


async def writer_killed(run: Run) -> None:
    """One of the two, whose shards the other takes over, or both."""
    killed = run.some(run.writers)
    owners = {row["owner"] for row in await run.stack.ledger("SELECT owner FROM shards")}
    for number in killed:
        run.writers[number].kill()
    for number in killed:
        run.start_writer(number)

    async def taken_over() -> bool:
        now = {row["owner"] for row in await run.stack.ledger("SELECT owner FROM shards")}
        return len(owners - now) == len(killed)

    await until(taken_over, HEAL_S, "the shards of a writer that was killed should have another owner")


async def writer_paused_across_a_recovery(run: Run) -> None:
    """One of the two: the other takes its shards over, and recovers them, too."""
    old = run.random.choice(run.writers)
    old.signal(signal.SIGSTOP)
    await until(lambda: one_owner(run), HEAL_S, "the other writer should have all shards")
    run.loses_records = True
    async with run.stack.redis() as redis:
        await redis.flushall()
    await run.recovered()
    await until(lambda: all_certified(run), HEAL_S, "every shard should be certified")
    old.signal(signal.SIGCONT)


async def one_owner(run: Run) -> bool:
    """Whether a single writer owns every shard."""
    (row,) = await run.stack.ledger(
        "SELECT count(DISTINCT owner) AS owners, count(*) FILTER (WHERE owner IS NULL) AS idle FROM shards"
    )
    return bool(row["owners"] == 1 and row["idle"] == 0)


async def api_killed(run: Run) -> None:
    """One of the two, whose clients turn to the other, or both."""
    killed = run.some(run.apis)
    for number in killed:
        run.apis[number].kill()
    for number in killed:
        await run.start_api(number)


@contextlib.asynccontextmanager
async def writers_standing_still(run: Run) -> AsyncIterator[None]:
    """Nothing of any shard goes into the ledger, and nobody takes a shard over."""
    for writer in run.writers:
        writer.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for writer in run.writers:
            writer.signal(signal.SIGCONT)


@contextlib.asynccontextmanager
async def written_to_redis_alone(run: Run) -> AsyncIterator[None]:
    """What is done just before the block is in Redis and not in the ledger: the writers are paused meanwhile. Under load."""
    async with writers_standing_still(run):
        await asyncio.sleep(run.random.uniform(0.2, 0.6))  # a commit that was on its way has arrived
        await until(lambda: _more_than_the_ledger(run), HEAL_S, "Redis should have what the ledger has not")
        yield


async def _more_than_the_ledger(run: Run) -> bool:
    """Whether Redis has decided something in any shard that the ledger does not know."""
    known = {row["shard"]: row["committed"] for row in await run.stack.ledger("SELECT shard, committed FROM shards")}
    decided = await seqs_in_redis(run)
    return any(seq > known[int(meta[4:6])] for meta, seq in decided.items())


async def seqs_in_redis(run: Run) -> dict[str, int]:
    """How many events each shard's meta tells of in its epoch."""
    async with run.stack.redis() as redis:
        return {key: int(await redis.hget(key, "seq") or 0) async for key in redis.scan_iter("cb:*:meta")}


async def redis_killed(run: Run) -> None:
    assert run.stack.redis_server is not None
    async with under_load(run), written_to_redis_alone(run):
        run.stack.redis_server.kill()
    run.stack.redis_server.start()
    await run.recovered()


async def redis_rolled_back(run: Run) -> None:
    """An old copy of the append-only file is restored. What is gone the API processes still know."""
    await _roll_redis_back(run, [])


async def redis_rolled_back_and_api_killed(run: Run) -> None:
    """… and some of them are gone, too: what has no record must be quarantined."""
    run.loses_records = True
    killed = run.some(run.apis)
    await _roll_redis_back(run, killed)
    for number in killed:
        await run.start_api(number)


async def _roll_redis_back(run: Run, killed: Sequence[int]) -> None:
    server = run.stack.redis_server
    assert server is not None
    (folder,) = server.directory.rglob("appendonlydir")
    shutil.copytree(folder, run.stack.folder / "old")
    async with under_load(run), written_to_redis_alone(run):
        for number in killed:
            run.apis[number].kill()
        server.kill()
    shutil.rmtree(folder)
    shutil.copytree(run.stack.folder / "old", folder)
    server.start()
    await run.recovered()


async def redis_lost(run: Run) -> None:
    """Redis comes back empty."""
    server = run.stack.redis_server
    assert server is not None
    async with under_load(run), written_to_redis_alone(run):
        server.kill()
    for folder in server.directory.rglob("appendonlydir"):
        shutil.rmtree(folder)
    server.start()
    await run.recovered()


async def everything_flushed(run: Run) -> None:
    async with run.stack.redis() as redis, under_load(run), written_to_redis_alone(run):
        await redis.flushall()
    await run.recovered()


async def redis_and_api_killed(run: Run) -> None:
    """One API process or both cannot say any more what they answered: what has no record must be quarantined."""
    run.loses_records = True
    assert run.stack.redis_server is not None
    killed = run.some(run.apis)
    async with under_load(run), written_to_redis_alone(run):
        for number in killed:
            run.apis[number].kill()
        run.stack.redis_server.kill()
    run.stack.redis_server.start()
    await run.recovered()
    for number in killed:
        await run.start_api(number)


async def scripts_flushed(run: Run) -> None:
    async with run.stack.redis() as redis:
        await redis.script_flush()
        await redis.function_flush()
    async with probing(run) as probe:
        await probe.goes_on()  # so everybody has asked for a script that was gone
    await asyncio.sleep(0.5)
    assert await run.epochs_now() == run.epochs, "a script that is not loaded is no reason for a recovery"


async def redis_stopped(run: Run) -> None:
    assert run.stack.redis_server is not None
    os.kill(run.stack.redis_server.pid, signal.SIGSTOP)
    await asyncio.sleep(3.0)
    os.kill(run.stack.redis_server.pid, signal.SIGCONT)


async def backend_stopped(run: Run) -> None:
    """The Postgres backends of both writers stop: no time-out of the server reaches them."""
    rows = await run.stack.ledger(
        "SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'coupon-writer%' AND datname = current_database()"
    )
    assert len(rows) >= len(run.writers), "the backends of both writers were to be found"
    for row in rows:
        os.kill(row["pid"], signal.SIGSTOP)
    await asyncio.sleep(6.0)
    for row in rows:
        os.kill(row["pid"], signal.SIGCONT)


def _deleted(kind: str) -> Strike:
    async def fault(run: Run) -> None:
        run.loses_records = kind in ("meta", "holders", "book", "free", "events")
        async with run.stack.redis() as redis, run.client() as http:

            async def kept() -> list[str]:
                found = [key async for key in redis.scan_iter(f"cb:*:{kind}*")]
                if not found:
                    await run.send(http, run.new_assign(f"first-{secrets.token_hex(4)}"))
                return found

            await redis.delete(*await until(kept, HEAL_S, "there should be something to delete"))
            if kind == "events":
                return  # gone from the stream is lost only what the ledger had not: there may have been nothing

            async def missed() -> bool:
                # A missing key is found when it is looked for.
                for book_id in run.books:
                    await http.get(f"/coupons/{book_id}")
                now = await run.epochs_now()
                return any(now[shard] > epoch for shard, epoch in run.epochs.items())

            await until(missed, HEAL_S, "the fault should have been followed by a recovery")

    fault.__name__ = f"{kind}_deleted"
    return fault


async def stream_trimmed(run: Run) -> None:
    run.loses_records = True
    async with run.stack.redis() as redis, under_load(run), written_to_redis_alone(run):
        for key in [key async for key in redis.scan_iter("cb:*:events")]:
            await redis.xtrim(key, maxlen=0, approximate=False)
    await run.recovered(all_shards=False)


PROCESS_FAULTS = [
    Fault(strike)
    for strike in (
        writer_killed,
        writer_paused_across_a_recovery,
        api_killed,
        redis_killed,
        redis_rolled_back,
        redis_rolled_back_and_api_killed,
        redis_lost,
        everything_flushed,
        redis_and_api_killed,
        scripts_flushed,
        redis_stopped,
        backend_stopped,
        stream_trimmed,
        *(_deleted(kind) for kind in ("meta", "holders", "book", "free", "events")),
    )
]
