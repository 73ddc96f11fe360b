"""What a throw-away service leaves: nothing, though its supervisor had to be killed and its parts end after it."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from coupon_svc.dev import throwaway

PART = """
import pathlib, sys, time
data, end = pathlib.Path(sys.argv[1]), time.time() + 1.5
while time.time() < end:
    (data / str(time.time_ns())).touch()
"""
STUBBORN = f"""
import pathlib, signal, subprocess, sys, time
data = pathlib.Path(sys.argv[1])
signal.signal(signal.SIGTERM, signal.SIG_IGN)
data.mkdir()
subprocess.Popen([sys.executable, "-c", {PART!r}, str(data)], stderr=subprocess.DEVNULL)
while not any(data.iterdir()):
    time.sleep(0.01)
(data / "dev.json").write_text("{{}}")
time.sleep(60)
"""


def test_what_is_written_while_it_is_removed_is_removed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(folder: Path, output: Path, arguments: object, checkout: Path | None) -> subprocess.Popen[bytes]:
        output.touch()
        return subprocess.Popen([sys.executable, "-c", STUBBORN, str(folder / "data")])

    monkeypatch.setattr(throwaway, "_start", start)
    monkeypatch.setattr(throwaway, "STOP_TIMEOUT_SECONDS", 0.1)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with throwaway.signals_raise(), throwaway.throwaway_service("test"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_an_order_that_comes_while_it_starts_leaves_nothing_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process is there, and nobody knows it yet."""
    started: list[subprocess.Popen[bytes]] = []

    def start(folder: Path, output: Path, arguments: object, checkout: Path | None) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]))
        signal.raise_signal(signal.SIGTERM)
        return started[0]

    monkeypatch.setattr(throwaway, "_start", start)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with throwaway.signals_raise(), pytest.raises(KeyboardInterrupt), throwaway.throwaway_service("test"):
        pass
    assert started[0].returncode == -signal.SIGTERM
    assert list(tmp_path.iterdir()) == []
