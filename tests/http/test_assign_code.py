"""POST /coupons/assign/{code}."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from tests.harness import Stack
from tests.http.helpers import POSITION, TIME, alike, assign, counters, make_book, patch, redeem, refused


async def test_the_named_code_is_assigned_and_the_second_time_it_is_the_users_already(
    client: httpx.AsyncClient,
) -> None:
    book = await make_book(client, codes=["NAMED-1", "NAMED-2"], max_redemptions_per_code=2)
    first = await client.post("/coupons/assign/NAMED-1", json={"user_id": "u"})
    assert first.status_code == 201
    again = await client.post("/coupons/assign/NAMED-1", json={"user_id": "u"})
    assert (again.status_code, again.json()) == (200, first.json())
    answer = first.json()
    assert TIME.fullmatch(answer.pop("assigned_at"))
    assert POSITION.fullmatch(answer.pop("position"))
    assert answer == {
        "code": "NAMED-1",
        "book_id": book,
        "user_id": "u",
        "redemptions_left": 2,
        "durable": True,
    }
    assert (await counters(client, book))["assigned"] == 1


async def test_what_is_the_users_already_keeps_the_place_of_its_assignment(client: httpx.AsyncClient) -> None:
    await make_book(client, codes=["NAMED-1"], max_redemptions_per_code=2)
    first = (await client.post("/coupons/assign/NAMED-1", json={"user_id": "u"})).json()
    await redeem(client, "NAMED-1")
    again = (await client.post("/coupons/assign/NAMED-1", json={"user_id": "u"})).json()
    assert again == {**first, "redemptions_left": 1}


@pytest.mark.parametrize("spelled", ["named-1", "NaMeD-1", "%20named-1%20", "%4Eamed%2D1"])
async def test_a_code_is_trimmed_and_upper_cased(client: httpx.AsyncClient, spelled: str) -> None:
    await make_book(client, codes=["NAMED-1"])
    made = await client.post(f"/coupons/assign/{spelled}", json={"user_id": "u"})
    assert (made.status_code, made.json()["code"]) == (201, "NAMED-1")


async def test_every_sign_of_a_code_goes_through_the_path(client: httpx.AsyncClient) -> None:
    code = "0A9._~+@-"
    await make_book(client, codes=[code])
    for verb, status in (("assign", 201), ("lock", 201)):
        made = await client.post(f"/coupons/{verb}/{code}", json={"user_id": "u"})
        assert (made.status_code, made.json()["code"]) == (status, code)
    assert (await client.get(f"/coupons/codes/{code}")).json()["status"] == "locked"


async def test_somebody_elses_code_is_refused_without_a_word_about_whose(client: httpx.AsyncClient) -> None:
    book = await make_book(client, codes=["NAMED-1"], max_codes_per_user=1)
    await client.post("/coupons/assign/NAMED-1", json={"user_id": "somebody"})
    taken = await client.post("/coupons/assign/NAMED-1", json={"user_id": "v"})
    refused(taken, 409, "already_assigned")
    assert "somebody" not in taken.text
    await redeem(client, "NAMED-1")
    assert alike(taken, await client.post("/coupons/assign/NAMED-1", json={"user_id": "v"}))
    assert (await client.post("/coupons/assign/NAMED-1", json={"user_id": "somebody"})).status_code == 200
    await patch(client, book, status="paused")
    refused(await client.post("/coupons/assign/NAMED-1", json={"user_id": "v"}), 409, "book_paused")


async def test_anothers_code_is_told_before_the_users_limit(client: httpx.AsyncClient) -> None:
    await make_book(client, codes=["L-1", "L-2", "L-3"], max_codes_per_user=1)
    for code, user_id in (("L-1", "u"), ("L-2", "v")):
        assert (await client.post(f"/coupons/assign/{code}", json={"user_id": user_id})).status_code == 201
    refused(await client.post("/coupons/assign/L-2", json={"user_id": "u"}), 409, "already_assigned")
    body = refused(await client.post("/coupons/assign/L-3", json={"user_id": "u"}), 409, "user_code_limit")
    assert (body["limit"], body["held"]) == (1, 1)
    assert (await client.post("/coupons/assign/L-1", json={"user_id": "u"})).status_code == 200


async def test_of_many_who_want_one_code_one_gets_it(client: httpx.AsyncClient) -> None:
    book = await make_book(client, codes=["NAMED-1"])
    sent = await asyncio.gather(*(client.post("/coupons/assign/NAMED-1", json={"user_id": f"u{n}"}) for n in range(10)))
    assert sorted(answer.status_code for answer in sent) == [201] + [409] * 9
    refused(await client.post("/coupons/assign", json={"book_id": book, "user_id": "u"}), 409, "book_exhausted")


async def test_a_code_far_down_a_large_book_can_be_named(client: httpx.AsyncClient) -> None:
    """More codes than Redis is lent at a time: most of them have to be fetched by name."""
    codes = [f"DEEP-{number:05}" for number in range(8_000)]
    book = await make_book(client, codes=codes)
    named = codes[::400]
    sent = await asyncio.gather(*(client.post(f"/coupons/assign/{c}", json={"user_id": c}) for c in named))
    assert [answer.status_code for answer in sent] == [201] * len(named)
    assert [answer.json()["code"] for answer in sent] == named
    assert await counters(client, book) == {
        "total": 8_000,
        "available": 8_000 - len(named),
        "assigned": len(named),
        "redeemed": 0,
        "quarantined": 0,
    }
    assert await assign(client, book) not in named


async def test_no_such_code_and_another_tenants_are_alike(client: httpx.AsyncClient, service: Stack) -> None:
    book = await make_book(client, codes=["MINE-1", "MINE-2", "MINE-3"])
    await client.post("/coupons/assign/MINE-1", json={"user_id": "u"})
    locked = await client.post("/coupons/lock/MINE-1")
    await patch(client, book, status="paused")
    spelled = ["MINE-1", "MINE-2", "NONE-1", "x", "%00%00%00", "-ABC", "a%20b", "%C3%9Fabc", "%EF%BC%A1BC", "x" * 65]
    async with await service.client() as other:
        for verb, body in (
            ("assign", {"user_id": "u"}),
            ("lock", {}),
            ("unlock", {"lock_token": locked.json()["lock_token"]}),
            ("redeem", {}),
        ):
            answers = [await other.post(f"/coupons/{verb}/{code}", json=body) for code in spelled]
            refused(answers[0], 404, "code_not_found")
            assert all(alike(answers[0], answer) for answer in answers)
        reads = [await other.get(f"/coupons/codes/{code}") for code in spelled]
        refused(reads[0], 404, "code_not_found")
        assert all(alike(reads[0], read) for read in reads)
        assert (await other.get("/users/u/coupons")).json() == {"coupons": [], "next_cursor": None}
        absent = await other.get("/users/u/coupons?book_id=bk_none")
        refused(absent, 404, "book_not_found")
        assert alike(absent, await other.get(f"/users/u/coupons?book_id={book}"))


async def test_an_invalid_body_is_told_before_a_code_that_is_not_there(client: httpx.AsyncClient) -> None:
    for code in ("NONE-1", "x"):
        refused(await client.post(f"/coupons/assign/{code}"), 422, "invalid_request")
        refused(await client.post(f"/coupons/unlock/{code}"), 422, "invalid_request")
        refused(await client.post(f"/coupons/lock/{code}", json={"ttl_seconds": 0}), 422, "invalid_request")
        too_large = {"metadata": {"a": "x" * 4096}}
        refused(await client.post(f"/coupons/redeem/{code}", json=too_large), 422, "invalid_request")
