"""An Idempotency-Key is no way to see what another tenant did."""

from __future__ import annotations

import httpx

from tests.harness import Stack


async def test_another_tenants_book_is_not_found_also_with_its_idempotency_key(
    client: httpx.AsyncClient, service: Stack
) -> None:
    # BUG in assign_coupon.lua: `replay` stands before `book`, the record's key is of the book alone, and the fingerprint
    # knows no tenant; so whoever sends the same request gets the other tenant's code, and with another user_id learns by
    # `idempotency_key_reused` that book and key exist. (The scripts of a named code are safe: the code is resolved first.)
    made = await client.post("/coupons", json={"name": "b", "generate": {"pattern": "T-########", "total": 5}})
    request = {"book_id": made.json()["book_id"], "user_id": "u"}
    headers = {"Idempotency-Key": "order-1"}
    assert (await client.post("/coupons/assign", json=request, headers=headers)).status_code == 201
    async with await service.client() as stranger:
        for user_id in ("u", "v"):
            answer = await stranger.post("/coupons/assign", json={**request, "user_id": user_id}, headers=headers)
            assert (answer.status_code, answer.json().get("code")) == (404, "book_not_found")
