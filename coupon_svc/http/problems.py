"""Outcomes as HTTP: the only module that knows which status an outcome has, and what a refusal looks like."""

from __future__ import annotations

import secrets
from typing import NamedTuple

import msgspec

from coupon_svc.domain.outcomes import Outcome, Refused


class Problem(NamedTuple):
    """How an outcome is told: its status, a title, what to do about it, and when to come again (seconds)."""

    status: int
    title: str
    detail: str
    retry_after_s: int | None = None


PROBLEMS: dict[Outcome, Problem] = {
    Outcome.TOO_MANY_CONNECTIONS: Problem(
        503, "Too many connections", "This process serves as many connections as it may. Nothing was done.", 1
    ),
    Outcome.REQUEST_TIMEOUT: Problem(
        408, "Request timeout", "The request was not complete in time. Nothing was done; send it again."
    ),
    Outcome.SHUTTING_DOWN: Problem(
        503, "Shutting down", "This process is being stopped; another one serves. Nothing was done.", 1
    ),
    Outcome.MALFORMED_HTTP: Problem(400, "Malformed HTTP", "The request is not valid HTTP/1.1."),
    Outcome.NOT_FOUND: Problem(404, "Not found", "Nothing has this address. /docs lists what there is."),
    Outcome.METHOD_NOT_ALLOWED: Problem(
        405, "Method not allowed", "The Allow header names the methods of this address."
    ),
    Outcome.UNAUTHENTICATED: Problem(
        401, "Not authenticated", "Send a valid key as `Authorization: Bearer <api key>`."
    ),
    Outcome.MISSING_SCOPE: Problem(403, "Missing scope", "The key has none of the scopes in `scopes`; one is enough."),
    Outcome.BODY_TOO_LARGE: Problem(
        413, "Body too large", "A body has at most `limit_bytes` bytes. Send less at a time."
    ),
    Outcome.UNSUPPORTED_MEDIA_TYPE: Problem(415, "Unsupported media type", "Send `Content-Type: application/json`."),
    Outcome.MALFORMED_JSON: Problem(400, "Malformed JSON", "The body is not valid JSON in UTF-8."),
    Outcome.INVALID_IDEMPOTENCY_KEY: Problem(
        400, "Invalid Idempotency-Key", "An Idempotency-Key has 1..255 printable ASCII characters, bare or quoted."
    ),
    Outcome.INVALID_REQUEST: Problem(422, "Invalid request", "See `errors` for what is wrong, and where."),
    Outcome.PATTERN_CAPACITY: Problem(
        422, "Pattern too small", "The codes would fill more than half of what the pattern can name."
    ),
    Outcome.RECOVERING: Problem(
        503, "Recovering", "The data is being checked after a failure. Nothing was done. Try again.", 1
    ),
    Outcome.STORE_UNAVAILABLE: Problem(
        503, "Store unavailable", "A database cannot be reached. Nothing was done. Try again.", 1
    ),
    Outcome.IDEMPOTENCY_KEY_REUSED: Problem(
        422, "Idempotency-Key reused", "Another request has used this Idempotency-Key. Use a new one."
    ),
    Outcome.IDEMPOTENCY_IN_PROGRESS: Problem(
        409, "Still in progress", "The first request with this Idempotency-Key is still running. Try again."
    ),
    Outcome.BOOK_NOT_FOUND: Problem(404, "Book not found", "No such book exists."),
    Outcome.CODE_NOT_FOUND: Problem(404, "Code not found", "No such code exists."),
    Outcome.JOB_NOT_FOUND: Problem(404, "Job not found", "No such job exists."),
    Outcome.BOOK_CLOSED: Problem(409, "Book closed", "The book is closed for good."),
    Outcome.BOOK_PAUSED: Problem(409, "Book paused", "The book is paused."),
    Outcome.BOOK_NOT_STARTED: Problem(409, "Book not started", "The book's `starts_at` is still to come."),
    Outcome.BOOK_EXPIRED: Problem(409, "Book expired", "The book's `expires_at` has passed."),
    Outcome.ALREADY_ASSIGNED: Problem(409, "Already assigned", "The code is already assigned."),
    Outcome.CODE_QUARANTINED: Problem(
        409,
        "Code quarantined",
        "The code may have been assigned before records were lost. Send the `receipt` of that assign.",
    ),
    Outcome.USER_CODE_LIMIT: Problem(
        409, "User's limit reached", "The user holds `held` codes of the book; the limit is `limit`."
    ),
    Outcome.BOOK_EXHAUSTED: Problem(409, "Book exhausted", "Every code of the book is assigned."),
    Outcome.REFILLING: Problem(
        503, "Refilling", "More codes of the book are being loaded. Nothing was done. Try again.", 1
    ),
    Outcome.NOT_ASSIGNED: Problem(409, "Not assigned", "Nobody holds the code."),
    Outcome.NOT_HOLDER: Problem(403, "Not the holder", "Another user holds the code."),
    Outcome.ALREADY_REDEEMED: Problem(409, "Already redeemed", "All uses of the code are spent."),
    Outcome.LOCK_NOT_HELD: Problem(409, "Lock not held", "The lock token is not that of the present lock."),
    Outcome.LOCKED: Problem(
        423, "Locked", "The code is locked for a redemption. Try again after `retry_after_seconds`.", 1
    ),
    Outcome.BACKLOG_FULL: Problem(
        503, "Ledger backlog full", "The ledger has to catch up first. Nothing was done. Try again.", 5
    ),
    Outcome.LEDGER_BEHIND: Problem(
        503, "Ledger unavailable", "The ledger cannot be reached or is behind. Nothing was done. Try again.", 2
    ),
    Outcome.OUTCOME_UNKNOWN: Problem(
        503,
        "Outcome unknown",
        "The request may have taken effect. Send it again with the same Idempotency-Key to learn the result.",
        1,
    ),
    Outcome.INTERNAL_ERROR: Problem(
        500, "Internal error", "The service failed unexpectedly, and logged it. The request may have taken effect."
    ),
}

Headers = list[tuple[bytes, bytes]]


def problem_response(refused: Refused, extra_headers: Headers | None = None) -> tuple[int, Headers, bytes, str]:
    """(status, headers, body, request_id) of a refusal."""
    outcome, numbers = refused.outcome, dict(refused.numbers)
    problem = PROBLEMS[outcome]
    request_id = "req_" + secrets.token_hex(8)
    body = problem_body(outcome, request_id, refused.detail, **numbers)
    headers = [(b"content-type", b"application/problem+json"), *(extra_headers or ())]
    if problem.retry_after_s is not None:
        retry_after = numbers.get("retry_after_seconds", problem.retry_after_s)
        headers.append((b"retry-after", str(retry_after).encode()))
    if problem.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    return problem.status, headers, msgspec.json.encode(body), request_id


def problem_body(outcome: Outcome, request_id: str, detail: str = "", **numbers: object) -> dict[str, object]:
    """What a refusal says, before it is encoded."""
    problem = PROBLEMS[outcome]
    return {
        "type": f"/problems/{outcome.value}",
        "title": problem.title,
        "status": problem.status,
        "detail": detail or problem.detail,
        "code": outcome.value,
        "request_id": request_id,
        **numbers,
    }


def bad_request() -> bytes:
    """The body of the answer to what is not even valid HTTP."""
    return problem_response(Refused(Outcome.MALFORMED_HTTP))[2]
