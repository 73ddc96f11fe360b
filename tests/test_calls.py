"""The data plane on a real Redis: calls of all classes in one turn, when Redis does not take all of them."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Iterator
from itertools import count
from typing import Any

import pytest
import uvloop
from redis.asyncio import Redis

from coupon_svc.dev.servers import EmbeddedRedis
from coupon_svc.domain.outcomes import Refused
from coupon_svc.domain.shards import new_book_id
from coupon_svc.redis.connection import SILENT_S, connect
from coupon_svc.redis.control import ShardControl, Term
from coupon_svc.redis.data_plane import VERIFY_EVERY_S, DataPlane
from coupon_svc.redis.scripts import Scripts
from tests.chaos.proxy import Proxy
from tests.harness import until

SHARDS = 2
RULES = {
    "tenant_id": "1",
    "status": "active",
    "starts_at_ms": "",
    "expires_at_ms": "",
    "ack": "redis",
    "max_redemptions_per_code": "",
    "max_codes_per_user": "",
    "lock_ttl_ms": "60000",
    "total": "100",
    "unlent": "0",
    "stored": "{}",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    """A server of these tests' own, since it is set up to refuse."""
    with EmbeddedRedis(tmp_path_factory.mktemp("calls")) as embedded:
        yield embedded


@pytest.fixture
async def admin(server: EmbeddedRedis) -> AsyncIterator[Any]:
    async with Redis.from_url(server.admin_url, decode_responses=True) as redis:
        await redis.flushall()
        yield redis
        await redis.config_set("maxmemory", 0)
        await redis.config_set("min-replicas-to-write", 0)


class Api:
    """A data plane whose shards are open, with a book in each."""

    def __init__(self, plane: DataPlane, books: list[str]) -> None:
        self.plane = plane
        self.books = books

    async def is_open(self) -> bool:
        return self.plane.connected and all(view.is_open for view in self.plane.views)

    async def run(self, name: str, shard: int = 0, **parameters: Any) -> str:
        """The outcome of an operation, or the word with which it was refused."""
        named = {"tenant_id": 1, "book_id": self.books[shard], **parameters}
        try:
            return str((await self.plane.call(name, self.plane.views[shard], **named)).outcome)
        except Refused as refusal:
            return str(refusal.outcome)

    async def all_in_one_turn(self, shard: int = 0) -> dict[str, str]:
        """An operation of each kind, on the codes A and B that u holds."""
        keyless = {"idempotency_key": ""}
        asked = {
            "assign": self.run("assign_coupon", shard, user_id="v"),
            "lock": self.run("lock_coupon", shard, code="A", user_id="", new_token="t", **keyless),
            "redeem": self.run("redeem_coupon", shard, code="B", user_id="u"),
            "unlock": self.run("unlock_coupon", shard, code="C", lock_token="none", **keyless),
            "read": self.run("read_codes", shard, codes=["A"]),
        }
        return dict(zip(asked, await asyncio.gather(*asked.values()), strict=True))


@pytest.fixture
async def api(server: EmbeddedRedis, admin: Any) -> AsyncIterator[Api]:
    owner = ShardControl(server.url, SHARDS, Scripts(), "inst-1")
    books = []
    for shard in range(SHARDS):
        term = Term(shard, epoch=1, generation=1)
        await owner.shut_shard(term)
        await owner.certify_shard(term, await owner.connect(), 1_000_000)
        books.append(next(book_id for _ in count() if int((book_id := new_book_id(SHARDS))[3:5]) == shard))
        await owner.put_book(term, books[shard], 1, RULES, known=False)
        await owner.load_codes(term, books[shard], ["A", "B", "C", "D"], 0)
    plane = DataPlane(server.url, SHARDS, Scripts())
    plane.join("inst-1")
    await plane.start()
    api = Api(plane, books)
    await until(api.is_open, 10)
    for shard in range(SHARDS):
        given = [api.run("assign_code", shard, code=code, user_id="u") for code in ("A", "B")]
        assert await asyncio.gather(*given) == ["ok", "ok"]
    yield api
    await plane.stop()
    owner.close()


ALL_GO = {"assign": "ok", "lock": "ok", "redeem": "ok", "unlock": "ok", "read": "ok"}


async def test_functions_that_are_gone_are_loaded_again(api: Api, admin: Any) -> None:
    await admin.function_flush()
    assert await api.all_in_one_turn(0) == ALL_GO


async def test_all_that_comes_in_one_turn_is_three_calls(api: Api, admin: Any) -> None:
    before = (await admin.info("commandstats"))["cmdstat_fcall"]["calls"]
    told = await asyncio.gather(api.all_in_one_turn(0), api.all_in_one_turn(1))
    assert list(told) == [ALL_GO, ALL_GO]
    assert (await admin.info("commandstats"))["cmdstat_fcall"]["calls"] == before + 3


async def test_without_memory_nothing_new_is_promised_and_all_else_goes_on(api: Api, admin: Any) -> None:
    await admin.config_set("maxmemory", 1)
    assert await api.all_in_one_turn() == ALL_GO | {"assign": "backlog_full", "lock": "backlog_full"}


NO_WRITE = dict.fromkeys(ALL_GO, "store_unavailable") | {"read": "ok"}


async def test_where_redis_takes_no_write_reads_go_on(api: Api, admin: Any) -> None:
    """Redis refuses a script by its flags, before it runs."""
    await admin.config_set("min-replicas-to-write", 1)
    assert await api.all_in_one_turn() == NO_WRITE


async def test_with_a_full_disk_reads_go_on_and_nothing_was_done(
    api: Api, admin: Any, server: EmbeddedRedis, no_dump: None
) -> None:
    assert await api.all_in_one_turn() == NO_WRITE
    await admin.config_set("save", "")
    assert await api.all_in_one_turn() == ALL_GO, "B could be redeemed and A locked: neither was"
    assert (await admin.hgetall(api.plane.views[0].keys.meta))["seq"] == "4"


@pytest.fixture
async def no_dump(server: EmbeddedRedis, admin: Any) -> AsyncIterator[None]:
    """Redis could not write its file, as with a full disk: a folder stands in its place."""
    in_the_way = server.directory / "data" / "dump.rdb"
    in_the_way.mkdir()
    await admin.config_set("save", "86400 1000000")
    await admin.bgsave()

    async def failed() -> bool:
        return bool((await admin.info("persistence"))["rdb_last_bgsave_status"] == "err")

    await until(failed, what="the file should not be written")
    yield
    await admin.config_set("save", "")
    in_the_way.rmdir()


async def test_a_stream_that_takes_no_entry_puts_its_shard_in_doubt_before_anything_is_done(
    api: Api, admin: Any
) -> None:
    """Somebody added an entry by hand, at a position that is still to come."""
    keys = api.plane.views[0].keys
    await admin.xadd(keys.events, {"event": "by hand"}, id="1-99")
    before = {key: await admin.dump(key) async for key in admin.scan_iter(f"{keys.prefix}*") if key != keys.meta}
    told = await asyncio.gather(api.all_in_one_turn(0), api.all_in_one_turn(1))
    refused = dict.fromkeys(ALL_GO, "recovering")
    assert list(told) == [refused | {"read": told[0]["read"]}, ALL_GO]
    assert told[0]["read"] in ("ok", "recovering"), "it went before the others, or after the shard was in doubt"
    assert (await admin.hgetall(keys.meta))["epoch"] == "doubt"
    assert before == {
        key: await admin.dump(key) async for key in admin.scan_iter(f"{keys.prefix}*") if key != keys.meta
    }


async def test_a_shard_is_put_in_doubt_though_redis_has_lost_the_script(api: Api, admin: Any) -> None:
    await admin.script_flush()
    view = api.plane.views[0]
    await api.plane.doubt(view)

    async def is_doubted() -> bool:
        return bool(await admin.hget(view.keys.meta, "epoch") == "doubt")

    await until(is_doubted, 5)


async def test_a_shard_in_doubt_takes_no_other_with_it(api: Api, admin: Any) -> None:
    await admin.hset(api.plane.views[0].keys.meta, "epoch", "doubt")
    told = await asyncio.gather(api.all_in_one_turn(0), api.all_in_one_turn(1))
    assert list(told) == [dict.fromkeys(ALL_GO, "recovering"), ALL_GO]


async def test_a_meta_of_another_type_takes_no_other_shard_with_it(api: Api, admin: Any) -> None:
    meta = api.plane.views[0].keys.meta
    await admin.delete(meta)
    await admin.set(meta, "no hash")
    told = await asyncio.gather(api.all_in_one_turn(0), api.all_in_one_turn(1))
    assert list(told) == [dict.fromkeys(ALL_GO, "recovering"), ALL_GO]


async def test_a_connection_whose_opening_is_cancelled_is_closed(server: EmbeddedRedis, admin: Any) -> None:
    async def ids() -> set[str]:
        return {client["id"] for client in await admin.client_list()}

    async def is_open() -> bool:
        return not await ids() <= before

    async def is_closed() -> bool:
        return await ids() <= before

    before = await ids()
    with Proxy(server.url) as proxy:
        proxy.replies.delay_s = 60.0
        opening = asyncio.create_task(connect(proxy.url(server.url), "cancelled"))
        await until(is_open, 10)
        opening.cancel()
        await until(is_closed, SILENT_S / 2)


async def test_a_position_that_no_message_told_is_asked_for_soon(api: Api, admin: Any) -> None:
    """Each wait begins just after a verification, and ends long before the next one that comes by itself."""
    for committed in (1, 2):
        began = time.monotonic()
        await admin.hset(api.plane.views[0].keys.meta, "committed", committed)
        await api.plane.waiters.wait(0, 1, committed, until=began + 5)
    assert time.monotonic() - began < VERIFY_EVERY_S / 2


async def test_a_redis_whose_every_reply_is_late_is_used_and_kept(
    api: Api, server: EmbeddedRedis, caplog: pytest.LogCaptureFixture
) -> None:
    """What an API process and a writer ask for before they use a connection, and an API process each second, takes some
    replies: together they are later than a single one may be."""
    with Proxy(server.url) as proxy:
        proxy.replies.delay_s = SILENT_S / 4
        url = proxy.url(server.url)
        late = Api(DataPlane(url, SHARDS, Scripts()), api.books)
        late.plane.join("inst-1")
        owner = ShardControl(url, SHARDS, Scripts(), "inst-1")
        await asyncio.gather(late.plane.start(), owner.connect())
        await until(late.is_open, 10)
        assert await asyncio.gather(*(late.run("read_codes", codes=["A"]) for _ in range(3))) == ["ok"] * 3
        for _ in range(4):  # they end in time, though a verification is under way nearly all the time
            began = time.monotonic()
            with pytest.raises(Refused):
                await late.plane.waiters.wait(0, 1, 1_000_000, until=began + 0.3)
            assert time.monotonic() - began < SILENT_S / 4
        assert await late.run("read_codes", codes=["A"]) == "ok"
        await owner.refresh_identity()
        await late.plane.stop()
        owner.close()
    assert "redis" not in caplog.text


def be_busy(request: socket.socket) -> None:
    request.recv(1)
    time.sleep(SILENT_S + 0.2)


async def test_a_process_that_was_busy_for_long_reads_what_came_before_it_gives_redis_up(
    api: Api, server: EmbeddedRedis
) -> None:
    """With the event loop of the service: there a timer is due after a turn's reading, and the reply comes meanwhile."""

    async def ask_and_be_busy() -> list[str]:
        busy = Api(DataPlane(server.url, SHARDS, Scripts()), api.books)
        busy.plane.join("inst-1")
        await busy.plane.start()
        await until(busy.is_open, 10)
        loop = asyncio.get_running_loop()
        with contextlib.ExitStack() as sockets:
            request, caller = map(sockets.enter_context, socket.socketpair())
            loop.add_reader(request, be_busy, request)
            asked = [asyncio.ensure_future(busy.run("assign_coupon", shard, user_id="v")) for shard in range(SHARDS)]
            await asyncio.sleep(0)
            await asyncio.sleep(0)  # the call is sent
            caller.send(b"1")
            told = await asyncio.gather(*asked)
            loop.remove_reader(request)
        await busy.plane.stop()
        return told

    assert await asyncio.to_thread(lambda: uvloop.run(ask_and_be_busy())) == ["ok", "ok"]
