"""The OpenAPI 3.1 document, made from the operations and the structs that validate."""

from __future__ import annotations

import re
from collections.abc import Iterable
from http import HTTPStatus
from typing import Any

import msgspec

from coupon_svc import __version__
from coupon_svc.domain.outcomes import Outcome
from coupon_svc.http.endpoint import BODY_BYTES_MAX
from coupon_svc.http.operations import ANY_OPERATION, ANY_REQUEST, Operation
from coupon_svc.http.problems import PROBLEMS, problem_body
from coupon_svc.http.schemas import ProblemBody, UploadCodes, UserId

_REF = "#/components/schemas/{name}"
_TAGS = {
    "Books": "Sets of codes with rules.",
    "Codes": "Adding codes to a book, and looking at one.",
    "Coupons": "Codes in users' hands: assign, lock, redeem.",
    "Service": "Health, metrics and documents. No key is needed, and query parameters are ignored.",
}
_PATH: dict[str, tuple[dict[str, Any], str]] = {
    "code": (
        {"type": "string", "pattern": r"^\s*[A-Za-z0-9][A-Za-z0-9._~+@-]{2,63}\s*$"},
        "Case-insensitive; 3..64 of A-Z 0-9 . _ ~ + @ -, a letter or digit first.",
    ),
    "user_id": (msgspec.json.schema(UserId), "Your own id of the user, percent-encoded; `/` as `%2F`."),
    "book_id": (
        {"type": "string", "pattern": "^bk_[0-9]{2}[0-9a-z]{16}$"},
        "As a create answered it. Whatever else stands here is `book_not_found`.",
    ),
    "job_id": ({"type": "string"}, "A job's id."),
    "outcome": ({"enum": [outcome.value for outcome in Outcome]}, "The `code` of a problem."),
}
_IDEMPOTENCY_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "schema": {
        "type": "string",
        "pattern": r'^(?:"(?:\\["\\]|[ !#-\[\]-~]){1,255}"|(?!""$)[!-~](?:[ -~]{0,253}[!-~])?)$',
    },
    "description": "1..255 printable ASCII characters, bare or quoted. The same key with the same request has one effect.",
    "example": "order-4711",
}
_REQUEST_ID_SENT = {
    "name": "X-Request-Id",
    "in": "header",
    "schema": {"type": "string"},
    "description": "Your own id of this request: 1..64 of `A-Za-z0-9._-`. Any other is replaced. It is logged, so put no"
    " code or key in it.",
}
_REQUEST_ID = {
    "required": True,
    "schema": {"type": "string", "pattern": "^[A-Za-z0-9._-]{1,64}$"},
    "description": "the request's id: the one that was sent, or one of the service's",
}
_HEADERS_OF_ALL = {"X-Request-Id": {"$ref": "#/components/headers/X-Request-Id"}}
"""What every response carries."""
_REPLAYED = {"Idempotent-Replayed": {"schema": {"const": "true"}, "description": "present on an answer given before"}}
_LOCATION = {
    "Location": {
        "required": True,
        "schema": {"type": "string", "pattern": "^/coupons/bk_"},
        "description": "the book's address",
    }
}
_NUMBER = {"type": "integer"}
_RETRY_AFTER = {
    "Retry-After": {
        "required": True,
        "schema": {"type": "integer", "minimum": 1},
        "description": "when to try again, in seconds",
    }
}
_HEADERS: dict[int, dict[str, Any]] = {
    401: {"WWW-Authenticate": {"required": True, "schema": {"const": "Bearer"}, "description": "how to authenticate"}},
    405: {"Allow": {"required": True, "schema": {"type": "string"}, "description": "the methods of this address"}},
    423: _RETRY_AFTER,
    503: _RETRY_AFTER,
}
"""What problems of a status carry, always."""
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
_NUMBERS_TOLD: dict[Outcome, dict[str, Any]] = {
    Outcome.MISSING_SCOPE: {"scopes": ["coupons:assign"]},
    Outcome.BODY_TOO_LARGE: {"limit_bytes": BODY_BYTES_MAX},
    Outcome.INVALID_REQUEST: {"errors": [{"pointer": "/user_id", "detail": "Expected `str` of length >= 1"}]},
    Outcome.PATTERN_CAPACITY: {"capacity": 810_000, "requested": 500_000, "already_used": 0},
    Outcome.USER_CODE_LIMIT: {"limit": 1, "held": 1},
    Outcome.LOCKED: {"retry_after_seconds": 42},
}
"""An example of each."""
_BOOK_ID, _CODE, _USER, _MOMENT = "bk_08wazn8pg1mwcdvjs8", "SUMMER-9SJG-2HF7", "user-1", "2026-11-22T14:48:57.476Z"
_BODIES: dict[str, Any] = {
    "create_book": {
        "name": "Summer 2026",
        "max_codes_per_user": 1,
        "generate": {"pattern": "SUMMER-####-####", "total": 1000},
        "metadata": {"campaign": "s26"},
    },
    "update_book": {"status": "paused"},
    "upload_codes": {"book_id": _BOOK_ID, "codes": ["WELCOME-1", "WELCOME-2"]},
    "assign_coupon": {"book_id": _BOOK_ID, "user_id": _USER},
    "assign_code": {"user_id": _USER},
    "lock_coupon": {"user_id": _USER, "ttl_seconds": 60},
    "unlock_coupon": {"lock_token": "lk_50kkcqIRntRxrmigCOPKjESC"},
    "redeem_coupon": {"user_id": _USER, "reference": "order-4711"},
}
"""Bodies to begin with."""
_BOOK = {
    "book_id": _BOOK_ID,
    "name": "Summer 2026",
    "max_codes_per_user": 1,
    "max_redemptions_per_code": 1,
    "lock_ttl_seconds": 120,
    "starts_at": None,
    "expires_at": None,
    "ack": "ledger",
    "metadata": {"campaign": "s26"},
    "status": "active",
    "created_at": _MOMENT,
    "redemptions": 0,
    "codes": {"total": 1000, "available": 1000, "assigned": 0, "redeemed": 0, "quarantined": 0},
}
_ASSIGNED = {
    "code": _CODE,
    "book_id": _BOOK_ID,
    "user_id": _USER,
    "assigned_at": _MOMENT,
    "redemptions_left": 1,
    "position": "08:1-1",
    "durable": True,
}
_COUPON = {
    "code": _CODE,
    "book_id": _BOOK_ID,
    "user_id": _USER,
    "status": "assigned",
    "assigned_at": _MOMENT,
    "redemptions_used": 0,
    "redemptions_left": 1,
    "locked_until": None,
}
_ANSWERS: dict[str, Any] = {
    "create_book": _BOOK,
    "list_books": {"books": [_BOOK], "next_cursor": None},
    "read_book": _BOOK,
    "update_book": {**_BOOK, "status": "paused"},
    "upload_codes": {
        "book_id": _BOOK_ID,
        "received": 2,
        "inserted": 2,
        "duplicates": 0,
        "invalid": 0,
        "rejected": [],
        "rejected_truncated": False,
    },
    "assign_coupon": _ASSIGNED,
    "assign_code": _ASSIGNED,
    "lock_coupon": {
        "code": _CODE,
        "book_id": _BOOK_ID,
        "user_id": _USER,
        "lock_token": "lk_50kkcqIRntRxrmigCOPKjESC",
        "locked_until": _MOMENT,
        "ttl_seconds": 60,
    },
    "redeem_coupon": {
        "redemption_id": "rd_08_1_3",
        "code": _CODE,
        "book_id": _BOOK_ID,
        "user_id": _USER,
        "redeemed_at": _MOMENT,
        "redemptions_used": 1,
        "redemptions_left": 0,
        "position": "08:1-3",
        "durable": True,
    },
    "list_coupons": {"coupons": [_COUPON], "next_cursor": None},
    "read_code": {**_COUPON, "book_status": "active"},
}
"""What each operation answers when all is well."""
_EITHER_CODES_OR_GENERATE = {
    "oneOf": [
        {"required": [given], "properties": {given: {"type": kind}, other: {"type": "null"}}}
        for given, kind, other in (("codes", "array", "generate"), ("generate", "object", "codes"))
    ]
}
"""What no struct can say of an upload."""


def openapi_document(operations: tuple[Operation, ...]) -> dict[str, Any]:
    """The whole document, ready to be encoded."""
    types = {t for operation in operations for t in (operation.body, *operation.answers.values()) if t is not None}
    ordered = sorted(types, key=lambda t: t.__name__)
    schemas, components = msgspec.json.schema_components([*ordered, ProblemBody], ref_template=_REF)
    components[UploadCodes.__name__] |= _EITHER_CODES_OR_GENERATE
    refs = dict(zip([*ordered, ProblemBody], schemas, strict=True))
    paths: dict[str, Any] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation, refs)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Coupon Book Service",
            "version": __version__,
            "description": "Books of coupon codes: assigned at random or by name, locked at checkout, redeemed as often as"
            " their book allows. GET paths answer HEAD, too.",
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": "/"}],
        "security": [{"key": []}],
        "tags": [{"name": name, "description": description} for name, description in _TAGS.items()],
        "paths": {**paths, **_public_paths()},
        "components": {
            "schemas": components,
            "headers": {"X-Request-Id": _REQUEST_ID},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer", "description": "An API key"}},
        },
    }


def _operation(operation: Operation, refs: dict[Any, Any]) -> dict[str, Any]:
    parameters = [_path_parameter(name) for name in re.findall(r"{(\w+)", operation.path)]
    if operation.query is not None:
        parameters += _query_parameters(operation.query)
    if operation.method == "POST":
        parameters.append(_IDEMPOTENCY_KEY)
    parameters.append(_REQUEST_ID_SENT)
    described: dict[str, Any] = {
        "operationId": operation.name,
        "tags": [operation.tag],
        "summary": operation.summary,
        "description": f"Scope: {' or '.join(f'`{scope}`' for scope in operation.scopes)}.",
        "parameters": parameters,
        "responses": _responses(operation, refs),
    }
    if operation.body is not None:
        described["requestBody"] = {
            "required": any(field.required for field in msgspec.structs.fields(operation.body)),
            "content": {"application/json": {"schema": refs[operation.body], "example": _BODIES[operation.name]}},
        }
    return described


def _path_parameter(name: str) -> dict[str, Any]:
    schema, description = _PATH[name]
    return {"name": name, "in": "path", "required": True, "schema": schema, "description": description}


def _query_parameters(query: type[msgspec.Struct]) -> list[dict[str, Any]]:
    _, components = msgspec.json.schema_components([query])
    return [
        {"name": name, "in": "query", "description": schema.pop("description"), "schema": schema}
        for name, schema in components[query.__name__]["properties"].items()
    ]


def _responses(operation: Operation, refs: dict[Any, Any]) -> dict[str, Any]:
    responses: dict[str, Any] = {}
    for status, answer in operation.answers.items():
        response: dict[str, Any] = {"description": HTTPStatus(status).phrase, "headers": _HEADERS_OF_ALL}
        if answer is not None:
            response["content"] = {"application/json": {"schema": refs[answer], "example": _ANSWERS[operation.name]}}
        if operation.method == "POST":
            response["headers"] = _HEADERS_OF_ALL | _REPLAYED | (_LOCATION if operation.name == "create_book" else {})
        responses[str(status)] = response
    return responses | _problems((*operation.outcomes, *ANY_OPERATION))


def _problems(outcomes: Iterable[Outcome]) -> dict[str, Any]:
    by_status: dict[int, list[Outcome]] = {}
    for outcome in sorted(set(outcomes), key=list(Outcome).index):
        by_status.setdefault(PROBLEMS[outcome].status, []).append(outcome)
    return {str(status): _problem(status, of_status) for status, of_status in sorted(by_status.items())}


def _problem(status: int, outcomes: list[Outcome]) -> dict[str, Any]:
    properties: dict[str, Any] = {
        "status": {"const": status},
        "code": {"enum": [outcome.value for outcome in outcomes]},
    }
    for outcome in outcomes:
        properties |= _NUMBERS.get(outcome, {})
    schema = {
        "allOf": [
            {"$ref": _REF.format(name="ProblemBody")},
            {"properties": properties},
        ]
    }
    lines = [f"`{outcome.value}`: {PROBLEMS[outcome].detail}" for outcome in outcomes]
    examples = {
        outcome.value: {
            "value": problem_body(outcome, "req_5f0c3f2a9d1e4b670000001a", **_NUMBERS_TOLD.get(outcome, {}))
        }
        for outcome in outcomes
    }
    return {
        "description": "\n\n".join(lines),
        "headers": _HEADERS_OF_ALL | _HEADERS.get(status, {}),
        "content": {"application/problem+json": {"schema": schema, "examples": examples}},
    }


def _public_paths() -> dict[str, Any]:
    def get(
        name: str, summary: str, media_type: str, schema: dict[str, Any], outcomes: tuple[Outcome, ...] = ()
    ) -> dict[str, Any]:
        content = {media_type: {"schema": schema}}
        answer = {"200": {"description": "OK", "headers": _HEADERS_OF_ALL, "content": content}}
        problems = _problems((*ANY_REQUEST, *outcomes))
        described = {
            "operationId": name,
            "tags": ["Service"],
            "summary": summary,
            "security": [],
            "parameters": [_REQUEST_ID_SENT],
        }
        return {"get": {**described, "responses": answer | problems}}

    def status(word: str, **more: dict[str, Any]) -> dict[str, Any]:
        properties = {"status": {"const": word}, **more}
        return {"type": "object", "properties": properties, "required": list(properties)}

    shards = {
        "type": "object",
        "properties": {"open": {"type": "integer"}, "of": {"type": "integer"}},
        "required": ["open", "of"],
        "description": "how many shards this process can use",
    }
    unready = (
        Outcome.SHUTTING_DOWN,
        Outcome.STORE_UNAVAILABLE,
        Outcome.RECOVERING,
        Outcome.BACKLOG_FULL,
        Outcome.LEDGER_BEHIND,
    )
    explained = {
        "type": "object",
        "properties": {
            "code": {"type": "string", "description": "the outcome"},
            "status": {"type": "integer", "description": "the HTTP status it is answered with"},
            "title": {"type": "string", "description": "the outcome in a few words"},
            "detail": {"type": "string", "description": "what it means"},
            "retry_after_s": {"type": ["integer", "null"], "description": "when to try again, in seconds"},
        },
        "required": ["code", "status", "title", "detail", "retry_after_s"],
    }
    read_problem = get("read_problem", "What a problem is about", "application/json", explained, (Outcome.NOT_FOUND,))
    read_problem["get"]["parameters"].insert(0, _path_parameter("outcome"))
    read_readiness = get(
        "read_readiness",
        "Every shard is certified, below its backlog cap, and its ledger was seen of late",
        "application/json",
        status("ready", shards=shards),
        unready,
    )
    refusal = read_readiness["get"]["responses"]["503"]["content"]["application/problem+json"]["schema"]
    refusal["allOf"][1]["properties"]["shards"] = shards
    parts = ("openapi", "info", "servers", "security", "tags", "paths", "components")
    document = {"type": "object", "properties": {part: {} for part in parts}, "required": ["openapi", "info", "paths"]}
    text = {"type": "string"}
    return {
        "/healthz": get("read_health", "The process lives", "application/json", status("alive")),
        "/readyz": read_readiness,
        "/metrics": get("read_metrics", "Counters for Prometheus", "text/plain", text),
        "/openapi.json": get("read_openapi", "This document", "application/json", document),
        "/docs": get("read_docs", "This document, for people", "text/html", text),
        "/problems/{outcome}": read_problem,
    }
