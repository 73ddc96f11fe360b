"""The steps of the writer between which a crash must do no harm.

Each names a moment at which Postgres and Redis may have parted: something is written in one and not yet in the other.
"""

from __future__ import annotations

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


def crash_point(name: str) -> None:
    """A step, one of CRASH_POINTS, has been taken. Does nothing."""
