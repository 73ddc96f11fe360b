"""GET /coupons/{book_id}."""

from __future__ import annotations

import httpx
import pytest

from tests.harness import Stack
from tests.http.helpers import NO_SUCH_BOOK, alike, assign, counters, lock, make_book, patch, redeem, refused, upload


async def test_the_counters_are_live_and_add_up(client: httpx.AsyncClient) -> None:
    book = await make_book(client, codes=["A-1", "A-2", "A-3"], max_redemptions_per_code=2)
    await client.post("/coupons/assign/A-1", json={"user_id": "u"})
    assert await counters(client, book) == {
        "total": 3,
        "available": 2,
        "assigned": 1,
        "redeemed": 0,
        "quarantined": 0,
    }
    token = await lock(client, "A-1")
    assert (await counters(client, book))["assigned"] == 1  # so is one that is locked
    await redeem(client, "A-1", lock_token=token)
    assert (await counters(client, book))["assigned"] == 1  # and one partly used
    await redeem(client, "A-1")
    await upload(client, book, ["A-4"])
    assert await counters(client, book) == {
        "total": 4,
        "available": 3,
        "assigned": 0,
        "redeemed": 1,
        "quarantined": 0,
    }


async def test_codes_that_never_run_out_of_uses_stay_assigned(client: httpx.AsyncClient) -> None:
    book = await make_book(client, max_redemptions_per_code=None)
    code = await assign(client, book)
    for _ in range(3):
        await redeem(client, code)
    assert await counters(client, book) == {
        "total": 20,
        "available": 19,
        "assigned": 1,
        "redeemed": 0,
        "quarantined": 0,
    }


async def test_every_redemption_is_counted_wherever_the_book_is_answered(client: httpx.AsyncClient) -> None:
    cases: list[tuple[int | None, int, int]] = [(1, 2, 2), (2, 3, 1), (None, 3, 0)]
    for uses_max, uses, redeemed in cases:
        book = await make_book(client, codes=[f"R-{uses_max}-1", f"R-{uses_max}-2"], max_redemptions_per_code=uses_max)
        for number in range(uses):
            code = f"R-{uses_max}-{min(2, number + 1)}"
            await client.post(f"/coupons/assign/{code}", json={"user_id": "u"})
            key = {"Idempotency-Key": str(number)}
            for _ in range(2):  # the second is a replay, and no use
                assert (await client.post(f"/coupons/redeem/{code}", headers=key)).status_code == 201
        read = (await client.get(f"/coupons/{book}")).json()
        assert (read["redemptions"], read["codes"]["redeemed"]) == (uses, redeemed)
        assert (await patch(client, book, name="b"))["redemptions"] == uses
        assert (await client.get("/coupons")).json()["books"][0]["redemptions"] == uses


async def test_a_book_that_is_shut_is_read_as_ever(client: httpx.AsyncClient) -> None:
    book = await make_book(client)
    for status in ("paused", "closed"):
        await patch(client, book, status=status)
        assert (await client.get(f"/coupons/{book}")).json()["status"] == status


@pytest.mark.parametrize(
    "book_id",
    [
        NO_SUCH_BOOK,
        "x",
        "bk_",
        "bk_99aaaaaaaaaaaaaaaa",
        "bk_-1aaaaaaaaaaaaaaaa",
        "%00",
        "%F0%9F%8E%89",
        "%20",
        "..%00",
        "x" * 5000,
        "jobs",
    ],
)
async def test_an_id_of_any_shape_that_names_no_book_is_not_found(client: httpx.AsyncClient, book_id: str) -> None:
    missing = await client.get(f"/coupons/{book_id}")
    refused(missing, 404, "book_not_found")
    assert alike(missing, await client.get(f"/coupons/{NO_SUCH_BOOK}"))


async def test_an_id_with_a_slash_is_not_found_like_any_other(client: httpx.AsyncClient) -> None:
    for method in ("GET", "PATCH"):
        refused(await client.request(method, "/coupons/a%2Fb", json={}), 404, "book_not_found")


async def test_another_tenants_book_is_exactly_like_none(client: httpx.AsyncClient, service: Stack) -> None:
    book = await make_book(client)
    async with await service.client() as other:
        for method, body in (("GET", None), ("PATCH", {"name": "mine"}), ("PATCH", {"status": "closed"})):
            theirs = await other.request(method, f"/coupons/{book}", json=body)
            assert alike(theirs, await other.request(method, f"/coupons/{NO_SUCH_BOOK}", json=body))
            refused(theirs, 404, "book_not_found")
        assert (await other.get("/coupons")).json() == {"books": [], "next_cursor": None}
    assert (await client.get(f"/coupons/{book}")).json()["name"] == "a book"


async def test_a_key_that_may_write_books_may_read_them(service: Stack) -> None:
    async with await service.client(scopes=("books:write",)) as client:
        book = (await client.post("/coupons", json={"name": "a"})).json()
        assert (await client.get(f"/coupons/{book['book_id']}")).json() == book
