"""Starts the service's processes by fork from one that has imported the libraries they need, and nothing of ours.

Two thirds of the processor time of a start went into those imports, and the tests start some hundred processes. Each
still imports the service itself, runs as `python -m` would run it, and has a pid, a log and an exit status of its own.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

LIBRARIES = [
    "asyncpg", "cryptography.hazmat.primitives.ciphers", "hiredis", "httptools", "msgspec", "starlette.applications",
    "uvicorn.lifespan.on", "uvicorn.main", "uvicorn.protocols.http.httptools_impl", "uvloop",
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


class Forked:
    """A process that is started by fork: as much of subprocess.Popen as the tests use."""

    def __init__(self, start: Start) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(LIBRARIES)
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


def _become(start: Start) -> None:
    """What the forked process does: be the command."""
    os.environ.clear()
    os.environ.update(start.environment)
    output = os.open(start.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    sys.argv = start.command if start.listener is None else [*start.command, f"--fd={start.listener.detach()}"]
    runpy.run_module(start.command[0], run_name="__main__", alter_sys=True)
