"""Faults in the middle of a recovery, which is killed or paused or has to wait; and a ledger that went back."""

from __future__ import annotations

import asyncio
import secrets
import shutil
import signal
import time

import asyncpg
import httpx

from tests.backup import Backup
from tests.chaos.fault import SHARDS, Fault
from tests.chaos.fencing_faults import adopted, keys_of, lacks_proc, state_of, watching
from tests.chaos.network import APIS, identity, network, promote, replica_stage
from tests.chaos.network_faults import clients_at_work, left_behind
from tests.chaos.probe import all_sent, under_load
from tests.chaos.process_faults import writers_standing_still, written_to_redis_alone
from tests.chaos.run import HEAL_S, Attempt, Run, all_certified, new_book
from tests.harness import until

STEPS = ("begun", "shut", "drained", "settled", "wiped", "restored", "certified")
FEW_CODES = 8


async def recoverer_dies_on_its_way(run: Run) -> None:
    """A stale failover, FLUSHALL or an old copy; and one writer is killed or paused at a step of its recovery. The other one
    begins at the first step again."""
    step, how = run.random.choice(STEPS), run.random.choice(("dies_at", "stops_at"))
    disaster = run.random.choice((_flushed, _old_copy, _stale_failover))
    run.writers[0].stop()
    run.start_writer(0, **{how: f"recover.{step}"})
    await run.share_shards()
    dying = run.writers[0]
    async with clients_at_work(run):
        await disaster(run)

        async def struck() -> bool:
            return dying.process.poll() is not None or state_of(dying) == "T"

        await until(struck, HEAL_S, f"a recovery should have come to {step}")
        await run.recovered()
    dying.signal(signal.SIGCONT)
    dying.kill()
    run.start_writer(0)


async def _flushed(run: Run) -> None:
    async with run.stack.redis() as redis, written_to_redis_alone(run):
        await redis.flushall()


async def _old_copy(run: Run) -> None:
    server = run.stack.redis_server
    assert server is not None
    (folder,) = server.directory.rglob("appendonlydir")
    shutil.copytree(folder, run.stack.folder / "copy")
    async with written_to_redis_alone(run):
        server.kill()
    shutil.rmtree(folder)
    shutil.copytree(run.stack.folder / "copy", folder)
    server.start()


async def _stale_failover(run: Run) -> None:
    stage = await left_behind(run)
    assert stage.replica is not None
    async with written_to_redis_alone(run):
        await promote(stage.replica)
        stage.lead_to(stage.replica)


async def failed_back_and_recoverers_killed(run: Run) -> None:
    """A master decides, and nobody hears of it; its stale replica deals the same codes to others. Then the old master comes
    back, and the writers are killed when they have quarantined those codes and have not wiped the events yet."""
    run.loses_records = True
    stage = network(run)
    few = await _few_codes_in_every_shard(run)
    await run.idle()
    async with clients_at_work(run):
        await left_behind(run)
    assert stage.replica is not None
    certified = await identity(stage.master)
    await run.stack.drained()  # the ledger has all that anybody has heard of: nothing counts as lost
    async with writers_standing_still(run), run.client() as http:
        for part in APIS:
            stage.redis_of[part].treat(replies="lose")
        unheard = await _decided_unheard(run, http, few)
        await promote(stage.replica)
        stage.lead_to(stage.replica)
        for part in APIS:
            stage.redis_of[part].heal()
        await unheard
    async with clients_at_work(run), run.client() as http:
        await run.recovered()
        await until(lambda: all_certified(run), HEAL_S, "every shard should be certified")
        run.epochs = await run.epochs_now()
        for number, writer in enumerate(run.writers):
            writer.stop()
            run.start_writer(number, dies_at="recover.settled")
        await run.share_shards()
        for book_id in few:

            async def deals(book_id: str = book_id) -> bool:
                attempt = _assign(book_id, f"between-{secrets.token_hex(4)}")
                await run.send(http, attempt)
                return attempt.outcome == "ok"

            await until(deals, HEAL_S, "the new master should deal")
        async with writers_standing_still(run):
            second = [_assign(book_id, f"second{n}") for book_id in few for n in range(FEW_CODES)]
            await asyncio.gather(*(run.send(http, attempt) for attempt in second))
            stage.lead_to(stage.master)
        assert await identity(stage.master) == certified, "it should be the old master in its old life"
        early = [attempt for attempt in second if attempt.outcome == "ok" and attempt.answer["durable"] is False]
        assert early, "the new master should have dealt what the ledger does not have"
        for number, writer in enumerate(run.writers):
            assert await writer.died(HEAL_S) == -signal.SIGKILL
            run.start_writer(number)
        await run.recovered()


async def _decided_unheard(run: Run, http: httpx.AsyncClient, few: list[str]) -> asyncio.Future[list[None]]:
    """Let requests for codes of these books come to the first API process in one turn, and so to Redis in one call: it sends
    no third while two have no reply. Returns when Redis has given a code of each book away."""
    first = [_assign(book_id, f"first{number}") for number in range(FEW_CODES) for book_id in few]
    await asyncio.gather(*(http.get("/healthz") for _ in first))  # connections are there: to make one takes turns
    run.apis[0].signal(signal.SIGSTOP)
    unheard = await all_sent(http, [run.send(http, attempt) for attempt in first])
    run.apis[0].signal(signal.SIGCONT)

    async def given_away() -> bool:
        async with run.stack.redis() as redis:
            return all([await redis.exists(keys_of(book_id).holders(book_id)) for book_id in few])

    await until(given_away, what="the master should have given codes away of which nobody hears")
    return unheard


async def _few_codes_in_every_shard(run: Run) -> list[str]:
    """Books of the fault's own that do not wait for the ledger, so small that a code which went back is soon dealt again."""
    books: dict[str, str] = {}
    async with run.client() as http:
        while len(books) < SHARDS:
            generate = {"pattern": "few-########", "total": 2 * FEW_CODES}
            rules = {"name": "few", "ack": "redis", "max_redemptions_per_code": 2, "generate": generate}
            book_id = await new_book(run.stack, http, rules)
            books.setdefault(book_id[3:5], book_id)
    return list(books.values())


def _assign(book_id: str, user: str) -> Attempt:
    body: dict[str, str | int] = {"book_id": book_id, "user_id": user}
    return Attempt("assign", "/coupons/assign", body, secrets.token_hex(8), book_id, "redis", user)


async def book_held_while_redis_is_flushed(run: Run) -> None:
    """A long transaction has a book's row, as of an upload, when Redis is emptied: no other book waits for it."""
    run.loses_records = True
    held = next(iter(run.books))
    async with watching(run) as ledger, under_load(run):
        transaction = ledger.transaction()
        await transaction.start()
        await ledger.execute("SELECT FROM books WHERE book_id = $1 FOR UPDATE", held)
        async with run.stack.redis() as redis, written_to_redis_alone(run):
            await redis.flushall()

        async def certified() -> bool:
            rows = await run.stack.ledger("SELECT shard, certified_epoch FROM shards")
            return all(
                row["certified_epoch"] > run.epochs[row["shard"]] for row in rows if row["shard"] != int(held[3:5])
            )

        await until(certified, HEAL_S, "the other shards should be recovered meanwhile")
        await transaction.rollback()
    await run.recovered()


async def ledger_restored(run: Run) -> None:
    """Postgres is restored from before the writers' last start: every shard stops and says why, until an operator adopts the
    ledger as it is. What was answered since the backup is lost by choice; but no code of it goes to somebody else."""
    run.loses_records = True
    backup = Backup(run.stack)
    await run.stack.drained()
    async with under_load(run):
        run.restored_from_s = time.monotonic()  # the copy is of a moment within the next line
        await backup.take()
        for _ in range(2):  # each start is a new generation
            for number, writer in enumerate(run.writers):
                writer.stop()
                run.start_writer(number)
            await run.share_shards()
        await asyncio.sleep(1.0)
        for writer in run.writers:
            writer.stop()
        await until(lambda: _put_back(backup), HEAL_S, "the backup should be restored")
        run.start_writer(0)

        async def stopped() -> bool:
            rows = await run.stack.ledger("SELECT stopped FROM shards")
            return all("generation" in (row["stopped"] or "") for row in rows)

        await until(stopped, HEAL_S, "every shard should stop, and say that the ledger went back")
        run.restored_upto_s = time.monotonic()
        await adopted(run)
    run.start_writer(1)
    await run.recovered()


async def _put_back(backup: Backup) -> bool:
    """False when an API process was in the way with a row that it writes."""
    try:
        await backup.put_back()
    except asyncpg.DeadlockDetectedError:
        return False
    return True


RECOVERY_FAULTS = [
    Fault(recoverer_dies_on_its_way, replica_stage, lacks_proc),
    Fault(failed_back_and_recoverers_killed, replica_stage),
    Fault(book_held_while_redis_is_flushed),
    Fault(ledger_restored),
]
