"""A connection to Postgres that breaks before its first statement is trouble like any other: waited out, tried again."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest

from coupon_svc.config import load_settings
from coupon_svc.postgres import database
from coupon_svc.postgres.database import open_connection
from coupon_svc.postgres.errors import LedgerUnavailable
from coupon_svc.redis.control import ShardControl
from coupon_svc.redis.data_plane import DataPlane
from coupon_svc.redis.scripts import Scripts
from coupon_svc.service.registration import Registration
from coupon_svc.writer import lend, writer
from tests.conftest import SHARDS
from tests.harness import fresh_database


async def of_registration(url: str) -> Any:
    plane = DataPlane("redis://127.0.0.1:1", SHARDS, Scripts())
    return await Registration(url, plane).session.connection()


async def of_lender(url: str) -> Any:
    return await lend.Lender(url, "wr_test", cast(ShardControl, None), {}, 1, 1).session.connection()


async def of_writer(url: str) -> Any:
    settings = load_settings(
        {"COUPON_REDIS_URL": "redis://127.0.0.1:1", "COUPON_DATABASE_URL": url, "COUPON_SHARDS": str(SHARDS)}
    )
    return await writer.Writer(settings).owning.session.connection()


@pytest.mark.parametrize("connected", [of_registration, of_lender, of_writer])
async def test_one_that_breaks_at_once_is_the_ledger_being_unavailable(
    connected: Callable[[str], Awaitable[Any]], postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = await fresh_database(postgres_url, SHARDS)
    (await connected(url)).terminate()

    async def open_and_break(url: str, name: str) -> Any:
        connection = await open_connection(url, name)
        connection.terminate()
        return connection

    monkeypatch.setattr(database, "open_connection", open_and_break)
    with pytest.raises(LedgerUnavailable):
        await connected(url)
