"""The OpenAPI 3.1 document, made from the operations and the structs that validate: it cannot say anything else."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from coupon_svc import __version__
from coupon_svc.api.http import Operation
from coupon_svc.api.operations import ANY_OPERATION
from coupon_svc.api.problems import PROBLEMS
from coupon_svc.api.schemas import Problem
from coupon_svc.domain.outcomes import Outcome

_REF = "#/components/schemas/{name}"
_CODE = {"type": "string", "description": "Case-insensitive; 3..64 of A-Z 0-9 . _ ~ + @ -, a letter or digit first."}
_PARAMETERS: dict[str, list[dict[str, Any]]] = {
    "list_books": [],
    "list_coupons": [
        {"name": "book_id", "in": "query", "schema": {"type": "string"}},
        {"name": "status", "in": "query", "schema": {"enum": ["assigned", "locked", "redeemed"]}},
    ],
}
_PAGING = [
    {"name": "limit", "in": "query", "schema": {"type": "integer", "minimum": 1, "maximum": 1000, "default": 50}},
    {"name": "cursor", "in": "query", "schema": {"type": "string"}, "description": "next_cursor of the page before"},
]
_IDEMPOTENCY_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "schema": {"type": "string", "minLength": 1, "maxLength": 257},
    "description": "1..255 printable characters, bare or quoted. The same key has one effect, for 24 hours.",
}
_REPLAYED = {"Idempotent-Replayed": {"schema": {"const": "true"}, "description": "present on an answer given before"}}


def openapi_document(operations: tuple[Operation, ...]) -> dict[str, Any]:
    """The whole document, ready to be encoded."""
    types = {t for operation in operations for t in (operation.body, *operation.answers.values()) if t is not None}
    ordered = sorted(types, key=lambda t: t.__name__)
    schemas, components = msgspec.json.schema_components([*ordered, Problem], ref_template=_REF)
    refs = dict(zip([*ordered, Problem], schemas, strict=True))
    paths: dict[str, Any] = {}
    for operation in operations:
        path = operation.path.replace(":path", "")
        paths.setdefault(path, {})[operation.method.lower()] = _operation(operation, refs)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Coupon Book Service",
            "version": __version__,
            "description": "Books of coupon codes: assigned at random or by name, locked at checkout, redeemed once.",
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": "/"}],
        "security": [{"key": []}],
        "paths": {**paths, **_public_paths()},
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer", "description": "An API key"}},
        },
    }


def _operation(operation: Operation, refs: dict[Any, Any]) -> dict[str, Any]:
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": _CODE if name == "code" else {"type": "string"}}
        for name in re.findall(r"{(\w+)", operation.path)
    ]
    if operation.name in _PARAMETERS:
        parameters += _PARAMETERS[operation.name] + _PAGING
    if operation.method == "POST":
        parameters.append(_IDEMPOTENCY_KEY)
    described: dict[str, Any] = {
        "operationId": operation.name,
        "summary": operation.summary,
        "description": f"Scope: {' or '.join(f'`{scope}`' for scope in operation.scopes)}.",
        "parameters": parameters,
        "responses": _responses(operation, refs),
    }
    if operation.body is not None:
        described["requestBody"] = {"content": {"application/json": {"schema": refs[operation.body]}}}
    return described


def _responses(operation: Operation, refs: dict[Any, Any]) -> dict[str, Any]:
    responses: dict[str, Any] = {}
    for status, answer in operation.answers.items():
        response: dict[str, Any] = {"description": "Done"}
        if answer is not None:
            response["content"] = {"application/json": {"schema": refs[answer]}}
        if operation.method == "POST":
            response["headers"] = _REPLAYED
        responses[str(status)] = response
    by_status: dict[int, list[Outcome]] = {}
    for outcome in (*operation.outcomes, *ANY_OPERATION):
        by_status.setdefault(PROBLEMS[outcome].status, []).append(outcome)
    for status, outcomes in sorted(by_status.items()):
        responses[str(status)] = _problem(status, outcomes)
    return responses


def _problem(status: int, outcomes: list[Outcome]) -> dict[str, Any]:
    schema = {
        "allOf": [
            {"$ref": _REF.format(name="Problem")},
            {"properties": {"code": {"enum": [outcome.value for outcome in outcomes]}}},
        ]
    }
    lines = [f"`{outcome.value}`: {PROBLEMS[outcome].detail}" for outcome in outcomes]
    response: dict[str, Any] = {
        "description": "\n\n".join(lines),
        "content": {"application/problem+json": {"schema": schema}},
    }
    if status in (423, 429, 503):
        response["headers"] = {"Retry-After": {"schema": {"type": "integer"}, "description": "seconds"}}
    return response


def _public_paths() -> dict[str, Any]:
    def get(summary: str, media_type: str, *, unready: bool = False) -> dict[str, Any]:
        responses: dict[str, Any] = {"200": {"description": "OK", "content": {media_type: {}}}}
        if unready:
            responses["503"] = _problem(503, [Outcome.RECOVERING, Outcome.STORE_UNAVAILABLE, Outcome.BACKLOG_FULL])
        return {"get": {"summary": summary, "security": [], "responses": responses}}

    return {
        "/healthz": get("The process lives", "application/json"),
        "/readyz": get("Redis is certified and the backlog is below its cap", "application/json", unready=True),
        "/metrics": get("Counters for Prometheus", "text/plain"),
        "/openapi.json": get("This document", "application/json"),
        "/docs": get("This document, for people", "text/html"),
    }
