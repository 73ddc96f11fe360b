"""POST /coupons/lock/{code}."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from tests.harness import Stack, until
from tests.http.helpers import TIME, again, alike, assign, lock, make_book, patch, redeem, refused


def seconds_left(answer: dict[str, Any]) -> float:
    return (datetime.fromisoformat(answer["locked_until"]) - datetime.now(UTC)).total_seconds()


async def test_a_lock_is_held_until_its_time(client: httpx.AsyncClient) -> None:
    book = await make_book(client)
    code = await assign(client, book)
    made = await client.post(f"/coupons/lock/{code.lower()}", json={"user_id": "u", "ttl_seconds": 3600})
    assert made.status_code == 201
    answer = made.json()
    assert TIME.fullmatch(answer["locked_until"])
    assert 3590 < seconds_left(answer) <= 3601
    token = answer.pop("lock_token")
    answer.pop("locked_until")
    assert token
    assert answer == {"code": code, "book_id": book, "user_id": "u", "ttl_seconds": 3600}


async def test_the_books_own_time_is_the_default(client: httpx.AsyncClient) -> None:
    cases: list[tuple[dict[str, Any], int]] = [({}, 120), ({"lock_ttl_seconds": 7}, 7)]
    for fields, seconds in cases:
        code = await assign(client, await make_book(client, **fields))
        answer = (await client.post(f"/coupons/lock/{code}")).json()
        assert answer["ttl_seconds"] == seconds
        assert seconds - 5 < seconds_left(answer) <= seconds + 1


async def test_a_lock_is_never_promised_beyond_the_end_of_its_book(client: httpx.AsyncClient) -> None:
    ends_at = (datetime.now(UTC) + timedelta(seconds=40)).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    code = await assign(client, await make_book(client, expires_at=ends_at))
    keyed = {"Idempotency-Key": "l"}
    made = await client.post(f"/coupons/lock/{code}", headers=keyed)
    assert made.json()["locked_until"] == ends_at
    assert 30 <= made.json()["ttl_seconds"] < 40
    assert again(made, await client.post(f"/coupons/lock/{code}", headers=keyed))
    renewed = await client.post(f"/coupons/lock/{code}", json={"lock_token": made.json()["lock_token"]})
    assert (renewed.status_code, renewed.json()["locked_until"]) == (200, ends_at)
    assert (await client.get(f"/coupons/codes/{code}")).json()["locked_until"] == ends_at


async def test_a_lock_of_the_books_last_second_is_told_to_be_a_second_long(client: httpx.AsyncClient) -> None:
    book = await make_book(client)
    code = await assign(client, book)
    ends_at = (datetime.now(UTC) + timedelta(milliseconds=900)).isoformat()
    await patch(client, book, expires_at=ends_at)
    made = (await client.post(f"/coupons/lock/{code}", json={"ttl_seconds": 3600})).json()
    assert (made["locked_until"][:23], made["ttl_seconds"]) == (ends_at[:23], 1)

    await asyncio.sleep(max(0.0, seconds_left(made)))
    refused(await client.post(f"/coupons/redeem/{code}", json={"lock_token": made["lock_token"]}), 409, "book_expired")
    read = (await client.get(f"/coupons/codes/{code}")).json()
    assert (read["status"], read["book_status"]) == ("assigned", "expired")


async def test_a_book_whose_end_is_moved_ends_its_locks_with_it(client: httpx.AsyncClient) -> None:
    book = await make_book(client)
    code = await assign(client, book)
    token = await lock(client, code, ttl_seconds=600)
    ends_at = (datetime.now(UTC) + timedelta(seconds=60)).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    await patch(client, book, expires_at=ends_at)
    assert (await client.get(f"/coupons/codes/{code}")).json()["locked_until"] == ends_at
    assert (await client.get("/users/u/coupons")).json()["coupons"][0]["locked_until"] == ends_at
    await redeem(client, code, lock_token=token)


async def test_it_is_renewed_with_its_own_token_and_no_other_way(client: httpx.AsyncClient) -> None:
    code = await assign(client, await make_book(client))
    first = (await client.post(f"/coupons/lock/{code}", json={"ttl_seconds": 10})).json()
    token = first["lock_token"]
    renewed = await client.post(f"/coupons/lock/{code}", json={"lock_token": token, "ttl_seconds": 100})
    assert renewed.status_code == 200
    assert renewed.json()["lock_token"] == token
    assert renewed.json()["ttl_seconds"] == 100
    assert seconds_left(renewed.json()) > 90
    assert (await client.post(f"/coupons/lock/{code}", json={"lock_token": token})).json()["ttl_seconds"] == 120
    for body in ({}, {"user_id": "u"}, {"user_id": "u", "ttl_seconds": 1}):  # the holder without the token, too
        held = await client.post(f"/coupons/lock/{code}", json=body)
        problem = refused(held, 423, "locked")
        assert 100 <= problem["retry_after_seconds"] <= 120
        assert held.headers["retry-after"] == str(problem["retry_after_seconds"])
        assert token not in held.text
    for wrong in ("wrong", token[:-1], token + "x", token.upper()):
        refused(await client.post(f"/coupons/lock/{code}", json={"lock_token": wrong}), 409, "lock_not_held")


async def test_a_token_shown_where_no_lock_is_makes_none(client: httpx.AsyncClient) -> None:
    code = await assign(client, await make_book(client))
    refused(await client.post(f"/coupons/lock/{code}", json={"lock_token": "lk_mine"}), 409, "lock_not_held")
    assert (await client.get(f"/coupons/codes/{code}")).json()["status"] == "assigned"


async def test_it_ends_by_itself_and_its_token_with_it(client: httpx.AsyncClient) -> None:
    code = await assign(client, await make_book(client, max_redemptions_per_code=None))
    token = await lock(client, code, ttl_seconds=1)
    assert refused(await client.post(f"/coupons/redeem/{code}"), 423, "locked")["retry_after_seconds"] == 1

    async def ended() -> bool:
        return bool((await client.get(f"/coupons/codes/{code}")).json()["status"] == "assigned")

    await until(ended, timeout=4, what="a lock of one second should have ended")
    refused(await client.post(f"/coupons/lock/{code}", json={"lock_token": token}), 409, "lock_not_held")
    refused(await client.post(f"/coupons/redeem/{code}", json={"lock_token": token}), 409, "lock_not_held")
    assert (await client.post(f"/coupons/unlock/{code}", json={"lock_token": token})).status_code == 204
    assert (await redeem(client, code))["redemptions_used"] == 1
    other = await lock(client, code)
    assert other != token
    for verb in ("lock", "redeem", "unlock"):
        refused(await client.post(f"/coupons/{verb}/{code}", json={"lock_token": token}), 409, "lock_not_held")


async def test_of_many_who_lock_at_once_one_does(client: httpx.AsyncClient) -> None:
    code = await assign(client, await make_book(client))
    sent = await asyncio.gather(*(client.post(f"/coupons/lock/{code}") for _ in range(10)))
    assert sorted(answer.status_code for answer in sent) == [201] + [423] * 9


async def test_refusals_come_in_their_order(client: httpx.AsyncClient) -> None:
    book = await make_book(client, codes=["O-1", "O-2"])

    async def locked_with(**fields: Any) -> httpx.Response:
        return await client.post("/coupons/lock/O-1", json=fields)

    refused(await locked_with(user_id="v", lock_token="wrong"), 409, "not_assigned")
    await client.post("/coupons/assign/O-1", json={"user_id": "u"})
    token = await lock(client, "O-1")
    refused(await locked_with(user_id="v", lock_token="wrong"), 403, "not_holder")
    refused(await locked_with(user_id="v", lock_token=token), 403, "not_holder")
    refused(await locked_with(user_id="u", lock_token="wrong"), 409, "lock_not_held")
    refused(await locked_with(user_id="u"), 423, "locked")
    await redeem(client, "O-1", lock_token=token)
    refused(await locked_with(user_id="v"), 403, "not_holder")
    refused(await locked_with(user_id="u", lock_token=token), 409, "already_redeemed")
    refused(await locked_with(), 409, "already_redeemed")
    await patch(client, book, status="paused")
    refused(await locked_with(user_id="v", lock_token="wrong"), 409, "book_paused")


async def test_a_wrong_holder_is_not_told_who_it_is(client: httpx.AsyncClient) -> None:
    book = await make_book(client)
    answers = []
    for user_id in ("somebody", "else"):
        code = await assign(client, book, user_id)
        answers.append(await client.post(f"/coupons/lock/{code}", json={"user_id": "v"}))
        refused(answers[-1], 403, "not_holder")
    assert alike(*answers)


@pytest.mark.parametrize(
    "fields",
    [
        {"ttl_seconds": 0},
        {"ttl_seconds": 3601},
        {"ttl_seconds": 1.5},
        {"ttl_seconds": "1"},
        {"lock_token": ""},
        {"lock_token": "x" * 101},
        {"lock_token": 1},
        {"lock_token": "a\0"},
        {"token": "x"},
    ],
    ids=str,
)
async def test_an_invalid_body_is_refused(client: httpx.AsyncClient, fields: dict[str, Any]) -> None:
    refused(await client.post("/coupons/lock/NONE-1", json=fields), 422, "invalid_request")


async def test_null_is_as_good_as_nothing(client: httpx.AsyncClient) -> None:
    code = await assign(client, await make_book(client))
    body = {"user_id": None, "ttl_seconds": None, "lock_token": None}
    assert (await client.post(f"/coupons/lock/{code}", json=body)).json()["ttl_seconds"] == 120


async def test_locks_of_two_tenants_with_one_code_are_two(client: httpx.AsyncClient, service: Stack) -> None:
    await make_book(client, codes=["SAME-1"])
    async with await service.client() as other:
        await make_book(other, codes=["SAME-1"])
        tokens = []
        for each in (client, other):
            await each.post("/coupons/assign/SAME-1", json={"user_id": "u"})
            tokens.append(await lock(each, "SAME-1"))
        answer = await other.post("/coupons/unlock/SAME-1", json={"lock_token": tokens[0]})
        refused(answer, 409, "lock_not_held")
        assert (await redeem(other, "SAME-1", lock_token=tokens[1]))["redemptions_left"] == 0
    assert (await client.get("/coupons/codes/SAME-1")).json()["status"] == "locked"
