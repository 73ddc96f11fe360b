"""`coupon-svc demo` as a newcomer runs it, interrupted, and against a service that does not keep its promises."""

from __future__ import annotations

import contextlib
import http.server
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from coupon_svc.dev import demo, leash, throwaway


@contextlib.contextmanager
def started(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """The demo with `folder` for temporary data. The settings of a real service must not reach it."""
    foreign = {"COUPON_SHARDS": "nonsense", "COUPON_REDIS_URL": "redis://127.0.0.1:1", "PGSSLMODE": "require"}
    with subprocess.Popen(
        [sys.executable, "-m", "coupon_svc", "demo"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(folder), **foreign},
    ) as process:
        try:
            yield process
        finally:
            process.kill()  # its service ends with it, by its leash


def assert_nothing_is_left(folder: Path) -> None:
    assert list(folder.iterdir()) == []
    assert leash.find_processes(str(folder)) == []


def test_the_demo_shows_the_life_of_a_coupon_and_leaves_nothing(tmp_path: Path) -> None:
    with started(tmp_path) as process:
        out, error = process.communicate(timeout=60)
    assert error == ""
    assert "All of it is as it should be." in out
    answers = [line.strip() for line in out.splitlines() if " -> " in line]
    assert len(answers) == 18
    for part in ("423 locked", "409 user_code_limit", "409 already_redeemed", "201 (replayed)", "row 3: duplicate"):
        assert part in out
    ledger = out[out.index("What Postgres holds") :]
    assert ledger.count("coupon_assigned") == 3
    assert ledger.count("coupon_redeemed") == 1
    assert "20 available + 2 assigned + 1 redeemed = 23 codes" in ledger
    assert_nothing_is_left(tmp_path)


def test_a_demo_that_is_interrupted_while_it_starts_leaves_nothing(tmp_path: Path) -> None:
    with started(tmp_path) as process:
        assert leash.wait_until(lambda: any(tmp_path.glob("*/data/postgres")), timeout=20)
        assert_ends_cleanly(process, signal.SIGINT, tmp_path)


@pytest.mark.chaos
def test_a_demo_that_is_told_to_end_half_way_leaves_nothing(tmp_path: Path) -> None:
    with started(tmp_path) as process:
        assert process.stdout is not None
        assert any("POST /coupons -> 201" in line for line in process.stdout)
        assert_ends_cleanly(process, signal.SIGTERM, tmp_path)


def assert_ends_cleanly(process: subprocess.Popen[str], order: signal.Signals, folder: Path) -> None:
    process.send_signal(order)
    _, error = process.communicate(timeout=15)
    assert (process.returncode, error) == (130, "")
    assert_nothing_is_left(folder)


# -- a service that does not do what it should ------------------------------------------------------------------------


class Broken(http.server.BaseHTTPRequestHandler):
    status, content = 201, b'{"book_id": "bk_1", "codes": {"available": 19}}'

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        self.wfile.write(self.content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def broken() -> Iterator[demo.Caller]:
    with http.server.HTTPServer(("127.0.0.1", 0), Broken) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        caller = demo.Caller(f"http://127.0.0.1:{server.server_port}", "key")
        yield caller
        caller.close()
        server.shutdown()


@pytest.mark.parametrize(
    ("status", "content", "said"),
    [
        (201, b'{"book_id": "bk_1", "codes": {"available": 19}}', "`codes.available` is 19 and should be 20"),
        (503, b'{"code": "recovering"}', r"the answer is \(503, 'recovering'\) and should be 201"),
        (201, b"not JSON", "POST /coupons brought no answer"),
        (201, b"[]", "`codes.available` is None and should be 20"),
    ],
)
def test_an_answer_that_is_not_as_it_should_be_ends_the_demo(
    broken: demo.Caller, monkeypatch: pytest.MonkeyPatch, status: int, content: bytes, said: str
) -> None:
    monkeypatch.setattr(Broken, "status", status)
    monkeypatch.setattr(Broken, "content", content)
    with pytest.raises(demo.DemoError, match=f"step 1 went wrong: {said}"):
        demo.live(broken)


def test_a_service_that_does_not_start_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(throwaway, "SERVICE_COMMAND", (sys.executable, "-c", "raise SystemExit('there is a reason')"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert demo.run_demo() == 1
    error = capfd.readouterr().err
    assert error.startswith("coupon-svc demo: the service did not start (exit status 1)")
    assert "there is a reason" in error
    assert_nothing_is_left(tmp_path)
