"""POST /coupons/codes, as JSON."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from tests.harness import Stack
from tests.http.helpers import NO_SUCH_BOOK, again, alike, assign, counters, make_book, patch, refused, upload


async def test_what_was_not_added_is_told_by_row_and_reason(client: httpx.AsyncClient) -> None:
    elsewhere = await make_book(client, codes=["TAKEN-1"])
    book = await make_book(client, codes=["HERE-1"])
    answer = await upload(
        client,
        book,
        ["A-1", " a-1 ", "taken-1", "HERE-1", "no", "A B C", "-ABC", "x" * 65, "ÀBC", "ABC\0", "", "0._~+@-", "x" * 64],
    )
    rejected = answer.pop("rejected")
    assert answer == {
        "book_id": book,
        "received": 13,
        "inserted": 3,
        "duplicates": 3,
        "invalid": 7,
        "rejected_truncated": False,
    }
    only = "a code has only A-Z 0-9 . _ ~ + @ -"
    assert [(entry["row"], entry["code"], entry["reason"], entry["detail"]) for entry in rejected] == [
        (2, "A-1", "duplicate_in_upload", "as in row 1"),
        (3, "TAKEN-1", "duplicate_in_other_book", elsewhere),
        (4, "HERE-1", "duplicate_in_book", "the book has it already"),
        (5, "no", "invalid", "it has 2 characters; a code has 3 to 64"),
        (6, "A B C", "invalid", f"character 2 is ' ' (U+0020); {only}"),
        (7, "-ABC", "invalid", "character 1 is '-'; a code begins with a letter or a digit"),
        (8, "x" * 64, "invalid", "it has 65 characters; a code has 3 to 64"),
        (9, "ÀBC", "invalid", f"character 1 is 'À' (U+00C0); {only}"),
        (10, "ABC\0", "invalid", f"character 4 is U+0000; {only}"),
        (11, "", "invalid", "it has 0 characters; a code has 3 to 64"),
    ]
    assert set(rejected[0]) == {"row", "code", "reason", "detail"}
    assert (await counters(client, book))["total"] == 4
    assert (await counters(client, elsewhere))["total"] == 1
    assert (await client.get("/coupons/codes/taken-1")).json()["book_id"] == elsewhere


async def test_the_same_list_again_inserts_nothing_and_is_no_error(client: httpx.AsyncClient) -> None:
    book = await make_book(client, codes=[])
    codes = [f"AGAIN-{number}" for number in range(150)]
    assert (await upload(client, book, codes))["inserted"] == 150
    answer = await upload(client, book, [code.lower() for code in codes])
    assert (answer["inserted"], answer["duplicates"], answer["received"]) == (0, 150, 150)
    assert len(answer["rejected"]) == 100
    assert answer["rejected_truncated"] is True
    assert [entry["row"] for entry in answer["rejected"]] == list(range(1, 101))
    assert (await counters(client, book))["total"] == 150


async def test_a_large_list_is_answered_as_a_small_one(client: httpx.AsyncClient) -> None:
    """It is added in pieces; so no code of it must be its own duplicate."""
    elsewhere = await make_book(client, codes=["LARGE-00007"])
    book = await make_book(client, codes=["LARGE-04000"])
    codes = [f"LARGE-{number:05}" for number in range(5_000)]
    answer = await upload(client, book, ["no", *codes, "large-00001"])
    assert answer == {
        "book_id": book,
        "received": 5_002,
        "inserted": 4_998,
        "duplicates": 3,
        "invalid": 1,
        "rejected": [
            {"row": 1, "code": "no", "reason": "invalid", "detail": "it has 2 characters; a code has 3 to 64"},
            {"row": 9, "code": "LARGE-00007", "reason": "duplicate_in_other_book", "detail": elsewhere},
            {"row": 4_002, "code": "LARGE-04000", "reason": "duplicate_in_book", "detail": "the book has it already"},
            {"row": 5_002, "code": "LARGE-00001", "reason": "duplicate_in_upload", "detail": "as in row 3"},
        ],
        "rejected_truncated": False,
    }
    assert (await counters(client, book))["total"] == 4_999
    again = await upload(client, book, codes)
    assert (again["inserted"], again["duplicates"], again["rejected_truncated"]) == (0, 5_000, True)
    assert (await counters(client, book))["total"] == 4_999


@pytest.mark.parametrize("heading", ["code", "CODES", " Coupon_Code "])
async def test_a_heading_is_not_taken_for_a_code(client: httpx.AsyncClient, heading: str) -> None:
    book = await make_book(client, codes=[])
    body = {"book_id": book, "codes": [heading, "HEAD-1"]}
    (error,) = refused(await client.post("/coupons/codes", json=body), 422, "invalid_request")["errors"]
    assert error["pointer"] == "/codes/0"
    assert (await counters(client, book))["total"] == 0
    assert (await upload(client, book, ["HEAD-1", heading]))["inserted"] == 2


@pytest.mark.parametrize(
    "added",
    [
        {"codes": []},
        {"codes": ["SHUT-1"]},
        {"codes": [f"SHUT-{number}" for number in range(2_500)]},
        {"generate": {"pattern": "SHUT-####", "total": 10}},
        {"generate": {"pattern": "SHUT-####", "total": 2_500}},
    ],
    ids=["none", "few", "many", "a-few-drawn", "many-drawn"],
)
async def test_a_closed_book_takes_no_codes(client: httpx.AsyncClient, added: dict[str, Any]) -> None:
    book = await make_book(client, codes=["OPEN-1"])
    key = {"Idempotency-Key": "before"}
    first = await client.post("/coupons/codes", json={"book_id": book, "codes": ["OPEN-2"]}, headers=key)
    for status in ("paused", "closed"):
        await patch(client, book, status=status)
        if status == "paused":
            assert (await upload(client, book, ["OPEN-3"]))["inserted"] == 1
    refused(await client.post("/coupons/codes", json={"book_id": book, **added}), 409, "book_closed")
    assert (await counters(client, book))["total"] == 3
    replayed = await client.post("/coupons/codes", json={"book_id": book, "codes": ["OPEN-2"]}, headers=key)
    assert again(first, replayed)


async def test_a_code_is_unique_within_its_tenant_and_free_for_others(
    client: httpx.AsyncClient, service: Stack
) -> None:
    book = await make_book(client, codes=["MINE-1"])
    async with await service.client() as other:
        theirs = await make_book(other, codes=["MINE-1"])
        assert (await other.get("/coupons/codes/MINE-1")).json()["book_id"] == theirs
        assert (await other.post("/coupons/assign/MINE-1", json={"user_id": "them"})).status_code == 201
    assert (await client.get("/coupons/codes/MINE-1")).json()["book_id"] == book
    assert (await client.get("/coupons/codes/MINE-1")).json()["status"] == "available"


async def test_added_codes_can_be_assigned_at_once(client: httpx.AsyncClient) -> None:
    book = await make_book(client, codes=[])
    for number in range(5):
        await upload(client, book, [f"NOW-{number}"])
        assert await assign(client, book) == f"NOW-{number}"


async def test_twenty_thousand_codes_at_most(client: httpx.AsyncClient) -> None:
    book = await make_book(client, codes=[])
    codes = [f"BULK-{number:05}" for number in range(20_001)]
    body = refused(await client.post("/coupons/codes", json={"book_id": book, "codes": codes}), 422, "invalid_request")
    assert body["errors"][0]["pointer"] == "/codes"
    assert (await upload(client, book, codes[:20_000]))["inserted"] == 20_000
    assert (await counters(client, book))["available"] == 20_000


async def test_more_codes_are_generated(client: httpx.AsyncClient) -> None:
    book = await make_book(client, codes=["A-1"])
    generate = {"pattern": "B-##", "total": 30, "alphabet": "digits"}
    answer = await client.post("/coupons/codes", json={"book_id": book, "generate": generate})
    assert answer.status_code == 200
    assert answer.json() == {
        "book_id": book,
        "received": 30,
        "inserted": 30,
        "duplicates": 0,
        "invalid": 0,
        "rejected": [],
        "rejected_truncated": False,
    }
    assert (await counters(client, book))["total"] == 31
    too_many = await client.post("/coupons/codes", json={"book_id": book, "generate": {**generate, "total": 21}})
    body = refused(too_many, 422, "pattern_capacity")
    assert (body["capacity"], body["requested"], body["already_used"]) == (100, 21, 30)
    assert (await counters(client, book))["total"] == 31


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"codes": None, "generate": None},
        {"codes": ["A-1"], "generate": {"pattern": "####", "total": 1}},
        {"codes": "A-1"},
        {"codes": ["A-1", None]},
        {"codes": [1]},
        {"codes": [["A-1"]]},
        {"generate": {"pattern": "####"}},
        {"generate": {"pattern": "#-#!", "total": 1}},
    ],
    ids=str,
)
async def test_either_codes_or_a_pattern_must_be_given_before_the_book_is_looked_up(
    client: httpx.AsyncClient, fields: dict[str, Any]
) -> None:
    for book in (NO_SUCH_BOOK, "x", await make_book(client, codes=[])):
        refused(await client.post("/coupons/codes", json={"book_id": book, **fields}), 422, "invalid_request")


async def test_an_empty_list_adds_nothing(client: httpx.AsyncClient) -> None:
    book = await make_book(client, codes=[])
    answer = await upload(client, book, [])
    assert (answer["received"], answer["inserted"]) == (0, 0)


async def test_no_such_book_and_another_tenants_are_alike(client: httpx.AsyncClient, service: Stack) -> None:
    book = await make_book(client)
    async with await service.client() as other:
        for fields in ({"codes": ["A-1"]}, {"generate": {"pattern": "######", "total": 1}}):
            answers = [
                await other.post("/coupons/codes", json={"book_id": book_id, **fields})
                for book_id in (book, NO_SUCH_BOOK, "x", "", "bk_\0")
            ]
            refused(answers[0], 404, "book_not_found")
            assert all(alike(answers[0], answer) for answer in answers)


async def test_a_pattern_that_can_never_be_wide_enough_is_told_before_the_book_is_looked_up(
    client: httpx.AsyncClient,
) -> None:
    body = {"book_id": NO_SUCH_BOOK, "generate": {"pattern": "AAA", "total": 1}}
    refused(await client.post("/coupons/codes", json=body), 422, "pattern_capacity")


async def test_a_book_id_of_any_length_is_not_found(client: httpx.AsyncClient) -> None:
    sent = await client.post("/coupons/codes", json={"book_id": "x" * 201, "codes": []})
    refused(sent, 404, "book_not_found")


async def test_uploads_at_once_add_each_code_once(client: httpx.AsyncClient) -> None:
    one, other = await make_book(client, codes=[]), await make_book(client, codes=[])
    codes = [f"RACE-{number}" for number in range(200)]
    answers = await asyncio.gather(*(upload(client, book, codes) for book in (one, other) * 4))
    assert sum(answer["inserted"] for answer in answers) == 200
    assert (await counters(client, one))["total"] + (await counters(client, other))["total"] == 200
