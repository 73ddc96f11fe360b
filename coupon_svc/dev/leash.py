"""Processes that do not outlive the one that started them, not even when that one is killed with SIGKILL.

`leashed` wraps a command line so that it first runs this file as a script. The script gives up root where asked to, asks
the kernel for a signal at its parent's death, and becomes the command (same pid). A `preexec_fn` could do that too, but
runs Python in a forked child, which may hang when the parent has threads. The order matters: changing the user clears
the parent-death signal. Where the kernel has no such signal (macOS) the process is merely started.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def leashed(command: Sequence[str], death_signal: signal.Signals, identity: tuple[int, int] | None = None) -> list[str]:
    """`command` on a leash; with `identity` (uid, gid) as that user, which only root can ask for.

    The leash is held by the thread that starts the process, so that must be one that lives as long as its process.
    """
    who = "-" if identity is None else f"{identity[0]}:{identity[1]}"
    # -I -S: nothing but the standard library, so that it takes 15 ms and no environment can interfere.
    return [sys.executable, "-I", "-S", __file__, str(int(death_signal)), str(os.getpid()), who, *command]


def find_processes(marker: str) -> list[int]:
    """Living processes, but for this one, whose command line (as `ps` shows it) contains `marker`."""
    return [pid for pid, line in _command_lines() if marker in line and pid != os.getpid()]


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def started_at(pid: int) -> str | None:
    """An opaque word that differs between two processes that had the same pid; None when there is none such."""
    try:
        # The name (second field) may contain anything, even ") ": what follows the last one is regular.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(") ")[2].split()
        return None if fields[0] == "Z" else fields[19]
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
    listed = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return listed.stdout.strip() or None


def send(pids: Iterable[int], number: signal.Signals) -> None:
    """Signals those that still live. Callers have made sure that they are theirs."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def wait_until(fact: Callable[[], bool], timeout: float, interval: float = 0.02) -> bool:
    """Asks for `fact` until it holds or `timeout` seconds are over; says whether it held."""
    deadline = time.monotonic() + timeout
    while not fact():
        if time.monotonic() >= deadline:
            return False
        time.sleep(interval)
    return True


def _command_lines() -> list[tuple[int, str]]:
    if not Path("/proc/self/cmdline").exists():
        listed = subprocess.run(["ps", "-axww", "-o", "pid=,command="], capture_output=True, text=True, check=False)
        rows = (line.strip().partition(" ") for line in listed.stdout.splitlines())
        return [(int(pid), line) for pid, _, line in rows if pid.isdigit()]
    lines = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                raw = Path("/proc", entry, "cmdline").read_bytes()
            except OSError:  # it has just ended
                continue
            lines.append((int(entry), raw.replace(b"\0", b" ").decode(errors="replace")))
    return lines


def main(arguments: list[str]) -> None:
    number, parent, who, *command = arguments
    if who != "-":
        uid, _, gid = who.partition(":")
        os.setgroups([])
        os.setgid(int(gid))
        os.setuid(int(uid))
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
        if os.getppid() != int(parent):  # it died before the line above
            sys.exit(1)
    # Python ignores these for itself; the command must not inherit that.
    for ignored in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(ignored, signal.SIG_DFL)
    try:
        os.execv(command[0], command)
    except OSError as error:
        sys.exit(f"cannot run {command[0]}: {error.strerror}")


if __name__ == "__main__":
    main(sys.argv[1:])
