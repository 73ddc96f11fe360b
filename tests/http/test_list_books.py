"""GET /coupons."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from tests.http.helpers import assign, make_book, patch, refused


async def test_the_books_are_listed_newest_first_as_each_is_read(client: httpx.AsyncClient) -> None:
    assert (await client.get("/coupons")).json() == {"books": [], "next_cursor": None}
    made = [await make_book(client) for _ in range(3)]
    await assign(client, made[0])
    await patch(client, made[1], status="paused", name="another")
    page = (await client.get("/coupons")).json()
    assert [book["book_id"] for book in page["books"]] == made[::-1]
    assert page["books"] == [(await client.get(f"/coupons/{book}")).json() for book in made[::-1]]
    assert page["next_cursor"] is None


async def test_pages_hold_every_book_once(client: httpx.AsyncClient) -> None:
    made = await asyncio.gather(*(make_book(client, codes=[]) for _ in range(23)))
    for limit in (1, 5, 22, 23, 24, 1000):
        found: list[str] = []
        cursor: str | None = ""
        while cursor is not None:
            page = (await client.get("/coupons", params={"limit": limit, "cursor": cursor})).json()
            found += [book["book_id"] for book in page["books"]]
            cursor = page["next_cursor"]
            assert len(page["books"]) == limit or cursor is None
            assert cursor is None or cursor.replace("-", "").replace("_", "").isalnum()
            assert cursor is None or page["books"]
        assert len(found) == 23
        assert sorted(found) == sorted(made)


async def test_a_book_made_meanwhile_does_not_shift_the_pages(client: httpx.AsyncClient) -> None:
    made = [await make_book(client, codes=[]) for _ in range(4)]
    page = (await client.get("/coupons?limit=2")).json()
    await make_book(client, codes=[])
    rest = (await client.get("/coupons", params={"limit": 2, "cursor": page["next_cursor"]})).json()
    assert [book["book_id"] for book in page["books"] + rest["books"]] == made[::-1]


async def test_a_page_has_fifty_books_unless_asked_otherwise(client: httpx.AsyncClient) -> None:
    await asyncio.gather(*(make_book(client, codes=[]) for _ in range(51)))
    page = (await client.get("/coupons")).json()
    assert len(page["books"]) == 50
    assert page["next_cursor"]


@pytest.mark.parametrize("limit", ["0", "1001", "-1", "x", "", "1.5", "٣", "99999999999999999999"])
async def test_a_limit_out_of_bounds_is_invalid(client: httpx.AsyncClient, limit: str) -> None:
    body = refused(await client.get("/coupons", params={"limit": limit}), 422, "invalid_request")
    assert body["errors"][0]["pointer"] == "/limit"


@pytest.mark.parametrize("limit", ["0000019999", "000001" + "0" * 5000])
async def test_a_limit_out_of_bounds_is_invalid_behind_leading_zeros_too(client: httpx.AsyncClient, limit: str) -> None:
    refused(await client.get("/coupons", params={"limit": limit}), 422, "invalid_request")


@pytest.mark.parametrize("cursor", ["!", "x", "e30", "bnVsbA", "é", "a" * 5000, "W10", "WyJhIiwxXQ"])
async def test_a_cursor_of_ones_own_making_is_invalid(client: httpx.AsyncClient, cursor: str) -> None:
    refused(await client.get("/coupons", params={"cursor": cursor}), 422, "invalid_request")


@pytest.mark.parametrize("moment", ["0001-01-01T00:00:00+02:00", "9999-12-31T23:59:59-02:00"])
async def test_one_book_with_a_strange_time_does_not_take_the_list_away(client: httpx.AsyncClient, moment: str) -> None:
    book = await make_book(client, codes=[])
    await client.patch(f"/coupons/{book}", json={"starts_at": moment})
    assert (await client.get(f"/coupons/{book}")).status_code == 200
    assert (await client.get("/coupons")).status_code == 200
