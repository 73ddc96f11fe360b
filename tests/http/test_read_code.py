"""GET /coupons/codes/{code}."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.http.helpers import SHUT, TIME, assign, lock, make_book, patch, redeem, refused


async def test_a_code_is_read_in_each_of_its_states(client: httpx.AsyncClient) -> None:
    book = await make_book(client, codes=["R-1"], max_redemptions_per_code=2)
    nobodys = {
        "code": "R-1",
        "book_id": book,
        "status": "available",
        "book_status": "active",
        "user_id": None,
        "assigned_at": None,
        "redemptions_used": 0,
        "redemptions_left": 2,
        "locked_until": None,
    }
    assert (await client.get("/coupons/codes/R-1")).json() == nobodys
    assigned_at = (await client.post("/coupons/assign/R-1", json={"user_id": "u"})).json()["assigned_at"]
    held = {**nobodys, "status": "assigned", "user_id": "u", "assigned_at": assigned_at}
    assert (await client.get("/coupons/codes/r-1")).json() == held
    token = await lock(client, "R-1")
    locked = (await client.get("/coupons/codes/%20r-1%20")).json()
    assert TIME.fullmatch(locked["locked_until"])
    assert locked == {**held, "status": "locked", "locked_until": locked["locked_until"]}
    assert token not in str(locked)
    await redeem(client, "R-1", lock_token=token)
    assert (await client.get("/coupons/codes/R-1")).json() == {**held, "redemptions_used": 1, "redemptions_left": 1}
    await redeem(client, "R-1")
    spent = {**held, "status": "redeemed", "redemptions_used": 2, "redemptions_left": 0}
    assert (await client.get("/coupons/codes/R-1")).json() == spent
    (listed,) = (await client.get("/users/u/coupons")).json()["coupons"]
    assert listed == {name: value for name, value in spent.items() if name != "book_status"}


@pytest.mark.parametrize(("change", "outcome"), SHUT, ids=str)
async def test_a_code_tells_the_state_of_its_book_and_so_does_one_that_nobody_holds(
    client: httpx.AsyncClient, change: dict[str, Any], outcome: str
) -> None:
    book = await make_book(client, codes=["B-1", "B-2"])
    await client.post("/coupons/assign/B-1", json={"user_id": "u"})
    await patch(client, book, **change)
    for code in ("B-1", "B-2"):
        assert "book_" + (await client.get(f"/coupons/codes/{code}")).json()["book_status"] == outcome


async def test_a_code_without_a_bound_has_null_uses_left(client: httpx.AsyncClient) -> None:
    code = await assign(client, await make_book(client, max_redemptions_per_code=None, ack="redis"))
    assert (await client.get(f"/coupons/codes/{code}")).json()["redemptions_left"] is None


@pytest.mark.parametrize(
    "code", ["NONE-1", "x", "-AB", "%00%00%00", "a%20b", "x" * 65, "%C3%9F%C3%9F%C3%9F", "%FF%FF%FF"]
)
async def test_no_such_code_is_not_found(client: httpx.AsyncClient, code: str) -> None:
    refused(await client.get(f"/coupons/codes/{code}"), 404, "code_not_found")


async def test_a_code_not_found_is_found_once_it_is_there(client: httpx.AsyncClient) -> None:
    refused(await client.get("/coupons/codes/SOON-1"), 404, "code_not_found")
    await make_book(client, codes=["SOON-1"])
    assert (await client.get("/coupons/codes/SOON-1")).json()["status"] == "available"
