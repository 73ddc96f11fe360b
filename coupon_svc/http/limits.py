"""What one API process puts up with from its callers: how slow they may be, and how many."""

from __future__ import annotations

import logging
import resource
import signal
import threading
from asyncio import AbstractEventLoop
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec

from coupon_svc.config import Settings

log = logging.getLogger(__name__)

OTHER_FILES = 200
"""File descriptors of a process that are no callers' connections: Redis, Postgres, the listener, libraries."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds on connections. Times are seconds, as the event loop counts them."""

    head_s: float = 10.0
    """From the connect, or from the first byte of a later request, to the end of its headers."""
    body_s: float = 30.0
    """In each window of this length a body must end, or `body_bytes_per_s_min` come in. An answer that nobody takes is
    given up after one or two of them."""
    body_bytes_per_s_min: int = 4_096
    keep_alive_s: float = 620.0
    connections_max: int = 10_000

    @classmethod
    def of(cls, settings: Settings) -> Limits:
        return cls(
            head_s=settings.head_timeout_ms / 1000,
            body_s=settings.body_timeout_ms / 1000,
            body_bytes_per_s_min=settings.body_bytes_per_s_min,
            keep_alive_s=settings.keep_alive_ms / 1000,
            connections_max=_connections_that_fit(settings.connections_max),
        )

    @property
    def connections_refused_max(self) -> int:
        """How many connections beyond `connections_max` are told so; any more are closed unheard."""
        return max(16, self.connections_max // 10)


def _connections_that_fit(wanted: int) -> int:
    """`wanted`, or as many connections as this process may have files open. Raises its soft limit when need be."""
    needed = wanted + max(16, wanted // 10) + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted
    fit = max(10, (soft - OTHER_FILES) * 10 // 11)
    log.warning("COUPON_CONNECTIONS_MAX is %d, but with %d open files only %d connections fit", wanted, soft, fit)
    return fit


@contextmanager
def drain_at_sigterm(loop: AbstractEventLoop, drain_ms: int, begin: Callable[[], None]) -> Iterator[None]:
    """At SIGTERM call `begin`, and only `drain_ms` later whoever handled SIGTERM before, which is the server.

    SIGINT is left alone: whoever types Ctrl-C does not want to wait.
    """
    before = signal.getsignal(signal.SIGTERM)
    if not drain_ms or not callable(before) or threading.current_thread() is not threading.main_thread():
        yield
        return
    stop = before

    def on_sigterm(number: int, frame: object) -> None:
        begin()
        loop.call_soon_threadsafe(loop.call_later, drain_ms / 1000, stop, number, None)

    signal.signal(signal.SIGTERM, on_sigterm)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
