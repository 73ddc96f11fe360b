"""So many requests of a tenant are served at a time, and nothing is kept of a tenant with none."""

from __future__ import annotations

import asyncio
import gc

import pytest

from coupon_svc.domain.outcomes import Outcome, Refused
from coupon_svc.postgres.tenant_slots import TenantSlots


async def test_one_too_many_waits_and_is_refused_and_another_tenant_is_served() -> None:
    slots = TenantSlots(2)
    async with slots.slot(1, 0), slots.slot(1, 0):
        with pytest.raises(Refused) as refused:
            async with slots.slot(1, 0.01):
                pass
        assert refused.value.outcome is Outcome.STORE_UNAVAILABLE
        async with slots.slot(2, 0):
            pass
    async with slots.slot(1, 0), slots.slot(1, 0):
        pass


async def test_who_waits_is_served_when_a_slot_is_free() -> None:
    slots, free = TenantSlots(1), asyncio.Event()

    async def serve() -> None:
        async with slots.slot(1, 1):
            await free.wait()

    served = [asyncio.create_task(serve()) for _ in range(3)]
    await asyncio.sleep(0.01)
    free.set()
    await asyncio.wait_for(asyncio.gather(*served), 1)


async def test_nothing_is_kept_of_a_tenant_that_asks_for_nothing() -> None:
    slots = TenantSlots(1)
    for tenant_id in range(100):
        async with slots.slot(tenant_id, 0):
            assert len(slots._slots) <= 2
    gc.collect()
    assert len(slots._slots) == 0
