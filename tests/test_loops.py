"""What works in the background goes on, whatever goes wrong once; and nobody is left waiting for what never comes."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from coupon_svc.dev.servers import EmbeddedRedis
from coupon_svc.postgres.computed.ciphers import NO_CIPHERS
from coupon_svc.postgres.database import Database, open_connection
from coupon_svc.postgres.errors import LedgerUnavailable
from coupon_svc.redis import server, verification
from coupon_svc.redis.data_plane import DataPlane
from coupon_svc.redis.scripts import Scripts
from coupon_svc.service.budgets import Budget
from coupon_svc.service.code_directory import CodeDirectory
from coupon_svc.service.issued_codes import IssuedCodes
from tests.conftest import SHARDS
from tests.harness import until


async def test_a_loop_that_fails_unforeseen_begins_again(
    plain_redis: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failed: list[Any] = []

    def fails_once(info: Any) -> Any:
        if not failed:
            failed.append(info)
            raise KeyError("a secret")
        return server.judge(info)

    monkeypatch.setattr(verification, "judge", fails_once)
    plane = DataPlane(plain_redis.url, SHARDS, Scripts())
    await plane.start()

    async def connected() -> bool:
        return plane.connected

    try:
        await until(connected)
    finally:
        await plane.stop()
    assert "_keep_connected failed and begins again: KeyError at " in caplog.text
    assert "secret" not in caplog.text


async def test_who_asks_for_a_code_is_told_whatever_goes_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fails(*_: Any) -> Any:
        raise KeyError

    database = Database("postgresql://127.0.0.1:1/none", "test")
    directory = CodeDirectory(database, IssuedCodes(database, NO_CIPHERS), Budget(1, 1))
    monkeypatch.setattr(Database, "fetch", fails)
    for code in ("A", "B"):  # the second shows that the first has left nothing behind
        async with asyncio.timeout(5):
            with pytest.raises(KeyError):
                await directory.book_of_code(1, code, 5.0)


async def test_a_postgres_that_falls_silent_once_connected_is_given_up() -> None:
    """It lets a client in, and answers no statement."""
    let_in = (
        b"R\0\0\0\x08\0\0\0\0"  # AuthenticationOk
        b"S\0\0\0\x18server_version\x0015.0\0"
        b"K\0\0\0\x0c\0\0\0\x01\0\0\0\x02"
        b"Z\0\0\0\x05I"
    )

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1000)
        writer.write(let_in)
        await reader.read()
        writer.close()

    async with await asyncio.start_server(silent, "127.0.0.1", 0) as listener:
        port = listener.sockets[0].getsockname()[1]
        async with asyncio.timeout(5):
            with pytest.raises(LedgerUnavailable):
                await open_connection(f"postgresql://u@127.0.0.1:{port}/d?sslmode=disable", "test", 0.3)
