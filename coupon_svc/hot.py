"""Runs a hot request's coroutine without a Task: whoever resolves what it waits for goes on with it, there and then.

A Task and its Futures cost three turns through the event loop per request, and more than the request's own work. Use
cases stay straight async code; what they wait for on the hot path is a Slot. `drive` runs such a coroutine, and hands it
to a real Task as soon as it needs one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Generator, Sequence
from contextvars import Context
from functools import partial
from types import coroutine
from typing import Any, Generic, TypeVar

from coupon_svc.domain.errors import CouponError, error_location

T = TypeVar("T")
log = logging.getLogger(__name__)


class Withdrawn(CouponError):
    """Nobody wants a value any more, and nothing was done for it yet."""


class Slot(Generic[T]):
    """One value that arrives later, for one coroutine. Whoever resolves it first decides; what comes later is ignored.

    Under `drive` the coroutine goes on within `set_result`. A Task may await it, too, since it has what a Task asks of a
    Future. Then the coroutine goes on in the loop's next turn.
    """

    __slots__ = ("_asyncio_future_blocking", "_done", "_error", "_resume", "_value", "withdrawable")

    def __init__(self) -> None:
        self.withdrawable = False
        """Whether `Driven.withdraw` may end the wait. Whoever makes the slot says so, and only while nothing was done."""
        self._done = False
        self._error: BaseException | None = None
        self._resume: Callable[[], object] | None = None

    def done(self) -> bool:
        """Whether it has a value or an exception, or was cancelled."""
        return self._done

    def set_result(self, value: T) -> None:
        """Give it its value."""
        if not self._done:
            self._done = True
            self._value = value
            if self._resume is not None:
                self._resume()

    def set_exception(self, error: BaseException) -> None:
        """Raise `error` in the coroutine that waits, now or later."""
        if not self._done:
            self._done = True
            self._error = error
            if self._resume is not None:
                self._resume()

    def cancel(self, msg: str | None = None) -> bool:
        """Raise CancelledError in the coroutine that waits. False when it was done already."""
        if self._done:
            return False
        self.set_exception(asyncio.CancelledError(*([] if msg is None else [msg])))
        return True

    def __await__(self) -> Generator[Any, None, T]:
        if not self._done:
            if self._resume is not None:
                raise RuntimeError("somebody waits for this slot already")
            self._asyncio_future_blocking = True  # a Task asks for it, as for a Future's
            yield self
        if self._error is not None:
            raise self._error
        return self._value

    # --- what a Task asks of a Future

    def result(self) -> T:
        """The value. Raises the exception that it was given instead."""
        if self._error is not None:
            raise self._error
        return self._value

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    def add_done_callback(self, wake_up: Callable[[Slot[T]], object], *, context: Context | None = None) -> None:
        """Call `wake_up` in the loop's next turn after this is done."""
        loop = asyncio.get_running_loop()
        self._resume = lambda: loop.call_soon(wake_up, self, context=context)
        if self._done:
            self._resume()


@coroutine
def in_a_task() -> Generator[None, None, None]:
    """From here on the coroutine runs in a Task. To be awaited before asyncio.timeout, asyncio.sleep, Postgres, and whatever
    else belongs to a Task. In a Task already, it gives way for one turn of the loop."""
    yield


def drive(driven: Coroutine[Any, None, T], on_done: Callable[[T | None], object]) -> Driven[T]:
    """Run a coroutine now, until it waits for a Slot, and go on with it whenever that is resolved.

    `on_done` gets what it returns; or None when it raised, which is logged. What it waits for otherwise, a Future or
    `in_a_task`, hands it to a Task for good.
    """
    started = Driven(driven, on_done)
    started.go_on()
    return started


async def together(all_driven: Sequence[Coroutine[Any, None, T]]) -> list[T | None]:
    """Drive several coroutines at once, and return what they return, in their order; None for one that raised."""
    results: list[T | None] = [None] * len(all_driven)
    left = len(all_driven)
    all_done: Slot[None] = Slot()

    def on_done(index: int, result: T | None) -> None:
        nonlocal left
        results[index] = result
        left -= 1
        if not left:
            all_done.set_result(None)

    for index, driven in enumerate(all_driven):
        drive(driven, partial(on_done, index))
    if left:
        await all_done
    return results


class Driven(Generic[T]):
    """A coroutine that `drive` drives. `go_on` starts it; like a Task it can be cancelled."""

    __slots__ = ("_coroutine", "_on_done", "_task", "_waits_for")

    def __init__(self, driven: Coroutine[Any, None, T], on_done: Callable[[T | None], object]) -> None:
        self._coroutine = driven
        self._on_done = on_done
        self._waits_for: Slot[Any] | None = None
        self._task: asyncio.Task[T] | None = None

    def go_on(self) -> None:
        """Run the coroutine until it waits, or ends. Called once to start it, and by each Slot that it has waited for."""
        try:
            waits_for = self._coroutine.send(None)
        except StopIteration as end:
            self._waits_for = None
            self._on_done(end.value)
        except (Exception, asyncio.CancelledError) as error:
            self._fail(error)
        else:
            if type(waits_for) is Slot:
                self._waits_for = waits_for
                waits_for._resume = self.go_on
            else:
                self._waits_for = None
                self._task = asyncio.create_task(_Rest(self._coroutine, waits_for))
                self._task.add_done_callback(self._on_task_done)

    def withdraw(self) -> None:
        """Raise Withdrawn in the coroutine now, if it waits for a slot that is withdrawable. Else do nothing."""
        waits_for = self._waits_for
        if waits_for is not None and waits_for.withdrawable:
            waits_for.set_exception(Withdrawn())

    def cancel(self, msg: str | None = None) -> None:
        """Raise CancelledError in the coroutine, in the loop's next turn: whoever cancels may be iterating over what its end
        changes."""
        asyncio.get_running_loop().call_soon(self._cancel, msg)

    def _cancel(self, msg: str | None) -> None:
        waits_for = self._task or self._waits_for
        if waits_for is not None:
            waits_for.cancel(msg)

    def _on_task_done(self, task: asyncio.Task[T]) -> None:
        try:
            result = task.result()
        except (Exception, asyncio.CancelledError) as error:
            self._fail(error)
        else:
            self._on_done(result)

    def _fail(self, error: BaseException) -> None:
        """Whoever resolved the Slot must not suffer from what the coroutine raises."""
        self._waits_for = None
        log.error("a driven coroutine failed: %s at %s", type(error).__name__, error_location(error))
        self._on_done(None)


class _Rest(Coroutine[Any, Any, T]):
    """The rest of a driven coroutine, as the coroutine of a Task: first `waits_for`, which it has asked for already."""

    def __init__(self, driven: Coroutine[Any, None, T], waits_for: object) -> None:
        self._coroutine = driven
        self._waits_for = waits_for

    def send(self, value: Any) -> Any:
        if self._waits_for is not None:
            waits_for, self._waits_for = self._waits_for, None
            return waits_for
        return self._coroutine.send(value)

    def throw(self, *error: Any) -> Any:
        self._waits_for = None
        return self._coroutine.throw(*error)

    def close(self) -> None:
        self._coroutine.close()

    def __await__(self) -> Generator[Any, Any, T]:
        return self._coroutine.__await__()
