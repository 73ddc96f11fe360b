"""POST /coupons/assignments."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import struct
from typing import Any

import httpx
import pytest

from coupon_svc.http.server import HALF_CLOSED_WAIT_S
from coupon_svc.service.assign import LIST_PIECE
from tests.harness import Stack, until
from tests.http.helpers import (
    NO_SUCH_BOOK,
    POSITION,
    SHUT,
    TIME,
    again,
    alike,
    assign,
    counters,
    make_book,
    patch,
    refused,
    upload,
)
from tests.http.test_fast_path import dial, post

KEYED = {"Idempotency-Key": "list-1"}


async def ask(client: httpx.AsyncClient, book_id: str, users: list[str], **headers: str) -> httpx.Response:
    return await client.post("/coupons/assignments", json={"book_id": book_id, "user_ids": users}, headers=headers)


async def answered(client: httpx.AsyncClient, book_id: str, users: list[str], **headers: str) -> list[dict[str, Any]]:
    """The results, whose frame is checked."""
    answer = await ask(client, book_id, users, **headers)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    results: list[dict[str, Any]] = body.pop("results")
    assert [result["user_id"] for result in results] == users
    assert body == {"book_id": book_id, "assigned": sum(result["status"] == 201 for result in results)}
    return results


async def test_each_user_of_a_list_gets_a_code(client: httpx.AsyncClient, service: Stack) -> None:
    book = await make_book(client, generate={"pattern": "########", "total": 200}, max_redemptions_per_code=3)
    users = [f"user {n}" for n in range(100)]
    results = await answered(client, book, users)
    assert len({result["code"] for result in results}) == 100
    rows = await service.ledger("SELECT code, user_id FROM coupons WHERE book_id = $1", book)
    assert {tuple(row) for row in rows} == {(result["code"], result["user_id"]) for result in results}
    for result in results:
        assert TIME.fullmatch(result.pop("assigned_at"))
        assert POSITION.fullmatch(result.pop("position"))
        for name in ("code", "user_id"):
            assert result.pop(name)
        assert result == {"status": 201, "book_id": book, "redemptions_left": 3, "durable": True}


async def test_a_book_with_ack_redis_answers_each_with_a_receipt(client: httpx.AsyncClient) -> None:
    book = await make_book(client, ack="redis")
    results = await answered(client, book, ["u", "v"])
    assert [result["durable"] for result in results] == [False, False]
    assert all(result["receipt"].startswith("rc_") for result in results)


async def test_one_users_refusal_changes_nothing_for_the_others(client: httpx.AsyncClient) -> None:
    book = await make_book(client, codes=["A-1", "B-2", "C-3"], max_codes_per_user=1)
    await assign(client, book, "u")
    results = await answered(client, book, ["u", "v", "v", "w", "x"])
    assert results[0] == {"user_id": "u", "status": 409, "code": "user_code_limit", "limit": 1, "held": 1}
    assert [result["status"] for result in results] == [409, 201, 409, 201, 409]
    assert [result["code"] for result in results[2::2]] == ["user_code_limit", "book_exhausted"]


async def test_a_retry_gives_everybody_the_same_code_and_judges_the_refused_anew(client: httpx.AsyncClient) -> None:
    book = await make_book(client, codes=["A-1", "B-2"], max_codes_per_user=1)
    users = ["u", "v", "v", "w"]
    first = await answered(client, book, users, **KEYED)
    assert [result["status"] for result in first] == [201, 201, 409, 409]
    await upload(client, book, ["C-3"])
    second = await answered(client, book, users, **KEYED)
    assert second[:3] == first[:3]
    assert (second[3]["status"], second[3]["code"]) == (201, "C-3")
    assert (await counters(client, book))["assigned"] == 3


async def test_when_all_is_replayed_the_answer_says_so(client: httpx.AsyncClient) -> None:
    book = await make_book(client)
    first = await ask(client, book, ["u", "u", "v"], **KEYED)
    assert first.status_code == 200
    assert again(first, await ask(client, book, ["u", "u", "v"], **KEYED))
    assert (await counters(client, book))["assigned"] == 3


async def test_many_retries_at_once_have_one_effect(client: httpx.AsyncClient) -> None:
    book = await make_book(client, generate={"pattern": "########", "total": 400})
    users = [f"u{n}" for n in range(90)]
    answers = await asyncio.gather(*(answered(client, book, users, **KEYED) for _ in range(5)))
    assert all(answer == answers[0] for answer in answers)
    assert (await counters(client, book))["assigned"] == 90


async def test_the_key_of_a_list_is_no_other_requests(client: httpx.AsyncClient) -> None:
    book = await make_book(client, codes=["A-1", "B-2", "C-3"])
    await answered(client, book, ["u", "v"], **KEYED)
    one = {"book_id": book, "user_id": "u"}
    for other in (
        ask(client, book, ["u"], **KEYED),
        ask(client, book, ["v", "u"], **KEYED),
        client.post("/coupons/assign", json=one, headers=KEYED),
        client.post("/coupons/assign/C-3", json={"user_id": "u"}, headers=KEYED),
    ):
        refused(await other, 422, "idempotency_key_reused")
    assert (await client.post("/coupons/assign", json=one, headers={"Idempotency-Key": "one-1"})).status_code == 201
    refused(await ask(client, book, ["u"], **{"Idempotency-Key": "one-1"}), 422, "idempotency_key_reused")
    assert (await counters(client, book))["assigned"] == 3


async def test_a_list_that_had_no_effect_leaves_its_key_free(client: httpx.AsyncClient) -> None:
    book = await make_book(client, codes=[])
    assert [result["code"] for result in await answered(client, book, ["u"], **KEYED)] == ["book_exhausted"]
    await upload(client, book, ["A-1"])
    assert (await answered(client, book, ["v"], **KEYED))[0]["code"] == "A-1"


@pytest.mark.parametrize(("rules", "code"), SHUT)
async def test_a_book_that_is_shut_refuses_the_whole_list(
    rules: dict[str, Any], code: str, client: httpx.AsyncClient
) -> None:
    book = await make_book(client)
    before = await answered(client, book, ["u"], **KEYED)
    await patch(client, book, **rules)
    refused(await ask(client, book, ["u", "v"]), 409, code)
    assert await answered(client, book, ["u"], **KEYED) == before


@pytest.mark.parametrize("status", ["paused", "closed"])
async def test_a_retry_tells_a_code_again_though_the_book_is_shut(status: str, client: httpx.AsyncClient) -> None:
    """Also the code of somebody behind a whole piece of users who have none."""
    book = await make_book(client, generate={"pattern": "########", "total": 100}, max_codes_per_user=1)
    users = [f"u{number}" for number in range(LIST_PIECE + 8)]
    await answered(client, book, users[:LIST_PIECE])
    first = await answered(client, book, users, **KEYED)
    assert [result["status"] for result in first] == [409] * LIST_PIECE + [201] * 8
    await patch(client, book, status=status)
    second = await answered(client, book, users, **KEYED)
    assert second[LIST_PIECE:] == first[LIST_PIECE:]
    assert {result["code"] for result in second[:LIST_PIECE]} == {f"book_{status}"}


async def test_a_keyed_list_that_a_shut_book_refuses_to_everybody_is_refused_as_a_whole(
    client: httpx.AsyncClient,
) -> None:
    book = await make_book(client, generate={"pattern": "########", "total": 100})
    await patch(client, book, status="paused")
    users = [f"u{number}" for number in range(LIST_PIECE + 8)]
    refused(await ask(client, book, users, **KEYED), 409, "book_paused")


async def test_no_such_book_and_another_tenants_are_alike(client: httpx.AsyncClient, service: Stack) -> None:
    book = await make_book(client)
    async with await service.client() as other:
        answers = [
            await ask(other, book_id, ["u", "v"]) for book_id in (NO_SUCH_BOOK, book, "x", "bk_99aaaaaaaaaaaaaaaa")
        ]
    refused(answers[0], 404, "book_not_found")
    assert all(alike(answers[0], answer) for answer in answers)


@pytest.mark.parametrize(
    ("users", "pointer"),
    [
        ([], "/user_ids"),
        (["u"] * 1001, "/user_ids"),
        ("u", "/user_ids"),
        (None, "/user_ids"),
        (["u", ""], "/user_ids/1"),
        (["u", "a\0"], "/user_ids/1"),
        ([7], "/user_ids/0"),
    ],
    ids=lambda value: str(value)[:20],
)
async def test_other_lists_are_invalid(users: Any, pointer: str, client: httpx.AsyncClient) -> None:
    sent = await client.post("/coupons/assignments", json={"book_id": NO_SUCH_BOOK, "user_ids": users})
    assert refused(sent, 422, "invalid_request")["errors"][0]["pointer"].startswith("/user_ids")


async def test_a_list_of_a_thousand_is_answered_whole(client: httpx.AsyncClient) -> None:
    book = await make_book(client, generate={"pattern": "########", "total": 990})
    users = [f"u{n}" for n in range(1_000)]
    results = await answered(client, book, users, **KEYED)
    assert [result["status"] for result in results].count(201) == 990
    assert {result["code"] for result in results if result["status"] != 201} == {"book_exhausted"}
    assert await answered(client, book, users, **KEYED) == results


async def lists_answered(client: httpx.AsyncClient) -> int:
    """How many lists the service has answered, to whoever was still there."""
    metrics = (await client.get("/metrics")).text
    return sum(map(int, re.findall(r'coupon_requests_total\{.*operation="assign_coupons".*\} (\d+)', metrics)))


@pytest.mark.parametrize("resets", [True, False], ids=["reset", "closed"])
async def test_for_a_caller_who_has_hung_up_no_further_users_are_asked_for(
    resets: bool, client: httpx.AsyncClient, service: Stack
) -> None:
    book = await make_book(client, ack="redis", generate={"pattern": "########", "total": 2_000})
    await assign(client, book)
    before = await lists_answered(client)
    body = json.dumps({"book_id": book, "user_ids": [f"user {n}" for n in range(1_000)]}).encode()
    wire = await dial(service.base_url)
    redis: Any = service.redis()
    await redis.client_pause(1_500, all=False)  # what writes waits

    async def first_piece_waits() -> bool:
        return any(one["cmd"] == "fcall" and "b" in one["flags"] for one in await redis.client_list())

    wire.writer.write(post("/coupons/assignments", body, f"Authorization: {client.headers['authorization']}"))
    await until(first_piece_waits)
    if resets:
        wire.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    wire.writer.close()
    await asyncio.sleep(2 * HALF_CLOSED_WAIT_S)
    await redis.client_unpause()

    async def answered_to_nobody() -> bool:
        return await lists_answered(client) > before

    await until(answered_to_nobody)
    (name,) = [name async for name in redis.scan_iter(f"cb:*holders:{book}")]
    assert await redis.hlen(name) == 1 + LIST_PIECE
    await redis.aclose()
