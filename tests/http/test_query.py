"""Query parameters: those that an endpoint does not know, or that are given twice, are refused on every one with a key."""

from __future__ import annotations

import re

import httpx
import pytest

from coupon_svc.http.operations import Operation
from coupon_svc.http.routes import OPERATIONS
from tests.harness import Stack
from tests.http.helpers import assign, make_book, refused


def path_of(operation: Operation) -> str:
    return re.sub(r"\{\w+\}", "NONE-1", operation.path)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
async def test_a_parameter_that_the_endpoint_does_not_know_is_refused(
    client: httpx.AsyncClient, operation: Operation
) -> None:
    for query, pointer in (("foo=1", "/foo"), ("Limit=1", "/Limit"), ("x", "/x"), ("a%2Fb%7E=", "/a~1b~0")):
        answer = await client.request(operation.method, f"{path_of(operation)}?{query}")
        assert refused(answer, 422, "invalid_request")["errors"][0]["pointer"] == pointer
    for name in ("limit", "cursor", "status", "book_id"):
        if operation.query is None or name not in operation.query.__struct_fields__:
            answer = await client.request(operation.method, f"{path_of(operation)}?{name}=1")
            assert refused(answer, 422, "invalid_request")["errors"][0]["pointer"] == f"/{name}"


@pytest.mark.parametrize("path", ["/coupons", "/users/u/coupons"])
async def test_a_parameter_that_is_given_twice_is_refused(client: httpx.AsyncClient, path: str) -> None:
    for query in ("limit=1&limit=1", "limit=1&limit=2", "limit=1&cursor=&limit=1", "limit=1&l%69mit=1"):
        answer = await client.get(f"{path}?{query}")
        assert refused(answer, 422, "invalid_request")["errors"][0]["pointer"] == "/limit"
    refused(await client.get(f"{path}?cursor=&cursor="), 422, "invalid_request")


@pytest.mark.parametrize(
    "query", [b"limit=%", b"limit=%1", b"limit=1%zz", b"cursor=%FF", b"%C3=1", b"cursor=%ED%A0%80"]
)
async def test_a_query_that_is_not_percent_encoded_utf_8_is_refused(client: httpx.AsyncClient, query: bytes) -> None:
    for path in (b"/coupons", b"/users/u/coupons", b"/coupons/codes/NONE-1"):
        request = client.build_request("GET", "/", extensions={"target": path + b"?" + query})
        refused(await client.send(request), 422, "invalid_request")


async def test_a_request_with_such_a_parameter_does_nothing(client: httpx.AsyncClient) -> None:
    book = await make_book(client)
    code = await assign(client, book)
    for path, body in (
        ("/coupons", {"name": "b"}),
        ("/coupons/codes", {"book_id": book, "codes": ["Q-1"]}),
        ("/coupons/assign", {"book_id": book, "user_id": "u"}),
        (f"/coupons/lock/{code}", {}),
        (f"/coupons/redeem/{code}", {}),
    ):
        refused(await client.post(f"{path}?dry_run=true", json=body), 422, "invalid_request")
    refused(await client.patch(f"/coupons/{book}?dry_run=true", json={"name": "b"}), 422, "invalid_request")
    (read,) = (await client.get("/coupons")).json()["books"]
    assert (read["name"], read["redemptions"], read["codes"]["total"]) == ("a book", 0, 20)
    assert (await client.get("/users/u/coupons")).json()["coupons"][0]["status"] == "assigned"


async def test_an_empty_query_is_none(client: httpx.AsyncClient) -> None:
    for query in ("?", "?&", "?&limit=1&"):
        assert (await client.get(f"/coupons{query}")).status_code == 200


async def test_the_key_and_a_body_that_cannot_be_read_come_before(client: httpx.AsyncClient, service: Stack) -> None:
    refused(await client.get("/coupons?foo=1", headers={"Authorization": "Bearer no"}), 401, "unauthenticated")
    async with await service.client(scopes=("coupons:read",)) as other:
        refused(await other.get("/coupons?foo=1"), 403, "missing_scope")
    json, text = {"Content-Type": "application/json"}, {"Content-Type": "text/plain"}
    refused(await client.post("/coupons?foo=1", content=b"{", headers=json), 400, "malformed_json")
    refused(await client.post("/coupons?foo=1", content=b"{}", headers=text), 415, "unsupported_media_type")
    refused(await client.post("/coupons?foo=1", headers={"Idempotency-Key": ""}), 400, "invalid_idempotency_key")
    answer = await client.post("/coupons?foo=1", json={"nome": "b"})
    assert refused(answer, 422, "invalid_request")["errors"][0]["pointer"] == "/foo"
    refused(await client.get("/coupons/codes/NONE-1?foo=1"), 422, "invalid_request")  # before it is looked for


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics", "/openapi.json", "/docs", "/problems/locked"])
async def test_what_needs_no_key_ignores_the_query(client: httpx.AsyncClient, path: str) -> None:
    """Probes and caches add parameters of their own."""
    assert (await client.get(f"{path}?x=1&x=2&%zz")).status_code == 200


@pytest.mark.parametrize("limit", ["1", "1.0", "1e0"])
async def test_a_limit_may_be_written_as_json_writes_integers(client: httpx.AsyncClient, limit: str) -> None:
    for _ in range(2):
        await make_book(client, codes=[])
    assert len((await client.get(f"/coupons?limit={limit}")).json()["books"]) == 1


async def test_an_integer_of_a_body_may_have_a_fraction_of_zero(client: httpx.AsyncClient) -> None:
    """For JSON, and so for the OpenAPI document, it is the same number; in metadata it stays as it was sent."""
    body = b"""{"name": "b", "max_codes_per_user": 2.0, "lock_ttl_seconds": 6e1, "metadata": {"a": 1.0},
                "starts_at": "2020-01-01T00:00:00Z", "generate": {"pattern": "####", "total": 3.0}}"""
    json = {"Content-Type": "application/json"}
    made = await client.post("/coupons", content=body, headers={**json, "Idempotency-Key": "k"})
    assert made.status_code == 201, made.text
    book = made.json()
    assert (book["max_codes_per_user"], book["lock_ttl_seconds"], book["codes"]["total"]) == (2, 60, 3)
    assert b'"metadata":{"a":1.0}' in made.content
    same = body.replace(b"2.0", b"2").replace(b"3.0", b"3").replace(b"6e1", b"60")
    again = await client.post("/coupons", content=same, headers={**json, "Idempotency-Key": "k"})
    assert (again.status_code, again.json()) == (201, book)
    for wrong in (b"2.5", b"1e400", b"0.0", b"true", b'"2"'):
        answer = await client.post("/coupons", content=body.replace(b"2.0", wrong), headers=json)
        refused(answer, 422, "invalid_request")
    refused(await client.post("/coupons", content=body + b"x", headers=json), 400, "malformed_json")
