"""A user that may not run what the scripts run is found out before a script has done half of its work."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from redis.asyncio import Redis

from coupon_svc.dev.servers import EmbeddedRedis
from coupon_svc.redis.connection import Connection, connect
from coupon_svc.redis.errors import ServerUnfit
from coupon_svc.redis.listener import PositionListener
from coupon_svc.redis.rights import commands_of_scripts
from coupon_svc.redis.scripts import Scripts
from coupon_svc.redis.server import load_scripts

ROOT = Path(__file__).parent.parent


def test_every_command_of_every_script_is_asked_for() -> None:
    lua = "\n".join(path.read_text() for path in (ROOT / "lua").rglob("*.lua"))
    assert set(re.findall(r'(?:redis\.p?call\(|\{)"([A-Z]+)"', lua)) == set(commands_of_scripts())


@pytest.fixture
async def admin(plain_redis: EmbeddedRedis) -> AsyncIterator[Redis]:
    async with Redis.from_url(plain_redis.admin_url, decode_responses=True) as redis:
        yield redis
        await redis.acl_deluser("tested")


async def _come_as(admin: Redis, server: EmbeddedRedis, *rules: str) -> Connection:
    await admin.execute_command("ACL", "SETUSER", "tested", "reset", "on", ">secret", *rules)  # type: ignore[no-untyped-call]
    return await connect(_url_of_tested(server), "tested")


def _url_of_tested(server: EmbeddedRedis) -> str:
    parts = urlsplit(server.url)
    return parts._replace(netloc=f"tested:secret@{parts.netloc.rpartition('@')[2]}").geturl()


def _documented_rules() -> list[str]:
    [line] = re.findall(r"^ +user coupon on >PASSWORD (.*)$", (ROOT / "docs" / "redis.md").read_text(), re.MULTILINE)
    return str(line).split()


@pytest.mark.parametrize("lacking", ["-xadd", "-publish", "-zrem -xadd"])
async def test_a_user_that_lacks_a_right_is_refused_by_name(
    admin: Redis, plain_redis: EmbeddedRedis, lacking: str
) -> None:
    connection = await _come_as(admin, plain_redis, *_documented_rules(), *lacking.split())
    with pytest.raises(ServerUnfit) as refused:
        await load_scripts(connection, Scripts())
    for name in lacking.upper().replace("-", "").split():
        assert name in str(refused.value)
    assert "'tested'" in str(refused.value)
    connection.abort()


@pytest.mark.parametrize("keys", [["resetkeys", "~other:*"], ["resetchannels", "&other:*"]])
async def test_a_user_that_may_not_touch_our_keys_or_our_channel_is_refused(
    admin: Redis, plain_redis: EmbeddedRedis, keys: list[str]
) -> None:
    connection = await _come_as(admin, plain_redis, *_documented_rules(), *keys)
    with pytest.raises(ServerUnfit, match="may not run"):
        await load_scripts(connection, Scripts())
    connection.abort()


@pytest.mark.parametrize("asks", ["+acl|dryrun", "-acl"])
async def test_the_documented_user_is_fit_and_one_that_may_not_ask_is_not_checked(
    admin: Redis, plain_redis: EmbeddedRedis, asks: str
) -> None:
    connection = await _come_as(admin, plain_redis, *_documented_rules(), asks)
    await load_scripts(connection, Scripts())
    connection.abort()


async def test_a_listener_that_may_not_listen_leaves_no_connection_open(
    admin: Redis, plain_redis: EmbeddedRedis
) -> None:
    (await _come_as(admin, plain_redis, *_documented_rules(), "resetchannels", "&other:*")).abort()
    listener = PositionListener(_url_of_tested(plain_redis), lambda *_: None)
    listening = asyncio.create_task(listener.listen("positions"))
    await asyncio.sleep(1.5)  # some seven attempts
    open_now = [client for client in await admin.client_list() if client["name"] == "coupon-api-positions"]
    listening.cancel()
    assert len(open_now) <= 1
