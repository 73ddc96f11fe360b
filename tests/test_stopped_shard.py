"""A shard that was stopped for a person to look at is not opened by the next writer, though Redis and the ledger agree."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from coupon_svc.config import load_settings
from coupon_svc.ledger.recovery import HistoryForked
from coupon_svc.store.keys import ShardKeys
from coupon_svc.writer.writer import Writer
from tests.harness import Stack, until


async def test_a_stopped_shard_is_shut_when_it_would_be_opened(make_stack: Callable[[], Awaitable[Stack]]) -> None:
    stack = await make_stack()
    meta = ShardKeys(0, stack.shards).meta
    redis = stack.redis()
    first = stack.writer()

    async def certified() -> bool:
        return await redis.hget(meta, "epoch") == "1"

    await until(certified)
    first.stop()
    await stack.ledger("UPDATE shards SET stopped = 'a person looks' WHERE shard = 0")
    writer = Writer(load_settings(stack.environment))
    connection = await writer._connected("owning")
    await writer._renew(connection)
    try:
        with pytest.raises(HistoryForked, match="a person looks"):
            await writer._open(writer._shards[0])
        assert await redis.hget(meta, "epoch") == "recovering", "nobody decides anything there"
        await writer._open(writer._shards[1])
        assert writer._shards[1].opened_on is not None, "the others are opened"
    finally:
        writer._store.close()
        for opened in writer._connections.values():
            opened.terminate()
        await redis.aclose()
