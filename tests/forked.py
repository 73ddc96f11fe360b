"""Starts the service's processes by fork from one that has imported what they need.

Four fifths of the processor time of a start went into imports, and the tests start some hundred processes. Each still
runs as `python -m` would run it, and has a pid, a log and an exit status of its own.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from coupon_svc.redis import calls

IMPORTED = [
    "coupon_svc.app", "coupon_svc.cli", "coupon_svc.http.server", "coupon_svc.ops.adopt", "coupon_svc.ops.verify",
    "coupon_svc.writer.writer", "uvicorn.lifespan.on", "uvicorn.main", "uvicorn.protocols.http.httptools_impl", "uvloop",
]  # fmt: skip


class Start(NamedTuple):
    """What to run, and how."""

    command: list[str]
    """A module, and its arguments."""
    environment: dict[str, str]
    log: Path
    """What the process says is appended to it."""
    listener: socket.socket | None = None
    """The process gets it by `--fd N`."""
    errors: Path | None = None
    """Where standard error goes, unless to the log."""


class Forked:
    """A process that is started by fork: as much of subprocess.Popen as the tests use."""

    def __init__(self, start: Start) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED)
        self._process = context.Process(target=_become, args=(start,), daemon=True)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while the process lives."""
        return self._process.exitcode

    def wait(self, timeout: float) -> int:
        self._process.join(timeout)
        status = self.poll()
        if status is None:
            raise subprocess.TimeoutExpired(str(self._process), timeout)
        return status

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start_process(start: Start) -> Forked | subprocess.Popen[bytes]:
    """Start a part: by fork, unless the linker is to load a library first, or the part is to have children."""
    if "LD_PRELOAD" not in start.environment and "--workers" not in start.command:
        return Forked(start)
    descriptors = [start.listener.fileno()] if start.listener is not None else []
    with start.log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", *start.command, *(f"--fd={number}" for number in descriptors)],
            env=start.environment,
            stdout=output,
            stderr=output,
            pass_fds=descriptors,
        )


def run_command(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command of `coupon-svc` to its end, with nothing on standard input; a minute is the most it may take."""
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder, "output"), Path(folder, "errors")
        process = Forked(Start(["coupon_svc", *args], {**os.environ, **environment}, output, errors=errors))
        try:
            status = process.wait(60)
        finally:
            process.kill()
        return subprocess.CompletedProcess(args, status, output.read_text(), errors.read_text())


def _become(start: Start) -> None:
    """What the forked process does: be the command."""
    os.environ.clear()
    os.environ.update(start.environment)
    for number, path in ((1, start.log), (2, start.errors or start.log)):
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.dup2(file, number)
        os.close(file)
    if start.command[0] == "coupon_svc":
        calls._tip_prefix = secrets.token_hex(8)  # a process draws it when it imports the module
    else:  # what changes the service before it is imported
        for name in [name for name in sys.modules if name.partition(".")[0] == "coupon_svc"]:
            del sys.modules[name]
    sys.argv = start.command if start.listener is None else [*start.command, f"--fd={start.listener.detach()}"]
    runpy.run_module(start.command[0], run_name="__main__", alter_sys=True)
