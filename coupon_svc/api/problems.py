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
    Outcome.NOT_FOUND: Problem(404, "Not found", "There is nothing at this address; see /docs for what there is."),
    Outcome.METHOD_NOT_ALLOWED: Problem(
        405, "Method not allowed", "The Allow header names the methods to be used here."
    ),
    Outcome.UNAUTHENTICATED: Problem(
        401, "Not authenticated", "Send a valid key as `Authorization: Bearer <api key>`."
    ),
    Outcome.MISSING_SCOPE: Problem(403, "Scope missing", "This key may not do that; see `scopes` for what it needs."),
    Outcome.BODY_TOO_LARGE: Problem(413, "Body too large", "Send less at a time; a JSON body may have 2 MiB."),
    Outcome.UNSUPPORTED_MEDIA_TYPE: Problem(415, "Unsupported media type", "Send `Content-Type: application/json`."),
    Outcome.MALFORMED_JSON: Problem(400, "Malformed JSON", "The body is not valid JSON in UTF-8."),
    Outcome.INVALID_IDEMPOTENCY_KEY: Problem(
        400, "Invalid Idempotency-Key", "An Idempotency-Key has 1..255 printable ASCII characters, bare or quoted."
    ),
    Outcome.INVALID_REQUEST: Problem(422, "Invalid request", "See `errors` for what is wrong and where."),
    Outcome.PATTERN_CAPACITY: Problem(422, "Pattern too small", "The pattern cannot name this many codes safely."),
    Outcome.RECOVERING: Problem(503, "Recovering", "The service is making sure that nothing was lost. Try again.", 1),
    Outcome.STORE_UNAVAILABLE: Problem(503, "Store unavailable", "A store cannot be reached. Nothing was done.", 1),
    Outcome.IDEMPOTENCY_KEY_REUSED: Problem(
        422, "Idempotency-Key reused", "This Idempotency-Key was used for another request; take a new one."
    ),
    Outcome.IDEMPOTENCY_IN_PROGRESS: Problem(
        409, "Still in progress", "The first request with this Idempotency-Key has not ended yet. Try again."
    ),
    Outcome.BOOK_NOT_FOUND: Problem(404, "Book not found", "There is no such book."),
    Outcome.CODE_NOT_FOUND: Problem(404, "Code not found", "There is no such code."),
    Outcome.JOB_NOT_FOUND: Problem(404, "Job not found", "There is no such job."),
    Outcome.BOOK_CLOSED: Problem(409, "Book closed", "The book was closed for good."),
    Outcome.BOOK_PAUSED: Problem(409, "Book paused", "The book is paused."),
    Outcome.BOOK_NOT_STARTED: Problem(409, "Book not started", "The book has not started yet."),
    Outcome.BOOK_EXPIRED: Problem(409, "Book expired", "The book has expired."),
    Outcome.ALREADY_ASSIGNED: Problem(409, "Already assigned", "The code was assigned before."),
    Outcome.CODE_QUARANTINED: Problem(
        409, "Code quarantined", "The code may have been given away before records were lost; show its receipt."
    ),
    Outcome.USER_CODE_LIMIT: Problem(409, "User's limit reached", "The user holds `held` of at most `limit` codes."),
    Outcome.BOOK_EXHAUSTED: Problem(409, "Book exhausted", "Every code of the book is taken."),
    Outcome.REFILLING: Problem(503, "Refilling", "More codes are on their way. Try again.", 1),
    Outcome.NOT_ASSIGNED: Problem(409, "Not assigned", "The code is not assigned to anybody."),
    Outcome.NOT_HOLDER: Problem(403, "Not the holder", "The code is not this user's."),
    Outcome.ALREADY_REDEEMED: Problem(409, "Already redeemed", "All uses of the code are spent."),
    Outcome.LOCK_NOT_HELD: Problem(409, "Lock not held", "This lock token is not, or no longer, the lock's."),
    Outcome.LOCKED: Problem(423, "Locked", "Somebody holds the code for a redemption. Try again later.", 1),
    Outcome.BACKLOG_FULL: Problem(503, "Too much to write down", "The ledger has to catch up. Nothing was done.", 5),
    Outcome.LEDGER_BEHIND: Problem(503, "Ledger away", "The ledger cannot be reached just now. Nothing was done.", 2),
    Outcome.OUTCOME_UNKNOWN: Problem(
        503, "Outcome unknown", "It may have happened. Send it again with the same Idempotency-Key to know.", 1
    ),
    Outcome.INTERNAL_ERROR: Problem(500, "Internal error", "Something is wrong on our side; it was logged."),
}

Headers = list[tuple[bytes, bytes]]


def problem_response(refused: Refused, extra_headers: Headers | None = None) -> tuple[int, Headers, bytes, str]:
    """(status, headers, body, request_id) of a refusal."""
    outcome, numbers = refused.outcome, dict(refused.numbers)
    problem = PROBLEMS[outcome]
    request_id = "req_" + secrets.token_hex(8)
    body = {
        "type": f"/problems/{outcome.value}",
        "title": problem.title,
        "status": problem.status,
        "detail": refused.detail or problem.detail,
        "code": outcome.value,
        "request_id": request_id,
        **numbers,
    }
    headers = [(b"content-type", b"application/problem+json"), *(extra_headers or ())]
    if problem.retry_after_s is not None:
        retry_after = numbers.get("retry_after_seconds", problem.retry_after_s)
        headers.append((b"retry-after", str(retry_after).encode()))
    if problem.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    return problem.status, headers, msgspec.json.encode(body), request_id


def bad_request() -> bytes:
    """The body of the answer to what is not even valid HTTP."""
    problem = {
        "type": "/problems/malformed_http",
        "title": "Malformed HTTP",
        "status": 400,
        "detail": "This is not a valid HTTP/1.1 request.",
        "code": "malformed_http",
        "request_id": "req_" + secrets.token_hex(8),
    }
    return msgspec.json.encode(problem)
