"""The stage of the network faults: a proxy between every part of the service and every server, and if wanted a replica."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from redis.asyncio import Redis

from coupon_svc.dev.servers import EmbeddedRedis
from tests.chaos.fault import SHARDS
from tests.chaos.proxy import PostgresMessages, Proxy, RedisMessages
from tests.chaos.run import Run
from tests.harness import Part, Stack, fresh_database, until

WRITERS = ("writer", "writer2")
APIS = ("api", "api2")
PARTS = (*WRITERS, *APIS, "operator")
"""Who has a way of its own to Redis and Postgres; `operator` is whoever looks on."""


class Twin(EmbeddedRedis):
    """A Redis that the same URLs fit, but for the port."""

    def __init__(self, directory: Path, of: EmbeddedRedis) -> None:
        super().__init__(directory)
        self._passwords = {name: of._settings[name] for name in ("admin_password", "service_password")}

    def _first_settings(self) -> dict[str, object]:
        return self._passwords


class Network(Stack):
    """A stack whose parts speak through proxies. `redis_of` and `postgres_of` have one for each of PARTS."""

    def __init__(self, server: EmbeddedRedis, database_url: str, folder: Path, shards: int = SHARDS) -> None:
        super().__init__(server, server.url, database_url, folder, shards)
        self.master = server
        self.redis_of = {part: Proxy(server.url, RedisMessages) for part in PARTS}
        self.postgres_of = {part: Proxy(database_url, PostgresMessages) for part in PARTS}
        self.replica: Twin | None = None
        self.link = Proxy(server.url)
        """Between the replica and its master."""

    def proxies(self) -> list[Proxy]:
        return [*self.redis_of.values(), *self.postgres_of.values(), self.link]

    def writer(self, number: int = 0, /, **environment: str) -> Part:
        return super().writer(number, **self._ways(WRITERS[number]), **environment)

    def api(self, number: int = 0, /, **environment: str) -> Part:
        return super().api(number, **self._ways(APIS[number]), **environment)

    def lead_to(self, server: EmbeddedRedis, *parts: str) -> None:
        """Repoint the Redis of these parts (of all without any)."""
        for part in parts or PARTS:
            self.redis_of[part].repoint(server.url)

    def _ways(self, part: str) -> dict[str, str]:
        return {
            "COUPON_REDIS_URL": self.redis_of[part].url(self.redis_url),
            "COUPON_DATABASE_URL": self.postgres_of[part].url(self.database_url),
        }

    @property
    def environment(self) -> dict[str, str]:
        return {**super().environment, "COUPON_REDIS_URL": self.redis_of["operator"].url(self.redis_url)}


@contextlib.asynccontextmanager
async def network_stage(postgres_url: str, folder: Path, shards: int = SHARDS) -> AsyncIterator[Network]:
    """Proxies everywhere."""
    with EmbeddedRedis(folder / "redis") as server, contextlib.ExitStack() as proxies:
        network = Network(server, await fresh_database(postgres_url, shards), folder, shards)
        for proxy in network.proxies():
            proxies.enter_context(proxy)
        network.redis_admin_url = network.redis_of["operator"].url(server.admin_url)
        yield network


@contextlib.asynccontextmanager
async def running_network(postgres_url: str, folder: Path, shards: int = SHARDS) -> AsyncIterator[Network]:
    """Proxies everywhere, and a writer and an API that are ready; they end with the block."""
    async with network_stage(postgres_url, folder, shards) as network:
        try:
            network.writer()
            network.api()
            await network.ready()
            yield network
        finally:
            network.close()


@contextlib.asynccontextmanager
async def replica_stage(postgres_url: str, folder: Path) -> AsyncIterator[Network]:
    """A replica that follows Redis through a proxy."""
    async with network_stage(postgres_url, folder) as network:
        with Twin(folder / "replica", network.master) as network.replica:
            await follow(network.replica, network.master, network.link.port)
            yield network


def network(run: Run) -> Network:
    """The stage of a run that is played on this one."""
    assert isinstance(run.stack, Network)
    return run.stack


# --- servers, past all proxies


@contextlib.asynccontextmanager
async def direct(server: EmbeddedRedis) -> AsyncIterator[Redis]:
    """A client that may do anything."""
    client = Redis.from_url(server.admin_url, decode_responses=True)
    try:
        yield client
    finally:
        await client.aclose()


async def follow(replica: EmbeddedRedis, master: EmbeddedRedis, port: int) -> None:
    """Make a server the replica of another, which it reaches at `port`, and wait until it has the same data."""
    async with direct(master) as client:
        await client.config_set("repl-diskless-sync-delay", 0)
    async with direct(replica) as client:
        await client.config_set("masteruser", "default")
        await client.config_set("masterauth", str(master._settings["admin_password"]))
        await client.replicaof("127.0.0.1", str(port))

        async def in_step() -> bool:
            info = await client.info("replication")
            return bool(info["role"] == "slave" and info["master_link_status"] == "up")

        await until(in_step, what="the replica should follow its master")


async def promote(server: EmbeddedRedis) -> None:
    """End a replica's following: it is a master from now on."""
    async with direct(server) as client:
        await client.replicaof("NO", "ONE")


async def identity(server: EmbeddedRedis) -> tuple[str, str]:
    """(run_id, replid)"""
    async with direct(server) as client:
        info = await client.info("everything")
        return str(info["run_id"]), str(info["master_replid"])


async def events_made(server: EmbeddedRedis) -> int:
    """Events of all shards, by their own count."""
    async with direct(server) as client:
        return sum([int(await client.hget(key, "seq") or 0) async for key in client.scan_iter("cb:*:meta")])
