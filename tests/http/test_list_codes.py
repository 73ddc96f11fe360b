"""GET /coupons/{book_id}/codes, in JSON."""

from __future__ import annotations

from base64 import urlsafe_b64decode
from typing import Any

import httpx
import pytest

from coupon_svc.postgres.keys import SCOPES
from coupon_svc.postgres.listing import LOOKED_AT_MAX
from tests.harness import Stack
from tests.http.helpers import NO_SUCH_BOOK, assign, lock, make_book, patch, redeem, refused, upload


async def everything(client: httpx.AsyncClient, book: str, **query: Any) -> list[dict[str, Any]]:
    """The codes of all pages."""
    found: list[dict[str, Any]] = []
    cursor: str | None = ""
    while cursor is not None:
        answer = await client.get(f"/coupons/{book}/codes", params={**query, "cursor": cursor})
        assert answer.status_code == 200, answer.text
        page = answer.json()
        assert len(page["codes"]) <= query.get("limit", 50)
        found += page["codes"]
        cursor = page["next_cursor"]
    return found


async def test_each_code_is_listed_as_it_is_read(client: httpx.AsyncClient) -> None:
    book = await make_book(client, codes=["L-4", "L-1", "L-3", "L-2", "L-5"], max_redemptions_per_code=2)
    for number in range(1, 5):
        await client.post(f"/coupons/assign/L-{number}", json={"user_id": "u"})
    await redeem(client, "L-1")
    await redeem(client, "L-1")
    await redeem(client, "L-2")
    await lock(client, "L-3")
    listed = (await client.get(f"/coupons/{book}/codes")).json()
    assert listed["next_cursor"] is None
    assert [code["code"] for code in listed["codes"]] == ["L-1", "L-2", "L-3", "L-4", "L-5"]
    assert [code["status"] for code in listed["codes"]] == ["redeemed", "assigned", "locked", "assigned", "available"]
    for code in listed["codes"]:
        read = (await client.get(f"/coupons/codes/{code['code']}")).json()
        assert {**code, "locked_until": None} == {**read, "locked_until": None}
        assert (code["locked_until"] is None) == (read["locked_until"] is None)


@pytest.mark.parametrize(("ack", "uses"), [("ledger", 1), ("redis", 2), ("ledger", None)])
async def test_pages_of_each_status_hold_every_code_once(client: httpx.AsyncClient, ack: str, uses: int | None) -> None:
    book = await make_book(
        client, generate={"pattern": "#########", "total": 40}, ack=ack, max_redemptions_per_code=uses
    )
    states: dict[str, set[str]] = {"assigned": set(), "locked": set(), "redeemed": set()}
    for number in range(15):
        code = await assign(client, book, f"u{number}")
        if number % 3 == 0:
            await lock(client, code)
        if number % 3 == 1:
            for _ in range(uses or 1):
                await redeem(client, code)
        states[("locked", "redeemed" if uses else "assigned", "assigned")[number % 3]].add(code)
    codes = [code["code"] for code in await everything(client, book)]
    assert codes == sorted(codes)
    assert len(set(codes)) == 40
    states["available"] = set(codes).difference(*states.values())
    states["quarantined"] = set()
    for limit in (1, 7, 40, 1000):
        assert [code["code"] for code in await everything(client, book, limit=limit)] == codes
        for status, expected in states.items():
            found = await everything(client, book, limit=limit, status=status)
            assert {code["status"] for code in found} <= {status}
            assert [code["code"] for code in found] == sorted(expected), status


async def test_a_prefix_narrows_the_list_and_is_spelled_as_a_code_is(client: httpx.AsyncClient) -> None:
    codes = ["AB", "ABC", "ABC-1", "ABC-2", "ABC~", "ABD", "B-ABC"]
    book = await make_book(client, codes=[code + "X" for code in codes])
    await make_book(client, codes=["ABC-3X"])
    for prefix, expected in (("abc", ["ABC-1X", "ABC-2X", "ABCX", "ABC~X"]), (" ABD ", ["ABDX"]), ("Z", [])):
        for limit in (1, 50):
            found = await everything(client, book, prefix=prefix, limit=limit)
            assert [code["code"] for code in found] == expected
    assert [code["code"] for code in await everything(client, book, prefix="ABCX")] == ["ABCX"]
    assert len(await everything(client, book, prefix="")) == len(codes)


async def test_a_page_of_one_status_looks_at_a_bounded_number_of_codes(client: httpx.AsyncClient) -> None:
    total = LOOKED_AT_MAX + 10
    book = await make_book(client, generate={"pattern": "##########", "total": total})
    last = (await everything(client, book, limit=1000))[-1]["code"]
    await client.post(f"/coupons/assign/{last}", json={"user_id": "u"})
    found = (await client.get(f"/coupons/{book}/codes?status=assigned&limit=1")).json()["codes"]
    assert [code["code"] for code in found] == [last], "few of many are found at once"
    # Of those that are looked at for `available`, only the first page's are.
    page = (await client.get(f"/coupons/{book}/codes?status=available&limit=1000")).json()
    assert len(page["codes"]) == 1000
    assert page["next_cursor"]
    assert len(await everything(client, book, status="available", limit=1000)) == total - 1


async def test_a_page_goes_on_looking_until_it_has_something(client: httpx.AsyncClient) -> None:
    """The one code that is redeemed is behind more held ones than are looked at in one go."""
    total = LOOKED_AT_MAX + 10
    book = await make_book(client, generate={"pattern": "##########", "total": total}, max_redemptions_per_code=2)
    held = []
    for begin in range(0, total, 1000):
        users = [f"u{number}" for number in range(begin, min(begin + 1000, total))]
        answer = await client.post("/coupons/assignments", json={"book_id": book, "user_ids": users})
        held += [result["code"] for result in answer.json()["results"]]
    for _ in range(2):
        await redeem(client, max(held))
    page = (await client.get(f"/coupons/{book}/codes?status=redeemed&limit=1")).json()
    assert [code["code"] for code in page["codes"]] == [max(held)]
    page = (await client.get(f"/coupons/{book}/codes?status=locked")).json()
    assert (page["codes"], page["next_cursor"]) == ([], None), "all were looked at"


async def test_codes_of_a_book_that_is_shut_are_listed(client: httpx.AsyncClient) -> None:
    book = await make_book(client, codes=["SHUT-1"])
    await patch(client, book, status="closed")
    (code,) = await everything(client, book)
    assert (code["code"], code["book_status"]) == ("SHUT-1", "closed")


@pytest.mark.parametrize(
    ("query", "where"),
    [
        ("limit=0", "/limit"),
        ("limit=1001", "/limit"),
        ("status=", "/status"),
        ("status=free", "/status"),
        ("prefix=-A", "/prefix"),
        ("prefix=A%20B", "/prefix"),
        ("prefix=%C3%9F", "/prefix"),
        ("prefix=" + "A" * 65, "/prefix"),
        ("cursor=!", "/cursor"),
        ("cursor=e30", "/cursor"),
        ("user_id=u", "/user_id"),
    ],
)
async def test_an_invalid_query_is_refused_and_told_where(client: httpx.AsyncClient, query: str, where: str) -> None:
    body = refused(await client.get(f"/coupons/{NO_SUCH_BOOK}/codes?{query}"), 422, "invalid_request")
    assert body["errors"][0]["pointer"] == where


async def test_a_cursor_shows_no_code_and_is_good_for_its_own_list_alone(client: httpx.AsyncClient) -> None:
    book, other = [await make_book(client) for _ in range(2)]
    page = (await client.get(f"/coupons/{book}/codes?limit=1")).json()
    cursor, code = page["next_cursor"], page["codes"][0]["code"]
    assert code not in urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode("latin-1")
    for path in (
        f"/coupons/{other}/codes?",
        f"/coupons/{book}/codes?prefix=A&",
        f"/coupons/{book}/codes?status=assigned&",
    ):
        refused(await client.get(f"{path}cursor={cursor}"), 422, "invalid_request")


async def test_no_such_book_is_not_found(client: httpx.AsyncClient, service: Stack) -> None:
    async with await service.client() as stranger:
        others = await make_book(stranger)
    for book in (NO_SUCH_BOOK, others, "x"):
        refused(await client.get(f"/coupons/{book}/codes"), 404, "book_not_found")


async def test_codes_of_an_upload_that_is_not_placed_are_not_listed(client: httpx.AsyncClient, service: Stack) -> None:
    book = await make_book(client, codes=["PLACED-1"])
    (row,) = await service.ledger("SELECT tenant_id FROM books WHERE book_id = $1", book)
    await service.ledger("INSERT INTO codes VALUES ($1, 'PLACED-0', $2, -2)", row["tenant_id"], book)
    for query in ({}, {"status": "available"}):
        assert [code["code"] for code in await everything(client, book, **query)] == ["PLACED-1"]
    await service.ledger("DELETE FROM codes WHERE book_id = $1 AND place = -2", book)


async def test_only_a_key_with_its_scope_may_list(service: Stack) -> None:
    tenant = "lists-" + NO_SUCH_BOOK
    async with await service.client(tenant) as owner:
        book = await make_book(owner)
    async with await service.client(tenant, tuple(scope for scope in SCOPES if scope != "codes:read")) as other:
        body = refused(await other.get(f"/coupons/{book}/codes"), 403, "missing_scope")
        assert body["scopes"] == ["codes:read"]
    async with await service.client(tenant, ("codes:read",)) as reader:
        assert len(await everything(reader, book)) == 20


async def test_a_code_and_a_job_called_codes_are_still_reached(client: httpx.AsyncClient) -> None:
    """Their paths have the shape of a list of the codes of a book called `codes`, or `jobs`."""
    book = await make_book(client, codes=["A-CODE", "CODES"])
    assert (await client.get("/coupons/codes/codes")).json()["book_id"] == book
    refused(await client.get("/coupons/jobs/codes"), 404, "job_not_found")
    assert (await client.post("/coupons/assign/codes", json={"user_id": "u"})).status_code == 201


async def test_more_codes_than_one_call_reads_are_listed(client: httpx.AsyncClient) -> None:
    book = await make_book(client, codes=["FIRST-1"])
    await upload(client, book, [f"MANY-{number}" for number in range(999)])
    page = (await client.get(f"/coupons/{book}/codes?limit=1000")).json()
    assert len(page["codes"]) == 1000
    assert page["next_cursor"] is None
