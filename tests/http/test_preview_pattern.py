"""POST /coupons/patterns/preview."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest

from coupon_svc.postgres.keys import SCOPES
from tests.harness import Stack
from tests.http.helpers import make_book, refused


async def preview(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    answer = await client.post("/coupons/patterns/preview", json=body)
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


async def test_it_tells_what_a_pattern_is_good_for_and_makes_nothing(client: httpx.AsyncClient, service: Stack) -> None:
    told = await preview(client, pattern=" pre-#### ", alphabet="digits", total=100)
    samples = told.pop("samples")
    assert told == {"capacity": 10_000, "already_used": 0, "guess_probability": 0.01, "fits": True}
    assert len(set(samples)) == 10
    assert all(re.fullmatch(r"PRE-\d{4}", sample) for sample in samples)
    assert await service.ledger("SELECT code FROM codes WHERE code = ANY ($1)", samples) == []
    assert (await client.get("/coupons")).json()["books"] == []


async def test_codes_that_lie_in_it_count_however_they_came(client: httpx.AsyncClient) -> None:
    book: dict[str, Any] = {"generate": {"pattern": "USED-##", "alphabet": "digits", "total": 30}}
    await make_book(client, **book)
    await make_book(client, codes=["USED-XX", "USED-1"])
    told = await preview(client, pattern="USED-##", alphabet="9876543210", total=20)
    assert (told["already_used"], told["guess_probability"], told["fits"]) == (30, 0.5, True)
    told = await preview(client, pattern="USED-##", alphabet="digits", total=21)
    assert told["fits"] is False
    await make_book(client, **{**book, "generate": {**book["generate"], "total": 20}})
    refused(await client.post("/coupons", json={"name": "b", **book}), 422, "pattern_capacity")


async def test_no_sample_is_a_code_that_was_issued(client: httpx.AsyncClient) -> None:
    used = [f"FREE-{number}" for number in range(8)]
    await make_book(client, codes=used)
    told = await preview(client, pattern="FREE-#", alphabet="digits", total=1)
    assert sorted(told["samples"]) == ["FREE-8", "FREE-9"]
    await make_book(client, codes=told["samples"])
    told = await preview(client, pattern="FREE-#", alphabet="digits", total=1)
    assert (told["samples"], told["guess_probability"], told["fits"]) == ([], 1.0, False)


async def test_another_tenants_codes_are_not_counted(client: httpx.AsyncClient, service: Stack) -> None:
    async with await service.client() as stranger:
        await make_book(stranger, generate={"pattern": "OTHER-##", "alphabet": "digits", "total": 50})
    assert (await preview(client, pattern="OTHER-##", alphabet="digits", total=1))["already_used"] == 0


async def test_the_largest_pattern_and_number_are_told_exactly(client: httpx.AsyncClient) -> None:
    told = await preview(client, pattern="#" * 64, alphabet="alphanumeric", total=10**12)
    assert told["capacity"] == 36**64
    assert told["guess_probability"] == 10**12 / 36**64
    assert (await preview(client, pattern="ABC", total=1))["capacity"] == 1


@pytest.mark.parametrize(
    ("body", "where"),
    [
        ({"pattern": "A B", "total": 1}, "/pattern"),
        ({"pattern": "-##", "total": 1}, "/pattern"),
        ({"pattern": "AB", "total": 1}, "/pattern"),
        ({"pattern": "A##", "total": 1, "alphabet": "AA"}, "/alphabet"),
        ({"pattern": "A##", "total": 0}, "/total"),
        ({"pattern": "A##", "total": 10**12 + 1}, "/total"),
        ({"pattern": "A##"}, ""),
        ({"pattern": "A##", "total": 1, "book_id": "x"}, ""),
    ],
)
async def test_what_is_no_pattern_is_refused_and_told_where(
    client: httpx.AsyncClient, body: dict[str, Any], where: str
) -> None:
    told = refused(await client.post("/coupons/patterns/preview", json=body), 422, "invalid_request")
    assert told["errors"][0]["pointer"] == where


async def test_it_needs_the_scope_that_makes_books(service: Stack) -> None:
    async with await service.client(scopes=tuple(scope for scope in SCOPES if scope != "books:write")) as other:
        answer = await other.post("/coupons/patterns/preview", json={"pattern": "A##", "total": 1})
        assert refused(answer, 403, "missing_scope")["scopes"] == ["books:write"]
