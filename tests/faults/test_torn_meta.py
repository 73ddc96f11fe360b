"""A field of a shard's meta was deleted or garbled by hand: nothing is decided by what is left, and the owner mends it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest

from coupon_svc.redis.keys import ShardKeys
from tests.conftest import SHARDS
from tests.harness import Stack, running_stack, until

FIELDS = (
    "epoch", "generation", "format", "run", "replid", "seq", "tip", "committed", "backlog_max", "ledger_at_ms",
    "installation",
)  # fmt: skip


@pytest.fixture(scope="module")
async def stack(tmp_path_factory: pytest.TempPathFactory, postgres_url: str) -> AsyncIterator[Stack]:
    async with running_stack(tmp_path_factory.mktemp("torn"), postgres_url, SHARDS) as stack:
        yield stack


@pytest.fixture(scope="module")
async def http(stack: Stack) -> AsyncIterator[httpx.AsyncClient]:
    async with await stack.client() as http:
        yield http


CASES = [
    (field, torn)
    for field in FIELDS
    for torn in (None, "x")
    if (field, torn) not in (("installation", "x"), ("tip", "x"))
]
"""Keys that are said to be another installation's are not taken from it: see test_installation.py. And what is made behind
another tip is a fork of history, which a person must look at: see test_put_back.py."""


@pytest.mark.parametrize(("field", "torn"), CASES)
async def test_a_field_that_is_gone_or_garbled_is_put_right(
    stack: Stack, http: httpx.AsyncClient, field: str, torn: str | None
) -> None:
    book = {"name": "b", "generate": {"pattern": "########", "total": 5}}
    book_id = (await http.post("/coupons", json=book)).json()["book_id"]
    given: dict[str, str] = {}

    async def deals() -> bool:
        user = f"u{len(given)}"
        answer = await http.post("/coupons/assign", json={"book_id": book_id, "user_id": user})
        assert answer.status_code in (201, 503), answer.text
        if answer.status_code == 201:
            assert given.setdefault(answer.json()["code"], user) == user
        return answer.status_code == 201

    await until(deals)
    async with stack.redis() as redis:
        meta = ShardKeys(int(book_id[3:5]), SHARDS).meta
        others = {await redis.hget(key, "epoch") async for key in redis.scan_iter("cb:*:meta") if key != meta}
        if torn is None:
            assert await redis.hdel(meta, field) == 1
        else:
            await redis.hset(meta, field, torn)

        async def whole() -> bool:
            now = await redis.hgetall(meta)
            return set(FIELDS) <= set(now) and "x" not in now.values()

        await until(whole)
        assert others == {await redis.hget(key, "epoch") async for key in redis.scan_iter("cb:*:meta") if key != meta}
    await until(deals)
    assert all(part.process.poll() is None for part in stack.parts)
    rows = await stack.ledger("SELECT code, user_id FROM coupons WHERE book_id = $1", book_id)
    assert given.items() <= {row["code"]: row["user_id"] for row in rows}.items()
