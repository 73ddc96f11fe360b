"""Time: whole Unix milliseconds inside, RFC 3339 in UTC on the wire."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from functools import lru_cache

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_BOOT_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
"""Where there is no CLOCK_BOOTTIME (macOS), CLOCK_MONOTONIC counts a suspension."""


def now_ms() -> int:
    """This machine's wall clock. The data plane takes Redis's clock instead, from the script's reply."""
    return time.time_ns() // 1_000_000


def boot_s() -> float:
    """Seconds of a clock that nobody can set and that goes on while the machine is suspended: for promises that end."""
    return time.clock_gettime(_BOOT_CLOCK)


@lru_cache(maxsize=64)
def _whole_second(second: int) -> str:
    """Answers of one moment share their second; formatting it anew each time is most of the cost."""
    return (_EPOCH + timedelta(seconds=second)).strftime("%Y-%m-%dT%H:%M:%S")


def rfc3339(at_ms: int) -> str:
    """`1795357061878` as `2026-11-22T14:17:41.878Z`."""
    return f"{_whole_second(at_ms // 1000)}.{at_ms % 1000:03d}Z"


def to_ms(moment: datetime) -> int:
    """A timezone-aware datetime as Unix milliseconds."""
    return (moment - _EPOCH) // timedelta(milliseconds=1)
