"""The functions of the calls on a real server: loaded once, kept, and those of other versions dropped."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from coupon_svc.dev.servers import EmbeddedRedis
from coupon_svc.redis.connection import Connection, connect
from coupon_svc.redis.data_plane import DataPlane
from coupon_svc.redis.errors import ServerUnfit
from coupon_svc.redis.scripts import LIBRARIES, Scripts, bind_library
from coupon_svc.redis.server import drop_other_libraries, load_library
from tests.harness import until
from tests.scripts.runner import Server, Shard

SCRIPTS = Scripts()
OURS = SCRIPTS.library.name
OLDER = bind_library("local function run_call() return 'older' end\n")
STRANGERS = "#!lua name=strangers\nredis.register_function('strange', function() return 1 end)"


@pytest.fixture
async def admin(plain_redis: EmbeddedRedis) -> AsyncIterator[Any]:
    async with Redis.from_url(plain_redis.admin_url, decode_responses=True) as redis:
        await redis.function_flush()
        yield redis
        await redis.config_set("maxmemory", 0)
        await redis.function_load(SCRIPTS.library.source, replace=True)


@pytest.fixture
async def connection(plain_redis: EmbeddedRedis) -> AsyncIterator[Connection]:
    connected = await connect(plain_redis.url, "test-library")
    yield connected
    connected.abort()


async def names(admin: Any) -> set[str]:
    found = await admin.function_list()
    return {dict(zip(one[::2], one[1::2], strict=True))["library_name"] for one in found}


def test_a_text_that_differs_has_another_name() -> None:
    assert OLDER.name != OURS
    assert OLDER.name.startswith(LIBRARIES)
    assert bind_library(OLDER.body) == OLDER


async def test_it_is_loaded_where_it_is_not(admin: Any, connection: Connection) -> None:
    await load_library(connection, OLDER)
    await load_library(connection, SCRIPTS.library)
    assert await names(admin) == {OURS, OLDER.name}


async def test_without_memory_one_that_is_there_will_do_and_a_new_one_is_refused(
    admin: Any, connection: Connection
) -> None:
    await load_library(connection, SCRIPTS.library)
    await admin.config_set("maxmemory", 1)
    await load_library(connection, SCRIPTS.library)
    with pytest.raises(ServerUnfit, match=r"functions of this version \(OOM\)"):
        await load_library(connection, OLDER)


async def test_only_the_functions_of_other_versions_are_dropped(admin: Any, connection: Connection) -> None:
    await admin.function_load(STRANGERS)
    for library in (OLDER, SCRIPTS.library):
        await load_library(connection, library)
    for _ in range(2):
        await drop_other_libraries(connection, SCRIPTS.library)
        assert await names(admin) == {OURS, "strangers"}


async def test_a_process_drops_them_when_it_starts_and_not_when_it_comes_again(
    plain_redis: EmbeddedRedis, admin: Any
) -> None:
    """Else two versions that run side by side would drop each other's functions without end."""

    async def has(*expected: str) -> bool:
        return await names(admin) == set(expected)

    await admin.function_load(OLDER.source)
    plane = DataPlane(plain_redis.url, 1, SCRIPTS)
    await plane.start()
    try:
        await until(lambda: has(OURS))
        await admin.function_load(OLDER.source)
        await admin.function_delete(OURS)
        await admin.client_kill_filter(_type="normal", skipme=True)
        await until(lambda: has(OURS, OLDER.name))
        await asyncio.sleep(0.3)
        assert await has(OURS, OLDER.name)
    finally:
        await plane.stop()


def test_a_call_asks_anew_which_history_the_server_is_in(tmp_path: Path) -> None:
    """A function keeps its variables from one call to the next; what the server said to the first is no answer to both."""
    with EmbeddedRedis(tmp_path) as embedded, Server(embedded, SCRIPTS) as server:
        shard = Shard(server)
        shard.certify()
        book = shard.new_book("A-1", "B-2")
        assert shard.assign_coupon(book, user_id="u")[0] == "ok"
        server.admin.replicaof("127.0.0.1", "1")
        server.admin.replicaof("no", "one")
        assert shard.assign_coupon(book, user_id="v") == ["suspect", "server"]
