"""What every operation checks before its own work: route, key, scope and body, in this order."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import asyncpg
import httpx
import pytest

from coupon_svc.http.operations import Operation
from coupon_svc.http.routes import OPERATIONS
from coupon_svc.postgres.keys import SCOPES, create_key, new_key, revoke_key
from tests.harness import Stack, until
from tests.http.helpers import JSON, refused

EACH = pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
WITH_BODY = pytest.mark.parametrize(
    "operation", [o for o in OPERATIONS if o.body is not None], ids=lambda operation: operation.name
)
POSTS = pytest.mark.parametrize(
    "operation", [o for o in OPERATIONS if o.method == "POST"], ids=lambda operation: operation.name
)
MIB = 1024 * 1024


def address(operation: Operation) -> str:
    """The operation's path, with things in it that do not exist."""
    path = operation.path.replace("{book_id}", "bk_none").replace("{code}", "NO-SUCH-CODE")
    return path.replace("{user_id}", "u").replace("{job_id}", "job_none")


@EACH
async def test_no_key_is_unauthenticated_before_anything_else(service: Stack, operation: Operation) -> None:
    async with httpx.AsyncClient(base_url=service.base_url, verify=False) as nobody:
        for authorization in (None, b"Bearer", b"Bearer cbk_unknown", b"Basic dXNlcjpwYXNz", b"Bearer \xe9\xff"):
            headers = {b"Content-Type": b"text/html", b"Idempotency-Key": b""}
            if authorization is not None:
                headers[b"Authorization"] = authorization
            sent = await nobody.request(operation.method, address(operation), content=b"{not json", headers=headers)
            refused(sent, 401, "unauthenticated")
            assert sent.headers["www-authenticate"].startswith("Bearer")


@EACH
async def test_a_key_needs_one_of_the_operations_scopes(service: Stack, operation: Operation) -> None:
    others = tuple(scope for scope in SCOPES if scope not in operation.scopes)
    async with await service.client(scopes=others) as client:
        sent = await client.request(operation.method, address(operation), content=b"{not json", headers=JSON)
        assert refused(sent, 403, "missing_scope")["scopes"] == list(operation.scopes)
    for scope in operation.scopes:
        async with await service.client(scopes=(scope,)) as client:
            sent = await client.request(operation.method, address(operation))
            assert sent.status_code not in (401, 403)


@EACH
async def test_another_method_is_not_allowed_even_without_a_key(service: Stack, operation: Operation) -> None:
    here = {o.method for o in OPERATIONS if o.path == operation.path}
    async with httpx.AsyncClient(base_url=service.base_url, verify=False) as nobody:
        for method in {"DELETE", "PUT", "OPTIONS", "PATCH", "POST", "GET"} - here:
            sent = await nobody.request(method, address(operation))
            refused(sent, 405, "method_not_allowed")
            allowed = set(sent.headers["allow"].split(", "))
            assert allowed == here | ({"HEAD"} if "GET" in here else set())


@EACH
async def test_a_trailing_slash_is_another_address(client: httpx.AsyncClient, operation: Operation) -> None:
    sent = await client.request(operation.method, address(operation) + "/")
    refused(sent, 404, "not_found")


async def test_what_no_route_knows_is_not_found_with_or_without_a_key(client: httpx.AsyncClient) -> None:
    for path in ("/", "/coupon", "/v1/coupons", "/coupons/lock", "/coupons/redeem/A-1/now", "/users/u", "//coupons"):
        async with httpx.AsyncClient(base_url=client.base_url, verify=False) as nobody:
            missing = await nobody.get(path)
        if path == "/coupons/lock":  # an address like a book's
            refused(missing, 401, "unauthenticated")
        else:
            refused(missing, 404, "not_found")
            refused(await client.get(path), 404, "not_found")


@WITH_BODY
async def test_a_body_over_two_mebibytes_is_too_large(client: httpx.AsyncClient, operation: Operation) -> None:
    async def drip() -> AsyncIterator[bytes]:
        for _ in range(33):
            yield b" " * (MIB // 16)

    # Whatever else is wrong with it: its type, its JSON, its Idempotency-Key.
    wrong = {"Content-Type": "text/html", "Idempotency-Key": ""}
    if operation.name == "upload_codes":  # there other types have other bounds
        wrong = {"Content-Type": "application/json"}
    for content in (b" " * (2 * MIB + 1), drip()):
        sent = await client.request(operation.method, address(operation), content=content, headers=wrong)
        assert refused(sent, 413, "body_too_large")["limit_bytes"] == 2 * MIB
    just_fits = b"{" + b" " * (2 * MIB - 2) + b"}"
    sent = await client.request(operation.method, address(operation), content=just_fits, headers=JSON)
    assert sent.status_code != 413


@WITH_BODY
async def test_a_body_must_be_called_json(client: httpx.AsyncClient, operation: Operation) -> None:
    types = ["application/x-www-form-urlencoded", "text/json", "application/jsonp", ""]
    for content_type in types:
        headers = {"Content-Type": content_type, "Idempotency-Key": ""}
        sent = await client.request(operation.method, address(operation), content=b"{not json", headers=headers)
        refused(sent, 415, "unsupported_media_type")
    for content_type in ("application/json; charset=utf-8", "Application/JSON"):
        headers = {"Content-Type": content_type}
        sent = await client.request(operation.method, address(operation), content=b"{not json", headers=headers)
        refused(sent, 400, "malformed_json")


MALFORMED = [
    b"{",
    b" ",
    b"{'name': 1}",
    b"\xff",
    b'{"\xff": 1}',
    b'{"\\ud800": 1}',
    b"NaN",
    b"\xef\xbb\xbf{}",
    '{"name": "a"}'.encode("utf-16"),
    b"nul",
]


@WITH_BODY
async def test_malformed_json_is_told_before_an_invalid_idempotency_key(
    client: httpx.AsyncClient, operation: Operation
) -> None:
    for body in MALFORMED:
        headers = {**JSON, "Idempotency-Key": ""}
        sent = await client.request(operation.method, address(operation), content=body, headers=headers)
        refused(sent, 400, "malformed_json")


async def test_json_that_is_malformed_behind_an_invalid_field_is_malformed(client: httpx.AsyncClient) -> None:
    for body in (b'{"no_such_field": 1, ', b'{"name": 1} {}', b'{"name": 1, "ack": "\\ud800"}', b"[1, 2"):
        sent = await client.post("/coupons", content=body, headers={**JSON, "Idempotency-Key": ""})
        refused(sent, 400, "malformed_json")


async def test_json_that_is_nested_very_deep_is_malformed_and_no_error_of_ours(client: httpx.AsyncClient) -> None:
    for opening, closing in ((b"[", b"]"), (b'{"a":', b"}")):
        for depth in (2_000, 100_000):
            value = opening * depth + b"1" + closing * depth
            body = b'{"name": "a", "metadata": {"a": ' + value + b"}}"
            refused(await client.post("/coupons", content=body, headers=JSON), 400, "malformed_json")


async def test_of_a_field_given_twice_the_last_counts(client: httpx.AsyncClient) -> None:
    made = await client.post("/coupons", content=b'{"name": "a", "name": "b"}', headers=JSON)
    assert made.json()["name"] == "b"


@POSTS
async def test_an_invalid_idempotency_key_is_told_before_an_invalid_body(
    client: httpx.AsyncClient, operation: Operation
) -> None:
    for key in (b"", b'""', b"\xc3\xa9", b"x" * 256, b'"' + b"x" * 256 + b'"', b"a\tb"):
        headers = {b"Content-Type": b"application/json", b"Idempotency-Key": key}
        sent = await client.post(address(operation), content=b'{"no_such_field": 1}', headers=headers)
        refused(sent, 400, "invalid_idempotency_key")


@WITH_BODY
async def test_a_field_nobody_knows_is_invalid_before_anything_is_looked_up(
    client: httpx.AsyncClient, operation: Operation
) -> None:
    for body in (b'{"no_such_field": 1}', b"[]", b"null", b"1", b'"x"', b'{"user_id": [], "lock_token": 1, "name": 1}'):
        sent = await client.request(operation.method, address(operation), content=body, headers=JSON)
        refused(sent, 422, "invalid_request")


@WITH_BODY
async def test_an_empty_body_is_an_empty_object(client: httpx.AsyncClient, operation: Operation) -> None:
    empty = await client.request(operation.method, address(operation))
    written = await client.request(operation.method, address(operation), json={})
    assert empty.status_code == written.status_code
    assert empty.json()["code"] == written.json()["code"]


@pytest.mark.parametrize("operation", [o for o in OPERATIONS if o.method == "GET"], ids=lambda o: o.name)
async def test_head_answers_as_get_without_a_body(client: httpx.AsyncClient, operation: Operation) -> None:
    got = await client.get(address(operation))
    head = await client.head(address(operation))
    assert head.status_code == got.status_code
    assert head.content == b""
    assert head.headers["content-type"] == got.headers["content-type"]
    assert head.headers["content-length"] == got.headers["content-length"]


async def test_the_scheme_of_a_key_is_case_insensitive(service: Stack) -> None:
    key = await service.key()
    async with httpx.AsyncClient(base_url=service.base_url, verify=False) as client:
        for authorization in (f"bearer {key}", f"BEARER {key}", f"Bearer  {key}"):
            assert (await client.get("/coupons", headers={"Authorization": authorization})).status_code == 200
        refused(await client.get("/coupons", headers={"Authorization": key}), 401, "unauthenticated")
        refused(await client.get("/coupons", headers={"Authorization": f"Bearer {key}x"}), 401, "unauthenticated")


async def test_revoked_and_expired_keys_are_refused_within_seconds_exactly_like_unknown_ones(service: Stack) -> None:
    revoked, expired = new_key(), new_key()
    connection = await asyncpg.connect(service.database_url)
    soon = datetime.now(UTC) + timedelta(seconds=1)
    key_id = await create_key(connection, "leavers", revoked)
    await create_key(connection, "leavers", expired, expires_at=soon)
    async with httpx.AsyncClient(base_url=service.base_url, verify=False) as client:

        async def status(key: str) -> int:
            return (await client.get("/coupons", headers={"Authorization": f"Bearer {key}"})).status_code

        assert [await status(revoked), await status(expired)] == [200, 200]
        assert await revoke_key(connection, key_id)
        await connection.close()

        async def both_refused() -> bool:
            return [await status(revoked), await status(expired)] == [401, 401]

        await until(both_refused, timeout=8, what="a revoked key should be refused within a few seconds")
        bodies = []
        for key in (revoked, expired, "cbk_unknown"):
            answer = await client.get("/coupons", headers={"Authorization": f"Bearer {key}"})
            body = refused(answer, 401, "unauthenticated")
            body.pop("request_id")
            bodies.append(body)
        assert bodies[0] == bodies[1] == bodies[2]
