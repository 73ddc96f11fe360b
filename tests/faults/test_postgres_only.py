"""The service that the benchmark compares with: Postgres alone assigns, as Postgres and Redis together do."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from bench.postgres_only import BOOK_ID, fill, postgres_only_app
from coupon_svc.http.request_id import STATE
from coupon_svc.postgres.database import open_connection
from coupon_svc.postgres.keys import create_key, new_key
from tests.harness import fresh_database


@pytest.fixture
async def client(postgres_url: str) -> AsyncIterator[httpx.AsyncClient]:
    """A caller of it, with a book of 5 codes."""
    url, key = await fresh_database(postgres_url, 16), new_key()
    connection = await open_connection(url, "test")
    await create_key(connection, "bench", key)
    await connection.close()
    await fill(url, 5)
    app = postgres_only_app(url)

    async def served(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "state": {STATE: b"req_test"}}, receive, send)

    transport = httpx.ASGITransport(served)
    headers = {"Authorization": f"Bearer {key}"}
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers) as client,
    ):
        yield client


async def test_codes_are_assigned_until_there_are_none_and_a_key_is_answered_again(client: httpx.AsyncClient) -> None:
    body = {"book_id": BOOK_ID, "user_id": "ann"}
    keyed = {"Idempotency-Key": "k"}
    first = await client.post("/coupons/assign", json=body, headers=keyed)
    again = await client.post("/coupons/assign", json=body, headers=keyed)
    assert first.status_code == 201, first.text
    assert again.json() == first.json()
    assert again.headers["Idempotent-Replayed"] == "true"
    reused = await client.post("/coupons/assign", json={**body, "user_id": "bob"}, headers=keyed)
    assert reused.json()["code"] == "idempotency_key_reused"
    codes = {first.json()["code"]}
    for _ in range(4):
        codes.add((await client.post("/coupons/assign", json=body)).json()["code"])
    assert len(codes) == 5
    assert (await client.post("/coupons/assign", json=body)).json()["code"] == "book_exhausted"
    unknown = await client.post("/coupons/assign", json={**body, "book_id": BOOK_ID[:-1] + "q"})
    assert unknown.json()["code"] == "book_not_found"
