"""Real servers and real processes for the tests: a stack of its own for whoever kills parts of it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import httpx
from redis.asyncio import Redis

from coupon_svc.dev.servers import EmbeddedRedis
from coupon_svc.postgres.keys import SCOPES, create_key, new_key
from coupon_svc.postgres.migrations import migrate
from tests.forked import Start, start_process

# httpx looks for this optional package on every request, and the search costs more than the request.
sys.modules.setdefault("sniffio", None)  # type: ignore[arg-type]

T = TypeVar("T")

DEADLINE_S = 20.0
MASTER_KEY = base64.b64encode(bytes(range(32))).decode()
START_S = 60.0
"""For processes to start: nothing is shown by how long that takes on a busy machine."""


async def until(fact: Callable[[], Awaitable[T]], timeout: float = DEADLINE_S, what: str = "") -> T:
    """Wait until `fact()` is true, and return it; fail the test when that takes longer than `timeout` seconds."""
    began = time.monotonic()
    while not (value := await fact()):
        waited = time.monotonic() - began
        assert waited < timeout, f"waited {timeout} s in vain: {what or fact}"
        await asyncio.sleep(min(0.02 + waited / 50, 0.1))  # what takes seconds is not asked for fifty times in each
    return value


_templates: dict[str, str] = {}
"""By the URL of a server: the database on it that others are copies of."""


async def fresh_database(url: str, shards: int) -> str:
    """Make a database of its own on the server of `url`, with the newest schema. Returns its URL."""
    if url not in _templates:
        _templates[url] = await _make_template(url)
    own_url = await _make_database(url, _templates[url])
    await _migrated(own_url, shards)
    return own_url


async def _make_template(url: str) -> str:
    """Make a database with the newest schema and nothing of an installation: a copy takes a fifth of the time of all
    migrations, and `migrate` gives each copy an id, a secret and shards of its own. Returns its name."""
    own_url = await _make_database(url, "template1")
    await _migrated(own_url, 1, "DELETE FROM shards", "DELETE FROM settings")
    return urlsplit(own_url).path[1:]


async def _make_database(url: str, template: str) -> str:
    name = "test_" + secrets.token_hex(6)
    admin = await asyncpg.connect(url)
    await admin.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
    await admin.close()
    return urlunsplit(urlsplit(url)._replace(path=f"/{name}"))


async def _migrated(url: str, shards: int, *statements: str) -> None:
    connection = await asyncpg.connect(url)
    await migrate(connection, shards)
    for statement in statements:
        await connection.execute(statement)
    await connection.close()


class Patient(httpx.AsyncBaseTransport):
    """Asks again when the service asks for patience and says that nothing was done, as its callers are told to: that a
    busy machine stood still for a second is no failure of the service."""

    _NOTHING_DONE = ("recovering", "store_unavailable", "refilling", "ledger_behind")

    def __init__(self, transport: httpx.AsyncBaseTransport) -> None:
        self._transport = transport

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        deadline = time.monotonic() + DEADLINE_S
        while True:
            response = await self._transport.handle_async_request(request)
            if response.status_code != 503 or time.monotonic() > deadline:
                return response
            if json.loads(await response.aread())["code"] not in self._NOTHING_DONE:
                return response
            await asyncio.sleep(0.1)

    async def aclose(self) -> None:
        await self._transport.aclose()


class Part:
    """One process of the service."""

    def __init__(
        self,
        args: list[str],
        environment: dict[str, str],
        log: Path,
        module: tuple[str, ...] = ("coupon_svc",),
        listener: socket.socket | None = None,
    ) -> None:
        """With a `listener`, the process serves on it."""
        self.log = log
        self.base_url = ""
        """Where an API process listens."""
        log.touch()
        self._log_start = log.stat().st_size
        self.process = start_process(Start([*module, *args], {**os.environ, **environment}, log, listener))

    def stop(self, timeout: float = 10.0) -> int:
        """SIGTERM, and the exit status."""
        if self.process.poll() is None:
            self.process.terminate()
        return self.process.wait(timeout)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def said(self, text: str) -> bool:
        """Whether the process has logged this text since it started."""
        with self.log.open("rb") as log:
            log.seek(self._log_start)
            return text.encode() in log.read()

    async def died(self, timeout: float = DEADLINE_S) -> int:
        """Wait for the process to end by itself. Returns its exit status, negative for a signal."""

        async def ended() -> bool:
            return self.process.poll() is not None

        await until(ended, timeout, "the process should have died")
        return self.process.wait(0)


class Stack:
    """The service on a Redis of its own and a database of its own: `api()` and `writer()` start its parts. Close it."""

    def __init__(
        self, redis: EmbeddedRedis | None, redis_url: str, database_url: str, folder: Path, shards: int
    ) -> None:
        self.redis_server = redis
        self.redis_url = redis_url
        self.redis_admin_url = redis.admin_url if redis else redis_url
        self.database_url = database_url
        self.folder = folder
        self.shards = shards
        self.parts: list[Part] = []
        self._ledgers: list[asyncpg.Connection] = []
        """Connections to the database that nobody uses now."""
        self.base_url = ""
        self.module: tuple[str, ...] = ("coupon_svc",)
        """What parts are started as; `("tests.unsafe", SAFEGUARD)` takes a safeguard out of them."""
        self.patient = False
        """Whether clients ask again when they are told to; for tests that are about something else."""

    @property
    def environment(self) -> dict[str, str]:
        return {
            "COUPON_REDIS_URL": self.redis_url,
            "COUPON_DATABASE_URL": self.database_url,
            "COUPON_SHARDS": str(self.shards),
            "COUPON_MASTER_KEY": MASTER_KEY,
        }

    def writer(self, number: int = 0, /, *, dies_at: str = "", stops_at: str = "", **environment: str) -> Part:
        """Start a writer; one that `dies_at` or `stops_at` a step, like "persist.committed", is sent SIGKILL or SIGSTOP
        there (tests/crashing.py). Writers of different `number` write different logs."""
        log = self.folder / f"writer{number or ''}.log"
        module = self.module
        if dies_at or stops_at:
            module = ("tests.crashing", "SIGKILL" if dies_at else "SIGSTOP", dies_at or stops_at, *module)
        part = Part(["writer"], {**self.environment, **environment}, log, module=module)
        self.parts.append(part)
        return part

    def api(self, number: int = 0, /, **environment: str) -> Part:
        """Start an API process on a port of its own; `base_url` is the newest one's. Processes of different `number` write
        different logs."""
        listener = socket.create_server(("127.0.0.1", 0))
        self.base_url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        part = Part(
            ["api"],
            {**self.environment, **environment},
            self.folder / f"api{number or ''}.log",
            module=self.module,
            listener=listener,
        )
        part.base_url = self.base_url
        listener.close()
        self.parts.append(part)
        return part

    def newest(self, *, serves: bool) -> Part:
        """The API process that was started last, or the writer."""
        return next(part for part in reversed(self.parts) if bool(part.base_url) == serves)

    async def ready(self, base_url: str = "") -> None:
        """Wait until an API process (the newest unless its address is given) says that it is ready."""
        async with httpx.AsyncClient(base_url=base_url or self.base_url) as client:

            async def is_ready() -> bool:
                try:
                    return (await client.get("/readyz")).status_code == 200
                except httpx.TransportError:
                    return False

            await until(is_ready, START_S, "the service should be ready")

    async def key(self, tenant: str | None = None, scopes: tuple[str, ...] = SCOPES) -> str:
        """A new API key, of a new tenant unless one is named."""
        key = new_key()
        connection = await asyncpg.connect(self.database_url)
        await create_key(connection, tenant or "t" + secrets.token_hex(6), key, scopes)
        await connection.close()
        return key

    async def client(self, tenant: str | None = None, scopes: tuple[str, ...] = SCOPES) -> httpx.AsyncClient:
        """An HTTP client with a key of its own. Close it after use."""
        transport: httpx.AsyncBaseTransport = httpx.AsyncHTTPTransport(
            verify=False,  # it is plain HTTP; loading the system's certificates takes 40 ms a client
            limits=httpx.Limits(max_connections=200),
        )
        return httpx.AsyncClient(
            base_url=self.base_url,
            headers={"Authorization": f"Bearer {await self.key(tenant, scopes)}"},
            timeout=30,
            transport=Patient(transport) if self.patient else transport,
        )

    async def ledger(self, statement: str, *args: Any) -> list[Any]:
        """Rows from Postgres."""
        connection = await self._ledger_connection()
        try:
            rows = list(await connection.fetch(statement, *args))
        except BaseException:
            connection.terminate()
            raise
        self._ledgers.append(connection)
        return rows

    async def _ledger_connection(self) -> asyncpg.Connection:
        """One that is used again: waits ask many times, and to connect costs more than to ask."""
        while self._ledgers:
            connection = self._ledgers.pop()
            if not connection.is_closed():
                return connection
        return await asyncpg.connect(self.database_url, statement_cache_size=0)

    def redis(self) -> Redis:
        """A redis-py client that may do anything. Close it after use."""
        return Redis.from_url(self.redis_admin_url, decode_responses=True)

    async def drained(self) -> None:
        """Wait until the ledger holds every event that Redis has made."""
        redis = self.redis()

        async def all_there() -> bool:
            rows = await self.ledger("SELECT shard, epoch, committed FROM shards")
            metas = {}
            async for key in redis.scan_iter("cb:*:meta"):
                metas[int(key[4:6])] = await redis.hgetall(key)
            return all(
                metas[row["shard"]].get("seq") == str(row["committed"]) for row in rows if row["shard"] in metas
            ) and bool(metas)

        try:
            await until(all_there, what="the ledger should have caught up")
        finally:
            await redis.aclose()

    def close(self) -> None:
        """End every part that still runs, and the Redis."""
        for connection in self._ledgers:
            connection.terminate()
        self._ledgers.clear()
        for part in self.parts:
            if part.process.poll() is None:
                part.signal(signal.SIGCONT)
            part.kill()
        if self.redis_server:
            self.redis_server.stop()


@contextlib.asynccontextmanager
async def running_stack(folder: Path, postgres_url: str, shards: int, **of_api: str) -> AsyncIterator[Stack]:
    """A stack of one's own whose writer and API are ready, ended with the block; `of_api` are settings of the API."""
    server = EmbeddedRedis(folder / "redis")
    server.start()
    stack = Stack(server, server.url, await fresh_database(postgres_url, shards), folder, shards)
    try:
        stack.writer()
        stack.api(**of_api)
        await stack.ready()
        yield stack
    finally:
        stack.close()
