"""GET /users/{user_id}/coupons."""

from __future__ import annotations

import asyncio
from base64 import urlsafe_b64decode
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from tests.http.helpers import NO_SUCH_BOOK, TIME, assign, lock, make_book, patch, redeem, refused


async def everything(client: httpx.AsyncClient, user_id: str = "u", **query: Any) -> list[dict[str, Any]]:
    """All pages of a user, each of which must be full but the last."""
    found: list[dict[str, Any]] = []
    cursor: str | None = ""
    while cursor is not None:
        answer = await client.get(f"/users/{quote(user_id, safe='')}/coupons", params={**query, "cursor": cursor})
        assert answer.status_code == 200, answer.text
        page = answer.json()
        found += page["coupons"]
        cursor = page["next_cursor"]
        if cursor is not None:
            assert len(page["coupons"]) == query.get("limit", 50)
            assert cursor.replace("-", "").replace("_", "").isalnum()
    return found


async def test_a_coupon_is_listed_in_each_of_its_states(client: httpx.AsyncClient) -> None:
    book = await make_book(client, codes=["C-1", "C-2", "C-3", "C-4"], max_redemptions_per_code=2)
    for number in range(1, 4):
        await client.post(f"/coupons/assign/C-{number}", json={"user_id": "u"})
    await redeem(client, "C-1")
    await redeem(client, "C-1")
    await redeem(client, "C-2")
    await lock(client, "C-2")
    by_code = {coupon.pop("code"): coupon for coupon in await everything(client)}
    assert list(by_code) == ["C-1", "C-2", "C-3"]
    assert all(TIME.fullmatch(coupon.pop("assigned_at")) for coupon in by_code.values())
    assert TIME.fullmatch(by_code["C-2"].pop("locked_until"))
    common = {"book_id": book, "user_id": "u"}
    assert by_code == {
        "C-1": {**common, "status": "redeemed", "redemptions_used": 2, "redemptions_left": 0, "locked_until": None},
        "C-2": {**common, "status": "locked", "redemptions_used": 1, "redemptions_left": 1},
        "C-3": {**common, "status": "assigned", "redemptions_used": 0, "redemptions_left": 2, "locked_until": None},
    }


async def test_pages_over_many_books_hold_every_coupon_once(client: httpx.AsyncClient) -> None:
    books = await asyncio.gather(*(make_book(client) for _ in range(12)))
    held: dict[str, str] = {}
    for book in books:
        for code in await asyncio.gather(*(assign(client, book) for _ in range(4))):
            held[code] = book
        await assign(client, book, "somebody else")
    codes = list(held)
    for code in codes[::5]:
        await redeem(client, code)
    for code in codes[1::5]:
        await lock(client, code)
    for limit in (1, 7, 48, 1000):
        found = await everything(client, limit=limit)
        assert len(found) == len(codes)
        assert {coupon["code"]: coupon["book_id"] for coupon in found} == held
    by_status = {"redeemed": set(codes[::5]), "locked": set(codes[1::5])}
    by_status["assigned"] = set(codes) - by_status["redeemed"] - by_status["locked"]
    for status, expected in by_status.items():
        for limit in (2, 1000):
            found = await everything(client, limit=limit, status=status)
            assert {coupon["status"] for coupon in found} == {status}
            assert sorted(coupon["code"] for coupon in found) == sorted(expected)
    for book in books[:3]:
        for limit in (1, 3, 4):
            found = await everything(client, limit=limit, book_id=book)
            assert sorted(coupon["code"] for coupon in found) == sorted(c for c, b in held.items() if b == book)
        found = await everything(client, limit=2, book_id=book, status="assigned")
        assert {coupon["code"] for coupon in found} == by_status["assigned"] & {c for c, b in held.items() if b == book}


async def test_a_page_has_fifty_coupons_unless_asked_otherwise(client: httpx.AsyncClient) -> None:
    book = await make_book(client, generate={"pattern": "########", "total": 60})
    await asyncio.gather(*(assign(client, book) for _ in range(51)))
    page = (await client.get("/users/u/coupons")).json()
    assert len(page["coupons"]) == 50
    assert page["next_cursor"]
    assert len((await client.get("/users/u/coupons?limit=51")).json()["coupons"]) == 51


async def test_what_was_answered_before_is_in_it(client: httpx.AsyncClient) -> None:
    for ack in ("ledger", "redis"):
        book = await make_book(client, ack=ack)
        for _ in range(5):
            code = await assign(client, book)
            assert code in {coupon["code"] for coupon in await everything(client)}


async def test_coupons_of_books_that_are_shut_are_listed(client: httpx.AsyncClient) -> None:
    book = await make_book(client)
    code = await assign(client, book)
    await patch(client, book, status="closed")
    assert [coupon["code"] for coupon in await everything(client)] == [code]


async def test_a_user_nobody_knows_holds_nothing(client: httpx.AsyncClient) -> None:
    assert (await client.get("/users/nobody/coupons")).json() == {"coupons": [], "next_cursor": None}


@pytest.mark.parametrize(
    "user_id",
    [
        "a/b",
        "/",
        "a//b/",
        "x/coupons",
        "coupons",
        "a b",
        "é/🎉 日本",
        "a?b=c#d",
        "%",
        "%2F",
        "+",
        "..a",
        "🎉" * 128,
        "a&b=c",
        ";",
    ],
)
async def test_user_ids_of_any_shape_work_percent_encoded(client: httpx.AsyncClient, user_id: str) -> None:
    code = await assign(client, await make_book(client), user_id)
    (coupon,) = await everything(client, user_id)
    assert (coupon["code"], coupon["user_id"]) == (code, user_id)


async def test_no_user_is_another_ones_prefix(client: httpx.AsyncClient) -> None:
    book = await make_book(client)
    for user_id in ("a", "a:b", "a/b", "A", "a b"):
        await assign(client, book, user_id)
    for user_id in ("a", "a:b", "a/b", "A", "a b"):
        assert [coupon["user_id"] for coupon in await everything(client, user_id)] == [user_id]


@pytest.mark.parametrize(
    ("query", "where"),
    [
        ("limit=0", "/limit"),
        ("limit=1001", "/limit"),
        ("limit=", "/limit"),
        ("limit=ten", "/limit"),
        ("status=available", "/status"),
        ("status=", "/status"),
        ("status=ASSIGNED", "/status"),
        ("cursor=!", "/cursor"),
        ("cursor=WyJhIiwxXQ", "/cursor"),
        ("cursor=e30", "/cursor"),
    ],
)
async def test_an_invalid_query_is_refused_and_told_where(client: httpx.AsyncClient, query: str, where: str) -> None:
    body = refused(await client.get(f"/users/u/coupons?{query}"), 422, "invalid_request")
    assert body["errors"][0]["pointer"] == where


@pytest.mark.parametrize("query", ["limit=0", "status=x", "cursor=!"])
async def test_an_invalid_query_is_told_before_a_book_that_is_not_there(client: httpx.AsyncClient, query: str) -> None:
    for book in ("x", NO_SUCH_BOOK):
        refused(await client.get(f"/users/u/coupons?book_id={book}&{query}"), 422, "invalid_request")


async def test_a_limit_out_of_bounds_is_invalid_behind_leading_zeros_too(client: httpx.AsyncClient) -> None:
    for limit in ("0000019999", "000001" + "0" * 5000):
        refused(await client.get(f"/users/u/coupons?limit={limit}"), 422, "invalid_request")


async def test_a_cursor_shows_no_code_and_is_good_for_its_own_list_alone(client: httpx.AsyncClient) -> None:
    first, second = [await make_book(client, max_codes_per_user=2) for _ in range(2)]
    codes = [await assign(client, book, "reader") for book in (first, first, second)]
    page = (await client.get("/users/reader/coupons", params={"limit": 1})).json()
    cursor = page["next_cursor"]
    assert not any(code in urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode("latin-1") for code in codes)
    rest = (await client.get("/users/reader/coupons", params={"cursor": cursor})).json()["coupons"]
    assert sorted(coupon["code"] for coupon in [*page["coupons"], *rest]) == sorted(codes)
    for path, query in (("/users/reader/coupons", {"book_id": first}), ("/users/other/coupons", {}), ("/coupons", {})):
        refused(await client.get(path, params={**query, "cursor": cursor}), 422, "invalid_request")


async def test_no_such_book_is_not_found(client: httpx.AsyncClient) -> None:
    for book in (NO_SUCH_BOOK, "x", "", "%00", "x" * 300):
        refused(await client.get(f"/users/u/coupons?book_id={book}"), 404, "book_not_found")
