"""Faults between the parts: replies late and lost, connections half open and cut, Postgres out of reach, stale replicas
promoted, old masters that come back, two masters at once, callers that hang up."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import time
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import httpx
import msgspec

from tests.chaos.fault import Fault
from tests.chaos.network import (
    WRITERS,
    Network,
    events_made,
    follow,
    identity,
    network,
    network_stage,
    promote,
    replica_stage,
)
from tests.chaos.postgres_faults import refused_for_the_ledger
from tests.chaos.probe import all_sent, probing
from tests.chaos.process_faults import one_owner, writers_standing_still, written_to_redis_alone
from tests.chaos.proxy import Proxy
from tests.chaos.run import HEAL_S, Attempt, Run, all_certified
from tests.harness import until

LOAD_S_MAX = 60.0
PAUSE_S = 0.02
GIVEN_UP_S = 12.0
"""Three seconds out of touch, and what a busy machine adds."""


@contextlib.asynccontextmanager
async def clients_at_work(run: Run, base_url: str = "") -> AsyncIterator[None]:
    """Clients work all through the block, however long it takes."""
    enough = asyncio.Event()
    load = asyncio.create_task(run.load(LOAD_S_MAX, base_url, PAUSE_S, enough))
    try:
        yield
    finally:
        enough.set()
        await load


def _ended_as(run: Run, outcome: str, start: int = 0) -> list[Attempt]:
    return [attempt for attempt in run.history[start:] if attempt.outcome == outcome]


async def _in_doubt(run: Run, start: int) -> None:
    """Wait until a request was answered that its outcome is unknown, or never: of those since `start` in the history."""

    async def in_doubt() -> bool:
        return bool(_ended_as(run, "unknown", start))

    await until(in_doubt, HEAL_S, "a request without its reply should have left somebody in doubt")


def _some(run: Run, of: dict[str, Proxy]) -> list[Proxy]:
    """The way of the first API process, and by chance that of the second, of a writer, of both."""
    return [of["api"]] + [of[part] for part in ("api2", *WRITERS) if run.random.random() < 0.4]


# --- between the service and Redis


async def redis_replies_delayed(run: Run) -> None:
    """Replies come later than anybody waits for them; the last ones never come."""
    proxies = _some(run, network(run).redis_of)
    start = len(run.history)
    async with clients_at_work(run):
        for proxy in proxies:
            proxy.delay_replies(run.random.uniform(2.2, 3.2))
        await asyncio.sleep(run.random.uniform(3.0, 4.0))
        await _in_doubt(run, start)
        for proxy in proxies:
            proxy.treat(replies="lose")
        await asyncio.sleep(0.5)
        for proxy in proxies:
            proxy.heal()
    assert proxies[0].replies.delayed, "nothing was delayed"


async def redis_replies_lost(run: Run) -> None:
    """Requests arrive, their replies do not; then the connection breaks. Again and again."""
    proxies = _some(run, network(run).redis_of)
    start, made = len(run.history), await events_made(network(run).master)

    async def had_effect() -> bool:
        return await events_made(network(run).master) > made

    async with clients_at_work(run):
        for rounds_left in reversed(range(5)):
            for proxy in proxies:
                proxy.treat(replies="lose")
            await asyncio.sleep(run.random.uniform(0.02, 0.2))
            if rounds_left == 0:
                await _in_doubt(run, start)
                await until(had_effect, HEAL_S, "the requests should have had their effect")
            for proxy in proxies:
                proxy.heal()
            await asyncio.sleep(run.random.uniform(0.1, 0.4))
    assert proxies[0].replies.lost, "no reply was lost"


async def redis_held_half_open(run: Run) -> None:
    """Connections that seem to stand and carry nothing. What was sent arrives long after everybody has given up on it."""
    proxies = _some(run, network(run).redis_of)
    start = len(run.history)
    async with clients_at_work(run):
        for proxy in proxies:
            proxy.treat(requests="hold", replies="hold")
        await asyncio.sleep(run.random.uniform(2.5, 4.0))
        await _in_doubt(run, start)
        for proxy in proxies:
            proxy.heal()
    assert proxies[0].requests.held, "nothing was held"


async def redis_cut_repeatedly(run: Run) -> None:
    """Connections to Redis are reset as soon as they stand again."""
    proxies = _some(run, network(run).redis_of)
    async with clients_at_work(run):
        rounds = itertools.count(1)

        async def enough() -> bool:
            for proxy in proxies:
                proxy.cut()
            await asyncio.sleep(run.random.uniform(0.05, 0.3))
            return next(rounds) >= 15 and proxies[0].cuts > 15

        await until(enough, HEAL_S, "connections should have been cut again and again")


# --- between the service and Postgres


CUT_FROM_POSTGRES_S = 7.5


def _cut(run: Run, proxy: Proxy) -> None:
    """Out of reach: either refused at once, or silent."""
    if run.random.random() < 0.5:
        proxy.cut(refuse=True)
    else:
        proxy.treat(requests="hold", replies="hold")


@contextlib.asynccontextmanager
async def _cut_from_postgres(run: Run, *parts: str) -> AsyncIterator[None]:
    """These parts cannot reach Postgres within the block, nor for CUT_FROM_POSTGRES_S."""
    ends_s = time.monotonic() + CUT_FROM_POSTGRES_S
    proxies = [network(run).postgres_of[part] for part in parts]
    for proxy in proxies:
        _cut(run, proxy)
    yield
    await asyncio.sleep(max(0.0, ends_s - time.monotonic()))
    for proxy in proxies:
        proxy.heal()


async def api_cut_from_postgres(run: Run) -> None:
    """An API process cannot renew its registration: what it answered early before, it answers when it is durable. The other
    goes on."""
    async with probing(run) as probe, clients_at_work(run):
        await probe.goes_on()
        async with _cut_from_postgres(run, "api"):
            await asyncio.sleep(4.5)  # it answers early until 4 s after it registered last

            async def goes_on() -> list[Attempt]:
                late = await asyncio.gather(*(probe.assign("redis", at=run.apis[0].base_url) for _ in range(8)))
                return [attempt for attempt in late if attempt.outcome == "ok"]

            answered = await until(goes_on, HEAL_S, "the API should have gone on without Postgres")
    assert all(attempt.answer["durable"] for attempt in answered), (
        "an API process whose registration has lapsed should wait for the ledger"
    )


async def writer_cut_from_postgres(run: Run) -> None:
    """Both writers are. Nothing becomes durable: what waits for the ledger is refused or unknown, the rest goes on."""
    async with probing(run) as probe, clients_at_work(run):
        await probe.goes_on()
        async with _cut_from_postgres(run, *WRITERS):
            await refused_for_the_ledger(probe)

            async def goes_on() -> bool:
                return (await probe.assign("redis")).answer.get("durable") is False

            await until(goes_on, HEAL_S, "a book that does not wait for the ledger should have gone on")


async def writer_cut_from_redis(run: Run) -> None:
    """One of the two is, refused or silent: it gives its shards up, and the other one serves them until it is back."""
    part = run.random.choice(WRITERS)
    proxy = network(run).redis_of[part]
    async with clients_at_work(run):
        _cut(run, proxy)
        await until(lambda: one_owner(run), GIVEN_UP_S, "the other writer should serve every shard")
        await asyncio.sleep(1.0)
        assert await one_owner(run), "who cannot reach Redis has taken a shard"
        proxy.heal()
        await run.share_shards()


# --- more than one Redis


async def left_behind(run: Run) -> Network:
    """Cut the replica off, and let its master go on until it has decided more. The writer may know of it, or not."""
    stage = network(run)
    assert stage.replica is not None
    stage.link.cut(refuse=True)
    stale = await events_made(stage.replica)

    async def ahead() -> bool:
        return await events_made(stage.master) > stale + 10

    await until(ahead, what="the master should have gone on")
    return stage


async def withheld_only_in_doubt(run: Run) -> None:
    """Every API process lives and reports: nothing is lost, and codes are quarantined only in shards where the reply of an
    event was lost on its way, so that the event is missing. Whoever had asked for it does not know what became of it."""
    await until(lambda: all_certified(run), HEAL_S, "every shard should be certified")
    in_doubt = {attempt.book_id[3:5] for attempt in _ended_as(run, "unknown")}
    rows = await run.stack.ledger("SELECT DISTINCT book_id FROM quarantine")
    withheld = {row["book_id"][3:5] for row in rows}
    assert withheld <= in_doubt, f"P4: codes are quarantined in shards {withheld}, and requests in doubt in {in_doubt}"


async def stale_replica_promoted(run: Run) -> None:
    """The master dies; its replica had fallen behind, and is made master all the same."""
    async with clients_at_work(run):
        stage = await left_behind(run)
        assert stage.replica is not None
        async with written_to_redis_alone(run):
            certified, made = await identity(stage.master), await events_made(stage.master)
            stage.master.kill()
            await promote(stage.replica)
            stage.lead_to(stage.replica)
        found = await identity(stage.replica)
        assert all(old != new for old, new in zip(certified, found, strict=True)), "it should be another server"
        assert await events_made(stage.replica) < made, "the replica should have been stale"
        await run.recovered()
    await withheld_only_in_doubt(run)


async def failed_back_to_the_old_master(run: Run) -> None:
    """A stale replica takes over while its master is out of reach; then the master is back as it was: its run_id, its
    replid, its certificate, and all it ever decided."""
    async with clients_at_work(run):
        stage = await left_behind(run)
        assert stage.replica is not None
        certified = await identity(stage.master)
        async with written_to_redis_alone(run):
            await promote(stage.replica)
            stage.lead_to(stage.replica)
        await run.recovered()
        await until(lambda: all_certified(run), HEAL_S, "every shard should be certified")
        run.epochs = await run.epochs_now()
        await asyncio.sleep(run.random.uniform(0.3, 1.0))
        stage.lead_to(stage.master)
        assert await identity(stage.master) == certified, "it should be the old master in its old life"
        await run.recovered()
    await withheld_only_in_doubt(run)


async def old_master_demoted_and_promoted_again(run: Run) -> None:
    """A stale replica is made master, and its old master follows it for a moment; then the old one is master again, with
    the other's data, on connections that have stood all the while. Its run_id is the certified one."""
    async with clients_at_work(run):
        stage = await left_behind(run)
        assert stage.replica is not None
        certified, made = await identity(stage.master), await events_made(stage.master)
        async with written_to_redis_alone(run):
            await promote(stage.replica)
            await follow(stage.master, stage.replica, stage.replica.port)
            await promote(stage.master)
        found = await identity(stage.master)
        assert found[0] == certified[0], "it should be the same process"
        assert found[1] != certified[1], "it should be another history"
        assert await events_made(stage.master) < made, "the replica should have been stale"
        await run.recovered()
    await withheld_only_in_doubt(run)


async def _hear_no_positions(run: Run) -> None:
    """End the connections that hear positions. A process that is stopped meanwhile connects again only when it wakes up:
    no position that it was told of in its sleep shows that the data are older than what it saw."""
    async with run.stack.redis() as redis:
        for client in await redis.client_list():
            if client["name"] == "coupon-api-positions":
                await redis.client_kill_filter(_id=client["id"])


async def old_master_back_while_a_process_sleeps(run: Run) -> None:
    """The same, while an API process is stopped: it wakes up with its connection as it was, and with requests to send,
    before it can have looked at whom it speaks to."""
    run.loses_records = True
    sleeper = run.apis[1]
    async with clients_at_work(run, run.apis[0].base_url), run.client(sleeper.base_url) as http:
        await asyncio.gather(*(run.send(http, run.new_assign(f"early{n}")) for n in range(24)))
        sleeper.signal(signal.SIGSTOP)
        try:
            await _hear_no_positions(run)
            stage = await left_behind(run)
            assert stage.replica is not None
            certified, made = await identity(stage.master), await events_made(stage.master)
            async with written_to_redis_alone(run):
                await promote(stage.replica)
                await follow(stage.master, stage.replica, stage.replica.port)
                await promote(stage.master)
                assert await events_made(stage.master) < made, "the replica should have been stale"
                late = await all_sent(http, [run.send(http, run.new_assign(f"late{n}")) for n in range(24)])
                sleeper.signal(signal.SIGCONT)
                await late
        finally:
            sleeper.signal(signal.SIGCONT)
        assert (await identity(stage.master))[0] == certified[0], "it should be the same process"
        await run.recovered()


async def split_brain(run: Run) -> None:
    """A stale replica is made master for the writers and one API process; the other goes on with the old master, and by
    chance without Postgres, so that nobody tells it."""
    stage = network(run)
    informed = run.random.random() < 0.5
    run.two_masters, run.loses_records = True, not informed
    first, second = (api.base_url for api in run.apis)
    async with probing(run) as probe, clients_at_work(run, first), clients_at_work(run, second):
        await probe.goes_on()
        await left_behind(run)
        assert stage.replica is not None
        if not informed:
            stage.postgres_of["api2"].treat(requests="hold", replies="hold")
        await promote(stage.replica)
        async with writers_standing_still(run):  # a recovery would be told to the second, which then refuses
            stage.lead_to(stage.replica, *WRITERS, "api", "operator")
            made = await events_made(stage.master)

            async def two_decide() -> bool:
                await probe.assign("redis", at=second)
                return await events_made(stage.master) > made

            await until(two_decide, what="somebody should have decided on the old master")
        await run.recovered()
        await asyncio.sleep(run.random.uniform(1.0, 3.0))

        async def is_of_use() -> bool:
            return (await probe.assign("ledger", at=first)).outcome == "ok"

        await until(is_of_use, HEAL_S, "the new master should have been of use")
        stage.lead_to(stage.replica, "api2")
        stage.postgres_of["api2"].heal()


# --- between callers and the service


CANCELLED_KEYS = 150
TIMES_EACH = 8


async def requests_cancelled(run: Run) -> None:
    """More than a thousand requests whose callers hang up, several with each key; then each is asked for again."""
    api = run.apis[0].process.pid
    before = len(os.listdir(f"/proc/{api}/fd"))
    attempts = [run.new_assign(f"c{number}") for number in range(CANCELLED_KEYS)]
    sends = [attempt for attempt in attempts for _ in range(TIMES_EACH)]
    run.random.shuffle(sends)
    places = asyncio.Semaphore(20)

    async def hang_up(attempt: Attempt) -> None:
        async with places:
            await _hang_up(run, attempt, run.random.choice((0.0, 0.002, 0.01, 0.05)))

    async def ask_again(http: httpx.AsyncClient, attempt: Attempt) -> None:
        async with places:
            attempt.in_doubt = True
            await run.send(http, attempt)

    async with clients_at_work(run):
        await asyncio.gather(*(hang_up(attempt) for attempt in sends))
        async with run.client() as http:
            await asyncio.gather(*(ask_again(http, attempt) for attempt in attempts))
    done = [attempt for attempt in attempts if attempt.replayed]
    assert len(done) > CANCELLED_KEYS / 10, "requests should have had their effect though nobody waited"

    async def settled() -> bool:
        return len(os.listdir(f"/proc/{api}/fd")) <= before + 10

    await until(settled, HEAL_S, "no connection should be kept for a caller who is gone")


async def _hang_up(run: Run, attempt: Attempt, patience: float) -> None:
    """Send a request, and close the connection after `patience` seconds, with what came by then unread."""
    attempt.invoked_s = attempt.invoked_s or time.monotonic()
    address = urlsplit(run.apis[0].base_url)
    attempt.asked_at = run.apis[0].base_url
    body = msgspec.json.encode(attempt.body)
    head = (
        f"POST {attempt.path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        f"Authorization: {run.authorization}\r\nIdempotency-Key: {attempt.key}\r\n\r\n"
    )
    _, writer = await asyncio.open_connection(address.hostname, address.port)
    writer.write(head.encode() + body)
    await asyncio.sleep(patience)
    writer.transport.abort()


NETWORK_FAULTS = [
    *(
        Fault(strike, network_stage)
        for strike in (
            redis_replies_delayed,
            redis_replies_lost,
            redis_held_half_open,
            redis_cut_repeatedly,
            api_cut_from_postgres,
            writer_cut_from_postgres,
            writer_cut_from_redis,
        )
    ),
    *(
        Fault(strike, replica_stage)
        for strike in (
            stale_replica_promoted,
            failed_back_to_the_old_master,
            old_master_demoted_and_promoted_again,
            old_master_back_while_a_process_sleeps,
            split_brain,
        )
    ),
    Fault(requests_cancelled),
]
