"""An endpoint without a server: what it answers, counts and logs, whatever its operation's function does."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from coupon_svc.domain.outcomes import Outcome, Refused
from coupon_svc.http.call import Answer, Call
from coupon_svc.http.endpoint import Endpoint
from coupon_svc.http.metrics import Metrics
from coupon_svc.http.response import Response
from coupon_svc.http.routes import OPERATIONS

READ_CODE = next(operation for operation in OPERATIONS if operation.name == "read_code")


class _Key:
    scopes = frozenset({"coupons:read"})
    tenant_id = 1


class _Keys:
    async def authenticate(self, authorization: bytes) -> Any:
        if authorization != b"Bearer good":
            raise Refused(Outcome.UNAUTHENTICATED)
        return _Key


def admit(tenant_id: int, code: str | None) -> None:
    if code == "SPENT":
        raise Refused(Outcome.TOO_MANY_UNKNOWN_CODES, retry_after_seconds=7)


async def ask(
    raised: BaseException | None,
    *,
    method: str = "GET",
    key: bytes = b"Bearer good",
    code: str = "A-1",
    query: bytes = b"",
) -> Response | None:
    async def handler(call: Call) -> Answer:
        if raised is not None:
            raise raised
        return Answer(200, {"code": call.path["code"]})

    endpoint = Endpoint(_Keys(), Metrics(), admit)  # type: ignore[arg-type]
    endpoint.add(READ_CODE, handler)
    return await endpoint.respond(b"its-id", method, {"code": code}, query, {b"authorization": key}, b"")


@pytest.mark.parametrize(
    ("raised", "status", "code"),
    [
        (Refused(Outcome.CODE_NOT_FOUND), 404, "code_not_found"),
        (Refused(Outcome.RECOVERING), 503, "recovering"),
        (asyncio.CancelledError(), 503, "outcome_unknown"),
        (KeyError("SECRET-1"), 500, "internal_error"),
    ],
    ids=["refused", "unavailable", "cancelled", "unforeseen"],
)
async def test_a_problem_carries_the_requests_id_and_a_5xx_is_logged_with_it(
    caplog: pytest.LogCaptureFixture, raised: BaseException, status: int, code: str
) -> None:
    caplog.set_level("INFO")
    response = await ask(raised)
    assert response is not None
    problem = json.loads(response.body)
    assert (response.status, problem["code"], problem["request_id"]) == (status, code, "its-id")
    assert len(caplog.messages) == (status >= 500)
    for message in caplog.messages:
        assert message.startswith(f"{status} {code} in read_code, request its-id")
        assert "SECRET-1" not in message


async def test_what_the_function_answers_is_sent() -> None:
    assert await ask(None) == Response(200, [(b"content-type", b"application/json")], b'{"code":"A-1"}')


async def test_the_method_is_judged_before_the_key_and_the_key_before_the_function() -> None:
    wrong_method = await ask(None, method="PUT", key=b"")
    assert wrong_method is not None
    assert (wrong_method.status, dict(wrong_method.headers)[b"allow"]) == (405, b"GET, HEAD")
    wrong_key = await ask(KeyError(), key=b"Bearer bad")
    assert wrong_key is not None
    assert wrong_key.status == 401


async def test_a_budget_is_judged_after_the_key_and_before_the_request() -> None:
    wrong_key = await ask(KeyError(), key=b"Bearer bad", code="SPENT")
    assert wrong_key is not None
    assert wrong_key.status == 401
    spent = await ask(KeyError(), code="SPENT", query=b"foo=1")
    assert spent is not None
    problem = json.loads(spent.body)
    assert (spent.status, problem["code"], problem["retry_after_seconds"]) == (429, "too_many_unknown_codes", 7)
    assert (b"retry-after", b"7") in spent.headers
