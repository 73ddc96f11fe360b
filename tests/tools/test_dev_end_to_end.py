"""`python -m coupon_svc dev`, the real command with all its parts: what it tells, what it survives, how it ends."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest
import redis

from coupon_svc.dev import leash
from tests.harness import START_S

PARTS = ["redis", "postgres", "writer", "api"]


class Dev:
    """A `coupon-svc dev --port 0 --workers 2 --api-key k` on a directory; it can be started again after its end."""

    process: subprocess.Popen[bytes]
    output: Path

    def __init__(self, directory: Path, *args: str, **environ: str) -> None:
        self.data_dir = directory / "data"
        self._directory, self._args, self._environ = directory, args, environ
        self.start()

    def start(self) -> None:
        given = ["--port", "0", "--data-dir", str(self.data_dir), "--workers", "2", "--api-key", "k", *self._args]
        self.output = self._directory / f"output-{time.monotonic_ns()}"
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "coupon_svc", "dev", *given],
                stdout=output,
                stderr=output,
                env={**os.environ, **self._environ},
            )

    def told(self) -> dict[str, Any]:
        told: dict[str, Any] = json.loads((self.data_dir / "dev.json").read_text())
        return told

    def ready(self) -> dict[str, Any]:
        wait_for((self.data_dir / "dev.json").exists, "dev.json", self)
        return self.told()

    def pids(self) -> dict[str, list[int]]:
        pids = self.told()["pids"]
        return {part: pids[part] if part == "api" else [pids[part]] for part in PARTS}

    def ask(
        self, method: str, path: str, body: dict[str, object] | None = None, key: str = ""
    ) -> tuple[int, dict[str, Any]]:
        """The first answer that is not 503: as a client should, it asks again then, with the same Idempotency-Key."""
        address = urlsplit(self.told()["base_url"])
        deadline = time.monotonic() + 20
        headers = {"Authorization": "Bearer k", "Content-Type": "application/json", "Idempotency-Key": key or path}
        while True:
            connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=10)
            status, answer = 0, b"no answer"
            with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
                connection.request(method, path, json.dumps(body) if body is not None else None, headers)
                response = connection.getresponse()
                status, answer = response.status, response.read()
            if status not in (0, 503):
                return status, json.loads(answer)
            assert time.monotonic() < deadline, f"{method} {path}: {answer!r}\n{self.output.read_text()}"
            time.sleep(0.05)

    def held(self, user_id: str) -> list[str]:
        status, answer = self.ask("GET", f"/users/{user_id}/coupons")
        assert status == 200, answer
        return [coupon["code"] for coupon in answer["coupons"]]

    def make_book(self, total: int) -> str:
        unique = f"E{time.monotonic_ns()}"
        generate = {"pattern": f"{unique}-######", "total": total}
        status, book = self.ask("POST", "/coupons", {"name": "b", "generate": generate}, unique)
        assert status == 201, book
        return str(book["book_id"])

    def assign(self, user_id: str) -> str:
        """A code of a new book, for the user."""
        book_id = self.make_book(10)
        status, coupon = self.ask("POST", "/coupons/assign", {"book_id": book_id, "user_id": user_id}, book_id)
        assert status == 201, coupon
        return str(coupon["code"])

    def stop(self) -> int:
        """The exit status after SIGTERM, which must come within ten seconds."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(timeout=10)
        finally:
            self.process.kill()  # its parts end with it, by their leash
            self.process.wait()

    def left(self) -> list[int]:
        """Processes that know the directory by their command line."""
        return leash.find_processes(str(self.data_dir))


def wait_for(fact: Any, what: str, dev: Dev) -> None:
    assert leash.wait_until(fact, timeout=START_S), f"no {what}; the supervisor said:\n{dev.output.read_text()}"


def gone(pid: int) -> bool:
    return leash.started_at(pid) is None


def all_pids(dev: Dev) -> list[int]:
    return [pid for pids in dev.pids().values() for pid in pids]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dev]:
    """With settings around it that are meant for another Postgres."""
    foreign = {"HOME": "/nonexistent", "PGSSLMODE": "require", "PGHOST": "192.0.2.1", "PGDATA": "/nonexistent"}
    one = Dev(tmp_path_factory.mktemp("dev"), **foreign)
    yield one
    one.stop()


@pytest.fixture
def dev(running: Dev) -> Dev:
    """Ready. Whoever stops it need not start it again."""
    if running.process.poll() is not None:
        running.start()
    running.ready()
    return running


async def test_dev_json_is_as_documented(dev: Dev) -> None:
    told = dev.ready()
    assert list(told) == ["base_url", "api_key", "redis_url", "database_url", "pids"]
    assert list(told["pids"]) == PARTS
    assert told["api_key"] == "k"
    assert len(told["pids"]["api"]) == 2
    assert stat.S_IMODE((dev.data_dir / "dev.json").stat().st_mode) == 0o600
    assert all(not gone(pid) for pid in all_pids(dev))
    with contextlib.closing(redis.Redis.from_url(told["redis_url"])) as admin:
        assert admin.acl_whoami() == "default"
        assert any(admin.scan_iter("cb:*", count=1000))
    connection = await asyncpg.connect(told["database_url"])
    tenant = await connection.fetchval("SELECT name FROM api_keys JOIN tenants USING (tenant_id)")
    await connection.close()
    assert tenant == "dev"


def test_it_says_where_it_is_and_with_which_key(dev: Dev) -> None:
    shown = dev.output.read_text()
    assert f": {dev.told()['base_url']} " in shown
    assert "all scopes): k\n" in shown


@pytest.mark.skipif(not shutil.which("curl"), reason="the tour needs curl")
@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_the_tour_works_when_pasted_as_one_block(dev: Dev, shell: str) -> None:
    if not shutil.which(shell):
        pytest.skip(f"no {shell}")
    shown = dev.output.read_text()
    block = shown[shown.index("# where, and who") : shown.index("Ctrl-C stops")]
    before = set(dev.held("alice"))
    ran = subprocess.run([shell], input=block, capture_output=True, text=True, timeout=20, check=True)
    assert ran.stderr == ""
    book, assigned, locked, redeemed, held, after = (json.loads(line) for line in ran.stdout.splitlines())
    assert book["codes"] == {"total": 1000, "available": 1000, "assigned": 0, "redeemed": 0, "quarantined": 0}
    code = assigned["code"]
    assert (assigned["book_id"], assigned["user_id"], assigned["durable"]) == (book["book_id"], "alice", True)
    assert (locked["code"], locked["ttl_seconds"]) == (code, 120)
    assert (redeemed["code"], redeemed["redemptions_left"]) == (code, 0)
    assert {coupon["code"]: coupon["status"] for coupon in held["coupons"]} == dict.fromkeys(
        {*before, code}, "redeemed"
    )
    assert after["codes"] == {"total": 1000, "available": 999, "assigned": 0, "redeemed": 1, "quarantined": 0}


@pytest.mark.parametrize("part", PARTS)
def test_a_killed_part_comes_back_and_what_was_answered_is_still_there(dev: Dev, part: str) -> None:
    code = dev.assign("kill-" + part)
    before = dev.told()
    victim = dev.pids()[part][0]
    os.kill(victim, signal.SIGKILL)
    wait_for(lambda: victim not in all_pids(dev), f"new dev.json after the death of {part}", dev)
    after = dev.told()
    assert {**after, "pids": None} == {**before, "pids": None}
    for other in set(PARTS) - {part}:
        assert after["pids"][other] == before["pids"][other]
    assert all(not gone(pid) for pid in all_pids(dev))
    assert dev.held("kill-" + part) == [code]
    assert dev.assign("after-" + part) in dev.held("after-" + part)


def test_what_was_assigned_is_there_after_a_restart(dev: Dev) -> None:
    code = dev.assign("carol")
    before, pids = dev.told(), all_pids(dev)
    assert dev.stop() == 0
    assert not (dev.data_dir / "dev.json").exists()
    assert all(gone(pid) for pid in pids)
    assert dev.left() == []
    dev.start()
    after = dev.ready()
    assert dev.held("carol") == [code]
    for told in ("redis_url", "database_url"):
        assert after[told] == before[told]


def test_an_order_to_stop_under_load_is_obeyed_in_time(dev: Dev) -> None:
    book_id = dev.make_book(5000)
    address, pids = urlsplit(dev.told()["base_url"]), all_pids(dev)
    answers: list[int] = []

    def call(number: int) -> None:
        connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=10)
        headers = {"Authorization": "Bearer k", "Content-Type": "application/json"}
        body = json.dumps({"book_id": book_id, "user_id": f"load-{number}"})
        with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
            while True:
                connection.request("POST", "/coupons/assign", body, headers)
                response = connection.getresponse()
                response.read()
                answers.append(response.status)

    callers = [threading.Thread(target=call, args=(number,)) for number in range(16)]
    for caller in callers:
        caller.start()
    wait_for(lambda: len(answers) >= 100, "answers", dev)
    began = time.monotonic()
    assert dev.stop() == 0, dev.output.read_text()
    assert time.monotonic() - began < 10
    for caller in callers:
        caller.join(timeout=15)
        assert not caller.is_alive()
    assert set(answers[:100]) == {201}
    assert 500 not in answers
    assert all(gone(pid) for pid in pids)
    assert dev.left() == []
    assert not (dev.data_dir / "dev.json").exists()


def refused(directory: Path, *args: str, **environ: str) -> tuple[int, str]:
    """The exit status and the words of a start that must not succeed, and must not leave anything running."""
    dev = Dev(directory, *args, **environ)
    try:
        status = dev.process.wait(timeout=20)
    finally:
        dev.stop()
    assert dev.left() == []
    return status, dev.output.read_text()


def test_wrong_input_is_an_error_of_one_line(tmp_path: Path) -> None:
    """Here through the real command; tests of the command line go through the rest of what can be wrong."""
    status, said = refused(tmp_path, "--api-key", "")
    assert status == 1
    assert said.startswith("coupon-svc: --api-key gives no usable key")
    assert len(said.splitlines()) == 1


def test_a_file_in_the_place_of_the_data_is_an_error_of_one_line(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file")
    status, said = refused(tmp_path)
    assert status == 1
    assert said == f"coupon-svc dev: cannot use {tmp_path / 'data'} for data: File exists; give another --data-dir\n"
