"""Faults in which one safeguard alone stands between the harm and a broken promise: something comes too late.

tests/chaos/test_chaos_proves_itself.py takes those safeguards out, and sees these faults fail.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import msgspec
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from coupon_svc.domain.position import parse_shard_position
from coupon_svc.postgres.epochs import want_recovery
from coupon_svc.redis.keys import ShardKeys
from coupon_svc.redis.scripts import Scripts
from tests.chaos.fault import SHARDS, Fault
from tests.chaos.probe import PROBE_CODES, Probe, probing, under_load
from tests.chaos.process_faults import one_owner, writers_standing_still
from tests.chaos.run import HEAL_S, Attempt, Run, all_certified, new_book
from tests.harness import START_S, Part, until
from tests.sent import sections_of

BACKLOG_MAX = 40
TRIES = 5
BATCH_WAITS_S = 4.5
"""A writer gives a commit up after 5 s."""
ACKS = ("ledger", "redis")

_WRITERS_BACKENDS = (
    "SELECT pid, state, query FROM pg_stat_activity"
    " WHERE datname = current_database() AND application_name LIKE 'coupon-writer%'"
)


def keys_of(book_id: str) -> ShardKeys:
    return ShardKeys(int(book_id[3:5]), SHARDS)


@contextlib.asynccontextmanager
async def watching(run: Run) -> AsyncIterator[asyncpg.Connection]:
    """A connection to the ledger of the fault's own, for more than a glance."""
    connection = await asyncpg.connect(run.stack.database_url)
    try:
        yield connection
    finally:
        connection.terminate()


# --- Redis: the epoch and the position in every script


async def request_comes_after_a_recovery(run: Run) -> None:
    """A script that was held up on its way, as in a full buffer, arrives when its epoch is over: nothing is done."""
    redis: Any = run.stack.redis()
    async with probing(run) as probe, redis:
        await probe.goes_on()
        book_id = probe.books["redis"]
        command = await _script_as_sent(run, probe)
        epoch = int(str(await redis.hget(keys_of(book_id).meta, "epoch")))
        async with watching(run) as ledger:
            await want_recovery(ledger, None)

        async def certified_anew() -> bool:
            now = str(await redis.hget(keys_of(book_id).meta, "epoch"))
            return now.isdigit() and int(now) > epoch

        await until(certified_anew, HEAL_S, "the shard should be recovered")
        await probe.goes_on()
        before = await probe.in_redis("redis")
        try:
            reply = await redis.execute_command(*command)
        except ResponseError as error:
            reply = error
        assert reply == '[["suspect","epoch"]]', f"P6: a request of an epoch that is over was carried out: {reply}"
        assert await probe.in_redis("redis") == before, "P6: a request of an epoch that is over was carried out"


async def _script_as_sent(run: Run, probe: Probe) -> list[bytes]:
    """The command of an assign as the API sends it, of a caller that has seen nothing of the epoch yet, for another user and
    under another Idempotency-Key: it has had no effect so far."""
    async with run.stack.redis() as redis, redis.monitor() as monitor:
        listening = asyncio.create_task(_first_assign(monitor))
        await asyncio.sleep(0.1)
        attempt = await probe.assign("redis")
        assert attempt.outcome == "ok", attempt
        words = await asyncio.wait_for(listening, HEAL_S)
    late_key = "late" + secrets.token_hex(4)

    def late(text: str) -> str:
        return text.replace(attempt.user, "late-user").replace(attempt.key, late_key)

    # FCALL, the function, the number of keys, the keys; then the sections, as MONITOR spells what is no text.
    behind = 3 + int(words[2])
    texts, packed = words[:behind], " ".join(words[behind:])
    values: list[Any] = []
    for section in sections_of(Scripts(), [packed.encode("latin-1").decode("unicode_escape").encode("latin-1")]):
        values += [*section._replace(seen_seq="0")[:-1], len(section.operations)]
        values += [late(field) if isinstance(field, str) else field for asked in section.operations for field in asked]
    return [late(text).encode() for text in texts] + [msgspec.msgpack.encode(values)]


async def _first_assign(monitor: Any) -> list[str]:
    async for heard in monitor.listen():
        words: list[str] = heard["command"].split(" ")
        if words[0].upper() == "FCALL" and any("probe-" in word for word in words):
            return words
    raise AssertionError("nobody asked Redis")


async def keys_put_back(run: Run) -> None:
    """Somebody restores keys of a moment ago into the running server: run_id, replid and epoch are the certified ones. The
    ledger has not seen what came after, and one of the API processes has."""
    run.loses_records = True
    seeing, blind = run.random.sample(run.apis, 2)
    async with probing(run) as probe:
        await probe.goes_on()
        async with writers_standing_still(run):
            await asyncio.sleep(0.3)
            kept = await _keep_keys(run)
            given = [await probe.assign("redis", at=seeing.base_url) for _ in range(5)]
            assert all(attempt.outcome == "ok" for attempt in given), given
            await _put_back(run, kept)
            later = [await probe.assign("redis", at=api.base_url) for api in (seeing, blind) for _ in range(5)]
        _require_refused(run, given, later)
    await run.recovered(all_shards=False)


async def keys_put_back_unseen(run: Run) -> None:
    """The same of what the ledger has, and the first to ask is an API process that made nothing of it. An event of its own
    at a position that was committed before is another event."""
    run.loses_records = True
    seeing, blind = run.random.sample(run.apis, 2)
    async with probing(run) as probe:
        await probe.goes_on()
        await run.idle()
        await run.stack.drained()
        kept = await _keep_keys(run)
        given = [await probe.assign(ack, at=seeing.base_url) for ack in probe.books for _ in range(5)]
        assert all(attempt.outcome == "ok" for attempt in given), given
        await run.stack.drained()
        await _told(run, probe, blind)
        await _put_back(run, kept)
        asked = [probe.assign(ack, at=blind.base_url) for ack in probe.books for _ in range(5)]
        _require_refused(run, given, list(await asyncio.gather(*asked)))
    await run.recovered(all_shards=False)


async def keys_put_back_unheard(run: Run) -> None:
    """The same, and the API process that is asked has heard no message: it makes its own events at positions that the ledger
    has. They are other entries there, and are never durable. Where the stream shows two histories, the shard is stopped, and
    an operator goes on with the ledger's."""
    run.loses_records = True
    deaf = run.random.randrange(len(run.apis))
    seeing = run.apis[1 - deaf]
    run.apis[deaf].stop()
    module, run.stack.module = run.stack.module, deafened(run.stack.module)
    await run.start_api(deaf)
    run.stack.module = module
    async with probing(run) as probe:
        await probe.goes_on()
        await run.idle()
        await run.stack.drained()
        kept = await _keep_keys(run)
        given = [await probe.assign("ledger", at=seeing.base_url) for _ in range(5)]
        assert all(attempt.outcome == "ok" for attempt in given), given
        await run.stack.drained()
        await _told(run, probe, seeing)
        await _put_back(run, kept)
        asked = [probe.assign("ledger", at=run.apis[deaf].base_url) for _ in range(5)]
        _require_refused(run, given, list(await asyncio.gather(*asked)))
        shard = int(probe.books["ledger"][3:5])

        async def told() -> str:
            # A recovery that finds the two histories stops the shard after it has begun its epoch.
            rows = await run.stack.ledger("SELECT certified_epoch, stopped FROM shards WHERE shard = $1", shard)
            return rows[0]["stopped"] or ("recovered" if rows[0]["certified_epoch"] > run.epochs[shard] else "")

        word = await until(told, HEAL_S, "the shard should be recovered or stopped")
        if word != "recovered":
            assert "differs from the one in the ledger" in word, word
            await adopted(run)
    await run.recovered(all_shards=False)


async def _told(run: Run, probe: Probe, api: Part) -> None:
    """Wait until an API process has heard of all that is committed."""

    async def published() -> bool:
        async with run.stack.redis() as redis:
            heads = [await redis.hmget(ShardKeys(shard, SHARDS).meta, "seq", "committed") for shard in range(SHARDS)]
        return all(seq == committed for seq, committed in heads)

    await until(published, HEAL_S, "what is committed should be told")
    # The messages left with it, so they came to the process before this question. It reads both in one turn, and answers.
    assert (await probe.http.get(f"{api.base_url}/healthz")).status_code == 200


async def adopted(run: Run) -> None:
    """As an operator goes on with the ledger as it is (docs/operations.md)."""
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "coupon_svc", "adopt", "--yes"],
        env={**os.environ, **run.stack.environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def deafened(module: tuple[str, ...]) -> tuple[str, ...]:
    """What starts a part that learns no position from messages, besides what this module takes out already."""
    return ("tests.unsafe", "+".join((*module[1:], "told_position")))


async def _keep_keys(run: Run) -> list[tuple[bytes, int, bytes]]:
    async with Redis.from_url(run.stack.redis_admin_url) as raw:
        keys = [key async for key in raw.scan_iter("cb:*")]
        async with raw.pipeline(transaction=True) as pipe:
            for key in keys:
                pipe.pttl(key)
                pipe.dump(key)
            found = await pipe.execute()
    kept = zip(keys, found[::2], found[1::2], strict=True)
    return [(key, max(0, ttl_ms), dump) for key, ttl_ms, dump in kept if dump is not None]


async def _put_back(run: Run, kept: list[tuple[bytes, int, bytes]]) -> None:
    async with Redis.from_url(run.stack.redis_admin_url) as raw, raw.pipeline(transaction=True) as pipe:
        pipe.flushall()
        for key, ttl_ms, dump in kept:
            pipe.restore(key, ttl_ms, dump)
        await pipe.execute()


def _require_refused(run: Run, given: list[Attempt], later: list[Attempt]) -> None:
    """Nothing was believed that went back. A shard may be recovered by the time of the last request: it deals anew then."""
    again = {a.answer["code"] for a in given} & {a.answer.get("code") for a in later if a.outcome == "ok"}
    assert not again, "P1: a code was answered to two users"
    for attempt in later:
        if attempt.outcome == "ok":
            shard, position = parse_shard_position(attempt.answer["position"])
            recovered = position.epoch > run.epochs[shard]
            assert recovered, "P6: Redis went back, and was believed"


async def backlog_reaches_its_bound(run: Run) -> None:
    """Both writers stand still and callers do not: events pile up to the bound, and no further."""
    for number, writer in enumerate(run.writers):
        writer.stop()
        run.start_writer(number, COUPON_LEASE_CODES_MIN="200", COUPON_BACKLOG_EVENTS_MAX=str(BACKLOG_MAX))
    await run.share_shards()
    async with probing(run) as probe, run.stack.redis() as redis:
        meta = keys_of(probe.books["redis"]).meta

        async def bounded() -> bool:
            return await redis.hget(meta, "backlog_max") == str(BACKLOG_MAX)

        await until(bounded, HEAL_S, "the new bound should be in force")
        await probe.goes_on()
        async with writers_standing_still(run):
            # At once: a ledger that is not seen for long is a reason of its own to refuse.
            asked = await asyncio.gather(*(probe.assign("redis") for _ in range(BACKLOG_MAX + 12)))
            refusals = {attempt.answer.get("code") for attempt in asked if attempt.outcome != "ok"}
            waiting = int(str(await redis.hget(meta, "seq"))) - int(str(await redis.hget(meta, "committed")))
            assert waiting <= BACKLOG_MAX, f"P7: {waiting} events wait, {BACKLOG_MAX} may"
            assert "backlog_full" in refusals, refusals  # a slow one may have lost its early answer meanwhile
        await probe.goes_on()


# --- the commit: position, epoch


async def backend_stopped_in_a_commit(run: Run) -> None:
    """A writer gives the commit up, and it happens all the same: what it sends again must not be taken for new."""
    async with watching(run) as ledger, under_load(run):
        name = await ledger.fetchval("SELECT current_database()")
        # A commit that takes a tenth of a second can be met.
        await ledger.execute(f"ALTER DATABASE {name} SET commit_delay = 100000")
        await ledger.execute(f"ALTER DATABASE {name} SET commit_siblings = 0")
        await ledger.execute(f"SELECT pg_terminate_backend(pid) FROM ({_WRITERS_BACKENDS}) AS backends")

        async def committing() -> int:
            rows = await ledger.fetch(_WRITERS_BACKENDS + " AND state = 'active' AND query LIKE '%commit_entries%'")
            for row in rows:
                os.kill(row["pid"], signal.SIGSTOP)
                if await ledger.fetchval("SELECT state = 'active' FROM pg_stat_activity WHERE pid = $1", row["pid"]):
                    return int(row["pid"])
                os.kill(row["pid"], signal.SIGCONT)
            return 0

        pid = await until(committing, HEAL_S, "a commit should be under way")
        try:
            await asyncio.sleep(6.0)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        await ledger.execute(f"ALTER DATABASE {name} RESET ALL")
        await ledger.execute(f"SELECT pg_terminate_backend(pid) FROM ({_WRITERS_BACKENDS}) AS backends")
        await asyncio.sleep(1.0)
        stopped = await ledger.fetchval("SELECT max(stopped) FROM shards")
        assert stopped is None, f"P2: what was committed already was taken for a fork of history: {stopped}"


async def batch_from_before_a_recovery(run: Run) -> None:
    """Postgres keeps a batch waiting until Redis was emptied and recovered: it is thrown away."""
    run.loses_records = True
    async with watching(run) as ledger, probing(run) as probe:
        for _ in range(TRIES):
            await probe.goes_on()
            if await _recovered_while_a_batch_waits(run, ledger, probe):
                break
            await run.recovered()
            await until(lambda: all_certified(run), HEAL_S, "every shard should be certified")
            run.epochs = await run.epochs_now()
        else:
            raise AssertionError(f"no recovery was done within the {BATCH_WAITS_S} s for which a writer waits")
        await probe.goes_on()
    await run.recovered()


async def _recovered_while_a_batch_waits(run: Run, ledger: Any, probe: Probe) -> bool:
    """Stop what commits for a shard, let Redis decide and empty it. Returns whether the recovery came in time: before the
    writer gave the batch up, and sent it once more."""
    shard = int(probe.books["ledger"][3:5])
    newest = (
        f"{_WRITERS_BACKENDS} AND application_name = (SELECT 'coupon-writer ' || owner FROM shards WHERE shard = $1)"
        " AND query LIKE '%commit_entries%' ORDER BY state_change DESC LIMIT 1"
    )
    pid = await until(lambda: ledger.fetchval(newest, shard), HEAL_S, "the connection that commits was to be found")
    await until(lambda: _stopped_between_transactions(ledger, pid), HEAL_S, "it was to be stopped between two commits")
    ends_s = time.monotonic() + BATCH_WAITS_S

    async def over() -> str:
        recovered = await _recovered(run, probe)
        if time.monotonic() > ends_s:
            return "too late"
        return "in time" if recovered else ""

    try:
        waiting = await probe.decided("ledger", 4)
        if waiting.done():
            return False
        await asyncio.sleep(0.5)  # the writer has sent it by then
        async with run.stack.redis() as redis:
            await redis.flushall()
        when = await until(over)
    finally:
        os.kill(pid, signal.SIGCONT)
    await waiting
    return when == "in time"


async def _stopped_between_transactions(ledger: Any, pid: int) -> bool:
    """Stop a backend of Postgres, unless it holds rows just now: the recovery would have to wait for them."""
    os.kill(pid, signal.SIGSTOP)
    if await ledger.fetchval("SELECT state = 'idle' FROM pg_stat_activity WHERE pid = $1", pid):
        return True
    os.kill(pid, signal.SIGCONT)
    return False


async def _recovered(run: Run, probe: Probe) -> bool:
    shard = int(probe.books["ledger"][3:5])
    rows = await run.stack.ledger("SELECT certified_epoch FROM shards WHERE shard = $1", shard)
    return bool(rows[0]["certified_epoch"] > run.epochs[shard])


# --- who may answer, load and open


async def registration_lapses(run: Run) -> None:
    """No API process can renew its row for so long that it counts as gone, and then Redis is emptied: what it answered since
    then, it answered when the ledger had it."""
    async with watching(run) as ledger, probing(run) as probe:
        await probe.goes_on()
        await ledger.execute(_NO_RENEWALS)
        try:

            async def counts_as_gone() -> bool:
                return not await ledger.fetch("SELECT FROM api_processes WHERE NOT gone")

            await until(counts_as_gone, HEAL_S, "the API should count as gone")
            async with run.stack.redis() as redis, writers_standing_still(run):
                asked = await probe.decided("redis", 6)
                if asked.done():
                    _none_is_early(asked.result())
                    raise AssertionError("Redis should have decided")
                await asyncio.sleep(0.5)
                await redis.flushall()
            await run.recovered()
        finally:
            await ledger.execute("DROP FUNCTION refuse CASCADE")
        _none_is_early(await asked)
        await probe.goes_on()


def _none_is_early(answered: list[Attempt]) -> None:
    early = [one for one in answered if one.outcome == "ok" and one.answer["durable"] is False]
    assert not early, "P2: who is not registered has answered before the ledger knew"


_NO_RENEWALS = """
    CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN RAISE EXCEPTION 'no renewals' USING ERRCODE = 'admin_shutdown'; END $$;
    CREATE TRIGGER refuse BEFORE INSERT OR UPDATE OF beat ON api_processes EXECUTE FUNCTION refuse()
"""


async def shard_stopped_by_hand(run: Run) -> None:
    """A shard that is to be looked at by a person stays shut, also for the next writer; then it goes on where it was."""
    async with watching(run) as ledger, probing(run) as probe:
        await probe.goes_on()
        shard = int(probe.books["redis"][3:5])
        await ledger.execute("UPDATE shards SET stopped = 'a person looks' WHERE shard = $1", shard)
        before = await _owner_and_generation(run, shard)
        owner = await run.owner_of(shard)
        run.writers[owner].kill()
        run.start_writer(owner)

        async def taken() -> bool:
            said = any(writer.said(f"shard {shard:02d} is stopped") for writer in run.writers)
            return said or await _opened_by_the_next(run, shard, before)

        await until(taken, HEAL_S, "the next writer should take the shard")
        await asyncio.sleep(1.2)  # the API looks once a second
        attempt = await probe.assign("redis")
        assert attempt.outcome != "ok", "P6: a shard that is stopped has dealt a code"
        assert attempt.answer["code"] == "recovering", attempt
        # As docs/operations.md has it.
        await ledger.execute("UPDATE shards SET stopped = NULL, epoch = 1 + epoch WHERE shard = $1", shard)
        owner = await run.owner_of(shard)
        run.writers[owner].kill()
        run.start_writer(owner)
        await probe.goes_on()


async def _owner_and_generation(run: Run, shard: int) -> tuple[str, int]:
    (row,) = await run.stack.ledger("SELECT owner, generation FROM shards WHERE shard = $1", shard)
    return row["owner"], row["generation"]


async def _opened_by_the_next(run: Run, shard: int, before: tuple[str, int]) -> bool:
    owner, now = await _owner_and_generation(run, shard)
    async with run.stack.redis() as redis:
        generation = await redis.hget(ShardKeys(shard, SHARDS).meta, "generation")
    return now > before[1] and owner != before[0] and generation == str(now)


async def lender_paused_across_a_recovery(run: Run) -> None:
    """A writer has noted that a block is lent, and stands still before it brings it; when it wakes up, those codes are
    the other writer's to bring, or in quarantine."""
    run.loses_records = True
    run.writers[0].stop()
    run.start_writer(0, stops_at="lend.leased")
    paused = run.writers[0]
    async with under_load(run), run.stack.redis() as redis, run.client() as http:

        async def owns() -> bool:
            rows = await run.stack.ledger("SELECT owner FROM shards")
            return any(row["owner"] and paused.said(row["owner"]) for row in rows) or state_of(paused) == "T"

        async def lends() -> bool:
            # Pools of the load may have enough. A new book has not: who has its shard lends it its first block.
            if state_of(paused) != "T":
                generate = {"pattern": "lent-########", "total": PROBE_CODES}
                await new_book(run.stack, http, {"name": "lent", "ack": run.random.choice(ACKS), "generate": generate})
            return state_of(paused) == "T"

        await until(owns, START_S, "the writer should have shards")
        await until(lends, HEAL_S, "the writer should have come to lend a block")
        await until(lambda: one_owner(run), HEAL_S, "the other writer should have all shards")
        await redis.flushall()
        await run.recovered()
        await until(lambda: all_certified(run), HEAL_S, "every shard should be certified")
        paused.signal(signal.SIGCONT)
        await asyncio.sleep(2.0)


def state_of(part: Part) -> str:
    """What the kernel says of the process: "T" for one that stands still."""
    return Path(f"/proc/{part.process.pid}/stat").read_text().rpartition(") ")[2][0]


def lacks_proc() -> str:
    return "" if Path("/proc/self/stat").exists() else "whether a process stands still is read from /proc"


FENCING_FAULTS = [
    Fault(request_comes_after_a_recovery),
    Fault(keys_put_back),
    Fault(keys_put_back_unseen),
    Fault(keys_put_back_unheard),
    Fault(backlog_reaches_its_bound),
    Fault(backend_stopped_in_a_commit),
    Fault(batch_from_before_a_recovery),
    Fault(registration_lapses),
    Fault(shard_stopped_by_hand),
    Fault(lender_paused_across_a_recovery, lacks=lacks_proc),
]
