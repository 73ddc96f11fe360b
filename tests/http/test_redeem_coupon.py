"""POST /coupons/redeem/{code}."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from tests.harness import Stack
from tests.http.helpers import POSITION, TIME, assign, counters, lock, make_book, patch, redeem, refused


async def test_one_use_is_spent_and_stands_in_the_ledger(client: httpx.AsyncClient, service: Stack) -> None:
    book = await make_book(client)
    code = await assign(client, book)
    body = {"user_id": "u", "reference": "order 7", "metadata": {"total": 12.5, "é": "\0"}}
    made = await client.post(f"/coupons/redeem/{code.lower()}", json=body)
    assert made.status_code == 201
    answer = made.json()
    redemption_id, position = answer.pop("redemption_id"), answer.pop("position")
    assert redemption_id
    assert POSITION.fullmatch(position)
    assert TIME.fullmatch(answer.pop("redeemed_at"))
    assert answer == {
        "code": code,
        "book_id": book,
        "user_id": "u",
        "redemptions_used": 1,
        "redemptions_left": 0,
        "durable": True,
    }
    (row,) = await service.ledger("SELECT code, user_id, reference, metadata FROM redemptions WHERE book_id = $1", book)
    assert tuple(row)[:3] == (code, "u", "order 7")
    assert json.loads(row["metadata"]) == body["metadata"]
    refused(await client.post(f"/coupons/redeem/{code}"), 409, "already_redeemed")


async def test_each_use_is_counted_until_none_is_left(client: httpx.AsyncClient) -> None:
    book = await make_book(client, max_redemptions_per_code=3)
    code = await assign(client, book)
    answers = [await redeem(client, code) for _ in range(3)]
    assert [(a["redemptions_used"], a["redemptions_left"]) for a in answers] == [(1, 2), (2, 1), (3, 0)]
    assert len({a["redemption_id"] for a in answers}) == len({a["position"] for a in answers}) == 3
    refused(await client.post(f"/coupons/redeem/{code}"), 409, "already_redeemed")
    assert (await counters(client, book))["redeemed"] == 1


async def test_without_a_bound_there_is_always_another_use(client: httpx.AsyncClient) -> None:
    code = await assign(client, await make_book(client, max_redemptions_per_code=None))
    answers = [await redeem(client, code) for _ in range(5)]
    assert [(a["redemptions_used"], a["redemptions_left"]) for a in answers] == [(n, None) for n in range(1, 6)]


@pytest.mark.parametrize("uses", [1, 3])
async def test_many_at_once_spend_no_use_twice(client: httpx.AsyncClient, uses: int) -> None:
    code = await assign(client, await make_book(client, max_redemptions_per_code=uses))
    sent = await asyncio.gather(*(client.post(f"/coupons/redeem/{code}") for _ in range(12)))
    used = sorted(answer.json()["redemptions_used"] for answer in sent if answer.status_code == 201)
    assert used == list(range(1, uses + 1))
    for answer in sent:
        if answer.status_code != 201:
            refused(answer, 409, "already_redeemed")


async def test_it_consumes_the_lock_whose_token_is_shown(client: httpx.AsyncClient) -> None:
    code = await assign(client, await make_book(client, max_redemptions_per_code=3))
    token = await lock(client, code)
    held = await client.post(f"/coupons/redeem/{code}", json={"user_id": "u"})
    assert refused(held, 423, "locked")["retry_after_seconds"] <= 120
    assert held.headers["retry-after"] == str(held.json()["retry_after_seconds"])
    assert (await redeem(client, code, lock_token=token))["redemptions_used"] == 1
    refused(await client.post(f"/coupons/redeem/{code}", json={"lock_token": token}), 409, "lock_not_held")
    assert (await redeem(client, code))["redemptions_used"] == 2
    assert (await client.get(f"/coupons/codes/{code}")).json()["locked_until"] is None


async def test_refusals_come_in_their_order(client: httpx.AsyncClient) -> None:
    book = await make_book(client, codes=["O-1"])

    async def redeemed_with(**fields: Any) -> httpx.Response:
        return await client.post("/coupons/redeem/O-1", json=fields)

    refused(await redeemed_with(user_id="v", lock_token="wrong"), 409, "not_assigned")
    await client.post("/coupons/assign/O-1", json={"user_id": "u"})
    token = await lock(client, "O-1")
    refused(await redeemed_with(user_id="v", lock_token="wrong"), 403, "not_holder")
    refused(await redeemed_with(user_id="v"), 403, "not_holder")
    refused(await redeemed_with(user_id="u", lock_token="wrong"), 409, "lock_not_held")
    refused(await redeemed_with(user_id="u"), 423, "locked")
    await redeem(client, "O-1", lock_token=token)
    refused(await redeemed_with(user_id="v"), 403, "not_holder")
    refused(await redeemed_with(user_id="u", lock_token=token), 409, "already_redeemed")
    await patch(client, book, expires_at="2001-01-01T00:00:00Z")
    refused(await redeemed_with(user_id="v", lock_token="wrong"), 409, "book_expired")


@pytest.mark.parametrize(
    "fields",
    [
        {"reference": ""},
        {"reference": "x" * 201},
        {"reference": "a\0b"},
        {"reference": 7},
        {"metadata": []},
        {"metadata": {"a": "x" * (4097 - len('{"a":""}'))}},
        {"metadata": {"a": "é" * 2045}},
        {"lock_token": ""},
        {"uses": 2},
    ],
    ids=lambda fields: str(fields)[:40],
)
async def test_an_invalid_body_spends_nothing(client: httpx.AsyncClient, fields: dict[str, Any]) -> None:
    code = await assign(client, await make_book(client))
    refused(await client.post(f"/coupons/redeem/{code}", json=fields), 422, "invalid_request")
    assert (await client.get(f"/coupons/codes/{code}")).json()["redemptions_used"] == 0


async def test_what_is_within_its_bounds_is_taken(client: httpx.AsyncClient) -> None:
    code = await assign(client, await make_book(client, max_redemptions_per_code=None))
    bodies: list[dict[str, Any]] = [
        {"reference": "x" * 200},
        {"reference": "日本 🎉 '; --"},
        {"metadata": {}},
        {"metadata": {"a": "x" * (4096 - len('{"a":""}'))}},
        {"metadata": {"\0": 10**30, "deep": [[[[[]]]]]}},
        {"user_id": None, "lock_token": None, "reference": None, "metadata": None},
    ]
    for number, fields in enumerate(bodies, 1):
        assert (await redeem(client, code, **fields))["redemptions_used"] == number


async def test_a_lock_of_another_code_opens_nothing(client: httpx.AsyncClient) -> None:
    book = await make_book(client)
    one, other = await assign(client, book), await assign(client, book)
    token = await lock(client, one)
    for verb in ("redeem", "lock"):
        refused(await client.post(f"/coupons/{verb}/{other}", json={"lock_token": token}), 409, "lock_not_held")
    await lock(client, other)
    refused(await client.post(f"/coupons/redeem/{other}", json={"lock_token": token}), 409, "lock_not_held")
