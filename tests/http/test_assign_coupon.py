"""POST /coupons/assign."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from coupon_svc.domain.position import parse_shard_position
from tests.harness import Stack
from tests.http.helpers import (
    NO_SUCH_BOOK,
    POSITION,
    TIME,
    alike,
    assign,
    counters,
    make_book,
    patch,
    redeem,
    refused,
    upload,
)


async def test_a_random_code_is_assigned(client: httpx.AsyncClient, service: Stack) -> None:
    book = await make_book(client, max_redemptions_per_code=3)
    made = await client.post("/coupons/assign", json={"book_id": book, "user_id": "auth0|7"})
    assert made.status_code == 201
    answer = made.json()
    code, position = answer.pop("code"), answer.pop("position")
    assert TIME.fullmatch(answer.pop("assigned_at"))
    assert POSITION.fullmatch(position)
    assert answer == {"book_id": book, "user_id": "auth0|7", "redemptions_left": 3, "durable": True}
    (row,) = await service.ledger("SELECT code, user_id FROM coupons WHERE book_id = $1", book)
    assert tuple(row) == (code, "auth0|7")


async def test_a_book_with_ack_redis_answers_without_the_ledger(client: httpx.AsyncClient, service: Stack) -> None:
    book = await make_book(client, ack="redis", max_redemptions_per_code=None)
    made = (await client.post("/coupons/assign", json={"book_id": book, "user_id": "u"})).json()
    assert made["durable"] is False
    assert made["redemptions_left"] is None
    assert POSITION.fullmatch(made["position"])
    again = (await client.post(f"/coupons/assign/{made['code']}", json={"user_id": "u"})).json()
    assert again["position"] == made["position"]
    assert (await redeem(client, made["code"]))["durable"] is True  # a redeem always waits
    (row,) = await service.ledger("SELECT code, user_id FROM coupons WHERE book_id = $1", book)
    assert tuple(row) == (made["code"], "u")


async def test_positions_of_a_book_grow_one_by_one(client: httpx.AsyncClient, service: Stack) -> None:
    book = await make_book(client)
    seen = []
    for _ in range(3):
        made = (await client.post("/coupons/assign", json={"book_id": book, "user_id": "u"})).json()
        seen.append(parse_shard_position(made["position"]))
    assert len({(shard, position.epoch) for shard, position in seen}) == 1
    first, second, third = (position.seq for _, position in seen)
    assert first < second < third


async def test_no_code_goes_to_two_and_the_book_runs_out_exactly_then(client: httpx.AsyncClient) -> None:
    book = await make_book(client)
    sent = await asyncio.gather(
        *(client.post("/coupons/assign", json={"book_id": book, "user_id": f"u{n}"}) for n in range(30))
    )
    codes = [answer.json()["code"] for answer in sent if answer.status_code == 201]
    assert len(codes) == len(set(codes)) == 20
    for answer in sent:
        if answer.status_code != 201:
            refused(answer, 409, "book_exhausted")
    assert (await counters(client, book))["available"] == 0
    await upload(client, book, ["FRESH-1"])
    assert await assign(client, book) == "FRESH-1"


async def test_an_empty_book_is_exhausted(client: httpx.AsyncClient) -> None:
    book = await make_book(client, codes=[])
    refused(await client.post("/coupons/assign", json={"book_id": book, "user_id": "u"}), 409, "book_exhausted")


async def test_a_user_holds_at_most_so_many_codes(client: httpx.AsyncClient) -> None:
    book, other = await make_book(client, max_codes_per_user=2), await make_book(client, max_codes_per_user=2)
    await assign(client, other)
    sent = await asyncio.gather(
        *(client.post("/coupons/assign", json={"book_id": book, "user_id": "u"}) for _ in range(6))
    )
    assert sorted(answer.status_code for answer in sent) == [201, 201, 409, 409, 409, 409]
    for answer in sent:
        if answer.status_code == 409:
            body = refused(answer, 409, "user_code_limit")
            assert (body["limit"], body["held"]) == (2, 2)
    code = next(answer.json()["code"] for answer in sent if answer.status_code == 201)
    await redeem(client, code)  # one that is redeemed was held, too
    refused(await client.post("/coupons/assign", json={"book_id": book, "user_id": "u"}), 409, "user_code_limit")
    assert await assign(client, book, "v")


async def test_the_users_limit_is_told_before_an_exhausted_book(client: httpx.AsyncClient) -> None:
    book = await make_book(client, codes=["ONLY-1"], max_codes_per_user=1)
    await assign(client, book)
    refused(await client.post("/coupons/assign", json={"book_id": book, "user_id": "u"}), 409, "user_code_limit")
    refused(await client.post("/coupons/assign", json={"book_id": book, "user_id": "v"}), 409, "book_exhausted")
    await patch(client, book, status="paused")
    refused(await client.post("/coupons/assign", json={"book_id": book, "user_id": "u"}), 409, "book_paused")


@pytest.mark.parametrize(
    "user_id", ["u", "auth0|7", "a@b.c", "a/b//c", "a b", "é🎉 日本", "x" * 128, "🎉" * 128, "'; --", "a:b{c}", '"\\']
)
async def test_user_ids_are_the_callers_own(client: httpx.AsyncClient, user_id: str) -> None:
    book = await make_book(client)
    made = (await client.post("/coupons/assign", json={"book_id": book, "user_id": user_id})).json()
    assert made["user_id"] == user_id
    assert (await client.get(f"/coupons/codes/{made['code']}")).json()["user_id"] == user_id
    assert (await redeem(client, made["code"], user_id=user_id))["user_id"] == user_id


@pytest.mark.parametrize("user_id", ["", "x" * 129, "a\0", ".", "\ufffd", "a ", None, 7, ["u"]], ids=repr)
@pytest.mark.parametrize("verb", ["assign", "assign/A-1", "lock/A-1", "redeem/A-1"])
async def test_other_user_ids_are_invalid(client: httpx.AsyncClient, user_id: Any, verb: str) -> None:
    if user_id is None and verb.startswith(("lock", "redeem")):
        return
    body = {"user_id": user_id, **({"book_id": NO_SUCH_BOOK} if verb == "assign" else {})}
    sent = await client.post(f"/coupons/{verb}", json=body)
    assert refused(sent, 422, "invalid_request")["errors"][0]["pointer"] == "/user_id"


@pytest.mark.parametrize("verb", ["assign", "assign/A-1", "lock/A-1", "redeem/A-1"])
async def test_a_user_id_with_a_line_break_at_its_end_is_invalid(client: httpx.AsyncClient, verb: str) -> None:
    book = await make_book(client, codes=["A-1"])
    body = {"user_id": "u\n", **({"book_id": book} if verb == "assign" else {})}
    refused(await client.post(f"/coupons/{verb}", json=body), 422, "invalid_request")


async def test_no_such_book_and_another_tenants_are_alike(client: httpx.AsyncClient, service: Stack) -> None:
    book = await make_book(client, codes=[])
    shut = await make_book(client)
    await patch(client, shut, status="closed")
    async with await service.client() as other:
        answers = [
            await other.post("/coupons/assign", json={"book_id": book_id, "user_id": "u"})
            for book_id in (NO_SUCH_BOOK, book, shut, "x", "", "bk_00\0", "🎉", "bk_99aaaaaaaaaaaaaaaa")
        ]
    refused(answers[0], 404, "book_not_found")
    assert all(alike(answers[0], answer) for answer in answers)


async def test_a_user_of_another_tenant_is_another_user(client: httpx.AsyncClient, service: Stack) -> None:
    await assign(client, await make_book(client, max_codes_per_user=1))
    async with await service.client() as other:
        book = await make_book(other, max_codes_per_user=1)
        assert await assign(other, book)
        assert len((await other.get("/users/u/coupons")).json()["coupons"]) == 1
