"""What schemathesis is told of the service beside its OpenAPI document: what no schema can say."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import schemathesis
from hypothesis import strategies as st

GENERATED_MAX = 50
"""Codes per request: it is the request that is tried here, not how many codes can be made."""
BEYOND_SCHEMAS = {"/alphabet", "/cursor", "/expires_at", "/generate/alphabet"}
"""A cursor is valid when a page answered it, a book ends after it begins, and no symbol stands twice in an alphabet."""

schemathesis.openapi.format(
    "date-time",
    st.datetimes(datetime(1970, 1, 1), datetime(9999, 12, 31), timezones=st.just(UTC)).map(datetime.isoformat),
)


@schemathesis.hook
def before_call(context: schemathesis.HookContext, case: schemathesis.Case[Any], kwargs: dict[str, Any]) -> None:
    """Let patterns that are valid have room for the codes that are asked for, and an address keep all its parts.

    An upload's answer repeats a rejected code as it was sent. Used as `{code}`, an empty one would name another address.
    """
    for name, value in case.path_parameters.items():
        case.path_parameters[name] = value if value != "" else "-"
    if _is_valid(case) and case.operation.label == "POST /coupons/codes":
        if case.media_type == "application/json":  # which names its book itself
            case.query.pop("book_id", None)
        else:
            case.query.setdefault("book_id", "bk_none")
    body: Any = case.body
    generate = body.get("generate") if isinstance(body, dict) else None
    if _is_valid(case) and isinstance(generate, dict):
        pattern, total = "F########" + generate["pattern"][:50], 1 + int(generate["total"]) % GENERATED_MAX
        case.body = {**body, "generate": {**generate, "pattern": pattern, "total": total}}


@schemathesis.check
def valid_requests_are_invalid_only_where_no_schema_can_tell(
    ctx: schemathesis.CheckContext, response: schemathesis.Response, case: schemathesis.Case[Any]
) -> None:
    """The built-in check knows statuses only, and 422 is also an answer to what is valid by itself."""
    if _is_valid(case) and response.status_code == 422:
        problem = response.json()
        if problem["code"] == "invalid_request":
            assert {error["pointer"] for error in problem["errors"]} <= BEYOND_SCHEMAS, problem["errors"]
        else:
            assert problem["code"] in ("idempotency_key_reused", "pattern_capacity"), problem


def _is_valid(case: schemathesis.Case[Any]) -> bool:
    return case.meta is not None and case.meta.generation.mode.is_positive
