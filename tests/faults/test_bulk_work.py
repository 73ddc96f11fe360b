"""Uploads and generations of any size stop nobody else, and leave nothing half done, whoever dies."""

from __future__ import annotations

import asyncio
import contextlib
import math
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any, NamedTuple

import asyncpg
import httpx
import pytest

from coupon_svc.dev.servers import EmbeddedRedis
from coupon_svc.domain.books import BookStatus
from coupon_svc.domain.chain import CHAIN_START
from coupon_svc.domain.codes import Generated, Pattern
from coupon_svc.domain.outcomes import Outcome, Refused
from coupon_svc.http.books import BookAnswers
from coupon_svc.postgres.codes import insert_codes
from coupon_svc.postgres.database import Database
from coupon_svc.postgres.lending import lease_block
from coupon_svc.postgres.shards import OwnedShard
from coupon_svc.postgres.uploads import Uploads
from coupon_svc.redis.calls import bind_operation
from coupon_svc.redis.contract import Reply
from coupon_svc.redis.data_plane import DataPlane
from coupon_svc.redis.scripts import Scripts
from coupon_svc.redis.shard_view import ShardView
from coupon_svc.service.books import BookChanges, Books, UpdateBook
from tests.bare_books import insert_bare_book
from tests.conftest import SHARDS
from tests.harness import Stack, fresh_database, running_stack, until
from tests.http.helpers import counters, make_book, refused, upload
from tests.test_verify import report_of

SWEPT_S = 60.0
BOOK = "bk_000123456789abcdef"
CODES = [f"MANY-{number:05}" for number in range(6_000)]


@pytest.fixture(scope="module")
async def service(tmp_path_factory: pytest.TempPathFactory, postgres_url: str) -> AsyncIterator[Stack]:
    """A service that lends a few codes at a time, of these tests' own: what they do takes all of it."""
    folder = tmp_path_factory.mktemp("bulk")
    with EmbeddedRedis(folder / "redis") as server:
        stack = Stack(server, server.url, await fresh_database(postgres_url, 2), folder, 2)
        stack.patient = True
        stack.writer(COUPON_LEASE_CODES_MIN="10", COUPON_LEASE_CODES_MAX="10")
        stack.api()
        await stack.ready()
        yield stack
        report = await report_of(stack)
        assert report.holds, report
        stack.close()


async def generate(client: httpx.AsyncClient, book_id: str, pattern: str, total: int) -> httpx.Response:
    body = {"book_id": book_id, "generate": {"pattern": pattern, "total": total}}
    return await client.post("/coupons/codes", json=body, timeout=120)


# --- nobody stops the others


async def test_a_book_is_paused_lent_and_added_to_while_codes_are_generated_into_it(
    client: httpx.AsyncClient,
) -> None:
    """Each of these needs the row of the book. One that waited for the generation would have its turn once."""
    book = await make_book(client, codes=[f"NAMED-{number}" for number in range(1_000)])
    generation = asyncio.create_task(generate(client, book, "G-##########", 60_000))
    done = 0
    while not generation.done():
        for status in ("paused", "active"):
            answer = await client.patch(f"/coupons/{book}", json={"status": status})
            assert answer.status_code == 200, answer.text
        answer = await client.post(f"/coupons/assign/NAMED-{done}", json={"user_id": "u"})
        assert answer.status_code in (200, 201), answer.text  # 200: it was drawn at random below
        for _ in range(20):  # two blocks: the pool must be filled again
            answer = await client.post("/coupons/assign", json={"book_id": book, "user_id": "u"})
            assert answer.status_code == 201 or answer.json()["code"] == "already_assigned", answer.text
        assert (await upload(client, book, [f"MORE-{done}"]))["inserted"] == 1
        done += 1
    assert (await generation).status_code == 200
    assert done >= 3
    assert (await counters(client, book))["total"] == 61_000 + done


@pytest.mark.chaos
async def test_ten_generations_of_one_tenant_are_nothing_to_another(client: httpx.AsyncClient, service: Stack) -> None:
    crowd = await make_book(client, codes=[])
    generations = [asyncio.create_task(generate(client, crowd, f"T{n}-##########", 30_000)) for n in range(10)]
    rounds = 0
    async with await service.client() as other:
        other._transport = httpx.AsyncHTTPTransport()  # one that does not ask again
        while not all(generation.done() for generation in generations):
            book = await make_book(other, generate={"pattern": "########", "total": 20})
            code = f"O-{rounds}"
            await upload(other, book, [code])
            calls = [
                other.post(f"/coupons/assign/{code}", json={"user_id": "u"}),
                other.patch(f"/coupons/{book}", json={"name": "another"}),
                other.get("/coupons"),
                other.post(
                    "/coupons/codes", json={"book_id": book, "generate": {"pattern": "#######", "total": 3_000}}
                ),
            ]
            answers = await asyncio.gather(*calls)
            assert [answer.status_code for answer in answers] == [201, 200, 200, 200], [a.text for a in answers]
            rounds += 1
    assert rounds >= 2
    answers = [await generation for generation in generations]
    done = [answer for answer in answers if answer.status_code == 200]
    for answer in answers:
        if answer not in done:  # its turn did not come in time
            assert "Nothing was done" in refused(answer, 503, "store_unavailable")["detail"]
    assert done
    assert (await counters(client, crowd))["total"] == 30_000 * len(done)


class Ledger(NamedTuple):
    """A database with one book, in which this test is the shard's owner."""

    url: str
    connection: asyncpg.Connection
    owned: OwnedShard


@pytest.fixture
async def ledger(postgres_url: str) -> AsyncIterator[Ledger]:
    url = await fresh_database(postgres_url, 1)
    connection = await asyncpg.connect(url)
    await connection.execute("INSERT INTO tenants (name) VALUES ('t')")
    await connection.execute("UPDATE shards SET owner = 'test', generation = 1, epoch = 1")
    await insert_bare_book(connection, BOOK)
    yield Ledger(url, connection, OwnedShard(0, epoch=1, generation=1, committed=0, chain=CHAIN_START, tip=""))
    await connection.close()


@pytest.fixture
async def pool(ledger: Ledger) -> AsyncIterator[Callable[[], Database]]:
    """Makes pools of connections to the ledger, as API processes have them."""
    pools: list[Database] = []

    def make() -> Database:
        pools.append(Database(ledger.url, "test", size=2))
        return pools[-1]

    yield make
    for made in pools:
        await made.close()


async def test_who_waits_too_long_for_a_turn_is_refused_and_nothing_was_done(
    ledger: Ledger, pool: Callable[[], Database]
) -> None:
    one, other = Uploads(pool()), Uploads(pool())  # as in two processes
    async with one.turn(1):
        async with other.turn(2, wait_s=0):
            pass
        for uploads in (one, other):
            with pytest.raises(Refused) as refusal:
                async with uploads.turn(1, wait_s=0.2):
                    pass
            assert refusal.value.outcome is Outcome.STORE_UNAVAILABLE
    async with other.turn(1, wait_s=0.2):
        pass


async def test_a_refill_has_its_turn_beside_writers_that_never_leave_the_row(ledger: Ledger) -> None:
    await insert_codes(ledger.connection, 1, BOOK, CODES[:50])
    ended = asyncio.Event()

    async def hold() -> None:
        connection = await asyncpg.connect(ledger.url)
        while not ended.is_set():
            async with connection.transaction():
                await connection.execute("SELECT FROM books WHERE book_id = $1 FOR UPDATE", BOOK)
                await asyncio.sleep(0.03)
        await connection.close()

    holders = [asyncio.create_task(hold()) for _ in range(3)]
    await asyncio.sleep(0.3)
    leases = [await lease_block(ledger.connection, "test", ledger.owned, BOOK, 5) for _ in range(5)]
    ended.set()
    await asyncio.gather(*holders)
    assert [len(lease.codes) for lease in leases if lease is not None][:3] == [5] * 3


async def test_a_refill_does_not_wait_long_for_a_row_that_stays_locked(ledger: Ledger) -> None:
    await insert_codes(ledger.connection, 1, BOOK, CODES[:50])
    holder = await asyncpg.connect(ledger.url)
    async with holder.transaction():
        await holder.execute("SELECT FROM books WHERE book_id = $1 FOR UPDATE", BOOK)
        async with asyncio.timeout(5):
            assert await lease_block(ledger.connection, "test", ledger.owned, BOOK, 5) is None
    await holder.close()
    lease = await lease_block(ledger.connection, "test", ledger.owned, BOOK, 5)
    assert lease is not None
    assert len(lease.codes) == 5


async def test_a_book_that_never_runs_dry_keeps_a_place_for_each_code(ledger: Ledger) -> None:
    """Half of what is left is lent before more is added, again and again: the places that are left halve each time."""
    for turn in range(60):
        await insert_codes(ledger.connection, 1, BOOK, [f"TOP-{turn}-{number}" for number in range(100)])
        lease = await lease_block(ledger.connection, "test", ledger.owned, BOOK, 100)
        assert lease is not None
        assert 100 <= len(lease.codes) <= 110
        if turn == 0:
            await insert_codes(ledger.connection, 1, BOOK, [f"REST-{number}" for number in range(100)])
    alike = await ledger.connection.fetchval("SELECT count(*) - count(DISTINCT place) FROM codes WHERE place > 0")
    assert alike < 300


# --- nothing is left half done


async def stalled(stack: Stack, statement: str) -> asyncpg.Connection:
    """A session whose open transaction has run the statement: whoever needs what it has locked stands still."""
    connection = await asyncpg.connect(stack.database_url)
    await connection.execute(f"BEGIN; {statement}")
    return connection


async def killed_in(
    stack: Stack, tenant: str, where: str, body: dict[str, Any], key: str, path: str = "/coupons/codes"
) -> None:
    """Send a request, and kill the API when its upload is not yet `decided`, or when it is and some codes are placed."""
    # The first piece of what is decided moves the book's counts; the second is held up, by a trigger.
    await stack.ledger(
        "CREATE FUNCTION stall() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " PERFORM pg_advisory_xact_lock(4711); RETURN NEW; END $$"
    )
    if where == "undecided":
        await stack.ledger("CREATE TRIGGER stall BEFORE UPDATE ON uploads FOR EACH ROW EXECUTE FUNCTION stall()")
    else:
        await stack.ledger(
            "CREATE TRIGGER stall BEFORE UPDATE ON books FOR EACH ROW WHEN (NEW.total - OLD.total > 0 AND OLD.total > 0)"
            " EXECUTE FUNCTION stall()"
        )
    holder = await stalled(stack, "SELECT pg_advisory_xact_lock(4711)")
    async with await stack.client(tenant) as client:
        request = asyncio.create_task(client.post(path, json=body, headers={"Idempotency-Key": key}))

        async def waits() -> bool:
            assert not request.done(), request.result().text
            rows = await stack.ledger(
                "SELECT FROM pg_locks WHERE locktype = 'advisory' AND objid = 4711 AND NOT granted"
            )
            return bool(rows)

        await until(waits)
        in_progress = await client.post(path, json=body, headers={"Idempotency-Key": key})
        refused(in_progress, 409, "idempotency_in_progress")
        stack.newest(serves=True).kill()
        with contextlib.suppress(httpx.TransportError):
            await request
    await stack.ledger(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'coupon-api-uploads'"
    )
    await holder.close()
    await stack.ledger("DROP FUNCTION stall CASCADE")


@pytest.fixture(scope="module")
async def uploading(tmp_path_factory: pytest.TempPathFactory, postgres_url: str) -> AsyncIterator[Stack]:
    async with running_stack(tmp_path_factory.mktemp("uploading"), postgres_url, SHARDS) as stack:
        yield stack


@pytest.fixture
async def stack(uploading: Stack) -> AsyncIterator[Stack]:
    """A stack whose parts may be killed: who kills one starts another."""
    yield uploading
    report = await report_of(uploading)
    assert report.holds, report
    assert await uploading.ledger("SELECT FROM uploads") == []


@pytest.fixture
def tenant() -> str:
    return "t" + secrets.token_hex(6)


@pytest.mark.parametrize("where", ["undecided", "decided"])
async def test_a_list_is_added_once_whatever_died_on_the_way(stack: Stack, tenant: str, where: str) -> None:
    async with await stack.client(tenant) as client:
        book = await make_book(client, codes=[])
        body = {"book_id": book, "codes": CODES}
        await killed_in(stack, tenant, where, body, "k")
        counts = "SELECT count(*) AS all, count(*) FILTER (WHERE place > 0) AS placed FROM codes WHERE book_id = $1"
        rows = await stack.ledger(counts, book)
        assert tuple(rows[0]) == (6_000, 2_000 if where == "decided" else 0)
    stack.api()
    await stack.ready()
    async with await stack.client(tenant) as client:
        answer = await client.post("/coupons/codes", json=body, headers={"Idempotency-Key": "k"})
        assert answer.status_code == 200, answer.text
        assert (answer.json()["inserted"], answer.json()["duplicates"]) == (6_000, 0)
        assert ("idempotent-replayed" in answer.headers) == (where == "decided")
        assert (await counters(client, book))["available"] == 6_000


@pytest.mark.parametrize("where", ["undecided", "decided"])
async def test_a_book_is_made_once_whatever_died_on_the_way(stack: Stack, tenant: str, where: str) -> None:
    body = {"name": "b", "generate": {"pattern": "B-########", "total": 6_000}}
    await killed_in(stack, tenant, where, body, "k", "/coupons")
    stack.api()
    await stack.ready()
    async with await stack.client(tenant) as client:
        assert len((await client.get("/coupons")).json()["books"]) == (1 if where == "decided" else 0)
        answer = await client.post("/coupons", json=body, headers={"Idempotency-Key": "k"})
        assert answer.status_code == 201, answer.text
        assert ("idempotent-replayed" in answer.headers) == (where == "decided")
        (book,) = (await client.get("/coupons")).json()["books"]
        assert book == answer.json()
        assert book["codes"]["available"] == 6_000


async def test_what_a_dead_upload_has_left_goes_by_itself(stack: Stack, tenant: str) -> None:
    books = {}
    for where in ("undecided", "decided"):
        async with await stack.client(tenant) as client:
            books[where] = await make_book(client, codes=[])
            await killed_in(
                stack, tenant, where, {"book_id": books[where], "codes": [f"{where}-{code}" for code in CODES]}, where
            )
        stack.api()
        await stack.ready()

    async def over() -> bool:
        return not await stack.ledger("SELECT FROM uploads")

    await until(over, SWEPT_S)
    rows = await stack.ledger(
        "SELECT book_id, count(*), count(*) FILTER (WHERE place > 0) FROM codes WHERE book_id = ANY ($1) GROUP BY book_id",
        list(books.values()),
    )
    assert [tuple(row) for row in rows] == [(books["decided"], 6_000, 6_000)]


async def test_codes_of_a_dead_upload_can_be_added_again_by_anybody_of_the_tenant(stack: Stack, tenant: str) -> None:
    async with await stack.client(tenant) as client:
        dead, other = await make_book(client, codes=[]), await make_book(client, codes=[])
        await killed_in(stack, tenant, "undecided", {"book_id": dead, "codes": CODES}, "k")
    stack.api()
    await stack.ready()
    async with await stack.client(tenant) as client:
        refused(await client.get(f"/coupons/codes/{CODES[0]}"), 404, "code_not_found")
        refused(await client.post(f"/coupons/assign/{CODES[0]}", json={"user_id": "u"}), 404, "code_not_found")
        assert (await upload(client, other, CODES[:10]))["inserted"] == 10
        assert (await counters(client, dead))["total"] == 0


async def test_an_upload_into_a_book_that_is_closed_meanwhile_adds_nothing(
    ledger: Ledger, pool: Callable[[], Database]
) -> None:
    uploads = Uploads(pool())

    async def closed(*_: object) -> None:
        raise Refused(Outcome.BOOK_CLOSED)

    async with uploads.turn(1) as turn:
        with pytest.raises(Refused):
            await turn.add(BOOK, CODES, closed)
        with pytest.raises(Refused):
            await turn.add(BOOK, Generated(Pattern("X-####", "0123456789"), 5_000), closed)
    assert await ledger.connection.fetch("SELECT FROM codes UNION ALL SELECT FROM uploads") == []


# --- what was answered is there


async def patient(answer: Callable[[], Awaitable[httpx.Response]], codes: tuple[str, ...]) -> httpx.Response:
    """The first answer that is none of these refusals."""

    async def other() -> httpx.Response | None:
        got = await answer()
        return None if got.status_code >= 400 and got.json()["code"] in codes else got

    got = await until(other)
    assert got is not None
    return got


@pytest.mark.parametrize(("uploaded", "generated"), [(3_000, 3), pytest.param(3, 3_000, marks=pytest.mark.chaos)])
async def test_a_replay_waits_for_what_the_first_answer_waited_for(
    stack: Stack, tenant: str, uploaded: int, generated: int
) -> None:
    async with await stack.client(tenant) as client:
        book = await make_book(client, codes=[])
        stack.newest(serves=False).stop()
        upload_it = {"book_id": book, "codes": CODES[:uploaded]}
        create_it = {"name": "b", "generate": {"pattern": "R-########", "total": generated}}
        asks = [
            partial(client.post, "/coupons/codes", json=upload_it, headers={"Idempotency-Key": "upload"}),
            partial(client.post, "/coupons", json=create_it, headers={"Idempotency-Key": "creation"}),
        ]
        for _ in range(2):
            for answer in await asyncio.gather(*(ask() for ask in asks)):
                refused(answer, 503, "outcome_unknown")
        stack.writer()
        added, made = await asyncio.gather(*(patient(ask, ("outcome_unknown",)) for ask in asks))
        assert added.json()["inserted"] == uploaded
        assert "idempotent-replayed" in added.headers
        assert made.status_code == 201, made.text
        for book_id in (book, made.json()["book_id"]):
            assigned = await client.post("/coupons/assign", json={"book_id": book_id, "user_id": "u"})
            assert assigned.status_code == 201, assigned.text


class GoneAfter(DataPlane):
    """A data plane whose Redis has the change, and is gone when it is asked again."""

    def __init__(self, version: int) -> None:
        super().__init__("redis://127.0.0.1:1", 1, Scripts())
        self._versions = [version]

    async def call(self, name: str, view: ShardView, until: float = math.inf, /, **parameters: Any) -> Reply:
        if not self._versions:
            raise Refused(Outcome.STORE_UNAVAILABLE)
        operation = bind_operation(self._scripts.operations[name].contract)
        return operation.reply(["ok", str(self._versions.pop()), "{}", 0, 0, 0, 0, 0])


async def test_a_change_that_was_made_is_never_answered_as_nothing_was_done(
    ledger: Ledger, pool: Callable[[], Database]
) -> None:
    database = pool()
    waiting: Any = None
    books = Books(GoneAfter(2), waiting, database, Uploads(database), 1, BookAnswers())
    with pytest.raises(Refused) as refusal:
        await books.update_book(UpdateBook(1, BOOK, BookChanges(status=BookStatus.PAUSED)))
    assert refusal.value.outcome is Outcome.OUTCOME_UNKNOWN
    assert await ledger.connection.fetchval("SELECT status FROM books") == "paused"
