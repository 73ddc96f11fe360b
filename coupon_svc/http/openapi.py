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
from coupon_svc.http.operations import ANY_OPERATION, ANY_REQUEST, Operation, PublicPath
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
_FILES: dict[str, Any] = {  # any bytes are a file: what is wrong with it, its job tells
    "text/csv": {"schema": {}, "example": "code\nWELCOME-1\nWELCOME-2\n"},
    "text/plain": {"schema": {}, "example": "WELCOME-1\nWELCOME-2\n"},
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
    429: _RETRY_AFTER,
    503: _RETRY_AFTER,
}
"""What problems of a status carry, always."""
_RETRY_AFTER_SECONDS = {"retry_after_seconds": {"type": "integer", "minimum": 1}}
_FACTS: dict[Outcome, dict[str, Any]] = {
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
        },
        "line": {"type": "integer", "minimum": 1, "description": "of a file: the line that cannot be read"},
    },
    Outcome.PATTERN_CAPACITY: {"capacity": _NUMBER, "requested": _NUMBER, "already_used": _NUMBER},
    Outcome.USER_CODE_LIMIT: {"limit": _NUMBER, "held": _NUMBER},
    Outcome.LOCKED: _RETRY_AFTER_SECONDS,
    Outcome.RATE_LIMITED: _RETRY_AFTER_SECONDS,
    Outcome.TOO_MANY_UNKNOWN_CODES: _RETRY_AFTER_SECONDS,
}
"""What else a problem of an outcome says."""
_FACTS_TOLD: dict[Outcome, dict[str, Any]] = {
    Outcome.MISSING_SCOPE: {"scopes": ["coupons:assign"]},
    Outcome.BODY_TOO_LARGE: {"limit_bytes": BODY_BYTES_MAX},
    Outcome.INVALID_REQUEST: {"errors": [{"pointer": "/user_id", "detail": "Expected `str` of length >= 1"}]},
    Outcome.PATTERN_CAPACITY: {"capacity": 810_000, "requested": 500_000, "already_used": 0},
    Outcome.USER_CODE_LIMIT: {"limit": 1, "held": 1},
    Outcome.LOCKED: {"retry_after_seconds": 42},
    Outcome.RATE_LIMITED: {"retry_after_seconds": 1},
    Outcome.TOO_MANY_UNKNOWN_CODES: {"retry_after_seconds": 1},
}
"""An example of each."""
_EITHER_CODES_OR_GENERATE = {
    "oneOf": [
        {"required": [given], "properties": {given: {"type": kind}, other: {"type": "null"}}}
        for given, kind, other in (("codes", "array", "generate"), ("generate", "object", "codes"))
    ]
}
"""What no struct can say of an upload."""


def openapi_document(operations: Iterable[Operation], public_paths: Iterable[PublicPath]) -> dict[str, Any]:
    """The whole document, ready to be encoded."""
    operations = list(operations)
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
        "paths": paths | {public.path: {"get": _public_path(public)} for public in public_paths},
        "components": {
            "schemas": components,
            "headers": {"X-Request-Id": _REQUEST_ID},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer", "description": "An API key"}},
        },
    }


def _operation(operation: Operation, refs: dict[Any, Any]) -> dict[str, Any]:
    parameters = _path_parameters(operation.path)
    if operation.query is not None:
        parameters += _query_parameters(operation.query)
    if operation.file_query is not None:
        parameters += _query_parameters(operation.file_query)
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
            "content": {"application/json": {"schema": refs[operation.body], "example": _example(operation.body)}},
        }
        if operation.file_query is not None:
            described["requestBody"]["content"] |= _FILES
            described["requestBody"]["description"] = "A file may come with `Content-Encoding: gzip`."
    return described


def _path_parameters(path: str) -> list[dict[str, Any]]:
    return [
        {"name": name, "in": "path", "required": True, "schema": _PATH[name][0], "description": _PATH[name][1]}
        for name in re.findall(r"{(\w+)", path)
    ]


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
            response["content"] = {"application/json": {"schema": refs[answer], "example": _example(answer)}}
        if operation.csv is not None:
            response["content"]["text/csv"] = {"schema": {"type": "string"}, "example": operation.csv.example}
            response["headers"] = _HEADERS_OF_ALL | {
                name: {"schema": {"type": "string"}, "description": f"of CSV alone: {text}"}
                for name, text in operation.csv.headers.items()
            }
        if operation.method == "POST":
            location = operation.location if status in (201, 202) else None
            response["headers"] = _HEADERS_OF_ALL | _REPLAYED | _location(location)
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
        properties |= _FACTS.get(outcome, {})
    schema = {
        "allOf": [
            {"$ref": _REF.format(name="ProblemBody")},
            {"properties": properties},
        ]
    }
    lines = [f"`{outcome.value}`: {PROBLEMS[outcome].detail}" for outcome in outcomes]
    examples = {
        outcome.value: {"value": problem_body(outcome, "req_5f0c3f2a9d1e4b670000001a", **_FACTS_TOLD.get(outcome, {}))}
        for outcome in outcomes
    }
    return {
        "description": "\n\n".join(lines),
        "headers": _HEADERS_OF_ALL | _HEADERS.get(status, {}),
        "content": {"application/problem+json": {"schema": schema, "examples": examples}},
    }


def _location(address: str | None) -> dict[str, Any]:
    if address is None:
        return {}
    schema = {"type": "string", "pattern": "^" + address.partition("{")[0]}
    return {"Location": {"required": True, "schema": schema, "description": f"`{address}`"}}


def _example(body: type[msgspec.Struct]) -> Any:
    return body.EXAMPLE  # type: ignore[attr-defined]  # a test requires it of each


def _public_path(public: PublicPath) -> dict[str, Any]:
    content = {public.media_type: {"schema": public.schema}}
    responses = {
        "200": {"description": "OK", "headers": _HEADERS_OF_ALL, "content": content},
        **_problems((*ANY_REQUEST, *public.outcomes)),
    }
    for status in {str(PROBLEMS[outcome].status) for outcome in public.outcomes}:
        refusal = responses[status]["content"]["application/problem+json"]["schema"]
        refusal["allOf"][1]["properties"] |= public.problem_schema
    return {
        "operationId": public.name,
        "tags": ["Service"],
        "summary": public.summary,
        "security": [],
        "parameters": [*_path_parameters(public.path), _REQUEST_ID_SENT],
        "responses": responses,
    }
