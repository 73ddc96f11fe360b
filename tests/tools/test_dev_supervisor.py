"""`coupon-svc dev` with real servers, and a stand-in for the service's own commands."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import asyncpg
import pytest
import redis

from coupon_svc.dev import leash
from coupon_svc.dev.servers import EmbeddedPostgres, EmbeddedRedis
from tests.harness import START_S

SUPERVISE = """
import sys
from pathlib import Path
from coupon_svc.dev.supervisor import Supervisor
port, data_dir, key, stub = sys.argv[1:]
command = (sys.executable, stub)
sys.exit(Supervisor("127.0.0.1", int(port), Path(data_dir), 2, key or None, command).run())
"""

STUB = """
import http.server, json, os, signal, socket, sys

class Api(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps({"pid": os.getpid()}).encode()
        self.send_response(503 if os.environ.get("STUB_WRITER") == "fails" else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

def api(fd):
    server = http.server.HTTPServer(("", 0), Api, bind_and_activate=False)
    server.socket = socket.socket(fileno=fd)
    server.socket.setblocking(True)
    server.serve_forever()

match sys.argv[1:]:
    case ["api", "--fd", fd]:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
        api(int(fd))
    case ["writer"]:
        print(os.environ["COUPON_REDIS_URL"], os.environ["COUPON_DATABASE_URL"])
        if os.environ.get("STUB_WRITER") == "fails":
            sys.exit("the writer has a reason")
        if os.environ.get("STUB_WRITER") == "is deaf":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            signal.pause()
    case ["migrate"]:
        print("migrated")
    case ["keys", "import", "--tenant", "dev"]:
        print("imported", len(sys.stdin.read()), "characters")
"""


class Dev:
    """One `coupon-svc dev` in a process of its own."""

    made: ClassVar[list[Dev]] = []

    def __init__(self, directory: Path, port: int = 0, key: str = "", environ: dict[str, str] | None = None) -> None:
        self.data_dir = directory / "data"
        stub = directory / "stub.py"
        stub.write_text(STUB)
        self.output = directory / f"output-{time.monotonic_ns()}"
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-c", SUPERVISE, str(port), str(self.data_dir), key, str(stub)],
                stdout=output,
                stderr=output,
                env={**os.environ, **(environ or {})},
            )
        self.made.append(self)

    def told(self) -> dict[str, Any]:
        told: dict[str, Any] = json.loads((self.data_dir / "dev.json").read_text())
        return told

    def ready(self) -> dict[str, Any]:
        wait_for((self.data_dir / "dev.json").exists, "dev.json", self)
        return self.told()

    def ended(self) -> int:
        """The exit status. The start that it may interrupt, or wait for, takes its time on a busy machine."""
        return self.process.wait(timeout=20)

    def pids(self) -> list[int]:
        return flat(self.told()["pids"])

    def processes(self) -> list[int]:
        """Of the servers; those of the API and the writer are known from dev.json."""
        servers = EmbeddedRedis(self.data_dir / "redis"), EmbeddedPostgres(self.data_dir / "postgres")
        return [pid for server in servers for pid in leash.find_processes(server.marker)]

    def close(self) -> None:
        """Its parts end with it, by their leash, even where it must be killed."""
        try:
            if self.process.poll() is None:
                self.process.terminate()
            self.ended()
        finally:
            self.process.kill()
            self.process.wait()


def flat(pids: dict[str, Any]) -> list[int]:
    return [pids["redis"], pids["postgres"], pids["writer"], *pids["api"]]


def wait_for(fact: Any, what: str, dev: Dev) -> None:
    assert leash.wait_until(fact, timeout=START_S), f"no {what}; the supervisor said:\n{dev.output.read_text()}"


def gone(pid: int) -> bool:
    return leash.started_at(pid) is None


def get(url: str) -> dict[str, Any]:
    address = urlsplit(url)
    assert address.hostname
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=5)
    with contextlib.closing(connection):
        connection.request("GET", address.path)
        answer: dict[str, Any] = json.loads(connection.getresponse().read())
        return answer


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dev]:
    one = Dev(tmp_path_factory.mktemp("dev"))
    one.made.remove(one)
    try:
        one.ready()
        yield one
    finally:
        one.close()


@pytest.fixture(autouse=True)
def nothing_outlives_a_failed_test() -> Iterator[None]:
    yield
    while Dev.made:
        Dev.made.pop().close()


# -- running ----------------------------------------------------------------------------------------------------------


async def test_dev_json_tells_how_to_reach_everything(dev: Dev) -> None:
    told = dev.told()
    assert set(told) == {"base_url", "api_key", "redis_url", "database_url", "pids"}
    assert set(told["pids"]) == {"redis", "postgres", "writer", "api"}
    assert len(told["pids"]["api"]) == 2
    assert all(not gone(pid) for pid in flat(told["pids"]))
    assert (dev.data_dir / "dev.json").stat().st_mode & 0o777 == 0o600
    assert get(f"{told['base_url']}/readyz")["pid"] in told["pids"]["api"]
    with contextlib.closing(redis.Redis.from_url(told["redis_url"])) as admin:
        assert admin.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
    connection = await asyncpg.connect(told["database_url"])
    assert await connection.fetchval("SELECT current_database()") == "coupons"
    await connection.close()


@pytest.mark.parametrize("part", ["redis", "postgres", "writer", "api"])
def test_a_killed_part_is_restarted(dev: Dev, part: str) -> None:
    before = dev.told()
    victim = flat({**before["pids"]})[["redis", "postgres", "writer", "api"].index(part)]
    os.kill(victim, signal.SIGKILL)
    wait_for(lambda: victim not in dev.pids(), f"new dev.json after the death of {part}", dev)
    after = dev.told()
    assert {**after, "pids": None} == {**before, "pids": None}
    assert len(set(flat(after["pids"])) & set(flat(before["pids"]))) == 4
    assert all(not gone(pid) for pid in flat(after["pids"]))
    assert "killed by SIGKILL), restarted" in dev.output.read_text()


def test_no_call_is_refused_while_both_api_processes_are_restarted(dev: Dev) -> None:
    told = dev.told()
    for pid in told["pids"]["api"]:
        os.kill(pid, signal.SIGKILL)
    # One that is dying may have accepted the call: who is killed resets what it has.
    wait_for(lambda: all(gone(pid) for pid in told["pids"]["api"]), "the killed processes to be gone", dev)
    assert get(f"{told['base_url']}/readyz")["pid"] not in told["pids"]["api"]
    wait_for(lambda: not set(told["pids"]["api"]) & set(dev.pids()), "new pids of the API", dev)


def test_everything_killed_at_once_comes_back(dev: Dev) -> None:
    before = dev.pids()
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not set(before) & set(dev.pids()), "new pids of all parts", dev)
    assert all(not gone(pid) for pid in dev.pids())


def test_the_key_of_the_first_start_is_shown_and_private(dev: Dev) -> None:
    key = dev.told()["api_key"]
    assert key.startswith("cbk_dev_")  # what a scanner for leaked secrets looks for
    assert (dev.data_dir / "api_key").read_text() == key
    assert (dev.data_dir / "api_key").stat().st_mode & 0o777 == 0o600
    assert key in dev.output.read_text()


def test_a_second_start_on_the_same_directory_is_refused(dev: Dev) -> None:
    told = dev.told()
    second = Dev(dev.data_dir.parent)
    assert second.ended() == 1
    said = second.output.read_text()
    assert f"another `coupon-svc dev` (pid {dev.process.pid}) runs on" in said
    assert len(said.splitlines()) == 1
    assert dev.told() == told


# -- life and death ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def again(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which one supervisor runs after the other: its servers are made once."""
    return tmp_path_factory.mktemp("again")


@pytest.mark.parametrize("order", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.chaos)])
def test_an_order_to_stop_ends_everything_cleanly(again: Path, order: signal.Signals) -> None:
    dev = Dev(again, key="ck_given")
    log = dev.data_dir / "logs" / "postgres.log"
    told = dev.ready()
    begun = log.stat().st_size
    assert told["api_key"] == "ck_given"
    dev.process.send_signal(order)
    assert dev.ended() == 0
    assert not (dev.data_dir / "dev.json").exists()
    assert all(gone(pid) for pid in flat(told["pids"]))
    assert dev.processes() == []
    assert b"database system is shut down" in log.read_bytes()[begun:]


def test_an_order_to_stop_during_the_start_is_obeyed(tmp_path: Path) -> None:
    dev = Dev(tmp_path)
    wait_for(lambda: "starting Postgres" in dev.output.read_text(), "start of Postgres", dev)
    dev.process.terminate()
    assert dev.ended() == 0
    assert dev.processes() == []


def test_a_part_that_does_not_listen_is_killed_in_time(again: Path) -> None:
    dev = Dev(again, environ={"STUB_WRITER": "is deaf"})
    told = dev.ready()
    dev.process.terminate()
    assert dev.ended() == 0
    assert all(gone(pid) for pid in flat(told["pids"]))


def test_a_part_that_dies_again_and_again_at_the_start_is_reported(again: Path) -> None:
    dev = Dev(again, environ={"STUB_WRITER": "fails"})
    assert dev.ended() == 1
    assert "the writer has a reason" in dev.output.read_text()
    assert dev.processes() == []


def test_a_killed_supervisor_takes_its_parts_along_and_can_be_started_again(again: Path) -> None:
    dev = Dev(again)
    before = dev.ready()
    port = urlsplit(before["base_url"]).port
    assert port
    dev.process.kill()
    dev.process.wait()
    # At once, while the leftovers still go; the old dev.json must not be taken for the new one's.
    dev = Dev(again, port=port)
    wait_for(lambda: "Ready after" in dev.output.read_text(), "second start", dev)
    after = dev.told()
    assert {**after, "pids": None} == {**before, "pids": None}
    assert all(gone(pid) for pid in flat(before["pids"]))
    dev.close()


def test_a_taken_port_is_an_error_of_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        dev = Dev(tmp_path, port=port)
        assert dev.ended() == 1
    assert dev.output.read_text() == (
        f"coupon-svc dev: port {port} of 127.0.0.1 is taken by another program; give another --port\n"
    )
    assert dev.processes() == []


def test_a_directory_that_cannot_be_used_is_an_error_of_one_line(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file")
    dev = Dev(tmp_path)
    assert dev.ended() == 1
    assert dev.output.read_text().startswith("coupon-svc dev: cannot use ")
    assert len(dev.output.read_text().splitlines()) == 1
