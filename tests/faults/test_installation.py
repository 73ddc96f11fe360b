"""An installation is one database and the Redis that belongs to it: who comes with the wrong address touches nothing."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import httpx
import pytest

from coupon_svc.domain.upload_files import Batch
from coupon_svc.postgres import staging
from coupon_svc.postgres.errors import DatabaseUnfit
from coupon_svc.postgres.migrations import check_installation, known_migrations, migrate
from coupon_svc.redis.data_plane import DataPlane
from coupon_svc.redis.errors import ReplyError
from coupon_svc.redis.keys import ShardKeys
from coupon_svc.redis.scripts import Scripts
from tests.bare_books import insert_bare_book
from tests.conftest import SHARDS
from tests.harness import Stack, fresh_database, until
from tests.http.helpers import make_book, refused

MakeStack = Callable[[], Awaitable[Stack]]


def seen_by(plane: DataPlane) -> list[tuple[int, tuple[int, int]]]:
    return [(report.shard, (report.epoch, report.seen_seq)) for report in plane.reports()]


async def test_a_second_installation_with_our_redis_changes_nothing_of_ours(
    make_stack: MakeStack, postgres_url: str
) -> None:
    ours = await make_stack()
    ours.writer()
    ours.api()
    await ours.ready()
    theirs = Stack(None, ours.redis_url, await fresh_database(postgres_url, ours.shards), ours.folder, ours.shards)
    async with await ours.client() as http, ours.redis() as client:
        redis: Any = client
        book_id = await make_book(http)
        await ours.drained()
        metas = [ShardKeys(shard, ours.shards).meta for shard in range(ours.shards)]

        async def owners() -> list[Any]:
            return [await redis.hmget(meta, "epoch", "generation", "installation", "recovery") for meta in metas]

        before = await owners()
        # Of the strangers one has fewer generations and epochs than we have, the other more.
        for generation in (0, 1000):
            await theirs.ledger("UPDATE shards SET generation = $1, epoch = $1", generation)
            writer, api = theirs.writer(), theirs.api()
            log = ours.folder / "writer.log"

            async def said(log: object = log) -> bool:
                return "holds the coupons of installation" in (ours.folder / "writer.log").read_text()

            await until(said, what="the stranger's writer should say whose Redis this is")
            await asyncio.sleep(1.5)
            async with httpx.AsyncClient(base_url=theirs.base_url) as stranger:
                assert (await stranger.get("/readyz")).status_code == 503
            answer = await http.post("/coupons/assign", json={"book_id": book_id, "user_id": f"u{generation}"})
            assert answer.status_code == 201, answer.text
            assert await owners() == before
            writer.kill()
            api.kill()
        theirs.close()
        assert "belongs to installation" in (ours.folder / "api.log").read_text()


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
async def test_a_database_that_cannot_hold_every_user_id_is_refused(postgres_url: str, encoding: str) -> None:
    admin = await asyncpg.connect(postgres_url)
    name = f"test_{encoding.lower()}"
    await admin.execute(f"CREATE DATABASE {name} ENCODING '{encoding}' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0")
    connection = await asyncpg.connect(urlunsplit(urlsplit(postgres_url)._replace(path=f"/{name}")))
    with pytest.raises(DatabaseUnfit, match="UTF-8"):
        await migrate(connection, 4)
    with pytest.raises(DatabaseUnfit, match="UTF-8"):
        await check_installation(connection, 4, known_migrations())
    await connection.close()
    await admin.execute(f"DROP DATABASE {name}")
    await admin.close()


async def test_a_process_is_refused_by_name_what_it_was_not_set_up_for(postgres_url: str) -> None:
    connection = await asyncpg.connect(await fresh_database(postgres_url, 4))
    installation = await check_installation(connection, 4, known_migrations())
    assert re.fullmatch("[0-9a-f]{32}", installation)
    assert await check_installation(connection, 4, known_migrations()) == installation
    with pytest.raises(DatabaseUnfit, match="set COUPON_SHARDS=4"):
        await check_installation(connection, 16, known_migrations())
    await connection.execute("INSERT INTO schema_migrations (name) VALUES ('0999_of_a_newer_version')")
    await connection.execute("INSERT INTO schema_migrations (name, needs) VALUES ('0999_and_another', '0003_ledger')")
    assert await check_installation(connection, 4, known_migrations()) == installation, (
        "these leave this version working"
    )
    await connection.execute("DELETE FROM schema_migrations WHERE name = '0003_ledger'")
    with pytest.raises(DatabaseUnfit, match="lacks 0003_ledger: run `coupon-svc migrate`"):
        await check_installation(connection, 4, known_migrations())
    await connection.execute("DROP TABLE schema_migrations")
    with pytest.raises(DatabaseUnfit, match="run `coupon-svc migrate`"):
        await check_installation(connection, 4, known_migrations())
    await connection.close()


MISFITS = {
    "a schema that is older": (
        "DELETE FROM schema_migrations WHERE name = '0009_bounded_recovery'",
        "This database lacks 0009_bounded_recovery: run `coupon-svc migrate` first.",
    ),
    "a schema that left this version behind": (
        "INSERT INTO schema_migrations (name, needs) VALUES ('0999_columns_are_gone', '0998_columns_are_moved')",
        "This database has 0999_columns_are_gone, with which only versions work that know 0998_columns_are_moved",
    ),
    "another number of shards": (
        "UPDATE settings SET shards = 16",
        f"COUPON_SHARDS is {SHARDS}, but this database was made for 16: set COUPON_SHARDS=16.",
    ),
}


@pytest.mark.parametrize("misfit", MISFITS)
async def test_writer_and_api_say_why_a_database_does_not_fit_and_write_nothing_to_it(
    make_stack: MakeStack, misfit: str
) -> None:
    statement, reason = MISFITS[misfit]
    stack = await make_stack()
    connection = await asyncpg.connect(stack.database_url)
    await connection.execute("INSERT INTO tenants (name) VALUES ('t')")
    await insert_bare_book(connection, "bk_000123456789abcdef")
    job = await staging.open_job(connection, 1, "bk_000123456789abcdef", "job_1", None)
    await staging.stage(connection, job.job_no, Batch(["A-1"], [1], []))
    await staging.complete(connection, job.job_no, staging.Received(1, 0, 0, None, []))
    await connection.close()
    await stack.ledger(statement)
    writer, api = stack.writer(), stack.api()
    assert await writer.died() == 1
    assert writer.said(f"coupon-svc: {reason}")

    async def said() -> bool:
        return api.said(reason)

    await until(said)
    async with await stack.client("t") as http:
        assert (await http.get("/readyz")).status_code == 503
        refused(await http.post("/coupons", json={"name": "b"}), 503, "store_unavailable")
    await asyncio.sleep(1.0)  # a worker looks for jobs when its process starts
    assert len(await stack.ledger("SELECT FROM books")) == 1
    assert not await stack.ledger("SELECT FROM codes"), "no job is worked off"
    assert api.process.poll() is None


# --- what is parsed


class Server:
    """A connection to a Redis whose shards have these metas."""

    def __init__(self, metas: list[dict[str, str]]) -> None:
        self.metas = metas

    async def ask(self, *command: str) -> Any:
        if command[0] == "TIME":
            return ["1000", "0"]
        return "redis_version:7.2.0\r\nrole:master\r\naof_enabled:1\r\nrun_id:r\r\nmaster_replid:p\r\nloading:0\r\n"

    def send(self, *command: str) -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        meta = self.metas[int(command[1].split("{")[1][:2])]
        error = ReplyError("WRONGTYPE Operation against a key holding the wrong kind of value")
        future.set_result(error if meta is ANOTHER_TYPE else [meta.get(field) for field in command[2:]])
        return future


ANOTHER_TYPE: dict[str, str] = {}
"""In the place of a meta that is another kind of key."""


def certified(**changes: str) -> dict[str, str]:
    meta = {"installation": "inst-1", "epoch": "3", "generation": "1", "recovery": "1-3", "run": "r", "replid": "p"}
    numbers = {"seq": "9", "committed": "9", "backlog_max": "10", "ledger_at_ms": "999000", "owner_at_ms": "999000"}
    return meta | numbers | {"format": "2", "tip": "t"} | changes


async def open_shards(
    *metas: dict[str, str], joined: bool = True, registered: bool = True
) -> tuple[DataPlane, list[bool]]:
    plane = DataPlane("redis://127.0.0.1:1", len(metas), Scripts())
    if joined:
        plane.join("inst-1")
    if registered:
        plane.register_until(float("inf"))
    server: object = Server(list(metas))
    await plane.verify(server)  # type: ignore[arg-type]
    return plane, [view.is_open for view in plane.views]


async def test_what_does_not_parse_shuts_its_own_shard_alone() -> None:
    torn = [certified(**{field: "x"}) for field in ("seq", "committed", "backlog_max", "epoch", "format")]
    others = (certified(installation="inst-2"), {"seq": "9"}, ANOTHER_TYPE)
    _, opened = await open_shards(certified(), *torn, *others, certified())
    assert opened == [True, *[False] * 8, True]


async def test_nothing_is_opened_before_postgres_has_said_whose_it_is() -> None:
    assert (await open_shards(certified(), joined=False))[1] == [False]


async def test_a_process_cut_off_from_postgres_leaves_a_redis_to_which_no_owner_speaks() -> None:
    """It may be one that another has replaced, and what it lists and refuses is not so any more."""
    silent = certified(owner_at_ms="984000")
    assert (await open_shards(certified(), silent, registered=False))[1] == [True, False]
    plane, opened = await open_shards(certified(), silent)
    assert opened == [True, True]
    plane.register_until(0)
    server: object = Server([certified(), silent])
    await plane.verify(server)  # type: ignore[arg-type]
    assert [view.is_open for view in plane.views] == [True, False], "it is shut where it was open, too"


async def test_what_a_certified_redis_says_is_committed_is_kept_no_longer() -> None:
    plane, _ = await open_shards(certified())
    for seq in (10, 11):
        plane.views[0].keep(3, seq, f"tip-{seq}", ["1", "", "5", "[]"])
    server: object = Server([certified(seq="11", committed="10")])
    await plane.verify(server)  # type: ignore[arg-type]
    assert [entry.seq for report in plane.reports() for entry in report.entries] == [11]


async def test_every_process_has_seen_what_the_ledger_has() -> None:
    """An event at or below it is none that this process can have made: keys of a moment ago were put back."""
    plane, _ = await open_shards(certified())
    plane.on_position(0, 3, 14)
    assert seen_by(plane) == [(0, (3, 14))]
    plane.on_position(0, 2, 77)
    assert seen_by(plane) == [(0, (3, 14))]
