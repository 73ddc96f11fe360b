"""Outcomes as problems (RFC 9457): the only module that knows the status, the title and the body of a refusal."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from coupon_svc.domain.errors import error_location
from coupon_svc.domain.outcomes import Outcome, Refused
from coupon_svc.http.response import Headers, Response


class ProblemText(NamedTuple):
    """How an outcome is answered: status, title, what to do about it, and when to try again (seconds)."""

    status: int
    title: str
    detail: str
    retry_after_s: int | None = None


PROBLEMS: dict[Outcome, ProblemText] = {
    Outcome.TOO_MANY_CONNECTIONS: ProblemText(
        503, "Too many connections", "This process serves as many connections as it may. Nothing was done.", 1
    ),
    Outcome.REQUEST_TIMEOUT: ProblemText(
        408, "Request timeout", "The request was not complete in time. Nothing was done; send it again."
    ),
    Outcome.SHUTTING_DOWN: ProblemText(
        503, "Shutting down", "This process is stopping. Nothing was done. Try again.", 1
    ),
    Outcome.MALFORMED_HTTP: ProblemText(400, "Malformed HTTP", "The request is not valid HTTP/1.1."),
    Outcome.NOT_FOUND: ProblemText(404, "Not found", "There is nothing at this address. /docs lists all addresses."),
    Outcome.METHOD_NOT_ALLOWED: ProblemText(
        405, "Method not allowed", "The Allow header names the methods of this address."
    ),
    Outcome.UNAUTHENTICATED: ProblemText(
        401, "Not authenticated", "Send a valid key as `Authorization: Bearer <api key>`."
    ),
    Outcome.MISSING_SCOPE: ProblemText(
        403, "Missing scope", "The key has none of the scopes in `scopes`; one is enough."
    ),
    Outcome.RATE_LIMITED: ProblemText(
        429,
        "Too many requests",
        "Your requests come too fast. Nothing was done. Try again after `retry_after_seconds`.",
        1,
    ),
    Outcome.TOO_MANY_UNKNOWN_CODES: ProblemText(
        429,
        "Too many unknown codes",
        "You have named too many codes that do not exist. Nothing was done. Try again after `retry_after_seconds`.",
        1,
    ),
    Outcome.BODY_TOO_LARGE: ProblemText(
        413, "Body too large", "A body has at most `limit_bytes` bytes. Send less at a time."
    ),
    Outcome.UNSUPPORTED_MEDIA_TYPE: ProblemText(
        415, "Unsupported media type", "Send `Content-Type: application/json`."
    ),
    Outcome.MALFORMED_JSON: ProblemText(400, "Malformed JSON", "The body is not valid JSON in UTF-8."),
    Outcome.INVALID_IDEMPOTENCY_KEY: ProblemText(
        400, "Invalid Idempotency-Key", "An Idempotency-Key has 1..255 printable ASCII characters, bare or quoted."
    ),
    Outcome.INVALID_REQUEST: ProblemText(422, "Invalid request", "See `errors` for what is wrong, and where."),
    Outcome.PATTERN_CAPACITY: ProblemText(
        422,
        "Pattern too small",
        "At most half of the codes that a pattern can name (`capacity`) may exist. `already_used` counts your codes that"
        " lie in it, uploaded ones too. Add a # or take a larger alphabet.",
    ),
    Outcome.RECOVERING: ProblemText(
        503, "Recovering", "The data is being checked after a failure. Nothing was done. Try again.", 1
    ),
    Outcome.STORE_UNAVAILABLE: ProblemText(
        503, "Store unavailable", "A database cannot be reached. Nothing was done. Try again.", 1
    ),
    Outcome.IDEMPOTENCY_KEY_REUSED: ProblemText(
        422, "Idempotency-Key reused", "Another request has used this Idempotency-Key. Use a new one."
    ),
    Outcome.IDEMPOTENCY_IN_PROGRESS: ProblemText(
        409, "Still in progress", "The first request with this Idempotency-Key is still running. Try again."
    ),
    Outcome.BOOK_NOT_FOUND: ProblemText(404, "Book not found", "No such book exists."),
    Outcome.CODE_NOT_FOUND: ProblemText(404, "Code not found", "No such code exists."),
    Outcome.JOB_NOT_FOUND: ProblemText(404, "Job not found", "No such job exists."),
    Outcome.BOOK_CLOSED: ProblemText(409, "Book closed", "The book is closed for good."),
    Outcome.BOOK_PAUSED: ProblemText(409, "Book paused", "The book is paused."),
    Outcome.BOOK_NOT_STARTED: ProblemText(409, "Book not started", "The book's `starts_at` is still to come."),
    Outcome.BOOK_EXPIRED: ProblemText(409, "Book expired", "The book's `expires_at` has passed."),
    Outcome.ALREADY_ASSIGNED: ProblemText(409, "Already assigned", "The code is already assigned."),
    Outcome.CODE_QUARANTINED: ProblemText(
        409,
        "Code quarantined",
        "The code may have been assigned before records were lost. Send the `receipt` of that assign.",
    ),
    Outcome.USER_CODE_LIMIT: ProblemText(
        409, "User's limit reached", "The user holds `held` codes of the book; the limit is `limit`."
    ),
    Outcome.BOOK_EXHAUSTED: ProblemText(409, "Book exhausted", "No code of the book is left to assign."),
    Outcome.REFILLING: ProblemText(
        503, "Refilling", "More codes of the book are being loaded. Nothing was done. Try again.", 1
    ),
    Outcome.NOT_ASSIGNED: ProblemText(409, "Not assigned", "Nobody holds the code."),
    Outcome.NOT_HOLDER: ProblemText(403, "Not the holder", "Another user holds the code."),
    Outcome.ALREADY_REDEEMED: ProblemText(409, "Already redeemed", "All uses of the code are spent."),
    Outcome.LOCK_NOT_HELD: ProblemText(409, "Lock not held", "The lock token is not that of the present lock."),
    Outcome.LOCKED: ProblemText(
        423, "Locked", "The code is locked for a redemption. Try again after `retry_after_seconds`.", 1
    ),
    Outcome.BACKLOG_FULL: ProblemText(
        503, "Ledger backlog full", "The ledger has to catch up first. Nothing was done. Try again.", 5
    ),
    Outcome.LEDGER_BEHIND: ProblemText(
        503, "Ledger unavailable", "The ledger cannot be reached or is behind. Nothing was done. Try again.", 2
    ),
    Outcome.OUTCOME_UNKNOWN: ProblemText(
        503,
        "Outcome unknown",
        "The request may have taken effect. Send it again with the same Idempotency-Key to learn the result.",
        1,
    ),
    Outcome.INTERNAL_ERROR: ProblemText(
        500, "Internal error", "The service failed unexpectedly, and logged it. The request may have taken effect."
    ),
}

log = logging.getLogger(__name__)


def problem_response(refused: Refused, request_id: bytes, headers: Headers | None = None) -> Response:
    """The response to a refused request. `headers` are added to those that the outcome itself needs."""
    outcome, facts = refused.outcome, refused.facts
    text = PROBLEMS[outcome]
    body = problem_body(outcome, request_id.decode(), refused.detail, **facts)
    all_headers = [(b"content-type", b"application/problem+json"), *(headers or ())]
    if text.retry_after_s is not None:
        retry_after = facts.get("retry_after_seconds", text.retry_after_s)
        all_headers.append((b"retry-after", str(retry_after).encode()))
    if text.status == 401:
        all_headers.append((b"www-authenticate", b"Bearer"))
    return Response(text.status, all_headers, msgspec.json.encode(body))


def problem_body(outcome: Outcome, request_id: str, detail: str = "", **facts: object) -> dict[str, object]:
    """The body of a problem (RFC 9457), before it is encoded. `detail` replaces the outcome's own."""
    text = PROBLEMS[outcome]
    return {
        "type": f"/problems/{outcome.value}",
        "title": text.title,
        "status": text.status,
        "detail": detail or text.detail,
        "code": outcome.value,
        "request_id": request_id,
        **facts,
    }


def log_failure(outcome: Outcome, operation: str, request_id: bytes, error: BaseException | None = None) -> None:
    """Log a refusal if its status is 5xx. `error` is what was not foreseen; its message may hold a code and is left out."""
    status = PROBLEMS[outcome].status
    if status < 500:
        return
    level, cause = logging.INFO, ""
    if error is not None:
        level, cause = logging.ERROR, f": {type(error).__name__} at {error_location(error)}"
    log.log(level, "%d %s in %s, request %s%s", status, outcome.value, operation, request_id.decode(), cause)


def log_failures(refusals: Iterable[Refused], operation: str, request_id: bytes) -> None:
    """Log those of the users of a list, as `log_failure`: one line for each outcome."""
    by_outcome: dict[Outcome, list[Refused]] = {}
    for refused in refusals:
        by_outcome.setdefault(refused.outcome, []).append(refused)
    for outcome, alike in by_outcome.items():
        log_failure(outcome, f"{operation} for {len(alike)} users", request_id, alike[0].__cause__)
