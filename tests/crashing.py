"""Runs a part of the service that is struck after one of the writer's steps, as a machine would be:

    python -m tests.crashing SIGKILL persist.committed coupon_svc writer
    python -m tests.crashing SIGSTOP lend.leased tests.unsafe fenced_load writer

SIGKILL ends the process there; SIGSTOP lets it stand still until it gets SIGCONT. Steps: coupon_svc/writer/crash.py.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys

from coupon_svc.writer import crash


def strike_at(step: str, number: signal.Signals) -> None:
    """Send this process a signal whenever it has taken a step. To be called before the writer is imported."""
    assert step in crash.CRASH_POINTS, f"the writer has no step {step}"
    assert "coupon_svc.writer.writer" not in sys.modules

    def crash_point(name: str) -> None:
        if name == step:
            os.kill(os.getpid(), number)

    crash.crash_point = crash_point


if __name__ == "__main__":
    strike_at(sys.argv[2], signal.Signals[sys.argv[1]])
    sys.argv = sys.argv[3:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
