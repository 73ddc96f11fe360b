"""PATCH /coupons/{book_id}."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from tests.http.helpers import (
    IN_THE_FUTURE,
    IN_THE_PAST,
    NO_SUCH_BOOK,
    SHUT,
    assign,
    lock,
    make_book,
    patch,
    redeem,
    refused,
)


async def test_each_field_can_be_changed_alone_and_the_others_stay(client: httpx.AsyncClient) -> None:
    book_id = await make_book(client)
    book = (await client.get(f"/coupons/{book_id}")).json()
    for change, stored in (
        ({"name": "another"}, {}),
        ({"max_codes_per_user": 3}, {}),
        ({"lock_ttl_seconds": 7}, {}),
        ({"starts_at": "2026-01-01T02:00:00+02:00"}, {"starts_at": "2026-01-01T00:00:00.000Z"}),
        ({"expires_at": IN_THE_FUTURE}, {"expires_at": "2999-01-01T00:00:00.000Z"}),
        ({"metadata": {"a": [1]}}, {}),
        ({"status": "paused"}, {}),
        ({"status": "active", "name": "third", "starts_at": None}, {}),
        ({"max_codes_per_user": None, "expires_at": None, "metadata": None}, {"metadata": {}}),
        ({}, {}),
    ):
        book = {**book, **change, **stored}
        assert await patch(client, book_id, **change) == book
        assert (await client.get(f"/coupons/{book_id}")).json() == book
        assert (await client.get("/coupons")).json()["books"] == [book]


async def test_a_change_is_in_force_once_it_is_answered(client: httpx.AsyncClient) -> None:
    book = await make_book(client, generate={"pattern": "########", "total": 100})
    body = {"book_id": book, "user_id": "u"}
    for _ in range(10):
        await patch(client, book, status="paused")
        refused(await client.post("/coupons/assign", json=body), 409, "book_paused")
        await patch(client, book, status="active")
        assert (await client.post("/coupons/assign", json=body)).status_code == 201
    await patch(client, book, max_codes_per_user=10)
    refused(await client.post("/coupons/assign", json=body), 409, "user_code_limit")
    await patch(client, book, lock_ttl_seconds=33)
    code = await assign(client, book, "v")
    assert (await client.post(f"/coupons/lock/{code}")).json()["ttl_seconds"] == 33


@pytest.mark.parametrize(("change", "outcome"), SHUT, ids=str)
async def test_a_book_that_is_not_open_refuses_assign_lock_and_redeem_and_nothing_else(
    client: httpx.AsyncClient, change: dict[str, Any], outcome: str
) -> None:
    book = await make_book(client, codes=["A-1", "A-2", "A-3", "A-4"], max_codes_per_user=2)
    for code in ("A-1", "A-2"):
        await client.post(f"/coupons/assign/{code}", json={"user_id": "u"})
    first = await client.post("/coupons/assign/A-1", json={"user_id": "u"})
    token = await lock(client, "A-1")
    await patch(client, book, **change)
    # Before every refusal of the verb's own: the limit, another's code, a wrong holder, a wrong token, a lock.
    for path, body in (
        ("assign", {"book_id": book, "user_id": "u"}),
        ("assign", {"book_id": book, "user_id": "v"}),
        ("assign/A-1", {"user_id": "v"}),
        ("assign/A-3", {"user_id": "u"}),
        ("lock/A-1", {}),
        ("lock/A-1", {"lock_token": token}),
        ("lock/A-2", {"user_id": "v"}),
        ("lock/A-3", {}),
        ("redeem/A-1", {"lock_token": token}),
        ("redeem/A-1", {"lock_token": "wrong"}),
        ("redeem/A-3", {}),
    ):
        refused(await client.post(f"/coupons/{path}", json=body), 409, outcome)
    again = await client.post("/coupons/assign/A-1", json={"user_id": "u"})
    assert (again.status_code, again.json()) == (200, first.json())
    read = (await client.get("/coupons/codes/A-1")).json()
    assert f"book_{read['book_status']}" == outcome
    ended = change.get("expires_at") == IN_THE_PAST  # and with it the lock
    assert (read["status"], read["locked_until"] is None) == (("assigned", True) if ended else ("locked", False))
    assert len((await client.get("/users/u/coupons")).json()["coupons"]) == 2
    assert (await client.get(f"/coupons/{book}")).json()["codes"]["assigned"] == 2
    refused(await client.post("/coupons/unlock/A-1", json={"lock_token": "wrong"}), 409, "lock_not_held")
    assert (await client.post("/coupons/unlock/A-1", json={"lock_token": token})).status_code == 204
    assert (await client.get("/coupons/codes/A-1")).json()["status"] == "assigned"


async def test_a_book_starts_and_expires_by_itself(client: httpx.AsyncClient) -> None:
    book = await make_book(client, starts_at=IN_THE_PAST, expires_at=IN_THE_FUTURE)
    await redeem(client, await assign(client, book))
    await patch(client, book, starts_at=None, expires_at=IN_THE_PAST)
    refused(await client.post("/coupons/assign", json={"book_id": book, "user_id": "u"}), 409, "book_expired")
    await patch(client, book, expires_at=None)
    assert await assign(client, book)


async def test_closed_is_final(client: httpx.AsyncClient) -> None:
    book = await make_book(client)
    await patch(client, book, status="closed")
    for status in ("active", "paused"):
        refused(await client.patch(f"/coupons/{book}", json={"status": status}), 409, "book_closed")
        refused(await client.patch(f"/coupons/{book}", json={"status": status, "name": "b"}), 409, "book_closed")
    assert (await client.get(f"/coupons/{book}")).json()["name"] == "a book"
    assert (await patch(client, book, status="closed", name="b"))["name"] == "b"


async def test_what_never_changes_is_refused(client: httpx.AsyncClient) -> None:
    book = await make_book(client)
    changes: list[dict[str, Any]] = [
        {"ack": "redis"},
        {"ack": "ledger"},
        {"max_redemptions_per_code": 2},
        {"max_redemptions_per_code": None},
        {"book_id": "x"},
        {"generate": {"pattern": "####", "total": 1}},
        {"codes": []},
    ]
    for change in changes:
        refused(await client.patch(f"/coupons/{book}", json=change), 422, "invalid_request")


@pytest.mark.parametrize(
    "change",
    [
        {"name": ""},
        {"name": None},
        {"name": "x" * 201},
        {"status": None},
        {"status": "open"},
        {"lock_ttl_seconds": 0},
        {"lock_ttl_seconds": None},
        {"max_codes_per_user": 0},
        {"starts_at": "soon"},
        {"metadata": {"a": "x" * 4096}},
        {"metadata": 1},
        {"starts_at": IN_THE_FUTURE, "expires_at": IN_THE_PAST},
    ],
    ids=str,
)
async def test_an_invalid_change_is_refused_before_it_is_asked_which_book(
    client: httpx.AsyncClient, change: dict[str, Any]
) -> None:
    # The last one can be judged without the book, as the others can.
    refused(await client.patch(f"/coupons/{await make_book(client)}", json=change), 422, "invalid_request")
    if "expires_at" not in change:
        refused(await client.patch(f"/coupons/{NO_SUCH_BOOK}", json=change), 422, "invalid_request")


async def test_metadata_that_is_too_large_is_told_before_a_book_id_of_no_shape(client: httpx.AsyncClient) -> None:
    refused(await client.patch("/coupons/x", json={"metadata": {"a": "x" * 4096}}), 422, "invalid_request")


async def test_a_book_that_would_end_before_it_begins_stays_as_it_was(client: httpx.AsyncClient) -> None:
    book = await make_book(client, starts_at=IN_THE_FUTURE)
    answer = await client.patch(f"/coupons/{book}", json={"expires_at": IN_THE_PAST, "name": "b"})
    assert refused(answer, 422, "invalid_request")["errors"][0]["pointer"] == "/expires_at"
    assert (await client.get(f"/coupons/{book}")).json()["name"] == "a book"


async def test_no_such_book_is_not_found(client: httpx.AsyncClient) -> None:
    for book_id in (NO_SUCH_BOOK, "x", "assign2", "%00"):
        refused(await client.patch(f"/coupons/{book_id}", json={"name": "b"}), 404, "book_not_found")


async def test_changes_at_once_all_come_true(client: httpx.AsyncClient) -> None:
    book = await make_book(client)
    changes: list[dict[str, Any]] = [
        {"name": "b"},
        {"lock_ttl_seconds": 9},
        {"max_codes_per_user": 5},
        {"metadata": {"a": 1}},
    ]
    await asyncio.gather(*(patch(client, book, **change) for change in changes))
    stored = (await client.get(f"/coupons/{book}")).json()
    for change in changes:
        assert change.items() <= stored.items()


async def test_lowering_the_limit_takes_no_code_away(client: httpx.AsyncClient) -> None:
    book = await make_book(client)
    codes = [await assign(client, book) for _ in range(3)]
    await patch(client, book, max_codes_per_user=1)
    body = refused(await client.post("/coupons/assign", json={"book_id": book, "user_id": "u"}), 409, "user_code_limit")
    assert (body["limit"], body["held"]) == (1, 3)
    assert (await redeem(client, codes[2]))["redemptions_left"] == 0
