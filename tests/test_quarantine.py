"""Codes whose records were lost: never dealt again, back by receipt, or by an operator's word."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import httpx

from coupon_svc.postgres.quarantine import deal_again, quarantined_books
from tests.harness import Stack, until

MakeStack = Callable[[], Awaitable[Stack]]


class Loss(NamedTuple):
    """A service that has lost the record of one answered assign, and the answer."""

    stack: Stack
    http: httpx.AsyncClient
    book_id: str
    lost: dict[str, Any]


async def lose_one(make_stack: MakeStack) -> Loss:
    """Restore a copy of the append-only file that is older than an answered assign, whose event the ledger never got. The
    process that has answered is gone, too."""
    stack = await make_stack()
    writer = stack.writer()
    api = stack.api()
    await stack.ready()
    http = await stack.client("shop")
    rules = {"name": "b", "ack": "redis", "generate": {"pattern": "Q-########", "total": 10}}
    book_id = (await http.post("/coupons", json=rules)).json()["book_id"]
    kept = await http.post("/coupons/assign", json={"book_id": book_id, "user_id": "kept"})
    assert kept.status_code == 201
    await stack.drained()
    assert stack.redis_server is not None
    (folder,) = stack.redis_server.directory.rglob("appendonlydir")
    shutil.copytree(folder, stack.folder / "old")
    writer.kill()  # what is done from now on is in Redis alone
    lost = await http.post("/coupons/assign", json={"book_id": book_id, "user_id": "lucky"})
    assert lost.status_code == 201
    assert lost.json()["durable"] is False
    api.kill()
    await http.aclose()
    stack.redis_server.kill()
    shutil.rmtree(folder)
    shutil.copytree(stack.folder / "old", folder)
    stack.redis_server.start()
    stack.writer()
    stack.api()
    http = await stack.client("shop")

    async def quarantined() -> bool:
        answer = await http.get(f"/coupons/{book_id}")
        return answer.status_code == 200 and answer.json()["codes"]["quarantined"] > 0

    await until(quarantined, 30)
    return Loss(stack, http, book_id, lost.json())


def verify(stack: Stack) -> int:
    command = [sys.executable, "-m", "coupon_svc", "verify"]
    done = subprocess.run(
        command, env={**__import__("os").environ, **stack.environment}, capture_output=True, check=False
    )
    return done.returncode


async def test_a_receipt_brings_a_lost_record_back(make_stack: MakeStack) -> None:
    loss = await lose_one(make_stack)
    http, code = loss.http, loss.lost["code"]
    counters = (await http.get(f"/coupons/{loss.book_id}")).json()["codes"]
    assert counters == {"total": 10, "available": 0, "assigned": 1, "redeemed": 0, "quarantined": 9}
    assert (await http.get(f"/coupons/codes/{code}")).json()["status"] == "quarantined"
    for path, body in (("assign", {"user_id": "thief"}), ("lock", {}), ("redeem", {})):
        answer = await http.post(f"/coupons/{path}/{code}", json=body)
        assert (answer.status_code, answer.json()["code"]) == (409, "code_quarantined")
    forged = loss.lost["receipt"][:-2] + "AA"
    answer = await http.post(f"/coupons/assign/{code}", json={"user_id": "lucky", "receipt": forged})
    assert answer.json()["code"] == "code_quarantined"

    shown = {"user_id": "lucky", "receipt": loss.lost["receipt"]}
    back = await http.post(f"/coupons/assign/{code}", json=shown)
    assert back.status_code == 200
    assert {**back.json(), "receipt": 0, "durable": 0} == {**loss.lost, "receipt": 0, "durable": 0}
    held = (await http.get("/users/lucky/coupons")).json()["coupons"]
    assert [coupon["code"] for coupon in held] == [code]
    assert (await http.post(f"/coupons/redeem/{code}", json={"user_id": "lucky"})).status_code == 201
    assert await loss.stack.ledger("SELECT FROM coupons WHERE code = $1 AND user_id = 'lucky'", code)
    await loss.stack.drained()
    assert verify(loss.stack) == 0
    await http.aclose()


async def test_a_receipt_shown_at_redeem_is_enough_and_names_its_user(make_stack: MakeStack) -> None:
    loss = await lose_one(make_stack)
    code, receipt = loss.lost["code"], loss.lost["receipt"]
    other = await loss.http.post(f"/coupons/assign/{code}", json={"user_id": "thief", "receipt": receipt})
    assert (other.status_code, other.json()["code"]) == (409, "already_assigned")
    answer = await loss.http.post(f"/coupons/redeem/{code}", json={"receipt": receipt})
    assert (answer.status_code, answer.json()["user_id"]) == (201, "lucky")
    await loss.http.aclose()


async def test_quarantined_codes_are_dealt_again_only_by_an_operators_word(make_stack: MakeStack) -> None:
    loss = await lose_one(make_stack)
    refused = await loss.http.post("/coupons/assign", json={"book_id": loss.book_id, "user_id": "next"})
    assert (refused.status_code, refused.json()["code"]) == (409, "book_exhausted")
    import asyncpg

    connection = await asyncpg.connect(loss.stack.database_url)
    assert [(book.book_id, book.codes) for book in await quarantined_books(connection)] == [(loss.book_id, 9)]
    assert await deal_again(connection, loss.book_id) == 9
    assert await connection.fetchval("SELECT count(*) FROM quarantine_decisions WHERE decision = 'dealt_again'") == 9
    await connection.close()

    async def dealt() -> bool:
        answer = await loss.http.post("/coupons/assign", json={"book_id": loss.book_id, "user_id": "next"})
        return answer.status_code == 201

    await until(dealt, 20)
    await loss.stack.drained()
    assert verify(loss.stack) == 0
    await loss.http.aclose()
