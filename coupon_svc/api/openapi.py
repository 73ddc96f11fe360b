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
_PATH = {
    "code": "Case-insensitive; 3..64 of A-Z 0-9 . _ ~ + @ -, a letter or digit first.",
    "user_id": "The caller's own id, percent-encoded; a / in it, too.",
    "book_id": "As a create answered it.",
    "job_id": "As an upload answered it.",
    "outcome": "The `code` of a problem.",
}
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
_LOCATION = {"Location": {"schema": {"type": "string"}, "description": "the book's address"}}
_NUMBER = {"type": "integer"}
_NUMBERS: dict[Outcome, dict[str, Any]] = {
    Outcome.MISSING_SCOPE: {"scopes": {"type": "array", "items": {"type": "string"}, "description": "one is enough"}},
    Outcome.BODY_TOO_LARGE: {"limit_bytes": _NUMBER},
    Outcome.INVALID_REQUEST: {
        "errors": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"pointer": {"type": "string"}, "detail": {"type": "string"}},
                "required": ["pointer", "detail"],
            },
            "description": "what is wrong, and where (RFC 6901; the name of a parameter of path or query likewise)",
        }
    },
    Outcome.PATTERN_CAPACITY: {"capacity": _NUMBER, "requested": _NUMBER, "already_used": _NUMBER},
    Outcome.USER_CODE_LIMIT: {"limit": _NUMBER, "held": _NUMBER},
    Outcome.LOCKED: {"retry_after_seconds": {"type": "integer", "minimum": 1}},
}
"""What else a problem of an outcome says."""
_EXAMPLES: dict[str, Any] = {
    "create_book": {
        "name": "Summer 2026",
        "max_codes_per_user": 1,
        "generate": {"pattern": "SUMMER-####-####", "total": 1000},
        "metadata": {"campaign": "s26"},
    },
    "update_book": {"status": "paused"},
    "upload_codes": {"book_id": "bk_…", "codes": ["WELCOME-1", "WELCOME-2"]},
    "assign_coupon": {"book_id": "bk_…", "user_id": "user-1"},
    "assign_code": {"user_id": "user-1"},
    "lock_coupon": {"user_id": "user-1", "ttl_seconds": 60},
    "unlock_coupon": {"lock_token": "lk_…"},
    "redeem_coupon": {"user_id": "user-1", "reference": "order-4711"},
}
"""Bodies to begin with; `…` stands for what an answer told."""


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
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}, "description": _PATH[name]}
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
        content = {"schema": refs[operation.body], "example": _EXAMPLES[operation.name]}
        described["requestBody"] = {"content": {"application/json": content}}
    return described


def _responses(operation: Operation, refs: dict[Any, Any]) -> dict[str, Any]:
    responses: dict[str, Any] = {}
    for status, answer in operation.answers.items():
        response: dict[str, Any] = {"description": "Done"}
        if answer is not None:
            response["content"] = {"application/json": {"schema": refs[answer]}}
        if operation.method == "POST":
            response["headers"] = _REPLAYED | (_LOCATION if operation.name == "create_book" else {})
        responses[str(status)] = response
    by_status: dict[int, list[Outcome]] = {}
    for outcome in (*operation.outcomes, *ANY_OPERATION):
        by_status.setdefault(PROBLEMS[outcome].status, []).append(outcome)
    for status, outcomes in sorted(by_status.items()):
        responses[str(status)] = _problem(status, outcomes)
    return responses


def _problem(status: int, outcomes: list[Outcome]) -> dict[str, Any]:
    properties: dict[str, Any] = {"code": {"enum": [outcome.value for outcome in outcomes]}}
    for outcome in outcomes:
        properties |= _NUMBERS.get(outcome, {})
    schema = {
        "allOf": [
            {"$ref": _REF.format(name="Problem")},
            {"properties": properties},
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
    def get(name: str, summary: str, media_type: str, **problems: list[Outcome]) -> dict[str, Any]:
        responses: dict[str, Any] = {"200": {"description": "OK", "content": {media_type: {}}}}
        shut = [Outcome.METHOD_NOT_ALLOWED]
        for outcomes in (*problems.values(), shut):
            status = PROBLEMS[outcomes[0]].status
            responses[str(status)] = _problem(status, outcomes)
        return {"get": {"operationId": name, "summary": summary, "security": [], "responses": responses}}

    unready = [
        Outcome.TOO_MANY_CONNECTIONS,
        Outcome.SHUTTING_DOWN,
        Outcome.STORE_UNAVAILABLE,
        Outcome.RECOVERING,
        Outcome.BACKLOG_FULL,
        Outcome.LEDGER_BEHIND,
    ]
    explained = get("read_problem", "What a problem is about", "application/json", missing=[Outcome.NOT_FOUND])
    explained["get"]["parameters"] = [
        {
            "name": "outcome",
            "in": "path",
            "required": True,
            "schema": {"enum": [outcome.value for outcome in Outcome]},
            "description": _PATH["outcome"],
        }
    ]
    return {
        "/healthz": get("read_health", "The process lives", "application/json"),
        "/readyz": get(
            "read_readiness",
            "Every shard is certified, below its backlog cap, and its ledger was seen of late",
            "application/json",
            unready=unready,
        ),
        "/metrics": get("read_metrics", "Counters for Prometheus", "text/plain"),
        "/openapi.json": get("read_openapi", "This document", "application/json"),
        "/docs": get("read_docs", "This document, for people", "text/html"),
        "/problems/{outcome}": explained,
    }
