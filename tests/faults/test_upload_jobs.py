"""Jobs of upload files: worked off once, whoever dies, and nobody waits for them."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import asyncpg
import httpx
import pytest

from coupon_svc.dev.servers import EmbeddedPostgres, EmbeddedRedis
from coupon_svc.domain.upload_files import Batch
from coupon_svc.postgres import jobs, staging
from coupon_svc.postgres.books import WRITER_CHANNEL
from coupon_svc.postgres.codes import PIECE_CODES
from coupon_svc.postgres.errors import LedgerUnavailable
from coupon_svc.postgres.jobs import PIECE_ROWS, Job
from tests.bare_books import insert_bare_book
from tests.conftest import SHARDS
from tests.harness import Stack, fresh_database, running_stack, until
from tests.http.helpers import assign, counters, make_book, patch, upload
from tests.http.test_upload_files import over, send
from tests.test_verify import report_of

CODES = [f"JOB-{number:05}" for number in range(9_000)]
FILE = "\n".join(reversed(CODES)).encode()
BODY_LINES = 6_000
"""Of 10 kB each: more than the memory that a body of any length may take."""
GROWTH_MIB_MAX = 32
TAKEN_OVER_S = 10.0
STALL = 4712


@pytest.fixture(scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory, postgres_url: str) -> AsyncIterator[Stack]:
    async with running_stack(tmp_path_factory.mktemp("jobs"), postgres_url, SHARDS) as stack:
        yield stack


@pytest.fixture
async def stack(running: Stack) -> AsyncIterator[Stack]:
    """A stack whose jobs can be held up. Its newest part is an API process: who kills it starts another."""
    yield running
    report = await report_of(running)
    assert report.holds, report
    await until(lambda: emptied(running), what="nothing should be staged any more")
    assert await running.ledger("SELECT FROM staged_codes") == []


@pytest.fixture
def tenant() -> str:
    return "t" + secrets.token_hex(6)


async def emptied(stack: Stack) -> bool:
    return not await stack.ledger("SELECT FROM jobs WHERE NOT emptied")


@contextlib.asynccontextmanager
async def held_up(stack: Stack, after: int) -> AsyncIterator[Callable[[], Awaitable[bool]]]:
    """While in force, no job moves on that has worked off `after` rows. Gives whether one is held up."""
    await stack.ledger(
        "CREATE FUNCTION stall() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        f" PERFORM pg_advisory_xact_lock({STALL}); RETURN NEW; END $$"
    )
    await stack.ledger(
        "CREATE TRIGGER stall BEFORE UPDATE ON jobs FOR EACH ROW"
        f" WHEN (NEW.done_rows > OLD.done_rows AND OLD.done_rows >= {after}) EXECUTE FUNCTION stall()"
    )
    holder = await asyncpg.connect(stack.database_url)
    await holder.execute(f"SELECT pg_advisory_lock({STALL})")

    async def is_held_up() -> bool:
        waits = f"SELECT FROM pg_locks WHERE locktype = 'advisory' AND objid = {STALL} AND NOT granted"
        return bool(await stack.ledger(waits))

    try:
        yield is_held_up
    finally:
        await holder.close()
        await stack.ledger("DROP FUNCTION stall CASCADE")


@contextlib.asynccontextmanager
async def file_held_up(stack: Stack, client: httpx.AsyncClient) -> AsyncIterator[tuple[str, httpx.Response]]:
    """A new book, and the answer to FILE, which is sent into it. While in force, the job has worked off some and waits."""
    book = await make_book(client, codes=[])
    async with held_up(stack, 2 * PIECE_ROWS) as is_held_up:
        sent = await send(client, book, FILE)
        await until(is_held_up)
        yield book, sent


async def job_of(client: httpx.AsyncClient, sent: httpx.Response) -> tuple[str, int]:
    """(status, codes inserted so far)."""
    job = (await client.get(sent.headers["location"])).json()
    return job["status"], job["inserted"]


async def test_another_process_goes_on_with_the_job_of_one_that_died(stack: Stack, tenant: str) -> None:
    dying = stack.parts[-1]
    async with await stack.client(tenant) as client:
        book = await make_book(client, codes=[CODES[4_711]])
        async with held_up(stack, 2 * PIECE_ROWS) as is_held_up:
            sent = await send(client, book, FILE + b"\nno\n" + FILE)
            await until(is_held_up)
            assert await job_of(client, sent) == ("running", PIECE_ROWS)
            dying.kill()
    stack.api(1)
    await stack.ready()
    async with await stack.client(tenant) as client:
        async with asyncio.timeout(TAKEN_OVER_S):
            job = await over(client, sent)
        assert (job["status"], job["received"], job["inserted"]) == ("succeeded", 18_001, 8_999)
        assert (job["duplicates"], job["invalid"]) == (9_001, 1)
        assert (await counters(client, book))["available"] == 9_000
    rows = await stack.ledger(
        "SELECT count(*) AS rows, count(DISTINCT row) AS different FROM rejected_codes JOIN jobs USING (job_no)"
        " WHERE book_id = $1",
        book,
    )
    assert tuple(rows[0]) == (9_002, 9_002)


async def running_job(connection: asyncpg.Connection, codes: list[str]) -> Job:
    """A job with these codes, in a new book of a new tenant, of which nothing was worked off."""
    await connection.execute("INSERT INTO tenants (name) VALUES ('t')")
    book = "bk_000123456789abcdef"
    await insert_bare_book(connection, book)
    opened = await staging.open_job(connection, 1, book, "job_1", None)
    await staging.stage(connection, opened.job_no, Batch(codes, list(range(1, len(codes) + 1)), []))
    return await staging.complete(connection, opened.job_no, staging.Received(len(codes), 0, 0, None, []))


async def test_a_piece_that_was_done_is_not_done_again(postgres_url: str) -> None:
    """By a process that has not heard of it: its turn may have ended with its connection."""
    connection = await asyncpg.connect(await fresh_database(postgres_url, 1))
    running = await running_job(connection, CODES[:1_500])
    moved = await jobs.add_piece(connection, running)
    assert (moved.done_rows, moved.inserted) == (PIECE_ROWS, PIECE_ROWS)
    with pytest.raises(LedgerUnavailable):
        await jobs.add_piece(connection, running)
    done = await jobs.add_piece(connection, moved)
    assert (done.inserted, done.duplicates, done.is_worked_off) == (1_500, 0, True)
    assert await connection.fetch("SELECT FROM rejected_codes") == []
    await connection.close()


@pytest.mark.parametrize("rows", [2 * PIECE_ROWS, 2 * PIECE_ROWS + 1], ids=["full", "not full"])
async def test_the_last_piece_of_a_job_tells_the_owner_of_the_book(rows: int, postgres_url: str) -> None:
    """Of pieces before it the owner hears only now and then. Without the last one, codes would wait for its next look."""
    connection = await asyncpg.connect(await fresh_database(postgres_url, 1))
    job = await running_job(connection, CODES[:rows])
    heard: list[object] = []
    await connection.add_listener(WRITER_CHANNEL, lambda *notified: heard.append(notified))
    told = []
    while not job.is_worked_off:
        heard.clear()
        job = await jobs.add_piece(connection, job)
        await connection.execute("SELECT")  # its reply comes behind what the owner would hear
        told.append(bool(heard))
    assert told == [False] * (len(told) - 1) + [True]
    await connection.close()


async def test_a_job_goes_on_when_postgres_has_ended_its_connections(stack: Stack, tenant: str) -> None:
    async with await stack.client(tenant) as client:
        async with file_held_up(stack, client) as (book, sent):
            await stack.ledger(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND application_name LIKE 'coupon-%'"
            )
        job = await over(client, sent)
        assert (job["status"], job["inserted"], job["duplicates"]) == ("succeeded", 9_000, 0)
        await stack.ready()
        assert (await counters(client, book))["available"] == 9_000


@pytest.mark.chaos
@pytest.mark.parametrize("crash", [False, True], ids=["restarted", "crashed"])
async def test_a_job_survives_a_restart_of_postgres(tmp_path: Path, crash: bool) -> None:
    """Pieces are committed without a wait for the disk: of a server that crashes, the last ones are done again."""
    with EmbeddedPostgres(tmp_path / "postgres") as postgres, EmbeddedRedis(tmp_path / "redis") as server:
        stack = Stack(server, server.url, await fresh_database(postgres.admin_url, 2), tmp_path, 2)
        try:
            stack.writer()
            stack.api()
            await stack.ready()
            async with await stack.client("t") as client:
                book = await make_book(client, codes=[])
                body = "\n".join(f"LONG-{number:06}" for number in range(60_000)).encode()
                sent = await send(client, book, body)

                async def under_way() -> bool:
                    return 2_000 <= (await job_of(client, sent))[1] < 58_000

                await until(under_way)
                (postgres.kill if crash else postgres.stop)()
                postgres.start()

                async def succeeded() -> bool:
                    answer = await client.get(sent.headers["location"])
                    return answer.status_code == 200 and answer.json()["status"] != "running"

                await until(succeeded, 60)
                assert await job_of(client, sent) == ("succeeded", 60_000)
                await stack.ready()
                assert (await counters(client, book))["available"] == 60_000
            report = await report_of(stack)
            assert report.holds, report
        finally:
            stack.close()


async def test_no_transaction_that_holds_a_book_writes_more_than_a_piece(stack: Stack, tenant: str) -> None:
    """However large a file or a list is: who wants the row of the book waits for so many rows at most."""
    await stack.ledger("CREATE TABLE written (tx xid8, rows bigint)")
    await stack.ledger(
        "CREATE FUNCTION note_written() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " INSERT INTO written SELECT pg_current_xact_id(), count(*) FROM changed; RETURN NULL; END $$"
    )
    for verb in ("INSERT", "UPDATE"):
        await stack.ledger(
            f"CREATE TRIGGER note_{verb} AFTER {verb} ON codes REFERENCING NEW TABLE AS changed"
            " FOR EACH STATEMENT EXECUTE FUNCTION note_written()"
        )

    async def most() -> int:
        (row,) = await stack.ledger(
            "SELECT max(rows)::int AS most FROM (SELECT sum(rows) AS rows FROM written GROUP BY tx) transactions"
        )
        return int(row["most"])

    async with await stack.client(tenant) as client:
        book = await make_book(client, codes=[])
        assert (await over(client, await send(client, book, FILE)))["inserted"] == 9_000
        assert await most() == PIECE_ROWS
        assert (await upload(client, book, [f"LIST-{number}" for number in range(4_500)]))["inserted"] == 4_500
        assert await most() == PIECE_CODES
    await stack.ledger("DROP FUNCTION note_written CASCADE")
    await stack.ledger("DROP TABLE written")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
async def test_a_body_of_any_length_takes_little_memory(stack: Stack, tenant: str) -> None:
    stack.parts[-1].kill()
    pid = stack.api().process.pid  # one that has used little memory so far
    await stack.ready()

    def memory_mib(field: str) -> float:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))

    async def body() -> AsyncIterator[bytes]:
        for start in range(0, BODY_LINES, 100):
            yield b"".join(b"MB-%06d,%b\n" % (number, b"x" * 10_000) for number in range(start, start + 100))

    async with await stack.client(tenant) as client:
        book = await make_book(client, codes=[])
        await over(client, await send(client, book, b"FIRST-1\n"))
        before = memory_mib("VmRSS")
        job = await over(client, await send(client, book, body()))
        assert (job["inserted"], job["invalid"]) == (BODY_LINES, 0)
        assert memory_mib("VmHWM") - before < GROWTH_MIB_MAX


async def test_a_book_that_is_closed_meanwhile_keeps_what_is_in(stack: Stack, tenant: str) -> None:
    async with await stack.client(tenant) as client:
        async with file_held_up(stack, client) as (book, sent):
            closing = asyncio.create_task(patch(client, book, status="closed"))
            await asyncio.sleep(0.2)
        await closing
        job = await over(client, sent)
        assert (job["status"], job["error"]) == ("failed", "book_closed")
        assert 2_000 <= job["inserted"] < 9_000
        assert (await counters(client, book))["total"] == job["inserted"]
        assert job["finished_at"] is not None


async def test_hot_work_and_other_uploads_of_the_tenant_do_not_wait_for_a_job(stack: Stack, tenant: str) -> None:
    async with await stack.client(tenant) as client:
        other = await make_book(client)
        book = await make_book(client, codes=[f"NAMED-{number}" for number in range(15)])
        body = "\n".join(f"LONG-{number:06}" for number in range(60_000)).encode()
        sent = await send(client, book, body)
        done = 0
        while (await job_of(client, sent))[0] == "running":
            await assign(client, other, f"u{done}")
            named = await client.post(f"/coupons/assign/NAMED-{done}", json={"user_id": "u"})
            assert named.status_code == 201, named.text
            await patch(client, book, name=f"b{done}")
            await upload(client, book, [f"SMALL-{done}"])
            if done == 2:  # needs the turn
                await upload(client, other, [f"TURN-{number}" for number in range(2_500)])
            done += 1
            if done >= 15:
                break
        assert done >= 2
        assert (await over(client, sent))["inserted"] == 60_000


@pytest.mark.chaos
async def test_a_body_whose_receiver_has_died_is_given_up(stack: Stack, tenant: str) -> None:
    async with await stack.client(tenant) as client:
        book = await make_book(client, codes=[])

        async def half() -> AsyncIterator[bytes]:
            yield FILE * 3
            await asyncio.sleep(60)

        request = asyncio.create_task(send(client, book, half(), {"Content-Type": "text/csv", "Idempotency-Key": "k"}))

        async def staged() -> bool:
            return bool(await stack.ledger("SELECT FROM staged_codes"))

        await until(staged)
        stack.parts[-1].kill()
        with contextlib.suppress(httpx.TransportError):
            await request
    await stack.ledger("UPDATE jobs SET touched_at = touched_at - interval '1 hour'")
    stack.api(1)
    await stack.ready()

    async def gone() -> bool:
        rows = await stack.ledger("SELECT state, error, emptied FROM jobs WHERE book_id = $1", book)
        return [tuple(row) for row in rows] == [("failed", "broken_off", True)]

    await until(gone)
    async with await stack.client(tenant) as client:
        sent = await send(client, book, FILE, {"Content-Type": "text/csv", "Idempotency-Key": "k"})
        assert (await over(client, sent))["inserted"] == 9_000
