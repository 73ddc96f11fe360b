"""Points at which a test lets the writer die or stand still, to see that nothing is lost or doubled. Inert otherwise."""

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
    "recover.judged",
    "recover.book_settled",
    "recover.settled",
    "recover.wiped",
    "recover.coupons_restored",
    "recover.restored",
    "recover.certified",
)
_CRASH_AT = os.environ.get("COUPON_TEST_CRASH_AT", "")
_PAUSE_AT = os.environ.get("COUPON_TEST_PAUSE_AT", "")


def crash_point(name: str) -> None:
    """Die here by SIGKILL, as if the machine had, or stand still until SIGCONT, when a test asked for this point."""
    if name == _CRASH_AT:
        os.kill(os.getpid(), signal.SIGKILL)
    if name == _PAUSE_AT:
        os.kill(os.getpid(), signal.SIGSTOP)
