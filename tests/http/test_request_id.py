"""Every request has one id: its caller's if that is well-formed, else one of ours. It is on every answer."""

from __future__ import annotations

import re

import httpx
import pytest

from coupon_svc.http.operations import Operation
from coupon_svc.http.routes import OPERATIONS
from tests.harness import Stack
from tests.http.helpers import make_book, refused
from tests.http.test_fast_path import chunked, dial, post

OURS = re.compile(r"req_[0-9a-f]{24}")
PUBLIC = ["/healthz", "/readyz", "/metrics", "/openapi.json", "/docs", "/problems/locked", "/problems/none", "/nowhere"]


def address(operation: Operation) -> str:
    return re.sub(r"\{\w+\}", "NONE-1", operation.path)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
async def test_an_operations_refusals_carry_the_callers_id_or_one_of_ours(
    service: Stack, client: httpx.AsyncClient, operation: Operation
) -> None:
    async with httpx.AsyncClient(base_url=service.base_url, verify=False) as nobody:
        for caller in (nobody, client):
            for sent in ("order-4711", None):
                headers = {"X-Request-Id": sent} if sent else {}
                answer = await caller.request(operation.method, address(operation), headers=headers)
                got = answer.headers["x-request-id"]
                assert got == sent if sent else OURS.fullmatch(got)
                if answer.is_error:
                    assert refused(answer, answer.status_code, answer.json()["code"])["request_id"] == got


async def test_answers_with_an_effect_carry_it_too_and_a_replay_has_its_own(client: httpx.AsyncClient) -> None:
    book_id = await make_book(client)
    body = {"book_id": book_id, "user_id": "u"}
    answers = [
        await client.post(
            "/coupons/assign", json=body, headers={"Idempotency-Key": "k", "X-Request-Id": f"try.{number}"}
        )
        for number in (1, 2)
    ]
    assert [answer.headers["x-request-id"] for answer in answers] == ["try.1", "try.2"]
    assert answers[0].content == answers[1].content


@pytest.mark.parametrize("path", PUBLIC)
async def test_so_does_what_needs_no_key(client: httpx.AsyncClient, path: str) -> None:
    for method in ("GET", "HEAD", "DELETE"):
        answer = await client.request(method, path, headers={"X-Request-Id": "probe_1"})
        assert answer.headers["x-request-id"] == "probe_1"
        assert OURS.fullmatch((await client.request(method, path)).headers["x-request-id"])


@pytest.mark.parametrize(
    "sent",
    [b"", b"x" * 65, b"a b", b"a/b", b"\xc3\xa9", b'"quoted"', b"a,b"],
    ids=["empty", "long", "space", "slash", "UTF-8", "quotes", "comma"],
)
async def test_an_id_that_is_not_well_formed_is_replaced_and_not_refused(
    client: httpx.AsyncClient, sent: bytes
) -> None:
    for path in ("/coupons", "/healthz"):
        answer = await client.get(path, headers={b"X-Request-Id": sent})
        assert answer.status_code == 200
        assert OURS.fullmatch(answer.headers["x-request-id"])
    longest = "x" * 64
    assert (await client.get("/coupons", headers={"X-Request-Id": longest})).headers["x-request-id"] == longest


async def test_no_two_requests_share_an_id_of_ours(service: Stack, client: httpx.AsyncClient) -> None:
    wire = await dial(service.base_url)
    ids = []
    for make in (post, chunked) * 20:
        wire.writer.write(make("/coupons/assign", b"{}"))
        ids.append((await wire.answer()).headers["x-request-id"])
    wire.writer.close()
    assert len(set(ids)) == 40


async def test_malformed_http_has_an_id_of_ours_even_right_after_a_request(service: Stack) -> None:
    wire = await dial(service.base_url)
    wire.writer.write(post("/coupons/assign", b"{}", "X-Request-Id: before"))
    assert (await wire.answer()).headers["x-request-id"] == "before"
    wire.writer.write(b"\x00\xff\r\n\r\n")
    answer = await wire.answer()
    assert answer.status == 400
    assert OURS.fullmatch(answer.headers["x-request-id"])
    wire.writer.close()
