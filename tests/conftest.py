"""Servers for the whole run, one stack for the tests that only call it, and stacks of their own for the others.

With COUPON_DATABASE_URL set, databases are made on that server; with COUPON_REDIS_URL set, the shared stack uses that
Redis, which must be empty and is emptied again. Tests that kill or tamper start a Redis of their own in any case.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import httpx
import hypothesis
import pytest
from redis.asyncio import Redis

from coupon_svc.dev.servers import EmbeddedPostgres, EmbeddedRedis, free_port
from tests.harness import Stack, fresh_database

# How long an example takes says nothing on a shared machine; the first one of a fresh clone reads all of Unicode.
# Each run draws other examples, so that half of the usual number finds as much in twice the runs.
hypothesis.settings.register_profile(
    "shared", deadline=None, max_examples=50, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.register_profile("quick", hypothesis.settings.get_profile("shared"), max_examples=20)
hypothesis.settings.load_profile("shared")

SHARDS = 4

LONGEST = (
    "test_every_message", "test_writer_kills", "test_bulk_work", "test_chaos", "test_computed_books", "test_load",
    "test_upload_jobs", "test_bounded_recovery", "test_writers_come_and_go", "test_door_limits", "test_dev_supervisor",
    "test_model", "test_dev_end_to_end", "test_adopt", "test_fairness", "test_call", "test_history", "test_schemathesis",
    "test_chaos_proves_itself", "test_noisy_neighbours", "test_walk", "test_half_open",
)  # fmt: skip
"""Files that take long begin first, lest one of them runs alone in the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(LONGEST)))


@pytest.fixture(scope="session")
def postgres_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Postgres on which databases can be made."""
    given = os.environ.get("COUPON_DATABASE_URL")
    if given:
        yield given
        return
    folder = tmp_path_factory.mktemp("postgres")
    # Tests connect some thousand times, and half the processor time of that would go into the password.
    trusting = folder / "pg_hba.conf"
    trusting.write_text("host all all 127.0.0.1/32 trust\n")
    # No test takes the power away: what is written is kept when processes are killed.
    with EmbeddedPostgres(folder / "server", extra=("fsync=off", f"hba_file={trusting}")) as server:
        yield server.admin_url


@pytest.fixture(scope="session")
def plain_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    """A Redis for tests of single scripts, which keep apart by their tags."""
    with EmbeddedRedis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="session")
def cluster_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    """A cluster of one node that has all slots: a script that touches two of them is refused."""
    from redis import Redis as BlockingRedis

    # By itself, its bus takes a port of the range of outgoing connections, which may be in use.
    extra = ("cluster-enabled yes", f"cluster-port {free_port()}")
    with EmbeddedRedis(tmp_path_factory.mktemp("cluster"), extra=extra) as server:
        with BlockingRedis.from_url(server.admin_url) as client:
            client.execute_command("CLUSTER ADDSLOTSRANGE", 0, 16383)
            while client.execute_command("CLUSTER INFO")["cluster_state"] != "ok":
                pass
        yield server


@pytest.fixture(scope="session")
async def service(tmp_path_factory: pytest.TempPathFactory, postgres_url: str) -> AsyncIterator[Stack]:
    """The running service, shared by the tests that only call it. Each uses a tenant of its own."""
    folder = tmp_path_factory.mktemp("service")
    # One Redis can serve one stack: of several test processes only the first takes the one that is given.
    first = os.environ.get("PYTEST_XDIST_WORKER", "gw0") == "gw0"
    given = os.environ.get("COUPON_REDIS_URL") if first else None
    server = None
    if given:
        client = Redis.from_url(given)
        assert await client.dbsize() == 0, "COUPON_REDIS_URL must name an empty database: the tests fill and empty it"
        await client.aclose()
    else:
        server = EmbeddedRedis(folder / "redis")
        server.start()
    stack = Stack(server, given or server.url, await fresh_database(postgres_url, SHARDS), folder, SHARDS)  # type: ignore[union-attr]
    stack.patient = True
    try:
        stack.writer()
        stack.api()
        await stack.ready()
        yield stack
    finally:
        stack.close()
        if given:
            client = Redis.from_url(given)
            await client.flushdb()
            await client.aclose()


@pytest.fixture
async def client(service: Stack) -> AsyncIterator[httpx.AsyncClient]:
    """An HTTP client of a new tenant on the shared service."""
    async with await service.client() as http:
        yield http


@pytest.fixture
async def make_stack(tmp_path: Path, postgres_url: str) -> AsyncIterator[Callable[..., Awaitable[Stack]]]:
    """Makes stacks of one's own, to be tampered with; nothing runs in them yet but Redis and an empty database.

    With one shard, all books are of the same."""
    stacks: list[Stack] = []

    async def make(shards: int = SHARDS) -> Stack:
        folder = tmp_path / f"stack{len(stacks)}"
        folder.mkdir()
        server = EmbeddedRedis(folder / "redis")
        server.start()
        stack = Stack(server, server.url, await fresh_database(postgres_url, shards), folder, shards)
        stacks.append(stack)
        return stack

    yield make
    for stack in stacks:
        stack.close()
