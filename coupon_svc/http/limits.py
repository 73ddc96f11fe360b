"""The limits of one API process on its callers: how slow they may be, and how many."""

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
"""File descriptors that a process needs for other things: Redis, Postgres, the listener, libraries."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Limits on connections. Times are seconds on the event loop's clock."""

    head_s: float = 10.0
    """From the connect, or from the first byte of a later request, to the end of its headers."""
    body_s: float = 30.0
    """A window: within each, a body must end or keep to `body_bytes_per_s_min`. A response that its caller does not take
    is given up after one or two windows."""
    body_bytes_per_s_min: int = 4_096
    keep_alive_s: float = 620.0
    connections_max: int = 10_000

    @classmethod
    def of(cls, settings: Settings) -> Limits:
        """The limits that the settings ask for, with no more connections than this process may have files open."""
        return cls(
            head_s=settings.head_timeout_ms / 1000,
            body_s=settings.body_timeout_ms / 1000,
            body_bytes_per_s_min=settings.body_bytes_per_s_min,
            keep_alive_s=settings.keep_alive_ms / 1000,
            connections_max=_connections_that_fit(settings.connections_max),
        )

    @property
    def connections_refused_max(self) -> int:
        """How many connections beyond `connections_max` get a 503. Any more are closed at once."""
        return max(16, self.connections_max // 10)


def _connections_that_fit(wanted: int) -> int:
    """`wanted`, or as many connections as the limit on open files allows. Raises the soft limit if needed."""
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
    """While in force, SIGTERM calls `begin` at once, and only `drain_ms` later the handler from before: the server's.

    Load balancers have that time to notice. SIGINT is left alone: whoever types Ctrl-C does not want to wait. With
    `drain_ms` 0, and outside the main thread, nothing changes.
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
