"""Faults of the machine that Redis is on: disk slow, full, or damaged, clock set, memory out, its one thread busy.

Each takes a run under load, does its harm, shows that it bit, and heals what does not heal by itself.
"""

from __future__ import annotations

import asyncio
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from redis.exceptions import ResponseError

from coupon_svc.dev.servers import ServerError
from coupon_svc.domain.position import Position
from tests.chaos.fault import Fault, Strike
from tests.chaos.fencing_faults import watching
from tests.chaos.machine import (
    ClockStack,
    PostgresClockStack,
    SlowDiskStack,
    clock_stage,
    fill_disk,
    lacks_a_compiler,
    lacks_mount,
    postgres_clock_stage,
    slow_disk_stage,
    small_redis_disk_stage,
)
from tests.chaos.probe import Probe, probing, under_load
from tests.chaos.process_faults import one_owner, seqs_in_redis, writers_standing_still, written_to_redis_alone
from tests.chaos.run import HEAL_S, Attempt, Run, new_book
from tests.harness import until

DIRTY_BYTES_LEFT = 16_384
FSYNC_S = 1.8


# --- the disk


async def redis_killed_on_a_slow_disk(run: Run) -> None:
    """While an fsync is under way Redis answers, and keeps what it should write in its memory for up to 2 s."""
    stack = SlowDiskStack.of(run)
    assert stack.redis_server is not None
    run.loses_records = True
    async with stack.redis() as redis, probing(run) as probe, under_load(run), writers_standing_still(run):
        metas = list(await seqs_in_redis(run))
        stack.disk.set_s(FSYNC_S)
        seqs: dict[str, int] = {}
        written: dict[str, int] = {}
        asked_at_s, wrote_at_s, pending, buffered = 0.0, -math.inf, 1, 0

        async def unwritten() -> bool:
            """A write was seen to begin an fsync, an event was decided after it, and the next write is not due yet."""
            nonlocal seqs, written, asked_at_s, wrote_at_s, pending, buffered
            before = asked_at_s, pending, buffered
            asked_at_s = time.monotonic()
            pipe: Any = redis.pipeline(transaction=False)
            pipe.info("persistence")
            for meta in metas:
                pipe.hget(meta, "seq")
            info, *replies = await pipe.execute()
            seqs = dict(zip(metas, map(int, replies), strict=True))
            pending, buffered = info["aof_pending_bio_fsync"], info["aof_buffer_length"]
            if pending and (not before[1] or buffered < before[2]):
                written, wrote_at_s = seqs, before[0]
            if pending and seqs == written:  # the load may have nothing that Redis can decide alone
                await probe.assign("redis")
            return seqs != written and time.monotonic() - wrote_at_s < FSYNC_S / 2

        await until(unwritten, HEAL_S, "an fsync should be under way, and an event to be written after it")
        stack.redis_server.kill()
        stack.disk.set_s(0)
        stack.redis_server.start()
        after = await seqs_in_redis(run)
        assert any(after[meta] < seqs[meta] for meta in metas), (seqs, after, "nothing was lost")
    await run.recovered()


async def redis_disk_full(run: Run) -> None:
    """With `appendfsync everysec` Redis goes on with reads, and refuses every write until there is space again."""
    server = run.stack.redis_server
    assert server is not None
    async with probing(run) as probe, under_load(run), run.stack.redis() as redis:
        filler = fill_disk(server.directory / "data", leaving=DIRTY_BYTES_LEFT)
        await until(lambda: _cannot_write(redis), HEAL_S, "the disk of Redis should be full")
        for ack in ("ledger", "redis"):
            before = await probe.in_redis(ack)
            refused = await probe.assign(ack)
            assert refused.answer.get("code") == "store_unavailable", refused
            assert await probe.in_redis(ack) == before, "a refused assign was to leave the pool as it is"

        async def unready() -> bool:
            return not await probe.is_ready()

        await until(unready, HEAL_S, "a Redis that cannot write should make the service unready")
        assert (await probe.http.get("/healthz")).status_code == 200
        filler.unlink()
        await until(probe.is_ready, HEAL_S, "the service should be ready when there is space again")
        await probe.goes_on()


async def redis_killed_with_its_disk_full(run: Run) -> None:
    """The write that found the disk full was answered before Redis noticed."""
    server = run.stack.redis_server
    assert server is not None
    run.loses_records = True
    filler = fill_disk(server.directory / "data", leaving=DIRTY_BYTES_LEFT)
    async with under_load(run), run.stack.redis() as redis:
        await until(lambda: _cannot_write(redis), HEAL_S, "the disk of Redis should be full")
    server.kill()
    filler.unlink()
    server.start()
    await run.recovered()


async def _cannot_write(redis: Any) -> bool:
    info = await redis.info("persistence")
    return bool(info["aof_last_write_status"] == "err")


# --- the append-only file


def _aof_tail(directory: Path) -> Path:
    """The file that is being appended to."""
    (folder,) = directory.rglob("appendonlydir")
    newest: Path = max(folder.glob("*.incr.aof"), key=lambda path: path.stat().st_mtime_ns)
    return newest


async def aof_tail_cut_off(run: Run) -> None:
    """As a crash of the machine leaves it: the last bytes never came to the disk. What is kept are whole scripts."""
    server = run.stack.redis_server
    assert server is not None
    run.loses_records = True
    async with probing(run) as probe:
        await probe.goes_on()
        async with writers_standing_still(run):
            given = [await probe.assign("redis") for _ in range(3)]  # so that it is a script that is cut off
            assert given[-1].outcome == "ok", given
            before = await seqs_in_redis(run)
            cut, after = 0, before
            while sum(after.values()) == sum(before.values()):  # the last bytes may be a lock's alone
                assert cut < 10_000, f"{cut} bytes were cut off, and nothing was lost"
                server.kill()
                file = _aof_tail(server.directory)
                some = run.random.randint(1, 3000)
                os.truncate(file, file.stat().st_size - some)
                cut += some
                server.start()
                after = await seqs_in_redis(run)
            await _require_whole_scripts(run)
    await run.recovered()


async def _require_whole_scripts(run: Run) -> None:
    """Each shard's stream ends where its meta says; each book's pool and holders add up to what was lent."""
    redis: Any = run.stack.redis()
    async with redis:
        async for meta in redis.scan_iter("cb:*:meta"):
            prefix, seq = meta.removesuffix("meta"), await redis.hget(meta, "seq")
            last = await redis.xrevrange(prefix + "events", count=1)
            assert not last or seq == "0" or str(Position.parse(last[0][0]).seq) == seq, (last, seq)
            async for book in redis.scan_iter(prefix + "book:*"):
                book_id = book.rpartition(":")[2]
                there = await redis.zcard(f"{prefix}free:{book_id}") + await redis.hlen(f"{prefix}holders:{book_id}")
                assert there == int(await redis.hget(book, "lent")), f"half a script was kept of {book_id}"


async def aof_corrupted(run: Run) -> None:
    """Redis refuses to start from a file that is damaged in its middle; an operator puts an old copy back, or nothing."""
    server = run.stack.redis_server
    assert server is not None
    run.loses_records = True
    (folder,) = server.directory.rglob("appendonlydir")
    shutil.copytree(folder, run.stack.folder / "copy")
    async with under_load(run), run.client() as http:
        await asyncio.sleep(run.random.uniform(0.3, 0.8))
        server.kill()
        with _aof_tail(server.directory).open("r+b") as file:
            data = file.read()
            file.seek(data.index(b"\r\n*", len(data) // 2))  # between two commands: text within one may be anything
            file.write(b"\xff" * 1024)
        with pytest.raises(ServerError, match=r"Bad file format|Error reading the append only file"):
            server.start()

        async def unready() -> bool:
            return (await http.get("/readyz")).status_code == 503

        await until(unready, HEAL_S, "the service should be unready without its Redis")
        shutil.rmtree(folder)
        if run.random.random() < 0.5:
            shutil.copytree(run.stack.folder / "copy", folder)
        server.start()
    await run.recovered()


# --- the clock


def _redis_clock_jumps(seconds: float, name: str) -> Strike:
    async def fault(run: Run) -> None:
        stack = ClockStack.of(run)
        run.loses_locks = True  # a lock ends by that clock
        ahead = run.random.choice((1, -1)) * seconds
        async with probing(run) as probe, under_load(run), stack.redis() as redis:
            for offset in (ahead, 0.0, -ahead, 0.0):
                stack.redis_clock.set_s(offset)
                began = time.time() + offset - 1.5

                async def jumped(began: float = began, offset: float = offset) -> bool:
                    return bool(began < (await redis.time())[0] < time.time() + offset + 1.5)

                await until(jumped, HEAL_S, "the clock of Redis was to jump")
                dealt = await probe.goes_on()
                at = await _assigned_at_ms(run, dealt.answer["code"]) / 1000
                assert began < at < time.time() + offset + 1.5, "the ledger was to have the time as Redis told it"

    fault.__name__ = name
    return fault


async def _assigned_at_ms(run: Run, code: str) -> int:
    rows = await run.stack.ledger("SELECT assigned_at_ms FROM coupons WHERE code = $1", code)
    return int(rows[0]["assigned_at_ms"])


async def redis_clock_jumps_days(run: Run) -> None:
    """By an hour, or more than an Idempotency-Key is kept, and back, while requests are asked again with the same key."""
    stack = ClockStack.of(run)
    run.loses_locks = True
    ahead = run.random.choice((1, -1)) * run.random.choice((1, 25, 49)) * 3600.0
    async with probing(run) as probe, under_load(run), stack.redis() as redis, run.client() as http:
        first = await probe.goes_on()
        stack.redis_clock.set_s(ahead)

        async def jumped() -> bool:
            return bool(abs((await redis.time())[0] - time.time() - ahead) < 5)

        await until(jumped, HEAL_S, "the clock of Redis was to jump")

        async def asked_again() -> Attempt:
            again = msgspec.structs.replace(first, answer={}, status=0)
            await run.send(http, again, at=run.elsewhere(first.asked_at), record=False)
            if again.outcome == "ok":
                assert again.answer["code"] == first.answer["code"], "P5: the same key gave a second code"
            return again

        async def shut() -> bool:
            return (await asked_again()).answer.get("code") == "recovering"

        await until(shut, HEAL_S, "by such a clock nothing should be decided")

        async def all_shut() -> (
            bool
        ):  # a shard whose owner has not looked yet would keep what has ended by such a clock
            answer = await http.get("/readyz")
            return answer.status_code == 503 and answer.json()["shards"]["open"] == 0

        await until(all_shut, HEAL_S, "by such a clock nothing should be decided")
        assert any(writer.said("set them right") for writer in run.writers), "somebody should say why"
        stack.redis_clock.set_s(0.0)

        async def answered() -> bool:
            return (await asked_again()).outcome == "ok"

        await until(answered, HEAL_S, "the key should be known again")
        await probe.goes_on()


async def postgres_clock_jumps(run: Run) -> None:
    """Who lives is no matter of Postgres's clock: set by half a minute while Redis is emptied, it ends nobody, and nobody
    lives on by it who was killed."""
    stack = PostgresClockStack.of(run)
    run.loses_records = True
    ahead = run.random.choice((1, -1)) * 30.0
    async with watching(run) as ledger, probing(run) as probe, under_load(run):
        stack.postgres_clock.set_s(ahead)

        async def jumped() -> bool:
            now = await ledger.fetchval("SELECT extract(epoch FROM clock_timestamp())")
            return abs(float(now) - time.time() - ahead) < 5

        await until(jumped, HEAL_S, "the clock of Postgres was to jump")
        owners = await stack.ledger("SELECT owner FROM shards ORDER BY shard")
        await asyncio.sleep(1.5)
        assert await stack.ledger("SELECT owner FROM shards ORDER BY shard") == owners, "a living writer was robbed"
        assert not await stack.ledger("SELECT FROM api_processes WHERE gone"), "a living process counts as gone"
        run.writers[0].kill()
        await until(lambda: one_owner(run), HEAL_S, "the other writer should take the shards")
        stack.postgres_clock.set_s(-ahead)
        async with stack.redis() as redis, written_to_redis_alone(run):
            await redis.flushall()
        await run.recovered()
        stack.postgres_clock.set_s(0.0)
        run.start_writer(0)
        await probe.goes_on()


async def redis_clock_jumps_under_a_lock(run: Run) -> None:
    """A lock ends when Redis's clock says so: set back it lasts, set forward it is over. Never have two the code."""
    stack = ClockStack.of(run)
    run.loses_locks = True  # a lock ends by that clock
    async with probing(run) as probe, under_load(run):
        held = await probe.goes_on()
        first = await probe.lock(held, 30)
        assert first.get("lock_token"), first
        stack.redis_clock.set_s(-50)
        assert (await probe.lock(held, 30))["code"] == "locked"
        assert (await probe.redeem(held)).answer["code"] == "locked"
        stack.redis_clock.set_s(50)
        second = await until(lambda: _locked(probe, held), HEAL_S, "the lock should have ended")
        assert (await probe.redeem(held, first["lock_token"])).answer["code"] == "lock_not_held"

        async def redeemed() -> bool:
            # Until its owner shows itself again, a ledger that was seen long ago by this clock is taken for gone.
            return (await probe.redeem(held, second["lock_token"])).outcome == "ok"

        await until(redeemed, HEAL_S, "who holds the lock should redeem")
        stack.redis_clock.set_s(0)
        await probe.goes_on()


async def _locked(probe: Probe, held: Any) -> dict[str, Any]:
    answer = await probe.lock(held, 30)
    return answer if "lock_token" in answer else {}


async def service_clock_jumps(run: Run) -> None:
    """The clocks of API and writer are set, and Redis is killed meanwhile: what is measured by them must do no harm."""
    stack = ClockStack.of(run)
    assert stack.redis_server is not None
    run.loses_records = True
    ahead = run.random.choice((1, -1)) * run.random.choice((2.0, 3600.0))
    async with probing(run) as probe, under_load(run):
        stack.service_clock.set_s(ahead)
        began = time.time()
        generate = {"pattern": "late-######", "total": 1}
        book_id = await new_book(run.stack, probe.http, {"name": "late", "generate": generate})
        rows = await stack.ledger("SELECT created_at_ms FROM books WHERE book_id = $1", book_id)
        told = rows[0]["created_at_ms"] / 1000
        assert began + ahead - 1 < told < time.time() + ahead + 1, "the clock of the API was to jump"
        stack.redis_server.kill()
        stack.redis_server.start()
        await run.recovered()
        await probe.goes_on()
        stack.service_clock.set_s(-ahead)
        await probe.goes_on()
        stack.service_clock.set_s(0)


# --- memory, and the one thread


async def memory_out(run: Run) -> None:
    """Nothing new is promised, and what was promised is kept: redeem, unlock and the way to the ledger go on."""
    async with probing(run) as probe, under_load(run), run.stack.redis() as redis:
        held = await probe.goes_on()
        more = [await probe.goes_on() for _ in range(3)]
        lock = await probe.lock(await probe.goes_on(), 60)
        used = (await redis.info("memory"))["used_memory"]
        await redis.config_set("maxmemory", used + 20_000)
        try:

            async def refused() -> bool:
                return "errorstat_OOM" in await redis.info("errorstats")

            await until(refused, HEAL_S, "memory should have run out under the load")
            # To the byte: what a client frees must not make room for a moment.
            await redis.config_set("maxmemory", 1)
            for ack in ("ledger", "redis"):
                before = await probe.in_redis(ack)
                attempt = await probe.assign(ack)
                assert attempt.answer.get("code") == "backlog_full", attempt
                assert await probe.in_redis(ack) == before, "a refused assign was to leave the pool as it is"
            redeemed = await probe.redeem(held)
            assert redeemed.outcome == "ok", redeemed
            await _all_classes_in_one_turn(probe, more, lock)
        finally:
            await redis.config_set("maxmemory", 0)
        await probe.goes_on()


async def _all_classes_in_one_turn(probe: Probe, held: list[Attempt], lock: dict[str, Any]) -> None:
    """Requests of every class, sent at once: those that Redis refuses take none of the others with them."""
    unlock = probe.http.post(f"/coupons/unlock/{lock['code']}", json={"lock_token": lock["lock_token"]})
    lists = [probe.http.get(f"/users/{attempt.user}/coupons") for attempt in held]
    redeems = [probe.redeem(attempt) for attempt in held]
    grows = [probe.assign(ack) for ack in ("ledger", "redis") for _ in range(4)]
    unlocked, listed, redeemed, grown = await asyncio.gather(
        unlock, asyncio.gather(*lists), asyncio.gather(*redeems), asyncio.gather(*grows)
    )
    assert unlocked.status_code == 204, unlocked.text
    assert all(answer.status_code == 200 for answer in listed), listed
    assert all(attempt.outcome == "ok" for attempt in redeemed), redeemed
    assert all(attempt.answer.get("code") == "backlog_full" for attempt in grown), grown


async def redis_busy(run: Run) -> None:
    """Somebody's script does not end. Redis says BUSY, or nothing at all; either way nobody asks it all the more."""
    says_so = run.random.random() < 0.5
    async with probing(run) as probe, under_load(run), run.stack.redis() as redis, run.stack.redis() as other:
        # Only from then on it says BUSY, and listens to who wants to end the script.
        await redis.config_set("busy-reply-threshold", 100 if says_so else 2500)
        before, asked_before = await _work_of_redis(other), len(run.history)
        began = time.monotonic()
        endless = asyncio.ensure_future(redis.eval("while true do end", 0))
        await asyncio.sleep(0.2)
        attempts = asyncio.gather(probe.assign("ledger"), probe.assign("redis"))
        await asyncio.sleep(2.3 if says_so else 0.3)
        await other.script_kill()
        with pytest.raises(ResponseError, match="killed"):
            await endless
        took = time.monotonic() - began
        assert took > 2.0, f"the script was to go on for a while, not for {took:.1f} s"
        assert all(attempt.outcome != "ok" for attempt in await attempts), "Redis was to be busy"
        after, asked = await _work_of_redis(other), len(run.history) - asked_before
        scripts, connections = (after[i] - before[i] for i in range(2))
        # A request is one script, two when it is looked for again; the owner's own are few.
        assert scripts <= 3 * asked + 100 * took, f"{scripts} scripts for {asked} requests in {took:.1f} s: a storm"
        assert connections <= 40 * took, f"{connections} connections in {took:.1f} s: a storm"
        await probe.goes_on()


async def _work_of_redis(redis: Any) -> tuple[int, int]:
    """(scripts and functions asked for, run or refused; connections accepted) since the start."""
    commands, stats = await redis.info("commandstats"), await redis.info("stats")
    ran = [commands.get(f"cmdstat_{name}", {}) for name in ("evalsha", "fcall")]
    return sum(one.get("calls", 0) + one.get("rejected_calls", 0) for one in ran), stats["total_connections_received"]


MACHINE_FAULTS = [
    Fault(redis_killed_on_a_slow_disk, slow_disk_stage, lacks_a_compiler),
    Fault(redis_disk_full, small_redis_disk_stage, lacks_mount),
    Fault(redis_killed_with_its_disk_full, small_redis_disk_stage, lacks_mount),
    Fault(aof_tail_cut_off),
    Fault(aof_corrupted),
    Fault(_redis_clock_jumps(2.0, "redis_clock_jumps_seconds"), clock_stage, lacks_a_compiler),
    Fault(_redis_clock_jumps(50.0, "redis_clock_jumps_most_of_a_minute"), clock_stage, lacks_a_compiler),
    Fault(redis_clock_jumps_days, clock_stage, lacks_a_compiler),
    Fault(postgres_clock_jumps, postgres_clock_stage, lacks_a_compiler),
    Fault(redis_clock_jumps_under_a_lock, clock_stage, lacks_a_compiler),
    Fault(service_clock_jumps, clock_stage, lacks_a_compiler),
    Fault(memory_out),
    Fault(redis_busy),
]
