"""Points at which a test lets the writer die, to see that nothing is lost or doubled there. Inert otherwise."""

from __future__ import annotations

import os
import signal

CRASH_POINTS = (
    "persist.read",
    "persist.written",
    "persist.committed",
    "persist.published",
    "lend.put",
    "lend.leased",
    "lend.brought",
    "lend.marked",
    "lend.lone_brought",
    "own.taken",
    "recover.begun",
    "recover.shut",
    "recover.drained",
    "recover.settled",
    "recover.wiped",
    "recover.restored",
    "recover.certified",
)
_CRASH_AT = os.environ.get("COUPON_TEST_CRASH_AT", "")


def crash_point(name: str) -> None:
    """Die here by SIGKILL, as if the machine had, when the test asked for this point."""
    if name == _CRASH_AT:
        os.kill(os.getpid(), signal.SIGKILL)
