"""Connections that seem to stand and carry nothing, processes that fall silent: nobody waits for them for good."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from coupon_svc.postgres.database import open_connection
from coupon_svc.postgres.epochs import want_recovery
from coupon_svc.redis.control import ShardControl
from coupon_svc.redis.data_plane import DataPlane
from coupon_svc.redis.errors import StoreError
from coupon_svc.redis.scripts import Scripts
from tests.chaos.network import Network, direct, promote, running_network
from tests.harness import until

GIVEN_UP_S = 8.0


@pytest.fixture(scope="module")
async def network(postgres_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Network]:
    """One for all: each test heals what it has cut."""
    async with running_network(postgres_url, tmp_path_factory.mktemp("network")) as network:
        yield network


async def test_a_caller_is_answered_while_redis_is_silent_on_a_connection_that_stands(network: Network) -> None:
    async with await network.client() as http:
        book = {"name": "half open", "generate": {"pattern": "H-######", "total": 10}}
        book_id = (await http.post("/coupons", json=book)).json()["book_id"]
        assert (await http.post("/coupons/assign", json={"book_id": book_id, "user_id": "ann"})).status_code == 201
        network.redis_of["api"].treat(requests="hold", replies="hold")
        asked = [http.post("/coupons/assign", json={"book_id": book_id, "user_id": "bob"}) for _ in range(5)]
        for answer in await asyncio.wait_for(asyncio.gather(*asked), GIVEN_UP_S):
            assert answer.json()["code"] in ("outcome_unknown", "store_unavailable")
        assert (await asyncio.wait_for(http.get("/readyz"), 1.0)).status_code == 503
        # Connections made meanwhile are as silent; what they wait for is given up as well.
        await asyncio.sleep(3.0)
        network.redis_of["api"].cut()
        network.redis_of["api"].heal()
    await network.ready()


@pytest.fixture
async def taciturn() -> AsyncIterator[tuple[str, list[asyncio.StreamWriter]]]:
    """A server that lets anybody in, and says nothing to whatever it is asked then: its URL, and who has come."""
    came: list[asyncio.StreamWriter] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        came.append(writer)
        with contextlib.suppress(ConnectionError):
            while asked := await reader.read(65536):
                if b"AUTH" in asked or b"SETNAME" in asked:
                    writer.write(b"+OK\r\n")

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    yield f"redis://coupon:secret@127.0.0.1:{server.sockets[0].getsockname()[1]}", came
    server.close()
    for writer in came:
        writer.close()


async def test_the_writer_gives_up_a_redis_that_does_not_say_who_it_is(
    taciturn: tuple[str, list[asyncio.StreamWriter]],
) -> None:
    store = ShardControl(taciturn[0], 1, Scripts())
    with pytest.raises(StoreError):
        await asyncio.wait_for(store.connect(), GIVEN_UP_S)
    assert store.identity is None


async def test_the_api_gives_up_a_redis_that_does_not_say_who_it_is(
    taciturn: tuple[str, list[asyncio.StreamWriter]],
) -> None:
    url, came = taciturn
    plane = DataPlane(url, 1, Scripts())
    await plane.start()

    async def came_again() -> bool:
        return len(came) > 2  # one connection listens

    try:
        await until(came_again, GIVEN_UP_S)
    finally:
        await plane.stop()
    assert not plane.connected


async def test_a_redis_that_is_not_fit_is_asked_again_on_one_connection(network: Network) -> None:
    """A replica refuses nobody's connection: each one that is not closed stays."""
    async with direct(network.master) as redis:
        await redis.replicaof("127.0.0.1", "1")
        await asyncio.sleep(2.0)
        names = [client["name"] for client in await redis.client_list()]
        await promote(network.master)
    for part, most in (("coupon-api", 2), ("coupon-writer", 2)):
        assert names.count(part) <= most, f"{part} should close what it cannot use"
    await network.ready()


async def test_calls_go_on_while_postgres_is_silent_on_connections_that_stand(network: Network) -> None:
    network.api(COUPON_KEY_CACHE_MS="100")
    await network.ready()
    async with await network.client() as http:
        book = {"name": "silent", "ack": "redis", "generate": {"pattern": "P-######", "total": 100}}
        book_id = (await http.post("/coupons", json=book)).json()["book_id"]
        await http.post("/coupons/assign", json={"book_id": book_id, "user_id": "ann"})
        network.postgres_of["api"].treat(requests="hold", replies="hold")
        for number in range(5):
            await asyncio.sleep(0.2)  # what is known of the key is too old by now
            asked = http.post("/coupons/assign", json={"book_id": book_id, "user_id": f"bob{number}"})
            assert (await asyncio.wait_for(asked, 1.5)).status_code == 201
        network.postgres_of["api"].heal()


async def test_a_process_that_falls_silent_within_a_transaction_does_not_hold_up_a_recovery(network: Network) -> None:
    async with await network.client() as http:
        book = {"name": "held", "generate": {"pattern": "S-######", "total": 10}}
        book_id = (await http.post("/coupons", json=book)).json()["book_id"]
        assert (await http.post("/coupons/assign", json={"book_id": book_id, "user_id": "ann"})).status_code == 201
    shard = int(book_id[3:5])
    silent = await open_connection(network.database_url, "a process that is stopped now")
    await silent.execute("BEGIN")
    await silent.execute("SELECT FROM books FOR UPDATE")
    operator = await open_connection(network.database_url, "operator")
    await want_recovery(operator, [shard])

    async def certified() -> bool:
        return bool(await operator.fetchval("SELECT certified_epoch = epoch FROM shards WHERE shard = $1", shard))

    await until(certified, what="the recovery should not wait for who is silent")
    await operator.close()
    silent.terminate()


async def test_the_api_gives_up_a_listener_that_carries_nothing() -> None:
    """Else every wait for the ledger would end by asking alone, for as long as the connection stands."""
    silent, over = asyncio.Event(), asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while asked := await reader.read(65536):
                if b"AUTH" in asked or b"SETNAME" in asked:
                    writer.write(b"+OK\r\n")
                if b"SUBSCRIBE" in asked:
                    writer.write(b"*3\r\n$9\r\nsubscribe\r\n$19\r\ncb:positions:inst-1\r\n:1\r\n")
                    silent.set()
                    await reader.read()
                    over.set()
        writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    plane = DataPlane(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}", 1, Scripts())
    plane.join("inst-1")
    await plane.start()
    await asyncio.wait_for(silent.wait(), GIVEN_UP_S)
    await asyncio.wait_for(over.wait(), GIVEN_UP_S)
    await plane.stop()
    server.close()


async def test_a_writer_stops_in_time_while_postgres_is_silent(network: Network) -> None:
    """Its commit is cancelled, and the rollback would wait for a server that confirms nothing. The last test that needs
    the writer."""
    network.patient = True
    async with await network.client() as http:
        book = {"name": "stop", "ack": "redis", "generate": {"pattern": "T-######", "total": 10}}
        book_id = (await http.post("/coupons", json=book)).json()["book_id"]
        assert (await http.post("/coupons/assign", json={"book_id": book_id, "user_id": "ann"})).status_code == 201
        network.postgres_of["writer"].treat(requests="hold", replies="hold")
        assert (await http.post("/coupons/assign", json={"book_id": book_id, "user_id": "bob"})).status_code == 201
    await asyncio.sleep(0.5)
    (writer,) = (part for part in network.parts if part.log.name == "writer.log")
    assert await asyncio.to_thread(writer.stop, 3.5) == 0, "it asks for a connection for 2 s, to hand its shards over"
