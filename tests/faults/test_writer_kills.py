"""Parts that die, stop, or lose one another, at every place where it could hurt: nothing is lost, nothing is doubled.

Each test has Redis and database of its own, sees that its fault has really struck, heals it, retries what was left
unknown with the same Idempotency-Keys, and then counts both stores (tests.audit).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest
from redis.exceptions import BusyLoadingError, RedisError

from coupon_svc.dev.servers import EmbeddedRedis
from coupon_svc.domain.shards import shard_tag
from coupon_svc.postgres.shards import WRITER_TTL_S
from coupon_svc.writer.crash import CRASH_POINTS
from tests.audit import Answer, History, audit, settled
from tests.conftest import SHARDS
from tests.harness import Part, Stack, fresh_database, until

MakeStack = Callable[[], Awaitable[Stack]]

SMALL_BLOCKS = {"COUPON_LEASE_CODES_MIN": "5", "COUPON_LEASE_CODES_MAX": "10"}
"""Blocks so small that a handful of assigns needs the next one."""
IMPATIENT = {"COUPON_LEDGER_WAIT_MS": "500"}


async def started(stack: Stack, **api_environment: str) -> Part:
    """One writer and one API process, ready. Returns the writer."""
    writer = stack.writer(**SMALL_BLOCKS)
    stack.api(**{**IMPATIENT, **api_environment})
    await stack.ready()
    return writer


@contextlib.asynccontextmanager
async def own_stack(folder: Path, postgres_url: str) -> AsyncIterator[Stack]:
    """A stack in which nothing runs yet but Redis."""
    with EmbeddedRedis(folder / "redis") as server:
        stack = Stack(server, server.url, await fresh_database(postgres_url, SHARDS), folder, SHARDS)
        try:
            yield stack
        finally:
            stack.close()


@pytest.fixture(scope="module")
async def lasting(tmp_path_factory: pytest.TempPathFactory, postgres_url: str) -> AsyncIterator[Stack]:
    """A running stack that all share who leave it as it should be."""
    async with own_stack(tmp_path_factory.mktemp("lasting"), postgres_url) as stack:
        await started(stack)
        yield stack


def codes(prefix: str, count: int) -> list[str]:
    return [f"{prefix}-{number:03d}" for number in range(count)]


async def retried(history: History, answers: list[Answer]) -> None:
    """Send again, with the same Idempotency-Keys, until each has been answered for good."""

    async def again(answer: Answer) -> None:
        async def answered() -> bool:
            return (await history.post(answer.path, answer.sent, answer.idempotency_key)).status not in (0, 503)

        await until(answered, what=f"{answer.verb} should be answered in the end, it was {answer.code}")

    await asyncio.gather(*(again(answer) for answer in answers))


def log_of(stack: Stack, part: str = "writer") -> str:
    return (stack.folder / f"{part}.log").read_text()


# --- the writer dies at each of its crash points

IN_MAKE_TEST = ("persist.committed", "lend.leased", "recover.coupons_restored")
"""Where the stores have parted furthest. The model dies at every one (tests/model/test_model.py), and
`make chaos` kills a writer there."""


async def traffic_until_dead(history: History, victim: Part, book_ids: tuple[str, str], tag: str) -> None:
    """Rounds of everything that makes a writer work, until it has died of it."""
    for number in range(200):
        if victim.process.poll() is not None:
            return
        key, calls = f"{tag}-{number}", []
        for book, book_id in enumerate(book_ids):
            calls += [
                history.post("/coupons/assign", {"book_id": book_id, "user_id": f"u{number}-{i}"}, f"{key}-{i}")
                for i in range(2)
            ]
            named = f"{'LR'[book]}-{59 - number:03d}" if number < 60 else f"{'LR'[book]}-000"
            calls.append(history.post(f"/coupons/assign/{named}", {"user_id": f"n{number}"}, f"{key}-n"))
            held = [answer for answer in history.assigned() if answer.body["book_id"] == book_id]
            if held:
                code = held[number % len(held)].body["code"]
                calls.append(history.post(f"/coupons/redeem/{code}", {"reference": key}, f"{key}-r"))
        added = codes(f"NEW{number}", 3)
        calls.append(history.post("/coupons/codes", {"book_id": book_ids[0], "codes": added}, f"{key}-c"))
        await asyncio.gather(*calls)


async def writer_dies_at(point: str, stack: Stack) -> None:
    healthy = await started(stack)
    async with await stack.client() as client:
        history = History(client)
        book_ids = (
            await history.new_book(codes("L", 60), max_redemptions_per_code=2),
            await history.new_book(codes("R", 60), ack="redis", max_codes_per_user=1),
        )
        for number in range(4):
            for book_id in book_ids:
                await history.post("/coupons/assign", {"book_id": book_id, "user_id": f"first{number}"}, f"f{number}")
        if point.startswith("recover."):  # there must be something to recover from
            await stack.drained()
        healthy.stop()
        if point.startswith("recover."):
            async with stack.redis() as redis:
                await redis.flushall()
        victim = stack.writer(dies_at=point, **SMALL_BLOCKS)
        traffic = asyncio.create_task(traffic_until_dead(history, victim, book_ids, point))
        assert await victim.died(60) == -signal.SIGKILL, f"the writer did not die at {point}"
        stack.writer(**SMALL_BLOCKS)
        await traffic
        await retried(history, list(history.answers))
        await audit(stack, history)
        for book_id in book_ids:  # and the service goes on
            await retried(
                history, [await history.post("/coupons/assign", {"book_id": book_id, "user_id": "last"}, "z")]
            )
            assert history.answers[-1].code in ("ok", "book_exhausted")


@pytest.fixture(scope="module")
async def dying(
    tmp_path_factory: pytest.TempPathFactory, postgres_url: str, request: pytest.FixtureRequest
) -> AsyncIterator[dict[str, asyncio.Task[None]]]:
    """The story of each crash point that is wanted, all under way at once: most of their time is waiting."""
    items: list[Any] = request.session.items
    wanted = {item.callspec.params["point"] for item in items if "dying" in getattr(item, "fixturenames", ())}
    at_once = asyncio.Semaphore(6)

    async def story(point: str) -> None:
        async with at_once, own_stack(tmp_path_factory.mktemp(point), postgres_url) as stack:
            await writer_dies_at(point, stack)

    tasks = {point: asyncio.create_task(story(point)) for point in CRASH_POINTS if point in wanted}
    yield tasks
    for task in tasks.values():
        task.cancel()
    await asyncio.gather(*tasks.values(), return_exceptions=True)


@pytest.mark.parametrize(
    "point",
    [pytest.param(point, marks=() if point in IN_MAKE_TEST else pytest.mark.chaos) for point in CRASH_POINTS],
)
async def test_a_writer_that_is_killed_loses_and_doubles_nothing(
    dying: dict[str, asyncio.Task[None]], point: str
) -> None:
    await dying[point]


# --- writers that stop, share, hand over


async def owners(stack: Stack) -> list[str]:
    return [row["owner"] for row in await stack.ledger("SELECT owner FROM shards WHERE owner IS NOT NULL")]


async def test_a_writer_that_was_stopped_and_wakes_up_can_write_nothing(make_stack: MakeStack) -> None:
    stack = await make_stack()
    sleeper = await started(stack)
    async with await stack.client() as client:
        history = History(client)
        book_id = await history.new_book(codes("S", 80), max_redemptions_per_code=None)
        running = True

        async def customers(number: int) -> None:
            turn = 0
            while running:
                turn += 1
                call = {"book_id": book_id, "user_id": f"u{number}-{turn}"}
                answer = await history.post("/coupons/assign", call, f"{number}-{turn}")
                if answer.ok:
                    await history.post(f"/coupons/redeem/{answer.body['code']}", {}, f"{number}-{turn}-r")
                await asyncio.sleep(0.05)

        traffic = [asyncio.create_task(customers(number)) for number in range(3)]
        await until(lambda: _count(history.redeemed(), 3))
        before = set(await owners(stack))
        sleeper.signal(signal.SIGSTOP)
        stack.writer(**SMALL_BLOCKS)

        async def taken_over() -> bool:
            owned = await owners(stack)
            return len(owned) == SHARDS and not set(owned) & before

        await until(taken_over, what="the other writer should take every shard over")
        seen = len(history.redeemed())
        sleeper.signal(signal.SIGCONT)
        await until(lambda: _count(history.redeemed(), seen + 3), what="the service should go on")

        async def shared() -> bool:
            return before < set(await owners(stack))

        await until(shared, what="the woken writer should find itself taken over, and be given its share anew")
        running = False
        await asyncio.gather(*traffic)
        await retried(history, [answer for answer in history.answers if answer.unknown])
        await audit(stack, history)


async def _count(answers: list[Answer], wanted: int) -> bool:
    return len(answers) >= wanted


@pytest.mark.chaos
async def test_a_writer_that_stops_in_its_very_first_commit_is_taken_over(make_stack: MakeStack) -> None:
    stack = await make_stack()
    sleeper = await started(stack)
    async with await stack.client() as client:
        history = History(client)
        book_id = await history.new_book(codes("W", 20))
        await settled(stack)
        blocker = await asyncpg.connect(stack.database_url)
        transaction = blocker.transaction()
        await transaction.start()
        await blocker.execute("LOCK TABLE entries IN SHARE MODE")
        call = asyncio.create_task(history.post("/coupons/assign", {"book_id": book_id, "user_id": "u"}, "k"))
        waiting = (
            "SELECT pid FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name LIKE 'coupon-writer%' AND wait_event_type = 'Lock'"
        )

        async def within_the_commit() -> list[Any]:
            return await stack.ledger(waiting)

        await until(within_the_commit, what="the writer should be within its first commit")
        sleeper.signal(signal.SIGSTOP)
        before = set(await owners(stack))
        await transaction.rollback()
        await blocker.close()
        await call
        stack.writer(**SMALL_BLOCKS)

        async def taken_over() -> bool:
            owned = await owners(stack)
            return len(owned) == SHARDS and not set(owned) & before

        await until(taken_over, 12, "the other writer should take every shard over")
        sleeper.signal(signal.SIGCONT)
        await retried(history, list(history.answers))
        await audit(stack, history)


async def test_writers_share_the_shards_and_one_that_is_told_to_stop_hands_over_at_once(make_stack: MakeStack) -> None:
    stack = await make_stack()
    first = await started(stack)
    stack.writer(**SMALL_BLOCKS)

    async def shared() -> bool:
        owned = await owners(stack)
        return len(owned) == SHARDS and sorted(owned.count(owner) for owner in set(owned)) == [2, 2]

    await until(shared, what="two writers should own two shards each")
    async with await stack.client() as client:
        history = History(client)
        book_ids = await asyncio.gather(
            *(history.new_book(codes(f"B{i}", 20), ack=("ledger", "redis")[i % 2]) for i in range(6))
        )

        async def burst(name: str) -> None:
            await asyncio.gather(
                *(
                    history.post("/coupons/assign", {"book_id": book_id, "user_id": f"{name}{i}"}, f"{name}{i}")
                    for book_id in book_ids
                    for i in range(6)
                )
            )

        await burst("shared")
        traffic = asyncio.create_task(burst("moved"))
        assert await asyncio.to_thread(first.stop) == 0
        loop = asyncio.get_running_loop()
        stopped_at = loop.time()

        async def handed_over() -> bool:
            owned = await owners(stack)
            return len(owned) == SHARDS and len(set(owned)) == 1

        await until(handed_over, what="the other writer should own every shard")
        taken_s = loop.time() - stopped_at
        assert taken_s < WRITER_TTL_S - 1, f"the hand-over took {taken_s:.1f} s, as long as a take-over"
        await traffic
        await retried(history, list(history.answers))
        assert len({answer.body["position"] for answer in history.assigned()}) == 72
        await audit(stack, history)


# --- an API process or Redis dies


async def test_a_retry_after_the_api_was_killed_gets_the_same_code(make_stack: MakeStack) -> None:
    stack = await make_stack()
    writer = await started(stack, COUPON_LEDGER_WAIT_MS="20000")
    api = stack.parts[-1]
    async with await stack.client("shop") as client:
        history = History(client)
        book_id = await history.new_book(codes("A", 30), max_codes_per_user=1)
        await settled(stack)
        calls = [({"book_id": book_id, "user_id": f"u{i}"}, f"k{i}") for i in range(4)]
        writer.signal(signal.SIGSTOP)  # so that nothing is durable, and the API has to wait with its answers
        waiting = [asyncio.create_task(history.post("/coupons/assign", call, key)) for call, key in calls]
        redis: Any = stack.redis()

        async def popped() -> bool:
            return sum([int(await redis.hget(meta, "seq")) async for meta in redis.scan_iter("cb:*:meta")]) == 4

        await until(popped, what="Redis should have decided the assigns")
        events = [entry async for key in redis.scan_iter("cb:*:events") for _, entry in await redis.xrange(key)]
        await redis.aclose()
        api.kill()
        answers = await asyncio.gather(*waiting)
        assert [answer.status for answer in answers] == [0] * 4, "the API was to die before it answered"
        writer.signal(signal.SIGCONT)
    stack.api()
    await stack.ready()
    async with await stack.client("shop") as client:
        history.client = client
        await retried(history, list(answers))
        got = {answer.body["user_id"]: answer.body["code"] for answer in history.assigned()}
        decided = [event for entry in events for event in json.loads(entry["events"])]
        assert got == {user: code for _, _, code, user, *_ in decided}
        assert all(answer.replayed for answer in history.assigned())
        await audit(stack, history)


async def test_the_service_goes_on_by_itself_after_redis_was_killed(lasting: Stack) -> None:
    stack = lasting
    assert stack.redis_server is not None
    async with await stack.client() as client:
        history = History(client)
        book_ids = [await history.new_book(codes(ack.upper(), 60), ack=ack) for ack in ("ledger", "redis")]
        locked = await history.post("/coupons/assign", {"book_id": book_ids[1], "user_id": "locker"}, "locker")
        lock = await history.post(f"/coupons/lock/{locked.body['code']}", {"ttl_seconds": 600})
        running = True

        async def customers(book_id: str) -> None:
            turn = 0
            while running:
                turn += 1
                await history.post("/coupons/assign", {"book_id": book_id, "user_id": f"u{turn}"}, f"t{turn}")
                await asyncio.sleep(0.02)

        traffic = [asyncio.create_task(customers(book_id)) for book_id in book_ids]
        await until(lambda: _count(history.assigned(), 12))
        stack.redis_server.kill()

        async def noticed() -> bool:
            return any(not answer.ok for answer in history.answers)

        await until(noticed, what="somebody should have noticed that Redis died")
        stack.redis_server.start()
        seen = len(history.assigned())
        await until(lambda: _count(history.assigned(), seen + 6), what="the service should go on")
        running = False
        await asyncio.gather(*traffic)

        async def judged() -> Answer | None:  # the other book's shard may be the last to be recovered
            answer = await history.post(f"/coupons/lock/{locked.body['code']}")
            return None if answer.code == "recovering" else answer

        held = await until(judged, what="the shard of the lock should be open again")
        assert held is not None
        assert held.code == "locked", "a lock survives a restart that lost nothing"
        token = lock.body["lock_token"]
        redeem = await history.post(f"/coupons/redeem/{locked.body['code']}", {"lock_token": token}, "spend")
        assert redeem.ok, redeem
        await retried(history, [answer for answer in history.answers if answer.unknown])
        await audit(stack, history)


async def test_the_api_comes_back_after_a_redis_that_takes_its_time_to_load(lasting: Stack) -> None:
    # While Redis loads its file it answers INFO (with an append-only file that is off), and refuses to read keys.
    stack = lasting
    server = stack.redis_server
    assert server is not None
    async with await stack.client() as client:
        history = History(client)
        book_id = await history.new_book(codes("LOAD", 60))
        redis: Any = stack.redis()
        pipeline = redis.pipeline(transaction=False)
        for number in range(12_000):
            pipeline.set(f"ballast:{number % 10}", number)
        await pipeline.execute()
        await redis.aclose()
        server.kill()
        server.extra = ("key-load-delay 250",)
        restart = asyncio.create_task(asyncio.to_thread(server.start))

        async def loading() -> bool:
            client: Any = stack.redis()
            try:
                await client.get("ballast:0")
            except (ConnectionError, RedisError) as error:
                return isinstance(error, BusyLoadingError)
            finally:
                await client.aclose()
            return False

        await until(loading, what="Redis should be seen loading its file")
        await restart
        server.extra = ()
        await stack.ready()
        assert (await history.post("/coupons/assign", {"book_id": book_id, "user_id": "u"}, "k")).ok
        await audit(stack, history)


# --- Postgres is away, cut off, stopped, or slow


class LedgerProxy:
    """A door before Postgres that a test can shut, or shut right before or after one statement of one connection."""

    PASS, CUT, MUTE = "pass", "cut", "mute"  # let it through; end before it; let it through and end without its reply

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._host, self._port = str(parts.hostname), parts.port or 5432
        self._parts = parts
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.away = False
        self.struck = 0
        """How often a connection was ended by `judge`."""
        self.judge: Callable[[list[str]], str] = lambda _: self.PASS
        """Is given the statements that one connection has executed, the newest last, before it goes through."""

    async def start(self) -> str:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        login = self._parts.netloc.rpartition("@")[0]
        return urlunsplit(self._parts._replace(netloc=f"{login}@127.0.0.1:{port}"))

    async def stop(self) -> None:
        self.shut()
        if self._server is not None:
            self._server.close()
        await asyncio.gather(*self._tasks)

    def shut(self) -> None:
        """End every connection and take no new one."""
        self.away = True
        for writer in self._writers:
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            if not self.away:
                await self._serve(reader, writer)
        except OSError:
            pass
        finally:
            writer.transport.abort()
            self._tasks.discard(task)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection(self._host, self._port)
        self._writers |= {writer, up_writer}
        replied = asyncio.Event()
        mute = False

        async def back() -> None:
            try:
                while data := await up_reader.read(65536):
                    if mute:
                        return
                    writer.write(data)
            except OSError:
                pass
            finally:
                replied.set()
                writer.transport.abort()

        pump = asyncio.create_task(back())
        prepared: dict[bytes, str] = {}
        executed: list[str] = []
        try:
            while data := await reader.read(65536):
                verdict = self.PASS
                first, _, rest = data[5:].partition(b"\0")
                if data[:1] == b"P":
                    prepared[first] = rest.partition(b"\0")[0].decode()
                elif data[:1] in b"BQ" and data[:1]:
                    executed.append(prepared.get(rest.partition(b"\0")[0], "") if data[:1] == b"B" else first.decode())
                    verdict = self.judge(executed)
                if verdict == self.CUT:
                    self.struck += 1
                    return
                mute = verdict == self.MUTE
                up_writer.write(data)
                if mute:
                    await replied.wait()
                    self.struck += 1
                    return
        finally:
            pump.cancel()
            await asyncio.gather(pump, return_exceptions=True)
            up_writer.transport.abort()
            self._writers -= {writer, up_writer}


@contextlib.asynccontextmanager
async def through_proxy(stack: Stack) -> AsyncIterator[LedgerProxy]:
    """Let the parts that are started reach Postgres through a proxy; the stack itself still goes there directly."""
    proxy = LedgerProxy(stack.database_url)
    stack_url = await proxy.start()
    writer, api = stack.writer, stack.api
    stack.writer = lambda **more: writer(COUPON_DATABASE_URL=stack_url, **more)  # type: ignore[method-assign]
    stack.api = lambda **more: api(COUPON_DATABASE_URL=stack_url, **more)  # type: ignore[method-assign]
    try:
        yield proxy
    finally:
        await proxy.stop()


BehindProxy = tuple[Stack, LedgerProxy]


@pytest.fixture(scope="module")
async def lasting_proxy(tmp_path_factory: pytest.TempPathFactory, postgres_url: str) -> AsyncIterator[BehindProxy]:
    async with own_stack(tmp_path_factory.mktemp("proxy"), postgres_url) as stack, through_proxy(stack) as proxy:
        await started(stack)
        yield stack, proxy


@pytest.fixture
def behind_proxy(lasting_proxy: BehindProxy) -> BehindProxy:
    """A stack that all share who leave it as it should be, and its proxy, which lets everything through."""
    _, proxy = lasting_proxy
    proxy.away, proxy.struck, proxy.judge = False, 0, lambda _: proxy.PASS
    return lasting_proxy


async def test_while_postgres_is_away_only_what_needs_it_is_refused_and_before_it_happens(
    behind_proxy: BehindProxy,
) -> None:
    stack, proxy = behind_proxy
    async with await stack.client() as client:
        history = History(client)
        sure = await history.new_book(codes("SURE", 30))
        fast = await history.new_book(codes("FAST", 30), ack="redis")
        for book_id in (sure, fast):
            assert (await history.post("/coupons/assign", {"book_id": book_id, "user_id": "before"}, "before")).ok
        held = history.assigned()[1].body["code"]
        await settled(stack)
        proxy.shut()
        early = await history.post("/coupons/assign", {"book_id": fast, "user_id": "early"}, "early")
        assert early.status == 201

        redis: Any = stack.redis()

        async def known_to_be_away() -> bool:
            return {await redis.hget(key, "ledger_at_ms") async for key in redis.scan_iter("cb:*:meta")} == {"0"}

        await until(known_to_be_away, what="the writer should tell that Postgres is away")

        async def decided() -> int:
            return sum([int(await redis.hget(meta, "seq")) async for meta in redis.scan_iter("cb:*:meta")])

        before = await decided()
        refused = await history.post("/coupons/assign", {"book_id": sure, "user_id": "refused"}, "refused")
        assert (refused.status, refused.code) == (503, "ledger_behind")
        redeem = await history.post(f"/coupons/redeem/{held}", {}, "redeem")
        assert (redeem.status, redeem.code) == (503, "ledger_behind")
        assert await decided() == before, "they were to be refused before anything happens"
        went_on = await history.post("/coupons/assign", {"book_id": fast, "user_id": "away"}, "away")
        assert (went_on.status, went_on.body["durable"]) == (201, False)
        assert await decided() == before + 1
        await redis.aclose()
        proxy.away = False
        await retried(history, [answer for answer in history.answers if not answer.ok])
        assert {answer.body["user_id"] for answer in history.assigned()} == {"before", "early", "refused", "away"}
        await audit(stack, history)


async def test_a_commit_whose_confirmation_is_lost_is_not_made_twice(behind_proxy: BehindProxy) -> None:
    stack, proxy = behind_proxy
    async with await stack.client() as client:
        history = History(client)
        book_id = await history.new_book(codes("C", 30), max_redemptions_per_code=None)

        def lose_commits(executed: list[str]) -> str:
            lose = "commit_entries" in executed[-1] and proxy.struck < 3
            return proxy.MUTE if lose else proxy.PASS

        proxy.judge = lose_commits

        async def lost() -> bool:
            number = len(history.answers)
            answer = await history.post("/coupons/assign", {"book_id": book_id, "user_id": f"u{number}"}, f"k{number}")
            if answer.ok:
                await history.post(f"/coupons/redeem/{answer.body['code']}", {}, f"r{number}")
            return proxy.struck == 3

        await until(lost, what="three confirmations should be lost")
        await retried(history, list(history.answers))
        await audit(stack, history)


async def test_a_lease_whose_confirmation_is_lost_still_comes_to_redis(behind_proxy: BehindProxy) -> None:
    stack, proxy = behind_proxy
    async with await stack.client() as client:
        history = History(client)

        def lose_a_lease(executed: list[str]) -> str:
            leased = any("SET leased_upto = $2, lent" in statement for statement in executed[-4:])
            return proxy.MUTE if leased and executed[-1].startswith("COMMIT") and not proxy.struck else proxy.PASS

        book_id = await history.new_book(codes("LOST", 15), ack="redis")
        await settled(stack)
        proxy.judge = lose_a_lease
        for number in range(15):
            call = {"book_id": book_id, "user_id": f"u{number}"}

            async def answered(call: dict[str, str] = call, key: str = f"k{number}") -> bool:
                answer = await history.post("/coupons/assign", call, key)
                assert answer.code != "book_exhausted", f"{len(history.assigned())} of 15 codes were dealt"
                return answer.ok

            await until(answered, 5, "every code should be dealt")
        assert proxy.struck == 1, "the confirmation was to be lost"
        await audit(stack, history)


async def test_a_refill_that_failed_while_the_pool_ran_dry_is_tried_again(behind_proxy: BehindProxy) -> None:
    stack, proxy = behind_proxy
    async with await stack.client() as client:
        history = History(client)
        book_id = await history.new_book(codes("DRY", 20), ack="redis")
        await settled(stack)
        proxy.judge = lambda executed: proxy.CUT if "leased_upto" in executed[-1] else proxy.PASS

        async def dry() -> bool:
            user_id = f"u{len(history.answers)}"
            return (await history.post("/coupons/assign", {"book_id": book_id, "user_id": user_id})).code == "refilling"

        await until(dry, what="the pool should run dry")

        async def failed() -> bool:
            return proxy.struck > 0

        await until(failed, what="the refill was to fail")
        await stack.drained()
        proxy.judge = lambda _: proxy.PASS

        async def dealt() -> bool:
            return (await history.post("/coupons/assign", {"book_id": book_id, "user_id": "patient"}, "patient")).ok

        await until(dealt, 6, "the book should be refilled once Postgres is back")
        await audit(stack, history)


async def test_a_take_over_whose_confirmation_is_lost_leaves_no_shard_behind(make_stack: MakeStack) -> None:
    stack = await make_stack()
    async with through_proxy(stack) as proxy:

        def lose_a_take_over(executed: list[str]) -> str:
            return proxy.MUTE if "SET owner = $2, generation" in executed[-1] and not proxy.struck else proxy.PASS

        proxy.judge = lose_a_take_over
        stack.writer()
        stack.api()

        async def owned() -> bool:
            return len(await owners(stack)) == SHARDS

        await until(owned, what="the writer should own every shard")
        assert proxy.struck == 1, "the confirmation was to be lost"
        await stack.ready()


async def test_a_long_upload_into_one_book_does_not_hold_up_the_ledger_for_others(make_stack: MakeStack) -> None:
    stack = await make_stack()
    await started(stack, COUPON_LEDGER_WAIT_MS="3000")
    async with await stack.client() as client:
        history = History(client)
        big = await history.new_book(codes("BIG", 20), ack="redis")
        others = [await history.new_book(codes(f"O{number}", 20)) for number in range(2 * SHARDS)]
        others = [book_id for book_id in others if book_id[3:5] == big[3:5]] or others
        while others[0][3:5] != big[3:5]:
            others.insert(0, await history.new_book(codes(f"P{len(others)}", 20)))
        await settled(stack)
        upload = await asyncpg.connect(stack.database_url)
        try:
            transaction = upload.transaction()
            await transaction.start()
            # What an upload does first, and keeps until its last code is in.
            await upload.execute("SELECT FROM books WHERE book_id = $1 FOR UPDATE", big)
            for number in range(5):  # down to the mark at which the lender wants the next block
                await history.post("/coupons/assign", {"book_id": big, "user_id": f"u{number}"})

            answers = [
                await history.post("/coupons/assign", {"book_id": others[0], "user_id": f"u{number}"}, f"k{number}")
                for number in range(3)
            ]
            assert [answer.code for answer in answers] == ["ok"] * 3
            await transaction.rollback()
        finally:
            await upload.close()
        await audit(stack, history)


@pytest.mark.skipif("COUPON_DATABASE_URL" in os.environ, reason="a Postgres elsewhere cannot be sent signals")
@pytest.mark.chaos
async def test_a_postgres_backend_that_stands_still_is_given_up(make_stack: MakeStack) -> None:
    stack = await make_stack()
    await started(stack)
    async with await stack.client() as client:
        history = History(client)
        book_id = await history.new_book(codes("P", 30))
        assert (await history.post("/coupons/assign", {"book_id": book_id, "user_id": "before"}, "before")).ok
        await settled(stack)
        rows = await stack.ledger(
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND application_name LIKE 'coupon-writer%'"
            " AND state = 'idle' AND query LIKE '%commit_entries%' ORDER BY state_change DESC"
        )
        stopped = [row["pid"] for row in rows]
        assert stopped, "the persister's connection was to be found"
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        try:
            stuck = await history.post("/coupons/assign", {"book_id": book_id, "user_id": "stuck"}, "stuck")
            assert not stuck.ok, "the backend was to stand still"
            await retried(history, [stuck])
            later = await history.post("/coupons/assign", {"book_id": book_id, "user_id": "later"}, "later")
            assert later.ok
        finally:
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)
        await audit(stack, history)


async def test_a_writer_whose_connections_are_ended_again_and_again_loses_nothing(lasting: Stack) -> None:
    stack = lasting
    async with await stack.client() as client:
        history = History(client)
        book_id = await history.new_book(codes("T", 60), max_redemptions_per_code=None)
        ended = 0
        for number in range(12):
            call = asyncio.create_task(
                history.post("/coupons/assign", {"book_id": book_id, "user_id": f"u{number}"}, f"k{number}")
            )
            rows = await stack.ledger(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND application_name LIKE 'coupon-writer%'"
            )
            ended += len(rows)
            await call
        assert ended > 4, "connections were to be ended"
        await retried(history, list(history.answers))
        await audit(stack, history)


# --- poison


async def add_by_hand(stack: Stack, shard: int, fields: dict[str, str]) -> tuple[int, int]:
    """Put an event into a shard's stream as an administrator who knows no better, or other fields; returns its
    (epoch, seq)."""
    prefix = f"cb:{{{shard_tag(shard, stack.shards)}}}:"
    redis: Any = stack.redis()
    epoch = await redis.hget(prefix + "meta", "epoch")
    seq = int(await redis.hincrby(prefix + "meta", "seq", 1))
    if "event" in fields:
        names = ["event", "book", "code", "user", "idem", "fingerprint", "uses", "reference", "metadata"]
        events = json.dumps([[fields[name] for name in names if name in fields]])
        after = await redis.hget(prefix + "meta", "tip")
        fields = {"n": "1", "after": after, "tip": "by hand", "at_ms": fields["at_ms"], "events": events}
        await redis.hset(prefix + "meta", "tip", "by hand")
    await redis.xadd(prefix + "events", fields, id=f"{epoch}-{seq}")
    await redis.aclose()
    return int(epoch), seq


def redeemed_fields(book_id: str, **changes: str) -> dict[str, str]:
    fields = {"event": "coupon_redeemed", "book": book_id, "code": "POISON", "user": "u", "at_ms": "1", "uses": "1"}
    return {**fields, "reference": "", "metadata": "", "idem": "", "fingerprint": "", **changes}


def assigned_fields(book_id: str, **changes: str) -> dict[str, str]:
    fields = {"event": "coupon_assigned", "book": book_id, "code": "POISON", "user": "u", "at_ms": "1"}
    return {**fields, "idem": "", "fingerprint": "", **changes}


POISONS: dict[str, Callable[[str], dict[str, str]]] = {
    "no fields that we know": lambda _: {"something": "else"},
    "an event of no known kind": lambda book_id: redeemed_fields(book_id, event="coupon_eaten"),
    "a time that is no number": lambda book_id: assigned_fields(book_id, at_ms="yesterday"),
    "a user with NUL": lambda book_id: assigned_fields(book_id, user="a\0b"),
    "a code too long for an index": lambda book_id: assigned_fields(book_id, code=os.urandom(6000).hex()),
    "a time beyond 64 bits": lambda book_id: assigned_fields(book_id, at_ms=str(1 << 70)),
    "a use beyond 32 bits": lambda book_id: redeemed_fields(book_id, uses=str(1 << 40)),
}


@pytest.mark.parametrize("poison", POISONS)
async def test_a_poisoned_event_goes_to_the_dead_letters_and_the_rest_goes_on(
    poisoned: tuple[Stack, Part], poison: str
) -> None:
    stack, writer = poisoned
    async with await stack.client() as client:
        history = History(client)
        book_id = await history.new_book(codes("OK", 20))
        shard = int(book_id[3:5])
        assert (await history.post("/coupons/assign", {"book_id": book_id, "user_id": "before"}, "before")).ok
        epoch, seq = await add_by_hand(stack, shard, POISONS[poison](book_id))
        after = [
            history.post("/coupons/assign", {"book_id": book_id, "user_id": f"after{i}"}, f"after{i}") for i in range(3)
        ]
        # Who was behind the poison in its epoch may be told "outcome unknown"; the same key tells that all went well.
        await retried(history, list(await asyncio.gather(*after)))
        stored = await stack.ledger("SELECT FROM coupons WHERE book_id = $1 AND user_id LIKE 'after%'", book_id)
        assert len(stored) == 3
        dead = await stack.ledger(
            "SELECT FROM dead_letters WHERE shard = $1 AND epoch = $2 AND seq = $3", shard, epoch, seq
        )
        assert len(dead) == 1
        assert writer.process.poll() is None, "the writer should survive it"
        await audit(stack, history)


@pytest.fixture(scope="module")
async def poisoned_stacks(
    tmp_path_factory: pytest.TempPathFactory, postgres_url: str
) -> AsyncIterator[dict[str, tuple[Stack, Part]]]:
    """One stack for all poisons, as long as its writer lives."""
    stacks: dict[str, tuple[Stack, Part]] = {}
    yield stacks
    for stack, _ in stacks.values():
        stack.close()


@pytest.fixture
async def poisoned(
    poisoned_stacks: dict[str, tuple[Stack, Part]], tmp_path_factory: pytest.TempPathFactory, postgres_url: str
) -> tuple[Stack, Part]:
    if "now" in poisoned_stacks and poisoned_stacks["now"][1].process.poll() is not None:
        poisoned_stacks.pop("now")[0].close()
    if "now" not in poisoned_stacks:
        folder: Path = tmp_path_factory.mktemp("poison")
        server = EmbeddedRedis(folder / "redis")
        server.start()
        stack = Stack(server, server.url, await fresh_database(postgres_url, SHARDS), folder, SHARDS)
        poisoned_stacks["now"] = stack, await started(stack, COUPON_LEDGER_WAIT_MS="5000")
    return poisoned_stacks["now"]


async def test_nobody_is_told_that_a_dead_letter_is_durable(make_stack: MakeStack) -> None:
    stack = await make_stack()
    await stack.ledger("ALTER TABLE coupons ADD CONSTRAINT not_this_one CHECK (user_id <> 'refused by the ledger')")
    await started(stack, COUPON_LEDGER_WAIT_MS="5000")
    async with await stack.client() as client:
        history = History(client)
        book_id = await history.new_book(codes("D", 20))
        calls = [
            history.post("/coupons/assign", {"book_id": book_id, "user_id": user_id}, user_id)
            for user_id in ("a", "refused by the ledger", "b")
        ]
        answers = await asyncio.gather(*calls)
        assert len(await stack.ledger("SELECT FROM dead_letters")) == 1, "the event was to be refused"
        assert answers[1].code == "outcome_unknown"
        await retried(history, [answers[0], answers[2]])  # who stood behind it in its epoch learns by the same key
        assert len(await stack.ledger("SELECT FROM coupons WHERE user_id IN ('a', 'b')")) == 2
        again = await history.post("/coupons/assign", answers[1].sent, answers[1].idempotency_key)
        assert again.code == "outcome_unknown", "an idempotent replay shows no code that the ledger does not have"


async def test_history_that_contradicts_the_ledger_stops_its_shard_loudly(make_stack: MakeStack) -> None:
    stack = await make_stack()
    await started(stack)
    async with await stack.client() as client:
        history = History(client)
        book_id = await history.new_book(codes("F", 20))
        first = await history.post("/coupons/assign", {"book_id": book_id, "user_id": "first"}, "first")
        shard = int(book_id[3:5])
        other = book_id
        while other[3:5] == book_id[3:5]:
            other = await history.new_book(ack="ledger")
        await history.client.post("/coupons/codes", json={"book_id": other, "codes": codes("G", 5)})
        await add_by_hand(stack, shard, assigned_fields(book_id, code=first.body["code"], user="second"))

        async def loud() -> bool:
            return "contradicts the ledger" in log_of(stack)

        await until(loud, what="the writer should say so")
        elsewhere = await history.post("/coupons/assign", {"book_id": other, "user_id": "elsewhere"}, "elsewhere")
        assert elsewhere.ok, "the other shards go on"
        rows = await stack.ledger("SELECT user_id FROM coupons WHERE code = $1", first.body["code"])
        assert [row["user_id"] for row in rows] == ["first"], "what was durable stays"
