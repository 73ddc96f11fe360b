"""Faults that meet calls of many operations: Redis is killed in the middle of one, or finds a key of another type."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

from tests.chaos.fault import SHARDS, Fault, Strike
from tests.chaos.fencing_faults import keys_of
from tests.chaos.probe import Probe, probing, under_load
from tests.chaos.run import HEAL_S, Attempt, Run, all_certified
from tests.harness import until

MANY = 48
CALLS_TAKE_S = 0.004
"""About as long as Redis is at the calls that have waited for it."""
TRIES = 8
KINDS = ("meta", "events", "book", "free", "holders", "coupons", "idem", "lock", "quarantine")
"""Of keys, as docs/redis.md has them."""


async def redis_killed_in_a_call(run: Run) -> None:
    """SIGKILL while calls of many operations run: of each call Redis has all or nothing, as it comes back."""
    server = run.stack.redis_server
    assert server is not None
    for _ in range(TRIES):
        async with probing(run) as probe:  # with books of its own each time: a load may empty them
            await probe.goes_on()
            cut_off = await _killed_under_load(run, probe, server)
            server.start()
            await run.recovered()
            await probe.goes_on()
            await until(lambda: all_certified(run), HEAL_S, "every shard should be certified")
            run.epochs = await run.epochs_now()
        if cut_off > 1:
            return
    raise AssertionError("a call of several operations was to be cut off")


async def _killed_under_load(run: Run, probe: Probe, server: Any) -> int:
    """Kill Redis a moment after it has gone on with the calls that waited for it. Returns how many requests never heard
    what became of them: none where it was done with all calls already."""
    stop, begun = asyncio.Event(), len(run.history)
    asked = [asyncio.ensure_future(_assigns(probe, api.base_url, stop)) for api in run.apis for _ in range(2)]

    async def under_way() -> bool:
        return sum(attempt.outcome == "ok" for attempt in run.history[begun:]) > MANY

    await until(under_way, HEAL_S, "there should be a load")
    os.kill(server.pid, signal.SIGSTOP)  # calls fill up, and wait for Redis to go on
    await asyncio.sleep(0.2)
    os.kill(server.pid, signal.SIGCONT)
    await asyncio.sleep(run.random.uniform(0.0, CALLS_TAKE_S))
    server.kill()
    stop.set()
    await asyncio.gather(*asked)
    return sum(attempt.outcome == "unknown" for attempt in run.history[begun:])


async def _assigns(probe: Probe, at: str, stop: asyncio.Event) -> None:
    """Bursts of assigns, whatever becomes of them."""
    while not stop.is_set():
        burst = [probe.assign(ack, at=at) for ack in ("redis", "ledger") for _ in range(MANY // 4)]
        await asyncio.gather(*burst)


def _of_wrong_type(kind: str) -> Strike:
    async def fault(run: Run) -> None:
        run.scripts_fail = True
        run.loses_records = kind in ("meta", "events")
        async with probing(run) as probe, run.stack.redis() as client:
            redis: Any = client
            held = await probe.goes_on()
            key = await _key_of(redis, kind, held)
            newest = "SELECT code FROM codes WHERE book_id = $1 ORDER BY place DESC LIMIT 1"
            (nobodys,) = await run.stack.ledger(newest, held.book_id)
            shard = int(held.book_id[3:5])
            async with under_load(run):
                pipe = redis.pipeline(transaction=True)
                pipe.delete(key)
                pipe.hset(key, "field", "x") if kind in ("idem", "lock") else pipe.set(key, "x")
                await pipe.execute()

                async def recovered() -> bool:
                    await _burst(run, probe, held, nobodys["code"])
                    return (await run.epochs_now())[shard] > run.epochs[shard]

                await until(recovered, HEAL_S, "the shard should be recovered")
                await probe.goes_on()
            now = await run.epochs_now()
            others = [other for other in range(SHARDS) if other != shard and now[other] != run.epochs[other]]
            assert not others, f"other shards were disturbed: {others}"

    fault.__name__ = f"{kind}_of_wrong_type"
    return fault


async def _key_of(redis: Any, kind: str, held: Attempt) -> str:
    """The key of this kind that requests about a coupon use."""
    keys, code = keys_of(held.book_id), held.answer["code"]
    if kind in ("meta", "events"):
        return str(getattr(keys, kind))
    if kind in ("book", "free", "holders", "quarantine"):
        return str(getattr(keys, kind)(held.book_id))
    if kind == "lock":
        return keys.lock(held.book_id, code)
    tail = held.user if kind == "coupons" else held.key
    (found,) = [key async for key in redis.scan_iter(f"{keys.prefix}{kind}:*{tail}")]
    return str(found)


async def _burst(run: Run, probe: Probe, held: Attempt, nobodys: str) -> None:
    """Many requests at once at one API process, of which some use the keys of one coupon, and one asks about a code that
    nobody holds."""
    at = run.random.choice(run.apis).base_url
    others = [probe.assign(held.ack, at=at) for _ in range(MANY // 8)]
    again = Attempt("assign", held.path, held.body, held.key, held.book_id, held.ack, held.user)
    ask = (
        run.send(probe.http, again, at=at, record=False),
        probe.redeem(held),
        probe.http.post(f"{at}/coupons/lock/{nobodys}", json={"user_id": held.user}),
        probe.assign_code(held, at=at),
        probe.http.get(f"{at}/users/{held.user}/coupons"),
    )
    await asyncio.gather(*others, *ask)


CALL_FAULTS = [Fault(redis_killed_in_a_call), *(Fault(_of_wrong_type(kind)) for kind in KINDS)]
