"""How many requests of one tenant are served at a time, in this process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from weakref import WeakValueDictionary

from coupon_svc.domain.outcomes import Outcome, Refused


class TenantSlots:
    """At most so many of a tenant's requests are served at a time; more of them wait, those of others do not."""

    def __init__(self, each: int) -> None:
        self._each = each
        self._slots: WeakValueDictionary[int, asyncio.Semaphore] = WeakValueDictionary()

    @asynccontextmanager
    async def slot(self, tenant_id: int, wait_s: float) -> AsyncIterator[None]:
        """One of the tenant's slots. Raises Refused(store_unavailable) when none is free in time."""
        slot = self._slots.get(tenant_id)
        if slot is None:
            slot = self._slots[tenant_id] = asyncio.Semaphore(self._each)
        try:
            async with asyncio.timeout(wait_s):
                await slot.acquire()
        except TimeoutError:
            raise busy() from None
        try:
            yield
        finally:
            slot.release()


def busy() -> Refused:
    """The refusal of a request that others of its tenant stood before."""
    return Refused(Outcome.STORE_UNAVAILABLE, "Other requests of yours are still running. Nothing was done.")
