"""Work in the background that must never end by itself."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

log = logging.getLogger(__name__)

AGAIN_S = 0.5


async def keep_running(loop: Callable[[], Awaitable[None]]) -> None:
    """Run `loop`, which never returns, and begin it again should it fail for a reason that nobody thought of: a silent end
    would leave whoever needs it waiting for good."""
    while True:
        try:
            await loop()
        except Exception as error:
            log.error("%s failed and begins again: %s at %s", loop.__name__, type(error).__name__, place_of(error))
        await asyncio.sleep(AGAIN_S)


def place_of(error: BaseException) -> str:
    """File and line where an error came from, and nothing of what it says, which may hold a code or a key."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace is not None else "nowhere"
