"""Background loops that must never end by themselves."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from coupon_svc.domain.errors import error_location

log = logging.getLogger(__name__)

AGAIN_S = 0.5


async def keep_running(loop: Callable[[], Awaitable[None]]) -> None:
    """Run `loop`, which never returns, and start it again after an unforeseen error: a silent end would leave everyone who
    needs it waiting forever."""
    while True:
        try:
            await loop()
        except Exception as error:
            log.error(
                "%s failed and begins again: %s at %s", loop.__name__, type(error).__name__, error_location(error)
            )
        await asyncio.sleep(AGAIN_S)
