"""POST /coupons."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest

from tests.http.helpers import IN_THE_FUTURE, JSON, TIME, assign, make_book, refused, upload


async def create(client: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    return await client.post("/coupons", json={"name": "a", **fields})


def pointer(response: httpx.Response) -> str:
    """Where the one error of an invalid request is."""
    (error,) = refused(response, 422, "invalid_request")["errors"]
    return str(error["pointer"])


async def test_a_book_is_answered_with_its_rules_as_stored(client: httpx.AsyncClient) -> None:
    made = await client.post(
        "/coupons",
        json={
            "name": "Summer 2026",
            "max_codes_per_user": 1,
            "max_redemptions_per_code": 3,
            "lock_ttl_seconds": 60,
            "starts_at": "2026-01-01T01:30:00.5+01:30",
            "expires_at": "2999-12-31T23:59:59Z",
            "ack": "redis",
            "generate": {"pattern": "summer-####-####", "total": 100, "alphabet": "unambiguous"},
            "metadata": {"campaign": "s26", "nested": {"ü": [1, 2.5, None, True]}},
        },
    )
    assert made.status_code == 201
    book = made.json()
    book_id = book.pop("book_id")
    assert book_id.startswith("bk_")
    assert made.headers["location"] == f"/coupons/{book_id}"
    assert TIME.fullmatch(book.pop("created_at"))
    assert book == {
        "name": "Summer 2026",
        "max_codes_per_user": 1,
        "max_redemptions_per_code": 3,
        "lock_ttl_seconds": 60,
        "starts_at": "2026-01-01T00:00:00.500Z",
        "expires_at": "2999-12-31T23:59:59.000Z",
        "ack": "redis",
        "metadata": {"campaign": "s26", "nested": {"ü": [1, 2.5, None, True]}},
        "status": "active",
        "redemptions": 0,
        "guess_probability": 100 / 30**8,
        "codes": {"total": 100, "available": 100, "assigned": 0, "redeemed": 0, "quarantined": 0},
    }
    assert (await client.get(made.headers["location"])).json() == made.json()
    code = await assign(client, book_id)
    assert re.fullmatch("SUMMER-[2-9ABCDEFGHJKMNPQRSTVWXYZ]{4}-[2-9ABCDEFGHJKMNPQRSTVWXYZ]{4}", code)


async def test_it_is_told_how_easily_a_generated_code_is_guessed(client: httpx.AsyncClient) -> None:
    async def chance(book_id: str) -> float | None:
        answer = (await client.get(f"/coupons/{book_id}")).json()
        found: float | None = answer["guess_probability"]
        return found

    uploaded = await make_book(client, codes=["GUESS-0000", "GUESS-X"])
    assert await chance(uploaded) is None
    few = {"pattern": "GUESS-####", "alphabet": "digits", "total": 9}
    first = await make_book(client, generate=few)
    assert await chance(first) == 10 / 10_000, "an uploaded code lies in the pattern"
    many = await create(client, generate={**few, "total": 2_490})
    assert many.json()["guess_probability"] == 0.25, "in pieces, too"
    assert await chance(many.json()["book_id"]) == 0.25
    for total, more in ((10, 0.251), (2_001, 0.4511)):
        answer = await client.post("/coupons/codes", json={"book_id": first, "generate": {**few, "total": total}})
        assert answer.status_code == 200
        assert await chance(first) == more
    harder = {"pattern": "GUESS-#########", "total": 1}
    assert (await client.post("/coupons/codes", json={"book_id": first, "generate": harder})).status_code == 200
    assert await chance(first) == 0.4511, "the easiest counts"
    await upload(client, uploaded, ["GUESS-1"])
    assert await chance(uploaded) is None


async def test_only_the_name_must_be_given(client: httpx.AsyncClient) -> None:
    book = (await create(client)).json()
    assert {name: book[name] for name in book if name not in ("book_id", "created_at")} == {
        "name": "a",
        "max_codes_per_user": None,
        "max_redemptions_per_code": 1,
        "lock_ttl_seconds": 120,
        "starts_at": None,
        "expires_at": None,
        "ack": "ledger",
        "metadata": {},
        "status": "active",
        "redemptions": 0,
        "guess_probability": None,
        "codes": {"total": 0, "available": 0, "assigned": 0, "redeemed": 0, "quarantined": 0},
    }
    refused(await client.post("/coupons"), 422, "invalid_request")


async def test_what_is_within_its_bounds_is_taken(client: httpx.AsyncClient) -> None:
    for fields in (
        {"name": "x" * 200},
        {"name": "日本語 🎉"},
        {"max_codes_per_user": None, "max_redemptions_per_code": None, "generate": None, "metadata": None},
        {"max_codes_per_user": 2_147_483_647, "max_redemptions_per_code": 2_147_483_647},
        {"lock_ttl_seconds": 1},
        {"lock_ttl_seconds": 3600},
        {"starts_at": IN_THE_FUTURE, "expires_at": None},
        {"metadata": {"a": "x" * (4096 - len('{"a":""}'))}},
        {"metadata": {"a": "\0", "\0": 10**30, "b": 1e300, "é": -0.0}},
    ):
        made = await create(client, **fields)
        assert made.status_code == 201, made.text
        assert (await client.get(f"/coupons/{made.json()['book_id']}")).json() == made.json()


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"name": ""}, "/name"),
        ({"name": "x" * 201}, "/name"),
        ({"name": "a\0b"}, "/name"),
        ({"name": None}, "/name"),
        ({"max_codes_per_user": 0}, "/max_codes_per_user"),
        ({"max_codes_per_user": -1}, "/max_codes_per_user"),
        ({"max_codes_per_user": 10**40}, "/max_codes_per_user"),
        ({"max_codes_per_user": True}, "/max_codes_per_user"),
        ({"max_codes_per_user": "1"}, "/max_codes_per_user"),
        ({"max_redemptions_per_code": 0}, "/max_redemptions_per_code"),
        ({"max_redemptions_per_code": 1.5}, "/max_redemptions_per_code"),
        ({"lock_ttl_seconds": 0}, "/lock_ttl_seconds"),
        ({"lock_ttl_seconds": 3601}, "/lock_ttl_seconds"),
        ({"lock_ttl_seconds": None}, "/lock_ttl_seconds"),
        ({"starts_at": "tomorrow"}, "/starts_at"),
        ({"starts_at": "2026-01-01T00:00:00"}, "/starts_at"),
        ({"starts_at": 1795357061}, "/starts_at"),
        ({"starts_at": "2026-01-02T00:00:00Z", "expires_at": "2026-01-01T00:00:00Z"}, "/expires_at"),
        ({"starts_at": "2026-01-01T01:00:00+01:00", "expires_at": "2026-01-01T00:00:00Z"}, "/expires_at"),
        ({"ack": "postgres"}, "/ack"),
        ({"ack": None}, "/ack"),
        ({"metadata": []}, "/metadata"),
        ({"metadata": {"a": "x" * (4097 - len('{"a":""}'))}}, "/metadata"),
        ({"generate": {}}, "/generate"),
        ({"generate": {"pattern": "A-####", "total": 0}}, "/generate/total"),
        ({"generate": {"pattern": "A-####", "total": None}}, "/generate/total"),
        ({"generate": {"pattern": "##", "total": 1}}, "/generate/pattern"),
        ({"generate": {"pattern": "#" * 65, "total": 1}}, "/generate/pattern"),
        ({"generate": {"pattern": "A B ####", "total": 1}}, "/generate/pattern"),
        ({"generate": {"pattern": "ÄÖ-####", "total": 1}}, "/generate/pattern"),
        ({"generate": {"pattern": "A/####", "total": 1}}, "/generate/pattern"),
        ({"generate": {"pattern": "-A####", "total": 1}}, "/generate/pattern"),
        ({"generate": {"pattern": "####", "total": 1, "alphabet": "AB-"}}, "/generate/pattern"),
        ({"generate": {"pattern": "A####", "total": 1, "alphabet": "A"}}, "/generate/alphabet"),
        ({"generate": {"pattern": "A####", "total": 1, "alphabet": "AAB"}}, "/generate/alphabet"),
        ({"generate": {"pattern": "A####", "total": 1, "alphabet": "aA"}}, "/generate/alphabet"),
        ({"generate": {"pattern": "A####", "total": 1, "alphabet": "A#B"}}, "/generate/alphabet"),
        ({"generate": {"pattern": "A####", "total": 1, "alphabet": "AÉ"}}, "/generate/alphabet"),
        ({"generate": {"pattern": "A####", "total": 1, "length": 1}}, "/generate"),
        ({"status": "paused"}, ""),
        ({"codes": ["A-1"]}, ""),
    ],
    ids=str,
)
async def test_what_is_not_within_its_bounds_is_invalid_and_told_where(
    client: httpx.AsyncClient, fields: dict[str, Any], where: str
) -> None:
    assert pointer(await create(client, **fields)) == where
    assert (await client.get("/coupons")).json()["books"] == []


async def test_a_name_with_a_line_break_at_its_end_is_invalid(client: httpx.AsyncClient) -> None:
    refused(await create(client, name="a\n"), 422, "invalid_request")


@pytest.mark.parametrize(
    "moment", ["0001-01-01T00:00:00Z", "0999-01-01T00:00:00Z", "0001-01-01T00:00:00+02:00", "9999-12-31T23:59:59-02:00"]
)
async def test_a_time_at_the_edges_of_the_calendar_is_refused_or_told_in_rfc_3339(
    client: httpx.AsyncClient, moment: str
) -> None:
    made = await create(client, starts_at=moment)
    if made.status_code == 201:
        assert TIME.fullmatch(made.json()["starts_at"])
    else:
        assert pointer(made) == "/starts_at"


async def test_numbers_without_end_are_refused(client: httpx.AsyncClient) -> None:
    for value in (b"9" * 6000, b"1e400", b"-1e999", b"1" + b"0" * 5000 + b".5"):
        for field in (b'"max_codes_per_user": ', b'"lock_ttl_seconds": ', b'"metadata": {"a": '):
            body = b'{"name": "a", ' + field + value + (b"}}" if b"metadata" in field else b"}")
            refused(await client.post("/coupons", content=body, headers=JSON), 422, "invalid_request")


@pytest.mark.parametrize(
    ("alphabet", "symbols", "size"),
    [
        (None, "[2-9A-HJKMNP-TV-Z]", 30),
        ("unambiguous", "[2-9A-HJKMNP-TV-Z]", 30),
        ("alphanumeric", "[0-9A-Z]", 36),
        ("letters", "[A-Z]", 26),
        ("digits", "[0-9]", 10),
        ("xy7", "[XY7]", 3),
        ("AB-", "[AB-]", 3),
    ],
)
async def test_generated_codes_follow_pattern_and_alphabet_and_fill_at_most_half(
    client: httpx.AsyncClient, alphabet: str | None, symbols: str, size: int
) -> None:
    generate = {"pattern": "G.###", "total": 10, **({"alphabet": alphabet} if alphabet else {})}
    book = (await create(client, generate=generate)).json()
    found = {await assign(client, book["book_id"]) for _ in range(10)}
    assert len(found) == 10
    assert all(re.fullmatch(rf"G\.{symbols}{{3}}", code) for code in found)
    capacity = size**3
    half = capacity // 2
    too_many = refused(await create(client, generate={**generate, "total": half - 9}), 422, "pattern_capacity")
    numbers = {name: too_many[name] for name in ("capacity", "requested", "already_used")}
    assert numbers == {"capacity": capacity, "requested": half - 9, "already_used": 10}
    if half < 1000:
        rest = await create(client, generate={**generate, "total": half - 10})
        assert rest.json()["codes"]["available"] == half - 10
        refused(await create(client, generate={**generate, "total": 1}), 422, "pattern_capacity")


async def test_a_pattern_without_a_random_symbol_has_no_capacity(client: httpx.AsyncClient) -> None:
    body = refused(await create(client, generate={"pattern": "SUMMER", "total": 1}), 422, "pattern_capacity")
    assert (body["capacity"], body["requested"], body["already_used"]) == (1, 1, 0)
    assert (await client.get("/coupons")).json()["books"] == []


async def test_generated_codes_step_aside_for_uploaded_ones(client: httpx.AsyncClient) -> None:
    await make_book(client, codes=["M-3"])
    book = (await create(client, generate={"pattern": "M-#", "total": 4, "alphabet": "digits"})).json()
    found = {await assign(client, book["book_id"]) for _ in range(4)}
    assert len(found) == 4
    assert "M-3" not in found


async def test_uploaded_codes_that_lie_in_a_pattern_fill_it_too(client: httpx.AsyncClient) -> None:
    await make_book(client, codes=["U.1+1", "u.2+2", "U.3+A", "UX1+1", "U.11+1", "AU.1+1", "U.1+12"])
    generate = {"pattern": "U.#+#", "alphabet": "digits"}
    body = refused(await create(client, generate={**generate, "total": 49}), 422, "pattern_capacity")
    assert (body["capacity"], body["requested"], body["already_used"]) == (100, 49, 2)
    assert "uploaded" in body["detail"]
    assert (await create(client, generate={**generate, "total": 48})).status_code == 201


@pytest.mark.parametrize("other", ["digits", "9876543210", "5432109876"])
async def test_the_same_alphabet_in_another_order_is_the_same_alphabet(client: httpx.AsyncClient, other: str) -> None:
    generate = {"pattern": "O-##", "total": 30}
    assert (await create(client, generate={**generate, "alphabet": "0123456789"})).status_code == 201
    body = refused(await create(client, generate={**generate, "alphabet": other}), 422, "pattern_capacity")
    assert (body["capacity"], body["requested"], body["already_used"]) == (100, 30, 30)


async def test_patterns_that_overlap_share_their_codes(client: httpx.AsyncClient) -> None:
    assert (await create(client, generate={"pattern": "P1##", "total": 50, "alphabet": "digits"})).status_code == 201
    wider = {"pattern": "P###", "total": 451, "alphabet": "digits"}
    assert refused(await create(client, generate=wider), 422, "pattern_capacity")["already_used"] == 50
    assert (await create(client, generate={**wider, "total": 450})).status_code == 201


async def test_a_large_book_is_there_whole_or_not_at_all(client: httpx.AsyncClient) -> None:
    made = await create(client, generate={"pattern": "L-######", "total": 5_001, "alphabet": "letters"})
    assert made.status_code == 201
    assert (await client.get(made.headers["location"])).json() == made.json()
    assert made.json()["codes"]["available"] == 5_001
    too_many = {"pattern": "L-###", "total": 6_000, "alphabet": "ABCDEFGHIJKLMNOPQRSTUVW"}  # of 12,167
    refused(await create(client, generate={**too_many, "total": 6_084}), 422, "pattern_capacity")
    assert (await create(client, generate=too_many)).status_code == 201
    refused(await create(client, generate={**too_many, "total": 2_001}), 422, "pattern_capacity")
    assert len((await client.get("/coupons")).json()["books"]) == 2


async def test_codes_can_be_added_to_a_generated_book(client: httpx.AsyncClient) -> None:
    book = await make_book(client)
    assert (await upload(client, book, ["MORE-1"]))["inserted"] == 1
    assert (await client.get(f"/coupons/{book}")).json()["codes"]["available"] == 21
