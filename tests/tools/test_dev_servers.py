"""The embedded servers: started, killed, restarted, and what the service's Redis user may do."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import redis

from coupon_svc.dev import leash
from coupon_svc.dev.servers import EmbeddedPostgres, EmbeddedRedis, ServerError, StartCancelledError, free_port


@pytest.fixture(scope="module")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis(tmp_path_factory.mktemp("valkey")) as server:
        yield server


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedPostgres]:
    with EmbeddedPostgres(tmp_path_factory.mktemp("postgres")) as server:
        yield server


@contextlib.contextmanager
def client(url: str) -> Iterator[redis.Redis]:
    connection = redis.Redis.from_url(url, decode_responses=True, retry=None)
    try:
        yield connection
    finally:
        connection.close()


def query(url: str, sql: str) -> Any:
    async def ask() -> Any:
        connection = await asyncpg.connect(url)
        try:
            return await connection.fetchval(sql)
        finally:
            await connection.close()

    return asyncio.run(ask())


# -- Valkey -----------------------------------------------------------------------------------------------------------


def test_a_restarted_valkey_has_the_same_address_and_data(valkey: EmbeddedRedis) -> None:
    url, pid = valkey.url, valkey.pid
    with client(url) as service:
        service.set("cb:kept", "yes")
    valkey.stop()
    valkey.start()
    assert valkey.url == url
    assert valkey.pid != pid
    with client(url) as service:
        assert service.get("cb:kept") == "yes"


def test_a_killed_valkey_can_be_started_again(valkey: EmbeddedRedis) -> None:
    with client(valkey.url) as service:
        service.set("cb:before", "yes")
    valkey.kill()
    assert not valkey.running
    valkey.start()
    with client(valkey.url) as service:
        assert service.get("cb:before") == "yes"


def test_valkey_keeps_every_write_and_evicts_nothing(valkey: EmbeddedRedis) -> None:
    with client(valkey.admin_url) as admin:
        settings = admin.config_get("appendonly", "appendfsync", "maxmemory-policy", "save", "bind")
    assert settings == {
        "appendonly": "yes",
        "appendfsync": "everysec",
        "maxmemory-policy": "noeviction",
        "save": "",
        "bind": "127.0.0.1",
    }


def test_the_service_user_can_do_its_work(valkey: EmbeddedRedis) -> None:
    with client(valkey.url) as service:
        assert service.ping()
        assert service.client_setname("api")
        sha = service.script_load(
            "redis.call('PUBLISH', 'cb:news', '1') return redis.call('XADD', KEYS[1], '1-1', 'a', 'b')"
        )
        service.delete("cb:{01}:events")
        with service.pubsub(ignore_subscribe_messages=True) as news:  # type: ignore[no-untyped-call]
            news.psubscribe("cb:*")
            assert service.evalsha(sha, 1, "cb:{01}:events") == "1-1"
            assert leash.wait_until(lambda: (news.get_message() or {}).get("channel") == "cb:news", timeout=5)
        assert service.xread({"cb:{01}:events": "0"}, block=10) == [["cb:{01}:events", [("1-1", {"a": "b"})]]]
        assert service.xtrim("cb:{01}:events", minid="2-0", approximate=False) == 1
        assert service.info("replication")["role"] == "master"


@pytest.mark.parametrize(
    "command",
    [
        "FLUSHALL",
        "FLUSHDB",
        "KEYS *",
        "CONFIG GET maxmemory",
        "CONFIG SET appendonly no",
        "SCRIPT FLUSH",
        "SCRIPT KILL",
        "FUNCTION FLUSH",
        "SHUTDOWN",
        "SWAPDB 0 1",
        "ACL LIST",
        "MONITOR",
        "GET other:key",
        "PUBLISH other:channel x",
    ],
)
def test_the_service_user_can_do_no_harm(valkey: EmbeddedRedis, command: str) -> None:
    with client(valkey.url) as service, pytest.raises(redis.exceptions.NoPermissionError):
        service.execute_command(*command.split())  # type: ignore[no-untyped-call]


def test_a_script_of_the_service_user_is_held_to_its_keys(valkey: EmbeddedRedis) -> None:
    with client(valkey.url) as service, pytest.raises(redis.exceptions.ResponseError, match="permission"):
        service.eval("return redis.call('SET', 'other', '1')", 0)


def test_nobody_gets_in_without_a_password(valkey: EmbeddedRedis) -> None:
    with client(f"redis://127.0.0.1:{valkey.port}") as stranger, pytest.raises(redis.exceptions.AuthenticationError):
        stranger.ping()


def test_passwords_stand_in_private_files_only(valkey: EmbeddedRedis, postgres: EmbeddedPostgres) -> None:
    for server in (valkey, postgres):
        passwords = [url.split(":")[2].split("@")[0].encode() for url in (server.url, server.admin_url)]
        for path in server.directory.rglob("*"):
            if path.is_file() and any(password in path.read_bytes() for password in passwords):
                assert path.stat().st_mode & 0o077 == 0, path
        for password in passwords:
            assert leash.find_processes(password.decode()) == []


def test_extra_lines_come_after_ours(tmp_path: Path) -> None:
    with (
        EmbeddedRedis(
            tmp_path, extra=("cluster-enabled yes", f"cluster-port {free_port()}", "appendfsync always")
        ) as server,
        client(server.admin_url) as admin,
    ):
        assert admin.info("cluster")["cluster_enabled"] == 1
        assert admin.config_get("appendfsync") == {"appendfsync": "always"}


def test_a_taken_port_is_given_up_for_another(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path)
    with server, client(server.url) as service:
        service.set("cb:kept", "yes")
        port = server.port
    with socket.create_server(("127.0.0.1", port)), server, client(server.url) as service:
        assert server.port != port
        assert service.get("cb:kept") == "yes"


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match="no-such-setting"):
        EmbeddedRedis(tmp_path, extra=("no-such-setting 1",)).start()


def test_a_copy_of_the_directory_leaves_the_original_alone(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path / "original") as original:
        (tmp_path / "copy").mkdir()
        (tmp_path / "copy" / "settings.json").write_text((tmp_path / "original" / "settings.json").read_text())
        with EmbeddedRedis(tmp_path / "copy") as copy:
            assert copy.port != original.port
            assert original.running


def test_a_server_whose_owner_was_killed_ends_or_is_replaced(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path; from coupon_svc.dev.servers import EmbeddedRedis;"
        "server = EmbeddedRedis(Path(sys.argv[1])); server.start();"
        "print(server.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    ended = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False)
    assert ended.returncode == -9
    with EmbeddedRedis(tmp_path) as server:
        assert leash.find_processes(server.marker) == [server.pid]
    assert leash.started_at(int(ended.stdout)) is None


# -- Postgres ---------------------------------------------------------------------------------------------------------


def test_postgres_is_made_as_the_ledger_needs_it(postgres: EmbeddedPostgres) -> None:
    assert query(postgres.url, "SELECT current_database()") == "coupons"
    for name, value in {
        "fsync": "on",
        "synchronous_commit": "on",
        "server_encoding": "UTF8",
        "lc_messages": "C",
    }.items():
        assert query(postgres.url, f"SHOW {name}") == value
    assert query(postgres.url, "SELECT datcollate FROM pg_database WHERE datname = 'coupons'") == "C"


def test_a_restarted_postgres_has_the_same_address_and_data(postgres: EmbeddedPostgres) -> None:
    url = postgres.url
    query(url, "CREATE TABLE kept AS SELECT 7 AS number")
    postgres.stop()
    postgres.start()
    assert postgres.url == url
    assert query(url, "SELECT number FROM kept") == 7


def test_a_killed_postgres_starts_again_though_a_child_of_it_is_busy(postgres: EmbeddedPostgres) -> None:
    def be_busy() -> None:
        with pytest.raises((asyncpg.PostgresError, OSError)):
            query(postgres.url, "SELECT count(*) FROM generate_series(1, 1e12::bigint)")

    running = "SELECT pid FROM pg_stat_activity WHERE query LIKE '%1e12%' AND pid <> pg_backend_pid()"
    with ThreadPoolExecutor() as threads:
        busy = threads.submit(be_busy)
        assert leash.wait_until(lambda: query(postgres.url, running) is not None, timeout=5)
        child = query(postgres.url, running)
        postgres.kill()
        assert leash.is_running(child)
        postgres.start()
        busy.result(timeout=5)
    assert query(postgres.url, "SELECT 1") == 1


def test_a_pid_file_whose_pid_is_somebody_elses_by_now_does_not_matter(
    postgres: EmbeddedPostgres, valkey: EmbeddedRedis
) -> None:
    postgres.kill()
    pid_file = postgres.data / "postmaster.pid"
    pid_file.write_text(pid_file.read_text().replace(str(postgres.pid), str(valkey.pid), 1))
    postgres.start()
    assert query(postgres.url, "SELECT 1") == 1
    assert valkey.running


def test_a_first_start_that_was_cut_short_leaves_nothing_half_done(tmp_path: Path) -> None:
    server = EmbeddedPostgres(tmp_path)
    asked = iter([False] * 20)
    with pytest.raises(StartCancelledError):
        server.start(cancelled=lambda: next(asked, True))
    assert not server.data.exists()
    with server:
        assert query(server.url, "SELECT 1") == 1
    assert [path.name for path in tmp_path.glob("unfinished*")] == []


def test_a_stopped_server_leaves_no_process(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path) as server:
        assert leash.find_processes(server.marker) == [server.pid]
    assert leash.find_processes(server.marker) == []
