"""The loops of a writer share one connection to Redis, and so the attempts to make one."""

from __future__ import annotations

import asyncio
from typing import NoReturn

import pytest

from coupon_svc.redis import control
from coupon_svc.redis.control import ShardControl
from coupon_svc.redis.errors import ForeignRedis, ServerUnfit, StoreError
from coupon_svc.redis.scripts import Scripts


@pytest.mark.parametrize("failure", [StoreError("away"), ServerUnfit("unfit"), ForeignRedis("foreign")])
async def test_a_failed_attempt_is_not_repeated_by_every_loop(
    monkeypatch: pytest.MonkeyPatch, failure: StoreError
) -> None:
    attempts = 0

    async def connect(*_: object, **__: object) -> NoReturn:
        nonlocal attempts
        attempts += 1
        raise failure

    monkeypatch.setattr(control, "connect", connect)
    monkeypatch.setattr(control, "CONNECT_AGAIN_S", 0.05)
    store = ShardControl("redis://nowhere", 1, Scripts())
    for _ in range(20):
        with pytest.raises(type(failure), match=str(failure)):
            await store.connect()
    assert attempts == 1
    await asyncio.sleep(0.06)
    with pytest.raises(type(failure)):
        await store.connect()
    assert attempts == 2
