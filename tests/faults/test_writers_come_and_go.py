"""Writers that join, leave, or cannot do their work: each shard is served by one that can, within seconds."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any, cast

import asyncpg
import httpx
import pytest

from coupon_svc.config import load_settings
from coupon_svc.domain.events import COUPON_ASSIGNED, Event
from coupon_svc.postgres import lending
from coupon_svc.postgres.database import LedgerConnection, LedgerSession
from coupon_svc.postgres.liveness import LOOKS_APART_MAX_S, Watch
from coupon_svc.postgres.shards import OwnedShard, drop_writer, renew_writer, writer_beats
from coupon_svc.redis.codec import StreamEntry
from coupon_svc.redis.control import ShardControl
from coupon_svc.redis.errors import ShardNotUsable, StoreError
from coupon_svc.redis.keys import ShardKeys
from coupon_svc.redis.scripts import Scripts
from coupon_svc.redis.server import Identity
from coupon_svc.writer import lend
from coupon_svc.writer.clock import LedgerClock
from coupon_svc.writer.lend import Lender
from coupon_svc.writer.owning import OUT_OF_TOUCH_S
from coupon_svc.writer.persist import Persister
from coupon_svc.writer.shard import Shard
from coupon_svc.writer.showing import Showing
from coupon_svc.writer.writer import Writer
from tests.chaos.proxy import Proxy
from tests.conftest import SHARDS
from tests.entries import as_read, entry_of
from tests.harness import Stack, fresh_database, until
from tests.owned import open_shard

MakeStack = Callable[[], Awaitable[Stack]]
CHAIN = bytes(32)
HERE = Identity("run", "repl")


async def owners(stack: Stack) -> list[str | None]:
    return [row["owner"] for row in await stack.ledger("SELECT owner FROM shards ORDER BY shard")]


async def one_owner(stack: Stack) -> bool:
    owned = await owners(stack)
    return None not in owned and len(set(owned)) == 1


async def books_in_every_shard(http: httpx.AsyncClient) -> list[str]:
    books: dict[str, str] = {}
    while len(books) < SHARDS:
        rules = {"name": "b", "generate": {"pattern": "########", "total": 1000}}
        book_id = (await http.post("/coupons", json=rules)).json()["book_id"]
        books[book_id[3:5]] = book_id
    return list(books.values())


async def serves(http: httpx.AsyncClient, books: list[str]) -> bool:
    answers = await asyncio.gather(
        *(http.post("/coupons/assign", json={"book_id": book, "user_id": "u"}) for book in books)
    )
    return all(answer.status_code == 201 for answer in answers)


# --- who cannot do the work does not hold it


async def test_a_writer_that_never_reaches_redis_takes_no_shard(make_stack: MakeStack) -> None:
    """It is counted by nobody, so that the one that can work owns all shards."""
    stack = await make_stack()
    stranger = stack.writer(COUPON_REDIS_URL="redis://127.0.0.1:1")
    stack.writer()
    stack.api()
    await stack.ready()
    async with await stack.client() as http:
        books = await books_in_every_shard(http)
        await until(lambda: serves(http, books), what="every shard should be served")
        await asyncio.sleep(2.5)  # both have looked again by now
        assert await one_owner(stack)
        assert await stack.ledger("SELECT count(*) AS number FROM writers") == [(1,)]
        assert await serves(http, books)
    assert stranger.process.poll() is None, "it goes on to try"


@pytest.mark.chaos
async def test_a_writer_that_is_cut_off_from_redis_gives_its_shards_to_one_that_is_not(make_stack: MakeStack) -> None:
    stack = await make_stack()
    with Proxy(stack.redis_url) as proxy:
        stack.writer(COUPON_REDIS_URL=proxy.url(stack.redis_url))
        stack.writer()
        stack.api()
        await stack.ready()

        async def shared() -> bool:
            owned = await owners(stack)
            return None not in owned and len(set(owned)) == 2

        async with await stack.client() as http:
            books = await books_in_every_shard(http)
            await until(shared, what="each should own two shards")
            proxy.cut(refuse=True)
            await until(lambda: one_owner(stack), OUT_OF_TOUCH_S + 4, "the other should have taken all shards over")
            await until(lambda: serves(http, books), what="every shard should be served")
            proxy.heal()
            await until(shared, what="it should take part again when Redis answers")
            await until(lambda: serves(http, books), what="every shard should be served by either")


async def test_a_single_writer_goes_on_by_itself_when_redis_is_back(make_stack: MakeStack) -> None:
    stack = await make_stack()
    with Proxy(stack.redis_url) as proxy:
        stack.writer(COUPON_REDIS_URL=proxy.url(stack.redis_url))
        stack.api()
        await stack.ready()
        async with await stack.client() as http:
            books = await books_in_every_shard(http)
            epochs = await stack.ledger("SELECT epoch FROM shards ORDER BY shard")
            proxy.cut(refuse=True)

            async def given_up() -> bool:
                return await owners(stack) == [None] * SHARDS and not await stack.ledger("SELECT FROM writers")

            await until(given_up, what="it should have given its shards up")
            proxy.heal()
            await until(lambda: serves(http, books), what="every shard should be served")
            assert await stack.ledger("SELECT epoch FROM shards ORDER BY shard") == epochs, (
                "nothing was to be recovered"
            )


# --- who lives is no matter of Postgres's clock


async def step_clock(stack: Stack, interval: str) -> None:
    """From now on Postgres's clock is off by this, as its statements read it."""
    ledger = await asyncpg.connect(stack.database_url)
    database = await ledger.fetchval("SELECT current_database()")
    await ledger.execute(f"""
        CREATE SCHEMA IF NOT EXISTS stepped;
        CREATE OR REPLACE FUNCTION stepped.now() RETURNS timestamptz LANGUAGE sql AS
            $$ SELECT pg_catalog.now() + interval '{interval}' $$;
        ALTER DATABASE {database} SET search_path = stepped, pg_catalog, public
    """)
    await ledger.close()


@pytest.mark.chaos
async def test_a_step_of_the_ledgers_clock_forward_ends_no_living_process(make_stack: MakeStack) -> None:
    """Else its shards' owners would report for it while it goes on to answer."""
    stack = await make_stack()
    await step_clock(stack, "0 s")
    stack.writer()
    stack.api()
    await stack.ready()
    await asyncio.sleep(1.2)
    living = [await stack.ledger("SELECT process_id FROM api_processes"), await owners(stack)]
    await step_clock(stack, "1 hour")
    await asyncio.sleep(3)
    assert [await stack.ledger("SELECT process_id FROM api_processes"), await owners(stack)] == living
    log = (stack.folder / "writer.log").read_text()
    assert "is gone" not in log


async def test_a_step_of_the_ledgers_clock_back_keeps_no_dead_process(make_stack: MakeStack) -> None:
    stack = await make_stack()
    await step_clock(stack, "0 s")
    first = stack.writer()
    stack.api()
    await stack.ready()
    gone = set(await owners(stack))
    first.signal(signal.SIGSTOP)
    await step_clock(stack, "-1 hour")
    first.kill()
    stack.parts[1].kill()
    stack.writer()

    async def taken_over() -> bool:
        return await one_owner(stack) and not set(await owners(stack)) & gone

    await until(taken_over, what="the next writer should have taken all shards over")

    async def forgotten() -> bool:
        return not await stack.ledger("SELECT FROM api_processes")

    await until(forgotten, what="the API process should count as gone")


def test_a_row_is_gone_when_it_was_seen_unchanged_for_long_enough() -> None:
    watch = Watch(5.0)
    assert watch.look({"dead": 1, "living": 1}, 100.0, 100.1) == []
    for second in range(1, 5):
        assert watch.look({"dead": 1, "living": 1 + second}, 100.0 + second, 100.1 + second) == []
    assert watch.look({"dead": 1, "living": 9}, 105.3, 105.4) == []
    assert watch.look({"dead": 1, "living": 10}, 106.6, 106.7) == [("dead", 1)]
    assert watch.look({"dead": 2}, 107.6, 107.7) == [], "it was renewed after all"


def test_an_observer_that_stood_still_does_not_count_that_time() -> None:
    """Its machine may have stood still with all who live on it; they must have had time to renew their rows since."""
    watch = Watch(5.0)
    watch.look({"other": 1}, 100.0, 100.1)
    assert watch.look({"other": 1}, 1000.0, 1000.1) == []
    assert watch.look({"other": 1}, 2000.0, 2000.1) == []
    assert watch.look({"other": 1}, 3000.0, 3000.1) == [("other", 1)]
    assert LOOKS_APART_MAX_S * 3 > 5.0 > LOOKS_APART_MAX_S * 2


async def test_a_writer_that_was_renewed_since_it_was_seen_is_not_dropped(postgres_url: str) -> None:
    ledger = await asyncpg.connect(await fresh_database(postgres_url, 1))
    await renew_writer(ledger, "wr")
    (seen,) = (await writer_beats(ledger)).values()
    await renew_writer(ledger, "wr")
    assert not await drop_writer(ledger, "wr", seen)
    (seen,) = (await writer_beats(ledger)).values()
    assert await drop_writer(ledger, "wr", seen)
    assert await writer_beats(ledger) == {}
    await ledger.close()


async def test_no_renewal_waits_for_the_row_of_a_shard(make_stack: MakeStack) -> None:
    """A recovery holds it for as long as it settles. What is locked is taken, and given up, when it can be had."""
    stack = await make_stack()
    writer = Writer(load_settings({**stack.environment, "COUPON_REDIS_URL": "redis://127.0.0.1:1"}))
    connection = await writer.owning.session.connection()
    holder = await asyncpg.connect(stack.database_url)
    try:
        for others in ([], ["wr_a", "wr_b"]):
            for other in others:
                await renew_writer(holder, other)
            async with holder.transaction():
                await holder.execute("SELECT FROM shards WHERE shard = 3 FOR UPDATE")
                async with asyncio.timeout(1.0):
                    assert await writer.owning.renew(connection) is False
                assert 3 not in writer.shards
            assert await writer.owning.renew(connection)
            expected = [writer.writer_id] * 2 + [None] * 2 if others else [writer.writer_id] * SHARDS
            assert await owners(stack) == expected
    finally:
        await holder.close()
        writer.close()


# --- a shard that goes while something waits, or is odd, is no other shard's trouble


NO_LEDGER: Any = None
"""Stands for a connection that the functions which would use it, being replaced, do not use."""


def shard(number: int) -> Shard:
    return open_shard(OwnedShard(number, 1, 0, 1, CHAIN, ""), HERE)


@pytest.mark.parametrize("at", ["books_to_load", "lone_leases", "bring_again"])
async def test_a_shard_that_is_given_up_within_the_lenders_turn_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    shards = {number: shard(number) for number in range(3)}
    lender = Lender("", "wr", ShardControl("redis://127.0.0.1:1", 3, Scripts()), shards, 20, 20)
    lender._in_doubt = {f"bk_0{number}x": shards[number] for number in range(3)}
    brought: list[int] = []

    async def books_to_load(*_: Any) -> list[Any]:
        if at == "books_to_load":
            shards.pop(1, None)
        return []

    async def lone_leases(*_: Any) -> dict[str, lending.Lease]:
        if at == "lone_leases":
            shards[1] = shard(1)  # given up, and taken anew
        return {"bk_01x": lending.Lease(["A-1"], 0)} if at == "lone_leases" else {}

    async def bring_lone(*_: Any) -> None:
        raise AssertionError("what was lent by one owner is not brought by the next")

    async def bring_outstanding(_: Any, one: Shard, book_id: str) -> None:
        brought.append(one.owned.shard)
        if at == "bring_again":
            shards.pop(1, None)
            lender._in_doubt.pop("bk_01x", None)  # whoever opened it anew has settled it

    monkeypatch.setattr(lender, "_bring_lone", bring_lone)
    monkeypatch.setattr(lender, "_bring_outstanding_of_book", bring_outstanding)
    monkeypatch.setattr(lending, "books_to_load", books_to_load)
    monkeypatch.setattr(lend, "lone_leases", lone_leases)
    await lender.turn(NO_LEDGER)
    await lender._bring_doubtful(NO_LEDGER)
    assert brought == [0, 2]


async def test_what_goes_wrong_with_one_shard_does_not_end_the_lenders_turn(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shards = {number: shard(number) for number in range(3)}
    lender = Lender("", "wr", ShardControl("redis://127.0.0.1:1", 3, Scripts()), shards, 20, 20)
    lender._to_look_at = {f"bk_0{number}x": shards[number] for number in range(3)}
    refilled: list[int] = []

    async def refill(_: Any, one: Shard, book_id: str) -> None:
        int({0: "7", 1: "a secret code", 2: "7"}[one.owned.shard])
        refilled.append(one.owned.shard)

    async def nothing(*_: Any) -> Any:
        return {}

    monkeypatch.setattr(lender, "_refill", refill)
    monkeypatch.setattr(lending, "books_to_load", nothing)
    monkeypatch.setattr(lend, "lone_leases", nothing)
    await lender.turn(NO_LEDGER)
    assert refilled == [0, 2]
    assert not shards[1].is_open
    assert shards[1].recovery_wanted
    assert "shard 01 is shut: ValueError at " in caplog.text
    assert "secret" not in caplog.text


class OddStore(ShardControl):
    """A Redis whose shard 1 answers what cannot be read."""

    def __init__(self) -> None:
        super().__init__("redis://127.0.0.1:1", 3, Scripts())
        self.told: list[int] = []
        self.identity = HERE

    async def connect(self) -> Identity:
        return HERE

    async def read_events(self, after: Iterable[int], *_: Any, **__: Any) -> dict[int, list[StreamEntry]]:
        events = {shard: Event(1, 1, COUPON_ASSIGNED, f"bk_0{shard}x", f"A-{shard}", "u", 1) for shard in after}
        return {shard: [as_read(entry_of(event))] for shard, event in events.items()}

    async def publish_positions(self, published: Any, *_: Any, **__: Any) -> list[int | ShardNotUsable]:
        self.told += [one.term.shard for one in published if one.term.shard != 1]
        return [ShardNotUsable("torn") if one.term.shard == 1 else one.committed for one in published]


class Answering:
    """A connection to Postgres that tells the time."""

    async def fetchval(self, _: str) -> int:
        return 0

    def terminate(self) -> None: ...


async def test_what_goes_wrong_with_one_shard_does_not_keep_the_others_from_being_shown(
    caplog: pytest.LogCaptureFixture,
) -> None:
    store, shards, session = OddStore(), {number: shard(number) for number in range(3)}, LedgerSession("", "test")

    async def show_away() -> None: ...

    showing = Showing(session, store, shards, LedgerClock(), gone=list, show_away=show_away)
    await showing.show(cast(LedgerConnection, Answering()))
    assert store.told == [0, 2]
    assert [shards[number].identity for number in range(3)] == [HERE, None, HERE]
    assert "shard 01 is shut: torn" in caplog.text


async def test_what_goes_wrong_with_one_shard_does_not_keep_the_others_from_being_told_that_postgres_is_away() -> None:
    store = OddStore()
    shards = {number: shard(number) for number in range(3)}
    await Persister("", "wr", store, shards, lambda *_: None, LedgerClock()).show_away()
    assert store.told == [0, 2]
    assert [shards[number].identity for number in range(3)] == [HERE, None, HERE]


async def test_what_goes_wrong_with_one_shard_does_not_keep_the_others_from_being_opened(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    writer = Writer(load_settings({"COUPON_REDIS_URL": "redis://x", "COUPON_DATABASE_URL": "postgresql://x"}))
    writer.shards.update({number: Shard(OwnedShard(number, 1, 0, 1, CHAIN, "")) for number in range(3)})

    async def open_unless_torn(one: Shard, _: Any) -> None:
        if one.number == 1:
            int("a torn field")
        one.opened(HERE)

    async def connection(_: LedgerSession) -> None: ...

    monkeypatch.setattr(writer.opener, "_open", open_unless_torn)
    monkeypatch.setattr(LedgerSession, "connection", connection)
    opening = asyncio.create_task(writer.opener.run())

    async def others_opened() -> bool:
        return writer.shards[2].identity is HERE

    await until(others_opened)
    opening.cancel()
    assert writer.shards[1].recovery_wanted, "what cannot be read is to be rebuilt"
    assert "shard 01 is not opened: ValueError at " in caplog.text


@pytest.fixture
async def ledger(postgres_url: str) -> AsyncIterator[tuple[str, asyncpg.Connection]]:
    url = await fresh_database(postgres_url, 3)
    connection = await asyncpg.connect(url)
    await connection.execute("UPDATE shards SET owner = 'wr', generation = 1, epoch = 1")
    yield url, connection
    await connection.close()


async def test_a_shard_that_another_writer_took_throws_no_other_shards_batch_away(
    ledger: tuple[str, asyncpg.Connection],
) -> None:
    url, connection = ledger
    shards = {number: shard(number) for number in range(3)}
    await connection.execute("UPDATE shards SET owner = 'another', generation = 2 WHERE shard = 1")
    store = OddStore()
    persister = Persister(url, "wr", store, shards, lambda *_: None, LedgerClock())
    await persister.turn()
    assert store.told == [0, 2]
    assert [shards[number].identity for number in range(3)] == [HERE, None, HERE]
    rows = await connection.fetch("SELECT shard FROM events ORDER BY shard")
    assert [row["shard"] for row in rows] == [0, 2]
    persister.session.close()


async def test_a_store_that_cannot_be_reached_is_the_trouble_of_all_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    shards = {number: shard(number) for number in range(2)}
    lender = Lender("", "wr", ShardControl("redis://127.0.0.1:1", 2, Scripts()), shards, 20, 20)

    async def away() -> None:
        raise StoreError("away")

    with pytest.raises(StoreError):
        await lender._guarded(shards[0], shards[0].owned, away())
    assert shards[0].identity is HERE


async def test_a_stream_of_another_type_is_its_own_shards_trouble(make_stack: MakeStack) -> None:
    """One command reads the streams of all shards, and fails for one of them."""
    stack = await make_stack()
    stack.writer()
    stack.api()
    await stack.ready()
    async with await stack.client() as http:
        books = await books_in_every_shard(http)
        await until(lambda: serves(http, books), what="every shard should be served")
        redis = stack.redis()
        await stack.drained()
        await redis.set(ShardKeys(int(books[0][3:5]), SHARDS).events, "by hand")
        await asyncio.sleep(3)
        for _ in range(20):
            answers = await asyncio.gather(
                *(http.post("/coupons/assign", json={"book_id": book, "user_id": "u"}) for book in books[1:])
            )
            assert [answer.status_code for answer in answers] == [201] * (SHARDS - 1)
            await asyncio.sleep(0.1)
        await redis.aclose()
