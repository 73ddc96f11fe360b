"""POST /coupons/unlock/{code}."""

from __future__ import annotations

import httpx

from tests.http.helpers import assign, lock, make_book, patch, redeem, refused


async def test_the_token_gives_the_lock_up(client: httpx.AsyncClient) -> None:
    code = await assign(client, await make_book(client))
    token = await lock(client, code)
    done = await client.post(f"/coupons/unlock/{code.lower()}", json={"lock_token": token})
    assert (done.status_code, done.content) == (204, b"")
    assert "content-type" not in done.headers
    assert (await client.get(f"/coupons/codes/{code}")).json()["status"] == "assigned"
    assert await lock(client, code) != token


async def test_where_no_lock_is_it_is_done_already(client: httpx.AsyncClient) -> None:
    book = await make_book(client, codes=["U-1", "U-2"])
    await client.post("/coupons/assign/U-1", json={"user_id": "u"})
    for code in ("U-1", "U-2"):  # assigned, and not even that
        assert (await client.post(f"/coupons/unlock/{code}", json={"lock_token": "any"})).status_code == 204
    token = await lock(client, "U-1")
    await redeem(client, "U-1", lock_token=token)
    assert (await client.post("/coupons/unlock/U-1", json={"lock_token": token})).status_code == 204
    await patch(client, book, status="closed")
    assert (await client.post("/coupons/unlock/U-1", json={"lock_token": token})).status_code == 204


async def test_somebody_elses_lock_stays(client: httpx.AsyncClient) -> None:
    code = await assign(client, await make_book(client))
    token = await lock(client, code)
    for wrong in ("wrong", token + " ", token.swapcase()):
        refused(await client.post(f"/coupons/unlock/{code}", json={"lock_token": wrong}), 409, "lock_not_held")
    refused(await client.post(f"/coupons/lock/{code}"), 423, "locked")


async def test_a_token_must_be_shown(client: httpx.AsyncClient) -> None:
    code = await assign(client, await make_book(client))
    for body in ({}, {"lock_token": None}, {"lock_token": ""}, {"lock_token": "a", "user_id": "u"}):
        refused(await client.post(f"/coupons/unlock/{code}", json=body), 422, "invalid_request")


async def test_no_such_code_is_not_found(client: httpx.AsyncClient) -> None:
    for code in ("NONE-1", "x", "%20", "a%00b"):
        refused(await client.post(f"/coupons/unlock/{code}", json={"lock_token": "a"}), 404, "code_not_found")


async def test_a_replay_gives_up_no_later_lock(client: httpx.AsyncClient) -> None:
    code = await assign(client, await make_book(client))
    token = await lock(client, code)
    for _ in range(2):
        body = {"lock_token": token}
        done = await client.post(f"/coupons/unlock/{code}", json=body, headers={"Idempotency-Key": "k"})
        assert done.status_code == 204
        await client.post(f"/coupons/lock/{code}")
    assert done.headers["idempotent-replayed"] == "true"
    assert (await client.get(f"/coupons/codes/{code}")).json()["status"] == "locked"
