"""`coupon-svc rebuild` makes Redis anew from the ledger, also where nothing shows that it differs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import httpx

from coupon_svc.domain.holding import Holding
from tests.forked import run_command
from tests.harness import Stack, until

MakeStack = Callable[[], Awaitable[Stack]]


async def want_rebuild(stack: Stack) -> str:
    """Type the command. Returns the beginning of what it says."""
    ran = await asyncio.to_thread(run_command, "rebuild", **stack.environment)
    assert ran.returncode == 0
    return ran.stdout.partition(" by ")[0]


async def test_what_was_changed_by_hand_is_put_right_and_what_was_given_stays_given(make_stack: MakeStack) -> None:
    stack = await make_stack()
    stack.writer()
    stack.api()
    await stack.ready()
    async with await stack.client() as http, stack.redis() as redis:
        rules = {"name": "b", "generate": {"pattern": "R-########", "total": 10}, "max_redemptions_per_code": 3}
        book_id = (await http.post("/coupons", json=rules)).json()["book_id"]

        async def assign(user: str) -> httpx.Response:
            body, headers = {"book_id": book_id, "user_id": user}, {"Idempotency-Key": user}
            return await http.post("/coupons/assign", json=body, headers=headers)

        given = (await assign("ann")).json()

        async def named() -> httpx.Response:
            body, headers = {"user_id": "ann"}, {"Idempotency-Key": "named"}
            return await http.post(f"/coupons/assign/{given['code']}", json=body, headers=headers)

        async def redeem() -> int:
            answer = await http.post(f"/coupons/redeem/{given['code']}", json={"user_id": "ann"})
            return int(answer.json()["redemptions_left"])

        assert await redeem() == 2
        hers = await named()
        assert (hers.status_code, hers.json()["redemptions_left"]) == (200, 2)
        assert hers.json()["durable"]
        assert hers.json()["position"] == given["position"]
        assert await redeem() == 1
        await stack.drained()
        (key,) = [key async for key in redis.scan_iter("cb:*:holders:*")]
        holding = Holding.parse(str(await redis.hget(key, given["code"])))
        await redis.hset(key, given["code"], holding._replace(user_id="thief").format())  # as many holders as before

        assert await want_rebuild(stack) == f"{stack.shards} shards are being rebuilt"

        async def rebuilt() -> bool:
            rows = await stack.ledger("SELECT FROM shards WHERE rebuild OR certified_epoch < epoch")
            return not rows and Holding.parse(str(await redis.hget(key, given["code"]) or "0-0 0 0 ")).user_id == "ann"

        await until(rebuilt)
        await stack.ready()
        listed = (await http.get("/users/ann/coupons")).json()["coupons"]
        assert [coupon["code"] for coupon in listed] == [given["code"]]
        again = await assign("ann")
        assert again.headers["idempotent-replayed"] == "true"
        assert again.json() == given
        hers_again = await named()
        assert (hers_again.status_code, hers_again.headers["idempotent-replayed"]) == (200, "true")
        assert hers_again.json() == hers.json()
        other = await assign("bob")
        assert other.status_code == 201
        assert other.json()["code"] != given["code"]
