"""`coupon-svc load` with a service of its own: it starts it, looks into all of it, and leaves nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from coupon_svc.dev import leash


def start(directory: Path, *args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "coupon_svc", "load", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "TMPDIR": str(directory)},
    )


def left_behind(directory: Path) -> list[str]:
    """What remains in the directory, and processes that know it."""
    found = [str(path) for path in directory.iterdir() if path.name.startswith("coupon-load-")]
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(directory).encode() in path.read_bytes():
                found.append(str(path))
        except OSError:
            continue
    return found


def test_a_load_of_its_own_service_holds_and_leaves_nothing(tmp_path: Path) -> None:
    tmp_path.chmod(0o711)
    report = tmp_path / "load.json"
    process = start(tmp_path, "--scenario", "checkout", "--duration", "1", "--codes", "300", "--json", str(report))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "The promises held." in output
    told = json.loads(report.read_text())
    assert set(told["cpu"]) == {"load", "redis", "postgres", "writer", "api"}
    assert all(part > 0 for part in told["cpu"].values())
    assert told["audit"]["checked"]["codes held in Redis, against the ledger (coupon-svc verify)"] > 0
    assert leash.wait_until(lambda: not left_behind(tmp_path), 10.0), left_behind(tmp_path)


def test_a_load_that_is_stopped_before_it_began_leaves_nothing(tmp_path: Path) -> None:
    tmp_path.chmod(0o711)
    process = start(tmp_path)
    assert process.stdout is not None
    assert process.stdout.read(8) == "Starting"
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "stopped; nothing was audited" in output
    assert leash.wait_until(lambda: not left_behind(tmp_path), 10.0), left_behind(tmp_path)
