"""What the tests of the routes share: books and coupons made in one line, and refusals checked as a whole."""

from __future__ import annotations

import re
from typing import Any

import httpx

JSON = {"Content-Type": "application/json"}
NO_SUCH_BOOK = "bk_00aaaaaaaaaaaaaaaa"
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
POSITION = re.compile(r"\d\d:\d+-\d+")
IN_THE_PAST, IN_THE_FUTURE = "2001-01-01T00:00:00Z", "2999-01-01T00:00:00Z"

SHUT = [
    ({"status": "closed"}, "book_closed"),
    ({"status": "paused"}, "book_paused"),
    ({"starts_at": IN_THE_FUTURE}, "book_not_started"),
    ({"expires_at": IN_THE_PAST}, "book_expired"),
    ({"status": "closed", "starts_at": IN_THE_FUTURE}, "book_closed"),
    ({"status": "paused", "expires_at": IN_THE_PAST}, "book_paused"),
]
"""Each way in which a book is not open, and what it is then refused with."""


async def make_book(client: httpx.AsyncClient, *, codes: list[str] | None = None, **fields: Any) -> str:
    """A new book, by default with 20 generated codes, or with those given. Returns its id."""
    if codes is None:
        fields.setdefault("generate", {"pattern": "########", "total": 20})
    response = await client.post("/coupons", json={"name": "a book", **fields})
    assert response.status_code == 201, response.text
    book_id: str = response.json()["book_id"]
    if codes:
        await upload(client, book_id, codes)
    return book_id


async def upload(client: httpx.AsyncClient, book_id: str, codes: list[str]) -> dict[str, Any]:
    """Add codes to a book, and what was answered."""
    response = await client.post("/coupons/codes", json={"book_id": book_id, "codes": codes})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def assign(client: httpx.AsyncClient, book_id: str, user_id: str = "u") -> str:
    """Assign a random code. Returns it."""
    response = await client.post("/coupons/assign", json={"book_id": book_id, "user_id": user_id})
    assert response.status_code == 201, response.text
    code: str = response.json()["code"]
    return code


async def lock(client: httpx.AsyncClient, code: str, **fields: Any) -> str:
    """Lock a coupon. Returns the token."""
    response = await client.post(f"/coupons/lock/{code}", json=fields)
    assert response.status_code == 201, response.text
    token: str = response.json()["lock_token"]
    return token


async def redeem(client: httpx.AsyncClient, code: str, **fields: Any) -> dict[str, Any]:
    """Redeem a coupon, and what was answered."""
    response = await client.post(f"/coupons/redeem/{code}", json=fields)
    assert response.status_code == 201, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def patch(client: httpx.AsyncClient, book_id: str, **fields: Any) -> dict[str, Any]:
    """Change a book, and what was answered."""
    response = await client.patch(f"/coupons/{book_id}", json=fields)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def counters(client: httpx.AsyncClient, book_id: str) -> dict[str, int]:
    """A book's live counters, which must add up."""
    codes: dict[str, int] = (await client.get(f"/coupons/{book_id}")).json()["codes"]
    assert codes["total"] == sum(number for name, number in codes.items() if name != "total")
    return codes


def refused(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """Check a refusal as a whole. Returns its body."""
    assert response.headers["content-type"] == "application/problem+json", response.text
    body: dict[str, Any] = response.json()
    assert (response.status_code, body["code"]) == (status, code), response.text
    assert body["status"] == status
    assert body["type"] == f"/problems/{code}"
    assert body["title"]
    assert body["detail"]
    assert body["request_id"] == response.headers["x-request-id"]
    assert "idempotent-replayed" not in response.headers
    if status in (423, 429, 503):
        assert int(response.headers["retry-after"]) >= 1
    if status == 422 and code == "invalid_request":
        assert body["errors"]
        assert all(set(error) == {"pointer", "detail"} for error in body["errors"])
    return body


def alike(one: httpx.Response, other: httpx.Response) -> bool:
    """Whether two refusals tell the same, but for which request they are about."""

    def told(response: httpx.Response) -> tuple[Any, ...]:
        headers = {k: v for k, v in response.headers.items() if k not in ("date", "x-request-id")}
        return response.status_code, headers, {k: v for k, v in response.json().items() if k != "request_id"}

    return told(one) == told(other)


def again(one: httpx.Response, other: httpx.Response) -> bool:
    """Whether `other` is the answer `one` over again, and marked so."""
    assert "idempotent-replayed" not in one.headers
    same = (one.status_code, one.content, one.headers.get("location")) == (
        other.status_code,
        other.content,
        other.headers.get("location"),
    )
    return same and other.headers.get("idempotent-replayed") == "true"
