"""What processes take of the processors (Linux): the load's own, and its service's when that runs here, too."""

from __future__ import annotations

import os
import resource
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

_TICKS_S = os.sysconf("SC_CLK_TCK")


def own_cpu_s() -> float:
    """Seconds of processor time that this process has used."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def cpu_s(parts: Mapping[str, Iterable[int]]) -> dict[str, float]:
    """Seconds that the processes of each part have used with all their children, living or ended.

    A process that has gone counts as 0.
    """
    used: dict[int, float] = {}
    children: defaultdict[int, list[int]] = defaultdict(list)
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        pid = int(path.parent.name)
        children[int(fields[1])].append(pid)
        used[pid] = sum(map(int, fields[11:15])) / _TICKS_S

    def tree(pid: int) -> float:
        return used.get(pid, 0.0) + sum(tree(child) for child in children[pid])

    return {part: sum(tree(pid) for pid in pids) for part, pids in parts.items()}


def machine() -> dict[str, object]:
    """What the figures were taken on, for the report: nothing that names the machine."""
    return {
        "processors": len(os.sched_getaffinity(0)),
        "system": " ".join((os.uname().sysname, os.uname().release, os.uname().machine)),
        "processor": _processor(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
