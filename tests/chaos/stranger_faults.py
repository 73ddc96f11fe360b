"""Faults that somebody makes: a second installation, a wrong password, entries and values put into Redis by hand."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import httpx
from redis.exceptions import ResponseError

from coupon_svc.redis.keys import ShardKeys
from tests.chaos.fault import SHARDS, Fault
from tests.chaos.fencing_faults import keys_of, watching
from tests.chaos.probe import probing, under_load
from tests.chaos.run import HEAL_S, Run
from tests.harness import Stack, fresh_database, until

HAND = "by hand"


async def another_installation_comes(run: Run) -> None:
    """A writer and an API process with a database of their own, and with our Redis: they say so, and touch nothing."""
    ours = run.stack
    generation = run.random.choice((0, 1000))  # older than ours, or newer
    database = await fresh_database(ours.database_url, ours.shards)
    theirs = Stack(None, ours.environment["COUPON_REDIS_URL"], database, ours.folder / "theirs", ours.shards)
    theirs.folder.mkdir()
    theirs.module = ours.module
    await theirs.ledger("UPDATE shards SET generation = $1, epoch = $1", generation)
    async with probing(run) as probe, under_load(run):
        await probe.goes_on()
        before = await _identities(run)
        try:
            writer, api = theirs.writer(), theirs.api()

            async def refused() -> bool:
                return writer.said("holds the coupons of installation") and api.said("belongs to installation")

            await until(refused, HEAL_S, "the strangers should say whose Redis this is")
            await asyncio.sleep(1.5)
            async with httpx.AsyncClient(base_url=theirs.base_url) as stranger:
                assert (await stranger.get("/readyz")).status_code == 503
            assert await _identities(run) == before, "P6: a stranger has changed what is ours"
            await probe.goes_on()
        finally:
            theirs.close()
    assert await run.epochs_now() == run.epochs, "a stranger is no reason for a recovery"


async def _identities(run: Run) -> list[Any]:
    redis: Any = run.stack.redis()
    fields = ("epoch", "generation", "installation", "recovery", "run", "replid")
    async with redis:
        return [await redis.hmget(ShardKeys(shard, SHARDS).meta, fields) for shard in range(SHARDS)]


async def writer_that_cannot_log_in(run: Run) -> None:
    """A third writer has a wrong password for Redis: it takes no shard, and the others keep all."""
    parts = urlsplit(run.stack.redis_url)
    wrong = urlunsplit(parts._replace(netloc=f"coupon:wrong@{parts.hostname}:{parts.port}"))
    before = await run.stack.ledger("SELECT shard, owner FROM shards ORDER BY shard")
    async with probing(run) as probe, under_load(run):
        third = run.stack.writer(2, COUPON_REDIS_URL=wrong)
        await until(lambda: _said(third, "redis cannot be used"), HEAL_S, "the writer should say that it cannot log in")
        await asyncio.sleep(2.5)
        await probe.goes_on()
        after = await run.stack.ledger("SELECT shard, owner FROM shards ORDER BY shard")
        assert after == before, "a writer that cannot do the work has taken a shard"
        third.kill()


async def _said(part: Any, text: str) -> bool:
    return bool(part.said(text))


async def entry_added_by_hand(run: Run) -> None:
    """XADD with an id that Redis makes up of its clock, or of an epoch to come."""
    await _entry_is_passed_over(
        run, lambda shard, _: run.random.choice(("*", f"{run.epochs[shard] + run.random.choice((1, 40))}-7"))
    )


async def entry_added_at_the_next_position(run: Run) -> None:
    """XADD with the very id that the next change would take."""
    await _entry_is_passed_over(run, lambda shard, seq: f"{run.epochs[shard]}-{seq + 1}")


async def _entry_is_passed_over(run: Run, id_of: Callable[[int, int], str]) -> None:
    """An entry that no script wrote, with the id that `id_of` makes of a shard and its newest number: it is passed over, and
    gone with the recovery. No script can add to the stream until then."""
    run.scripts_fail = True
    async with probing(run) as probe, run.stack.redis() as client:
        redis: Any = client
        shard = int(probe.books["ledger"][3:5])
        newest = "SELECT code FROM codes WHERE book_id = $1 ORDER BY place DESC LIMIT 1"
        (nobodys,) = await run.stack.ledger(newest, probe.books["ledger"])
        event = ["coupon_assigned", probe.books["ledger"], nobodys["code"], HAND, "", ""]
        at_ms = str(int(time.time() * 1000))
        entry = {"n": "1", "after": HAND, "tip": HAND, "at_ms": at_ms, "events": json.dumps([event])}
        keys = keys_of(probe.books["ledger"])

        async def added() -> bool:
            """False when a script was faster."""
            seq = int(await redis.hget(keys.meta, "seq"))
            with contextlib.suppress(ResponseError):
                await redis.xadd(keys.events, entry, id=id_of(shard, seq))
                return True
            return False

        async with under_load(run):
            await until(added, HEAL_S, "the entry should be added")

            async def recovered() -> bool:
                return (await run.epochs_now())[shard] > run.epochs[shard]

            await until(recovered, HEAL_S, "the shard should be recovered")
            await probe.goes_on()
        now = await run.epochs_now()
        assert now[shard] < run.epochs[shard] + 20, "an entry by hand says nothing about epochs"
        assert all(now[other] == epoch for other, epoch in run.epochs.items() if other != shard), (
            "others were disturbed"
        )
        left = await redis.xrange(keys.events)
        assert all(fields.get("tip") != HAND for _, fields in left), "the entry should be gone"
        assert not await run.stack.ledger("SELECT FROM coupons WHERE user_id = $1", HAND), "P4: it was believed"


async def meta_garbled(run: Run) -> None:
    """A number of one shard's meta is no number any more: that shard is recovered, and no other is disturbed."""
    field = run.random.choice(("committed", "seq", "ledger_at_ms", "backlog_max"))
    async with probing(run) as probe, run.stack.redis() as client:
        redis: Any = client
        shard = int(probe.books["ledger"][3:5])
        meta = keys_of(probe.books["ledger"]).meta
        others = [book_id for book_id in run.books if int(book_id[3:5]) != shard]
        async with under_load(run), run.client() as http:
            await redis.hset(meta, field, "x")
            until_s = time.monotonic() + 3.0
            disturbed = []
            while others and time.monotonic() < until_s:
                attempt = run.new_assign(f"other-{len(run.history)}", run.random.choice(others))
                await run.send(http, attempt, at=run.random.choice(run.apis).base_url)
                if attempt.status == 503 and attempt.answer["code"] != "refilling":
                    disturbed.append(attempt)
                await asyncio.sleep(0.05)

            async def put_right() -> bool:
                return str(await redis.hget(meta, field)).isdigit()

            await until(put_right, HEAL_S, f"{field} should be a number again")
            await probe.goes_on()
        assert not disturbed, f"other shards were disturbed: {disturbed[:3]}"
        now = await run.epochs_now()
        assert all(now[other] == epoch for other, epoch in run.epochs.items() if other != shard), (
            "others were recovered"
        )


async def events_table_locked(run: Run) -> None:
    """As by CREATE INDEX: Postgres answers, and nothing can be committed. What would wait for it is refused."""
    async with watching(run) as ledger, probing(run) as probe:
        await probe.goes_on()
        transaction = ledger.transaction()
        await transaction.start()
        await ledger.execute("LOCK TABLE entries IN SHARE MODE")
        async with under_load(run):

            async def refused() -> bool:
                return (await probe.assign("ledger")).answer.get("code") == "ledger_behind"

            await until(refused, HEAL_S, "what waits for the ledger should be refused")
            start = len(run.history)
            until_s = time.monotonic() + 5.0
            while time.monotonic() < until_s:
                await probe.assign("ledger")
                await asyncio.sleep(0.05)
            late = [a for a in run.history[start:] if a.book_id == probe.books["ledger"]]
            await transaction.rollback()
            unknown = [attempt for attempt in late if attempt.outcome == "unknown"]
            assert len(unknown) <= len(late) // 10, f"P7: {len(unknown)} of {len(late)} codes were popped for nothing"
            await probe.goes_on()


STRANGER_FAULTS = [
    Fault(another_installation_comes),
    Fault(writer_that_cannot_log_in),
    Fault(entry_added_by_hand),
    Fault(entry_added_at_the_next_position),
    Fault(meta_garbled),
    Fault(events_table_locked),
]
