"""While the clocks of Redis and Postgres are a minute apart nothing is decided; what ended by the wrong one comes back."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.chaos.machine import ClockStack, clock_stage, lacks_a_compiler
from tests.harness import until


@pytest.mark.skipif(bool(lacks_a_compiler()), reason=lacks_a_compiler())
@pytest.mark.parametrize("apart_s", [90_000, pytest.param(-90_000, marks=pytest.mark.chaos)])
async def test_a_clock_that_jumps_by_a_day_ends_no_idempotency_key(
    tmp_path: Path, postgres_url: str, apart_s: int
) -> None:
    async with clock_stage(postgres_url, tmp_path) as stack:
        assert isinstance(stack, ClockStack)
        try:
            stack.writer()
            stack.api()
            await stack.ready()
            async with await stack.client() as http, stack.redis() as redis:
                await _play(stack, http, redis, apart_s)
        finally:
            stack.close()


async def _play(stack: ClockStack, http: httpx.AsyncClient, redis: Any, apart_s: int) -> None:
    rules = {"name": "b", "generate": {"pattern": "Q-########", "total": 100}}
    book_id = (await http.post("/coupons", json=rules)).json()["book_id"]

    async def assign(key: str) -> httpx.Response:
        return await http.post(
            "/coupons/assign", json={"book_id": book_id, "user_id": "u"}, headers={"Idempotency-Key": key}
        )

    first = await assign("k")
    assert first.status_code == 201
    await stack.drained()
    stack.redis_clock.set_s(apart_s)

    async def jumped() -> bool:
        return bool(abs((await redis.time())[0] - time.time() - apart_s) < 5)

    await until(jumped)
    while_apart = [await assign("k" if number % 2 else f"k{number}") for number in range(20)]
    given = {answer.json()["code"] for answer in while_apart if answer.status_code == 201}
    assert given <= {first.json()["code"]}, "a code was given by a clock that nobody should believe"

    async def shut() -> bool:
        answer = await http.get("/readyz")
        return answer.status_code == 503 and answer.json()["code"] == "recovering"

    await until(shut)
    assert "set them right" in (stack.folder / "writer.log").read_text()
    stack.redis_clock.set_s(0)
    await stack.ready()

    async def answered() -> httpx.Response | None:
        answer = await assign("k")
        return answer if answer.status_code != 503 else None

    again = await until(answered)
    assert again is not None
    assert again.headers.get("idempotent-replayed") == "true", "P5: the key was forgotten"
    assert again.json() == first.json()
    rows = await stack.ledger("SELECT count(*) AS number FROM coupons WHERE user_id = 'u'")
    assert rows[0]["number"] == 1
