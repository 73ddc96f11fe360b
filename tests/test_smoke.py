"""The life of one coupon over HTTP, end to end."""

from __future__ import annotations

import httpx

from tests.harness import Stack


async def test_a_coupon_is_assigned_locked_and_redeemed(client: httpx.AsyncClient, service: Stack) -> None:
    book = (await client.post("/coupons", json={"name": "b", "generate": {"pattern": "AB-######", "total": 20}})).json()
    assigned = await client.post("/coupons/assign", json={"book_id": book["book_id"], "user_id": "u"})
    assert assigned.status_code == 201
    code = assigned.json()["code"]
    lock = await client.post(f"/coupons/lock/{code}")
    assert lock.status_code == 201
    redeemed = await client.post(f"/coupons/redeem/{code}", json={"lock_token": lock.json()["lock_token"]})
    assert redeemed.status_code == 201
    rows = await service.ledger("SELECT user_id, uses FROM coupons WHERE code = $1", code)
    assert [tuple(row) for row in rows] == [("u", 1)]
