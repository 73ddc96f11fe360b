"""The loops of a writer share one connection to Redis, and so the attempts to make one."""

from __future__ import annotations

import asyncio
from typing import NoReturn

import pytest

from coupon_svc.domain.position import Position
from coupon_svc.redis import control
from coupon_svc.redis.connection import Connection
from coupon_svc.redis.control import ShardControl
from coupon_svc.redis.errors import ForeignRedis, ServerUnfit, StoreError
from coupon_svc.redis.scripts import Scripts
from coupon_svc.redis.server import Identity


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


async def test_a_connection_that_does_not_open_holds_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    store = ShardControl("redis://nowhere", 1, Scripts())
    opened = Connection()

    async def connect(_: str, name: str, **__: object) -> Connection:
        if name == "coupon-writer-entries":
            await asyncio.Event().wait()
        return opened

    async def answers(_: Connection) -> Identity:
        return Identity("run", "replid")

    async def is_fine(*_: object) -> None:
        pass

    monkeypatch.setattr(control, "connect", connect)
    monkeypatch.setattr(control, "read_identity", answers)
    monkeypatch.setattr(control, "load_scripts", is_fine)
    monkeypatch.setattr(ShardControl, "_require_ours", is_fine)
    hanging = asyncio.create_task(store.stream_after(0, Position.parse("1-0"), count=1))
    await asyncio.sleep(0.05)
    assert not hanging.done()
    async with asyncio.timeout(1):
        await store.refresh_identity()
    hanging.cancel()


async def test_a_connection_that_is_closed_while_it_is_asked_is_asked_to_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another loop of the writer may close it at any moment: this one must get an answer or a StoreError, and go on."""
    store, asked = ShardControl("redis://nowhere", 1, Scripts()), []

    async def connect(*_: object, **__: object) -> Connection:
        return Connection()

    async def answers(_: Connection) -> Identity:
        return Identity("run", "replid")

    async def answers_and_closes(_: Connection) -> Identity:
        store.close()
        return Identity("run", "replid")

    async def is_fine(*arguments: object) -> None:
        asked.append(arguments[-1])

    monkeypatch.setattr(control, "connect", connect)
    monkeypatch.setattr(control, "load_scripts", is_fine)
    monkeypatch.setattr(ShardControl, "_require_ours", is_fine)
    monkeypatch.setattr(control, "read_identity", answers)
    await store.connect()
    monkeypatch.setattr(control, "read_identity", answers_and_closes)
    await store.refresh_identity()
    assert isinstance(asked[-1], Connection)
