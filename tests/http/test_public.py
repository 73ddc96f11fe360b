"""What needs no key: /healthz, /readyz, /metrics, /openapi.json, /docs, and the types of problems."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, MutableMapping
from typing import Any

import httpx
import pytest

from coupon_svc.http.problems import PROBLEMS
from coupon_svc.http.public import PublicEndpoint
from tests.conftest import SHARDS
from tests.harness import Stack
from tests.http.helpers import assign, lock, make_book, refused

PATHS = ["/healthz", "/readyz", "/metrics", "/openapi.json", "/docs"]


@pytest.fixture
async def nobody(service: Stack) -> AsyncIterator[httpx.AsyncClient]:
    """A client without a key."""
    async with httpx.AsyncClient(base_url=service.base_url, verify=False) as http:
        yield http


@pytest.mark.parametrize("path", PATHS)
async def test_no_key_is_needed_and_a_wrong_one_does_no_harm(nobody: httpx.AsyncClient, path: str) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        answer = await nobody.get(path, headers=headers)
        assert answer.status_code == 200
        head = await nobody.head(path, headers=headers)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-type"] == answer.headers["content-type"]


@pytest.mark.parametrize("path", PATHS)
async def test_other_methods_are_not_allowed(nobody: httpx.AsyncClient, path: str) -> None:
    for method in ("POST", "PUT", "PATCH", "DELETE", "OPTIONS"):
        answer = await nobody.request(method, path)
        refused(answer, 405, "method_not_allowed")
        assert answer.headers["allow"] == "GET, HEAD"
    refused(await nobody.get(path + "/"), 404, "not_found")


async def test_health_and_readiness_are_json(nobody: httpx.AsyncClient) -> None:
    assert (await nobody.get("/healthz")).json() == {"status": "alive"}
    ready = (await nobody.get("/readyz")).json()
    assert ready == {"status": "ready", "shards": {"open": SHARDS, "of": SHARDS}}


async def test_the_documentation_loads_nothing_from_elsewhere(nobody: httpx.AsyncClient) -> None:
    page = await nobody.get("/docs")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = page.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert not re.findall(r"""(?:src|href|action)\s*=\s*["']?(?:https?:)?//""", page.text)
    assert "@import" not in page.text
    assert "innerHTML" not in page.text


async def test_each_type_of_problem_is_explained_at_its_address(nobody: httpx.AsyncClient) -> None:
    for outcome, problem in PROBLEMS.items():
        told = (await nobody.get(f"/problems/{outcome.value}")).json()
        assert (told["code"], told["status"], told["title"]) == (outcome.value, problem.status, problem.title)
    refused(await nobody.get("/problems/none_such"), 404, "not_found")


async def test_metrics_are_well_formed_and_tell_nothing_of_one_tenant(
    client: httpx.AsyncClient, nobody: httpx.AsyncClient
) -> None:
    book = await make_book(client, name="a telling name", codes=["METRIC-1"])
    await client.post("/coupons/assign/METRIC-1", json={"user_id": "a.telling.user"})
    token = await lock(client, "METRIC-1")
    await client.get("/coupons/codes/METRIC-2")
    await assign(client, await make_book(client))
    text = (await nobody.get("/metrics")).text
    for secret in (book, "METRIC", "metric-", "telling", token, client.headers["authorization"][7:]):
        assert secret not in text
    sample = re.compile(r'[a-z_]+(\{([a-z]+="[^"\n]*",?)+\})? [-+.0-9e]+')
    names = set()
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            names.add(line.split()[2])
        else:
            assert sample.fullmatch(line), line
            name = line.partition("{")[0]
            assert name in names or re.sub("_(bucket|sum|count)$", "", name) in names
    assert re.search(r'coupon_requests_total\{[^}]*operation="read_code",outcome="code_not_found"\} [1-9]', text)
    assert re.search(r'coupon_requests_total\{[^}]*operation="lock_coupon",outcome="ok"\} [1-9]', text)


async def test_an_unexpected_error_is_a_problem_here_too(caplog: pytest.LogCaptureFixture) -> None:
    sent: list[MutableMapping[str, Any]] = []

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    async def receive() -> MutableMapping[str, Any]:
        raise AssertionError

    def fails(_: Any) -> tuple[bytes, bytes]:
        raise KeyError("a telling value")

    scope = {"type": "http", "method": "GET", "path": "/metrics", "state": {"request_id": b"its-id"}}
    await PublicEndpoint(fails)(scope, receive, send)
    assert sent[0]["status"] == 500
    assert b"internal_error" in sent[1]["body"]
    assert b'"request_id":"its-id"' in sent[1]["body"]
    assert "request its-id" in caplog.text
    assert "telling" not in caplog.text + sent[1]["body"].decode()
