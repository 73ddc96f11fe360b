"""The OpenAPI document: it is well formed, and what the service answers is what it says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import pytest
from jsonschema import Draft202012Validator
from referencing import Registry
from referencing.jsonschema import DRAFT202012
from starlette.routing import Route

from coupon_svc.domain.outcomes import Outcome
from coupon_svc.http.endpoint import Endpoint
from coupon_svc.http.openapi import openapi_document
from coupon_svc.http.public import Public, PublicEndpoint
from coupon_svc.http.routes import HANDLERS, OPERATIONS, PUBLIC_PATHS, make_app
from tests.harness import Stack

METHODS = {"get", "put", "post", "delete", "options", "head", "patch", "trace"}
INTERNAL: set[Outcome] = set()
"""Outcomes that no operation names: none."""


def _plain() -> dict[str, Any]:
    """The document as a client reads it."""
    document: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(openapi_document(OPERATIONS, PUBLIC_PATHS)))
    return document


DOCUMENT = _plain()
REGISTRY: Registry[Any] = Registry().with_resource("doc:", DRAFT202012.create_resource(DOCUMENT))


def _operations() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, item in DOCUMENT["paths"].items():
        for method, operation in item.items():
            yield path, method, operation


def _absolute(node: Any) -> Any:
    """The same schema with its references made absolute, so that it can be validated on its own."""
    if isinstance(node, dict):
        return {k: "doc:" + v if k == "$ref" else _absolute(v) for k, v in node.items()}
    return [_absolute(item) for item in node] if isinstance(node, list) else node


def _schemas(node: Any) -> Iterator[dict[str, Any]]:
    """Every schema in the document, but those within schemas."""
    if isinstance(node, dict):
        for name, value in node.items():
            if name == "schema":
                yield value
            else:
                yield from _schemas(value)
    elif isinstance(node, list):
        for item in node:
            yield from _schemas(item)


def _references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        for name, value in node.items():
            if name == "$ref":
                yield value
            else:
                yield from _references(value)
    elif isinstance(node, list):
        for item in node:
            yield from _references(item)


def test_its_structure_is_that_of_openapi_3_1() -> None:
    assert re.fullmatch(r"3\.1\.\d+", DOCUMENT["openapi"])
    assert DOCUMENT["info"]["title"]
    assert DOCUMENT["info"]["version"]
    known = {"openapi", "info", "servers", "security", "paths", "components", "tags", "externalDocs"}
    assert set(DOCUMENT) <= known
    for path, item in DOCUMENT["paths"].items():
        assert path.startswith("/")
        assert set(item) <= METHODS
    for path, method, operation in _operations():
        where = f"{method} {path}"
        assert set(operation) <= {
            "operationId",
            "summary",
            "description",
            "parameters",
            "requestBody",
            "responses",
            "security",
            "tags",
        }, where
        assert operation["summary"], where
        assert operation["responses"], where
        for status, response in operation["responses"].items():
            assert re.fullmatch("[1-5][0-9][0-9]", status), where
            assert response["description"], where
            assert set(response) <= {"description", "content", "headers"}, where
        for parameter in operation.get("parameters", []):
            assert parameter["in"] in ("path", "query", "header"), where
            assert ("schema" in parameter) != ("content" in parameter), where
        for requirement in operation.get("security", DOCUMENT["security"]):
            assert set(requirement) <= set(DOCUMENT["components"]["securitySchemes"]), where
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in DOCUMENT["components"]["schemas"])


def test_operation_ids_are_unique() -> None:
    names = [operation["operationId"] for _, _, operation in _operations()]
    assert len(names) == len(set(names))
    assert {operation.name for operation in OPERATIONS} <= set(names)


def test_the_parameters_of_each_path_are_declared_and_no_others() -> None:
    for path, method, operation in _operations():
        parameters = operation.get("parameters", [])
        declared = [parameter["name"] for parameter in parameters if parameter["in"] == "path"]
        assert declared == re.findall(r"\{(\w+)\}", path), f"{method} {path}"
        assert all(parameter["required"] is True for parameter in parameters if parameter["in"] == "path")
        names = [(parameter["in"], parameter["name"]) for parameter in parameters]
        assert len(names) == len(set(names))


def test_every_post_takes_an_idempotency_key_and_everything_a_request_id() -> None:
    for _, method, operation in _operations():
        headers = [p["name"] for p in operation.get("parameters", []) if p["in"] == "header"]
        assert headers == (["Idempotency-Key", "X-Request-Id"] if method == "post" else ["X-Request-Id"])


def test_every_response_has_the_id_of_its_request() -> None:
    for path, method, operation in _operations():
        for status, response in operation["responses"].items():
            assert "X-Request-Id" in response["headers"], f"{method} {path} {status}"


def test_every_schema_is_json_schema_and_every_reference_leads_somewhere() -> None:
    for schema in (*_schemas(DOCUMENT["paths"]), *DOCUMENT["components"]["schemas"].values()):
        Draft202012Validator.check_schema(schema)
    resolver = REGISTRY.resolver()
    for reference in _references(DOCUMENT):
        assert resolver.lookup("doc:" + reference).contents
    used = {reference.rpartition("/")[2] for reference in _references(DOCUMENT) if "/schemas/" in reference}
    assert used == set(DOCUMENT["components"]["schemas"])


def test_the_examples_are_what_the_schemas_say() -> None:
    for path, method, operation in _operations():
        for name, described in [("body", operation.get("requestBody", {})), *operation["responses"].items()]:
            for media_type, content in described.get("content", {}).items():
                examples = [content["example"]] if "example" in content else []
                examples += [example["value"] for example in content.get("examples", {}).values()]
                assert examples or operation["tags"] == ["Service"], f"{method} {path} {name} {media_type}"
                for example in examples:
                    validator = Draft202012Validator(_absolute(content["schema"]), registry=REGISTRY)
                    problems = list(validator.iter_errors(example))
                    assert not problems, f"{method} {path} {name}: {problems}"
                    assert isinstance(example, str) or set(example) <= _named(_absolute(content["schema"])), (
                        f"{method} {path} {name}"
                    )


def test_a_body_is_required_where_an_empty_one_is_refused() -> None:
    for operation in OPERATIONS:
        body = DOCUMENT["paths"][operation.path][operation.method.lower()].get("requestBody")
        assert (body is None) == (operation.body is None)
        if operation.body is not None:
            try:
                msgspec.json.decode(b"{}", type=operation.body)
            except msgspec.ValidationError:
                assert body["required"] is True, operation.name
            else:
                assert body["required"] is False, operation.name


def test_every_field_and_every_parameter_is_described() -> None:
    plain = {"codes", "coupons", "books", "reason"}  # their names say it all
    for name, schema in DOCUMENT["components"]["schemas"].items():
        for field, described in schema.get("properties", {}).items():
            parts = [described, *described.get("anyOf", [])]
            parts += [REGISTRY.resolver().lookup("doc:" + part["$ref"]).contents for part in parts if "$ref" in part]
            assert any("description" in part for part in parts) or field in plain, f"{name}.{field}"
    for path, method, operation in _operations():
        assert set(operation["tags"]) <= {tag["name"] for tag in DOCUMENT["tags"]}
        for parameter in operation.get("parameters", []):
            assert parameter["description"], f"{method} {path} {parameter['name']}"


def test_every_time_is_a_date_time() -> None:
    for name, schema in DOCUMENT["components"]["schemas"].items():
        for field, described in schema.get("properties", {}).items():
            if field.endswith(("_at", "_until")):
                parts = [described, *described.get("anyOf", [])]
                assert any(part.get("format") == "date-time" for part in parts), f"{name}.{field}"


def test_the_query_parameters_are_those_that_the_operation_knows() -> None:
    for operation in OPERATIONS:
        described = DOCUMENT["paths"][operation.path][operation.method.lower()]
        declared = {p["name"] for p in described["parameters"] if p["in"] == "query"}
        assert declared == {
            name for query in (operation.query, operation.file_query) if query for name in query.__struct_fields__
        }


def test_every_outcome_is_told_of_somewhere_or_is_internal() -> None:
    told = set()
    for _, _, operation in _operations():
        for response in operation["responses"].values():
            for content in response.get("content", {}).values():
                for part in content.get("schema", {}).get("allOf", []):
                    told |= set(part.get("properties", {}).get("code", {}).get("enum", []))
    assert told == set(Outcome) - INTERNAL


def test_a_retry_after_is_promised_where_one_has_to_wait() -> None:
    for _, _, operation in _operations():
        for status, response in operation["responses"].items():
            assert ("Retry-After" in response.get("headers", {})) == (status in ("423", "429", "503"))


def test_the_router_and_the_document_know_the_same_methods_and_paths() -> None:
    nothing: Any = type("Nothing", (), {"__getattr__": lambda self, name: None})()
    public = Public.__new__(Public)
    handlers = [cls.__new__(cls) for cls in HANDLERS]
    router = make_app(handlers, public, nothing, nothing, nothing, nothing).router
    routed = set()
    for route in router.routes:
        assert isinstance(route, Route)
        if isinstance(route.app, PublicEndpoint):
            routed.add(("GET", route.path))
        else:
            assert isinstance(route.app, Endpoint)
            routed |= {(method, route.path) for method in route.app.methods if method != "HEAD"}
    assert routed == {(method.upper(), path) for path, method, _ in _operations()}
    assert {(o.method, o.path) for o in OPERATIONS} <= routed


class Recorder(httpx.AsyncBaseTransport):
    """Passes requests on, and holds every answer to what the document says of it."""

    def __init__(self) -> None:
        self.inner = httpx.AsyncHTTPTransport()
        self.seen: set[tuple[str, str]] = set()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response = await self.inner.handle_async_request(request)
        await response.aread()
        self.check(request, response)
        return response

    async def aclose(self) -> None:
        await self.inner.aclose()

    def check(self, request: httpx.Request, response: httpx.Response) -> None:
        operation = self._find(request.method, request.url.path)
        name, status = operation["operationId"], str(response.status_code)
        self.seen.add((name, status))
        assert status in operation["responses"], f"{name} answered {status}: {response.text}"
        described = operation["responses"][status]
        for header, told in described.get("headers", {}).items():
            if told.get("required", "$ref" in told):
                assert header in response.headers, f"{name} {status}: no {header}"
        if "content" not in described:
            assert response.content == b"", f"{name} {status}: {response.text}"
            return
        media_type = response.headers["content-type"].partition(";")[0]
        assert media_type in described["content"], f"{name} {status}: {media_type}"
        if media_type == "text/csv":
            return
        schema = _absolute(described["content"][media_type].get("schema", True))
        problems = [e.message for e in Draft202012Validator(schema, registry=REGISTRY).iter_errors(response.json())]
        assert not problems, f"{name} {status}: {problems} in {response.text}"
        # The document names every field, or a client could not know of it.
        unknown = set(response.json()) - _named(schema)
        assert schema is True or not unknown, f"{name} {status}: {unknown} are not in the document"

    def _find(self, method: str, path: str) -> dict[str, Any]:
        fitting = [
            (candidate.count("{"), operation)
            for candidate, candidate_method, operation in _operations()
            if candidate_method == method.lower()
            and re.fullmatch(re.sub(r"\{user_id\}", ".+", re.sub(r"\{(?!user_id)\w+\}", "[^/]+", candidate)), path)
        ]
        return min(fitting, key=lambda found: found[0])[1]


def _named(schema: Any) -> set[str]:
    """The fields a schema names, through its references."""
    if not isinstance(schema, dict):
        return set()
    names = set(schema.get("properties", {}))
    if "$ref" in schema:
        names |= _named(_absolute(REGISTRY.resolver().lookup(schema["$ref"]).contents))
    for part in schema.get("allOf", []):
        names |= _named(part)
    return names


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


async def test_every_answer_of_a_walk_through_all_operations_is_as_documented(
    service: Stack, recorder: Recorder
) -> None:
    key = await service.key()
    async with httpx.AsyncClient(
        base_url=service.base_url, headers={"Authorization": f"Bearer {key}"}, transport=recorder
    ) as client:
        await _walk(client)
        for headers in ({"Authorization": "Bearer wrong"}, {}):
            for operation in OPERATIONS:
                path = re.sub(r"\{\w+\}", "NONE-1", operation.path)
                await client.request(operation.method, path, headers=headers)
    seen = {name for name, status in recorder.seen if status < "300"}
    assert seen >= {operation.name for operation in OPERATIONS}
    statuses = {status for _, status in recorder.seen}
    assert statuses >= {"200", "201", "204", "400", "401", "403", "404", "409", "413", "415", "422", "423"}


async def _walk(client: httpx.AsyncClient) -> None:
    for path in ("/healthz", "/readyz", "/metrics", "/openapi.json", "/docs", "/problems/locked", "/problems/none"):
        if path not in ("/metrics", "/docs"):  # those are no JSON
            await client.get(path)
    rules = {"name": "a", "max_codes_per_user": 2, "max_redemptions_per_code": 2, "metadata": {"a": [1]}}
    made = await client.post("/coupons", json=rules, headers={"Idempotency-Key": "k"})
    await client.post("/coupons", json=rules, headers={"Idempotency-Key": "k"})
    await client.post("/coupons", json={"name": "b"}, headers={"Idempotency-Key": "k"})
    book = made.json()["book_id"]
    await client.post("/coupons/codes", json={"book_id": book, "codes": ["A-1", "A-1", "!", "A-2", "A-3"]})
    text = {"Content-Type": "text/plain"}
    job = await client.post("/coupons/codes", params={"book_id": book}, content=b"no\nA-4\nNO\n", headers=text)
    await client.post("/coupons/codes", params={"book_id": book}, content=b"\xff\xfeA\0", headers=text)
    for path in ("", "/rejected", "/rejected?limit=1"):
        await client.get(job.headers["location"] + path)
    await client.post("/coupons/codes", json={"book_id": book, "generate": {"pattern": "A", "total": 1}})
    for total in (1, 1_000_000):
        generate = {"pattern": "AB####", "total": total}
        await client.post("/coupons/codes", json={"book_id": book, "generate": generate})
        await client.post("/coupons", json={"name": "c", "generate": generate, "ack": "redis"})
    for headers in ({"Content-Type": "text/plain"}, {"Content-Type": "application/json"}):
        for content in (b"{", b" " * (2 * 1024 * 1024 + 1)):
            for path in ("/coupons", "/coupons/assign", "/coupons/lock/A-1", "/coupons/redeem/A-1"):
                await client.post(path, content=content, headers=headers)
            await client.patch(f"/coupons/{book}", content=content, headers=headers)
    await client.post("/coupons", headers={"Idempotency-Key": ""})
    for user_id in ("u", "v"):
        for code in ("A-1", "A-2", "A-2", "A-3", "NONE-1"):
            await client.post(f"/coupons/assign/{code}", json={"user_id": user_id})
    for _ in range(4):
        await client.post("/coupons/assign", json={"book_id": book, "user_id": "w"})
    await client.post("/coupons/assign", json={"book_id": "none", "user_id": "w"})
    for book_id, users in ((book, ["w", "y"]), ("none", ["w"]), (book, [])):
        await client.post("/coupons/assignments", json={"book_id": book_id, "user_ids": users})
    for code in ("A-1", "AB-1", "NONE-1"):
        for body in ({}, {"user_id": "x"}, {"lock_token": "wrong"}, {"ttl_seconds": 0}):
            await client.post(f"/coupons/lock/{code}", json=body)
            await client.post(f"/coupons/redeem/{code}", json=body)
            await client.post(f"/coupons/unlock/{code}", json=body)
    for path in ("/coupons", f"/coupons/{book}/codes", "/users/u/coupons", "/users/a%2Fb/coupons"):
        for query in ("", "?limit=1", "?limit=0", "?cursor=x", "?book_id=none", "?status=locked", "?status=x"):
            await client.get(path + query)
    await client.get(f"/coupons/{book}/codes", headers={"Accept": "text/csv"})
    for pattern in ("AB####", "!"):
        await client.post("/coupons/patterns/preview", json={"pattern": pattern, "total": 1})
    for path in (f"/coupons/{book}", "/coupons/none", "/coupons/codes/A-1", "/coupons/codes/A-3", "/coupons/jobs/none"):
        await client.get(path)
    locked = await client.post("/coupons/lock/A-2")
    token = {"lock_token": locked.json()["lock_token"]}
    await client.post("/coupons/lock/A-2", json=token)
    await client.post("/coupons/unlock/A-2", json=token)
    for _ in range(3):
        await client.post("/coupons/redeem/A-2", json={"reference": "r"})
    for change in (
        {"status": "paused"},
        {"name": ""},
        {"starts_at": "2999-01-01T00:00:00Z"},
        {"status": "closed"},
        {"status": "active"},
    ):
        await client.patch(f"/coupons/{book}", json=change)
        for verb in ("lock/A-1", "redeem/A-1", "assign/AB-1"):
            await client.post(f"/coupons/{verb}", json={"user_id": "u"})
        await client.post("/coupons/assign", json={"book_id": book, "user_id": "u"})
    await client.patch("/coupons/none", json={"name": "b"})


async def test_a_key_without_scopes_is_refused_as_documented(service: Stack, recorder: Recorder) -> None:
    for scopes in (("coupons:read",), ("books:read",)):
        key = await service.key(scopes=scopes)
        async with httpx.AsyncClient(
            base_url=service.base_url, headers={"Authorization": f"Bearer {key}"}, transport=recorder
        ) as client:
            for operation in OPERATIONS:
                await client.request(operation.method, re.sub(r"\{\w+\}", "NONE-1", operation.path))
    assert {name for name, status in recorder.seen if status == "403"} == {o.name for o in OPERATIONS}


async def test_an_invalid_idempotency_key_is_documented_wherever_it_is_refused(
    service: Stack, recorder: Recorder
) -> None:
    key = await service.key()
    async with httpx.AsyncClient(
        base_url=service.base_url, headers={"Authorization": f"Bearer {key}"}, transport=recorder
    ) as client:
        for operation in OPERATIONS:
            path = re.sub(r"\{\w+\}", "NONE-1", operation.path)
            await client.request(operation.method, path, headers={"Idempotency-Key": ""})
