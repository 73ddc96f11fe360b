"""Codes whose records were lost: never dealt again, back by receipt, or by an operator's word."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import asyncpg
import httpx
import pytest

from coupon_svc.postgres.quarantine import deal_again, quarantined_books
from tests.conftest import SHARDS
from tests.forked import run_command
from tests.harness import Stack, running_stack, until

BOOKS = 3


class Loss(NamedTuple):
    """A service that has lost the record of one answered assign, and the answer."""

    stack: Stack
    http: httpx.AsyncClient
    book_id: str
    lost: dict[str, Any]


@pytest.fixture(scope="module")
async def losses(tmp_path_factory: pytest.TempPathFactory, postgres_url: str) -> AsyncIterator[list[Loss]]:
    """A loss in a book for each test: a copy of the append-only file was restored that is older than an answered assign,
    whose event the ledger never got. The process that has answered is gone, too."""
    async with running_stack(tmp_path_factory.mktemp("loss"), postgres_url, SHARDS) as stack:
        writer, api = stack.parts
        assert stack.redis_server is not None
        async with await stack.client("shop") as http:
            rules = {"name": "b", "ack": "redis", "generate": {"pattern": "Q-########", "total": 10}}
            books = [(await http.post("/coupons", json=rules)).json()["book_id"] for _ in range(BOOKS)]
            for book_id in books:
                kept = await http.post("/coupons/assign", json={"book_id": book_id, "user_id": "kept"})
                assert kept.status_code == 201
            await stack.drained()
            (folder,) = stack.redis_server.directory.rglob("appendonlydir")
            shutil.copytree(folder, stack.folder / "old")
            writer.kill()  # what is done from now on is in Redis alone
            lost = []
            for number, book_id in enumerate(books):
                answer = await http.post("/coupons/assign", json={"book_id": book_id, "user_id": f"lucky{number}"})
                assert answer.status_code == 201
                assert answer.json()["durable"] is False
                lost.append(answer.json())
            api.kill()
        stack.redis_server.kill()
        shutil.rmtree(folder)
        shutil.copytree(stack.folder / "old", folder)
        stack.redis_server.start()
        stack.writer()
        stack.api()
        async with await stack.client("shop") as http:
            for book_id in books:

                async def quarantined(book_id: str = book_id) -> bool:
                    answer = await http.get(f"/coupons/{book_id}")
                    return answer.status_code == 200 and answer.json()["codes"]["quarantined"] > 0

                await until(quarantined, 30)
            await stack.ready()
            yield [Loss(stack, http, book_id, answer) for book_id, answer in zip(books, lost, strict=True)]


def verify(stack: Stack) -> int:
    return run_command("verify", **stack.environment).returncode


async def test_a_receipt_brings_a_lost_record_back(losses: list[Loss]) -> None:
    loss = losses[0]
    http, code = loss.http, loss.lost["code"]
    counters = (await http.get(f"/coupons/{loss.book_id}")).json()["codes"]
    assert counters == {"total": 10, "available": 0, "assigned": 1, "redeemed": 0, "quarantined": 9}
    assert (await http.get(f"/coupons/codes/{code}")).json()["status"] == "quarantined"
    for path, body in (("assign", {"user_id": "thief"}), ("lock", {}), ("redeem", {})):
        answer = await http.post(f"/coupons/{path}/{code}", json=body)
        assert (answer.status_code, answer.json()["code"]) == (409, "code_quarantined")
    forged = loss.lost["receipt"][:-2] + "AA"
    answer = await http.post(f"/coupons/assign/{code}", json={"user_id": "lucky0", "receipt": forged})
    assert answer.json()["code"] == "code_quarantined"

    shown = {"user_id": "lucky0", "receipt": loss.lost["receipt"]}
    back = await http.post(f"/coupons/assign/{code}", json=shown)
    assert back.status_code == 200
    assert {**back.json(), "receipt": 0, "durable": 0} == {**loss.lost, "receipt": 0, "durable": 0}
    held = (await http.get("/users/lucky0/coupons")).json()["coupons"]
    assert [coupon["code"] for coupon in held] == [code]
    assert (await http.post(f"/coupons/redeem/{code}", json={"user_id": "lucky0"})).status_code == 201
    assert await loss.stack.ledger("SELECT FROM coupons WHERE code = $1 AND user_id = 'lucky0'", code)
    await loss.stack.drained()
    assert verify(loss.stack) == 0


async def test_a_receipt_shown_at_redeem_is_enough_and_names_its_user(losses: list[Loss]) -> None:
    loss = losses[1]
    code, receipt = loss.lost["code"], loss.lost["receipt"]
    other = await loss.http.post(f"/coupons/assign/{code}", json={"user_id": "thief", "receipt": receipt})
    assert (other.status_code, other.json()["code"]) == (409, "already_assigned")
    answer = await loss.http.post(f"/coupons/redeem/{code}", json={"receipt": receipt})
    assert (answer.status_code, answer.json()["user_id"]) == (201, "lucky1")


async def test_quarantined_codes_are_dealt_again_only_by_an_operators_word(losses: list[Loss]) -> None:
    loss = losses[2]
    refused = await loss.http.post("/coupons/assign", json={"book_id": loss.book_id, "user_id": "next"})
    assert (refused.status_code, refused.json()["code"]) == (409, "book_exhausted")
    connection = await asyncpg.connect(loss.stack.database_url)
    assert (loss.book_id, 9) in [(book.book_id, book.codes) for book in await quarantined_books(connection)]
    assert await deal_again(connection, loss.book_id) == 9
    assert await connection.fetchval("SELECT count(*) FROM quarantine_decisions WHERE decision = 'dealt_again'") == 9
    await connection.close()

    async def dealt() -> bool:
        answer = await loss.http.post("/coupons/assign", json={"book_id": loss.book_id, "user_id": "next"})
        return answer.status_code == 201

    await until(dealt, 20)
    await loss.stack.drained()
    assert verify(loss.stack) == 0
