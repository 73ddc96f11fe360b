"""Every error is a problem, and neither it nor the logs hold a code, a key or a token."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from coupon_svc.domain.outcomes import Outcome
from coupon_svc.http.problems import PROBLEMS
from tests.harness import Stack
from tests.http.helpers import JSON, assign, lock, make_book, refused

SECRETS = ["SECRETCODE-777", "secretcode-777", "lk_secret_token_777", "idem-secret-777", "cbk_secret_key_777"]
CODE, SPELLED, TOKEN, IDEM, KEY = SECRETS


async def _walk(client: httpx.AsyncClient, code: str, token: str) -> list[httpx.Response]:
    """Requests that are all refused, each with a code, a key or a token in it wherever one may stand."""
    idem = {"Idempotency-Key": IDEM}
    asked: list[tuple[str, str, Any]] = [
        ("GET", f"/coupons/codes/{SPELLED}", None),
        ("GET", f"/coupons/{SPELLED}", None),
        ("GET", f"/{CODE}", None),
        ("DELETE", f"/coupons/codes/{CODE}", None),
        ("GET", f"/users/u/coupons?book_id={CODE}", None),
        ("GET", f"/users/u/coupons?cursor={CODE}", None),
        ("GET", f"/users/u/coupons?status={CODE}", None),
        ("GET", f"/users/u/coupons?limit={CODE}", None),
        ("GET", f"/coupons/jobs/{CODE}", None),
        ("GET", f"/problems/{CODE}", None),
        ("POST", f"/coupons/assign/{CODE}", {"user_id": "u"}),
        ("POST", f"/coupons/assign/{code}", {"user_id": "v"}),
        ("POST", f"/coupons/lock/{CODE}", {}),
        ("POST", f"/coupons/lock/{code}", {}),
        ("POST", f"/coupons/lock/{code}", {"lock_token": TOKEN}),
        ("POST", f"/coupons/unlock/{code}", {"lock_token": TOKEN}),
        ("POST", f"/coupons/redeem/{code}", {"lock_token": TOKEN}),
        ("POST", f"/coupons/redeem/{code}", {"user_id": "v", "lock_token": token}),
        ("POST", f"/coupons/redeem/{code}", {"lock_token": [token]}),
        ("POST", "/coupons/codes", {"book_id": CODE, "codes": [code]}),
        ("POST", "/coupons/codes", {"book_id": "x", "codes": [[code]]}),
        ("POST", "/coupons", {"name": "a", "generate": {"pattern": CODE, "total": 1}}),
        ("POST", "/coupons", {"name": "a", "generate": {"pattern": CODE + "!#", "total": 1}}),
        ("POST", "/coupons", {"name": "a", "generate": {"pattern": "A##", "total": 1, "alphabet": CODE}}),
    ]
    answers = [
        await client.request(method, path, json=body, headers=idem if method == "POST" else {})
        for method, path, body in asked
    ]
    broken = b'{"codes": ["' + CODE.encode() + b'", '
    answers.append(await client.post("/coupons/codes", content=broken, headers=JSON))
    answers.append(await client.get("/coupons", headers={"Authorization": f"Bearer {KEY}"}))
    return answers


async def test_no_refusal_repeats_a_code_a_key_or_a_token_and_no_log_does(
    client: httpx.AsyncClient, service: Stack
) -> None:
    code = await assign(client, await make_book(client))
    token = await lock(client, code)
    secrets = [*SECRETS, code, code.lower(), token, client.headers["authorization"][7:]]
    for answer in await _walk(client, code, token):
        refused(answer, answer.status_code, answer.json()["code"])
        assert answer.status_code < 500, answer.text
        for secret in secrets:
            assert secret not in answer.text, f"{answer.request.method} {answer.request.url.path}: {answer.text}"
            assert all(secret not in value for value in answer.headers.values())
    for name in ("api.log", "writer.log"):
        log = (service.folder / name).read_text()
        for secret in secrets:
            assert secret not in log
        assert "secret" not in log.lower()  # no part of one either


@pytest.mark.parametrize(
    "body",
    [{CODE: 1}, {"ack": CODE}, {"generate": {CODE: 1}}, {"name": "a", "metadata": {}, "lock_ttl_seconds": CODE}],
    ids=str,
)
async def test_a_code_sent_as_a_field_or_as_a_word_is_not_repeated(
    client: httpx.AsyncClient, body: dict[str, Any]
) -> None:
    answer = await client.post("/coupons", json={"name": "a", **body})
    refused(answer, 422, "invalid_request")
    assert CODE not in answer.text


async def test_an_unexpected_error_is_a_problem_and_its_log_line_names_no_value(
    client: httpx.AsyncClient, service: Stack
) -> None:
    """A code whose record in Redis has been tampered with makes the service fail in a way it does not foresee."""
    book = await make_book(client)
    code = await assign(client, book)
    redis = service.redis()
    try:
        (holders,) = [key async for key in redis.scan_iter(f"cb:*:holders:{book}")]
        kept = await redis.hget(holders, code)
        await redis.hset(holders, code, "x-1 y z u")
        answer = await client.get(f"/coupons/codes/{code}")
        await redis.hset(holders, code, kept)
    finally:
        await redis.aclose()
    body = refused(answer, 500, "internal_error")
    assert code not in answer.text
    log = (service.folder / "api.log").read_text()
    assert body["request_id"] in log
    assert code not in log


def test_every_outcome_is_told_as_a_problem_in_the_order_of_the_contract() -> None:
    assert set(PROBLEMS) == set(Outcome)
    for outcome, problem in PROBLEMS.items():
        assert 400 <= problem.status < 600
        assert problem.title
        assert problem.detail.endswith(".")
        assert (problem.retry_after_s is not None) >= (problem.status in (423, 429, 503)), outcome
    assert list(PROBLEMS) == list(Outcome)
