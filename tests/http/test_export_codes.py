"""GET /coupons/{book_id}/codes, in CSV."""

from __future__ import annotations

import csv
import io
from typing import Any

import asyncpg
import httpx
import pytest

from coupon_svc.domain.position import parse_shard_position
from coupon_svc.postgres.computed.ciphers import NO_CIPHERS
from coupon_svc.postgres.listing import ROWS_PER_PAGE, CodesRange, codes_as_of
from tests.harness import Stack
from tests.http.helpers import NO_SUCH_BOOK, POSITION, TIME, assign, lock, make_book, redeem, refused, upload

CSV = {"Accept": "text/csv"}


async def export(client: httpx.AsyncClient, book: str, **query: Any) -> list[dict[str, str]]:
    answer = await client.get(f"/coupons/{book}/codes", params=query, headers=CSV)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "text/csv; charset=utf-8; header=present"
    assert POSITION.fullmatch(answer.headers["coupon-position"])
    return list(csv.DictReader(io.StringIO(answer.text, newline="")))


@pytest.mark.parametrize("ack", ["ledger", "redis"])
async def test_each_state_is_exported(client: httpx.AsyncClient, service: Stack, ack: str) -> None:
    names = ["E-1", "E-2", "E-3", "E-4", "E-5"]
    book = await make_book(client, codes=names, max_redemptions_per_code=2, ack=ack)
    for number in range(1, 4):
        await client.post(f"/coupons/assign/E-{number}", json={"user_id": "=a,\"b'"})
    await redeem(client, "E-1")
    await redeem(client, "E-1")
    await redeem(client, "E-2")
    await lock(client, "E-3")
    await service.ledger("UPDATE codes SET place = -1 WHERE book_id = $1 AND code = 'E-5'", book)
    await service.ledger("INSERT INTO quarantine (book_id, code, shard, epoch) VALUES ($1, 'E-5', 0, 1)", book)
    rows = await export(client, book)
    assert all(TIME.fullmatch(row.pop("assigned_at")) for row in rows[:3])
    held = {"user_id": "'=a,\"b'"}
    assert rows == [
        {"code": "E-1", "status": "redeemed", **held, "redemptions_used": "2", "redemptions_left": "0"},
        {"code": "E-2", "status": "assigned", **held, "redemptions_used": "1", "redemptions_left": "1"},
        {"code": "E-3", "status": "assigned", **held, "redemptions_used": "0", "redemptions_left": "2"},
    ] + [
        {
            "code": code,
            "status": status,
            "user_id": "",
            "assigned_at": "",
            "redemptions_used": "0",
            "redemptions_left": "2",
        }
        for code, status in (("E-4", "available"), ("E-5", "quarantined"))
    ]
    for status in ("available", "assigned", "redeemed", "quarantined"):
        found = await export(client, book, status=status)
        assert [row["code"] for row in found] == [row["code"] for row in rows if row["status"] == status]
    assert [row["code"] for row in await export(client, book, prefix="e-2")] == ["E-2"]
    await service.ledger("UPDATE codes SET place = 1 WHERE book_id = $1 AND code = 'E-5'", book)
    await service.ledger("DELETE FROM quarantine WHERE book_id = $1", book)


async def test_without_a_limit_nothing_is_left_to_say(client: httpx.AsyncClient) -> None:
    book = await make_book(client, codes=["UNLIMITED"], max_redemptions_per_code=None)
    await client.post("/coupons/assign/UNLIMITED", json={"user_id": "u"})
    await redeem(client, "UNLIMITED")
    (row,) = await export(client, book)
    assert (row["status"], row["redemptions_used"], row["redemptions_left"]) == ("assigned", "1", "")
    assert await export(client, book, status="redeemed") == []


async def test_many_pages_are_one_file_and_an_upload_of_it_inserts_nothing(client: httpx.AsyncClient) -> None:
    total = 3 * ROWS_PER_PAGE
    book = await make_book(client, generate={"pattern": "##########", "total": total})
    held = {await assign(client, book, f"u{number}") for number in range(20)}
    rows = await export(client, book)
    codes = [row["code"] for row in rows]
    assert (len(set(codes)), codes) == (total, sorted(codes))
    assert {row["code"] for row in rows if row["status"] == "assigned"} == held
    again = await upload(client, book, codes)
    assert (again["inserted"], again["duplicates"]) == (0, total)
    assert {row["code"] for row in await export(client, book, status="assigned")} == held


async def test_what_comes_after_the_position_is_not_shown(client: httpx.AsyncClient, service: Stack) -> None:
    book = await make_book(client, codes=["P-1", "P-2"], max_redemptions_per_code=3)
    await client.post("/coupons/assign/P-1", json={"user_id": "u"})
    await redeem(client, "P-1")
    position = (await client.get(f"/coupons/{book}/codes", headers=CSV)).headers["coupon-position"]
    await redeem(client, "P-1")
    await redeem(client, "P-1")
    await client.post("/coupons/assign/P-2", json={"user_id": "u"})
    async with asyncpg.create_pool(service.database_url, min_size=1, max_size=1) as pool, pool.acquire() as ledger:
        at = parse_shard_position(position)[1]
        for status, shown in ((None, [("P-1", 1), ("P-2", 0)]), ("assigned", [("P-1", 1), ("P-2", 0)])):
            rows, _ = await codes_as_of(ledger, CodesRange(book), at, status, NO_CIPHERS)  # type: ignore[arg-type]
            assert [(row.code, row.used) for row in rows] == shown
            assert [row.user_id for row in rows] == ["u", None]
    assert [row["redemptions_used"] for row in await export(client, book)] == ["3", "0"]


@pytest.mark.parametrize(
    ("query", "where"),
    [("status=locked", "/status"), ("limit=10", "/limit"), ("cursor=AA", "/cursor"), ("prefix=-", "/prefix")],
)
async def test_what_csv_cannot_do_is_refused(client: httpx.AsyncClient, query: str, where: str) -> None:
    body = refused(await client.get(f"/coupons/{NO_SUCH_BOOK}/codes?{query}", headers=CSV), 422, "invalid_request")
    assert body["errors"][0]["pointer"] == where


async def test_refusals_are_problems_in_json(client: httpx.AsyncClient, service: Stack) -> None:
    async with await service.client() as stranger:
        others = await make_book(stranger)
    for book in (NO_SUCH_BOOK, others):
        refused(await client.get(f"/coupons/{book}/codes", headers=CSV), 404, "book_not_found")


async def test_an_empty_book_is_a_heading(client: httpx.AsyncClient) -> None:
    book = await make_book(client, codes=[])
    answer = await client.get(f"/coupons/{book}/codes", headers=CSV)
    assert answer.text == "code,status,user_id,assigned_at,redemptions_used,redemptions_left\r\n"
