"""Every operation of the service: its path, what it needs, what it takes, and each answer it can give."""

from __future__ import annotations

from typing import Any

import msgspec

from coupon_svc.domain.outcomes import Outcome
from coupon_svc.http import schemas


class Operation(msgspec.Struct, frozen=True, kw_only=True):
    """One method of one path. The routes, the checks and the OpenAPI document are all made from it."""

    name: str
    method: str
    path: str
    summary: str
    tag: str
    """The group of operations that it is shown in."""
    scopes: tuple[str, ...] = ()
    """Any of them is enough; none means that no key is needed."""
    query: type[msgspec.Struct] | None = None
    """The query parameters that are known; None: none is."""
    body: type[msgspec.Struct] | None = None
    answers: dict[int, Any] = {}
    """Status -> type of the body, None for an empty one."""
    outcomes: tuple[Outcome, ...] = ()
    """Refusals that are this operation's own; those that any operation can meet are added."""


_BOOK_SHUT = (Outcome.BOOK_CLOSED, Outcome.BOOK_PAUSED, Outcome.BOOK_NOT_STARTED, Outcome.BOOK_EXPIRED)
_IDEMPOTENT = (Outcome.INVALID_IDEMPOTENCY_KEY, Outcome.IDEMPOTENCY_KEY_REUSED, Outcome.IDEMPOTENCY_IN_PROGRESS)
_BODY = (
    Outcome.BODY_TOO_LARGE,
    Outcome.UNSUPPORTED_MEDIA_TYPE,
    Outcome.MALFORMED_JSON,
)
_READ_SCOPES = ("books:read", "books:write")

ANY_REQUEST = (
    Outcome.TOO_MANY_CONNECTIONS,
    Outcome.REQUEST_TIMEOUT,
    Outcome.SHUTTING_DOWN,
    Outcome.MALFORMED_HTTP,
    Outcome.METHOD_NOT_ALLOWED,
    Outcome.INTERNAL_ERROR,
)
"""What every request can be refused with, also one that needs no key."""

ANY_OPERATION = (
    *ANY_REQUEST,
    Outcome.UNAUTHENTICATED,
    Outcome.MISSING_SCOPE,
    Outcome.INVALID_REQUEST,
    Outcome.RECOVERING,
    Outcome.STORE_UNAVAILABLE,
)
"""What every operation that needs a key can be refused with."""

OPERATIONS = (
    Operation(
        name="create_book",
        method="POST",
        path="/coupons",
        tag="Books",
        summary="Create a coupon book, with generated codes if wanted",
        scopes=("books:write",),
        body=schemas.CreateBook,
        answers={201: schemas.BookAnswer},
        outcomes=(*_BODY, *_IDEMPOTENT, Outcome.PATTERN_CAPACITY, Outcome.OUTCOME_UNKNOWN),
    ),
    Operation(
        name="list_books",
        method="GET",
        path="/coupons",
        tag="Books",
        summary="List the books, newest first",
        scopes=_READ_SCOPES,
        query=schemas.Page,
        answers={200: schemas.BooksPage},
    ),
    Operation(
        name="assign_coupon",
        method="POST",
        path="/coupons/assign",
        tag="Coupons",
        summary="Assign a random code of a book to a user",
        scopes=("coupons:assign",),
        body=schemas.AssignCoupon,
        answers={201: schemas.AssignAnswer},
        outcomes=(
            *_BODY,
            *_IDEMPOTENT,
            Outcome.BOOK_NOT_FOUND,
            *_BOOK_SHUT,
            Outcome.USER_CODE_LIMIT,
            Outcome.BOOK_EXHAUSTED,
            Outcome.REFILLING,
            Outcome.BACKLOG_FULL,
            Outcome.LEDGER_BEHIND,
            Outcome.OUTCOME_UNKNOWN,
        ),
    ),
    Operation(
        name="assign_code",
        method="POST",
        path="/coupons/assign/{code}",
        tag="Coupons",
        summary="Assign a given code to a user; 200 when it is this user's already",
        scopes=("coupons:assign",),
        body=schemas.AssignCode,
        answers={201: schemas.AssignAnswer, 200: schemas.AssignAnswer},
        outcomes=(
            *_BODY,
            *_IDEMPOTENT,
            Outcome.CODE_NOT_FOUND,
            *_BOOK_SHUT,
            Outcome.ALREADY_ASSIGNED,
            Outcome.CODE_QUARANTINED,
            Outcome.USER_CODE_LIMIT,
            Outcome.REFILLING,
            Outcome.BACKLOG_FULL,
            Outcome.LEDGER_BEHIND,
            Outcome.OUTCOME_UNKNOWN,
        ),
    ),
    Operation(
        name="lock_coupon",
        method="POST",
        path="/coupons/lock/{code}",
        tag="Coupons",
        summary="Hold a coupon for one redemption attempt; 200 when the hold is renewed with its token",
        scopes=("coupons:redeem",),
        body=schemas.LockCoupon,
        answers={201: schemas.LockAnswer, 200: schemas.LockAnswer},
        outcomes=(
            *_BODY,
            *_IDEMPOTENT,
            Outcome.CODE_NOT_FOUND,
            *_BOOK_SHUT,
            Outcome.CODE_QUARANTINED,
            Outcome.NOT_ASSIGNED,
            Outcome.NOT_HOLDER,
            Outcome.ALREADY_REDEEMED,
            Outcome.LOCK_NOT_HELD,
            Outcome.LOCKED,
            Outcome.BACKLOG_FULL,
            Outcome.LEDGER_BEHIND,
            Outcome.OUTCOME_UNKNOWN,
        ),
    ),
    Operation(
        name="unlock_coupon",
        method="POST",
        path="/coupons/unlock/{code}",
        tag="Coupons",
        summary="Give up the hold whose token is shown",
        scopes=("coupons:redeem",),
        body=schemas.UnlockCoupon,
        answers={204: None},
        outcomes=(*_BODY, *_IDEMPOTENT, Outcome.CODE_NOT_FOUND, Outcome.LOCK_NOT_HELD, Outcome.OUTCOME_UNKNOWN),
    ),
    Operation(
        name="redeem_coupon",
        method="POST",
        path="/coupons/redeem/{code}",
        tag="Coupons",
        summary="Spend one use of a coupon, for good",
        scopes=("coupons:redeem",),
        body=schemas.RedeemCoupon,
        answers={201: schemas.RedeemAnswer},
        outcomes=(
            *_BODY,
            *_IDEMPOTENT,
            Outcome.CODE_NOT_FOUND,
            *_BOOK_SHUT,
            Outcome.CODE_QUARANTINED,
            Outcome.NOT_ASSIGNED,
            Outcome.NOT_HOLDER,
            Outcome.ALREADY_REDEEMED,
            Outcome.LOCK_NOT_HELD,
            Outcome.LOCKED,
            Outcome.BACKLOG_FULL,
            Outcome.LEDGER_BEHIND,
            Outcome.OUTCOME_UNKNOWN,
        ),
    ),
    Operation(
        name="list_coupons",
        method="GET",
        path="/users/{user_id}/coupons",
        tag="Coupons",
        summary="List what a user holds",
        scopes=("coupons:read",),
        query=schemas.ListCoupons,
        answers={200: schemas.CouponsPage},
        outcomes=(Outcome.BOOK_NOT_FOUND, Outcome.LEDGER_BEHIND),
    ),
    Operation(
        name="upload_codes",
        method="POST",
        path="/coupons/codes",
        tag="Codes",
        summary="Add codes to a book: a list, or more generated ones",
        scopes=("codes:write",),
        body=schemas.UploadCodes,
        answers={200: schemas.UploadAnswer},
        outcomes=(
            *_BODY,
            *_IDEMPOTENT,
            Outcome.BOOK_NOT_FOUND,
            Outcome.BOOK_CLOSED,
            Outcome.PATTERN_CAPACITY,
            Outcome.OUTCOME_UNKNOWN,
        ),
    ),
    Operation(
        name="read_code",
        method="GET",
        path="/coupons/codes/{code}",
        tag="Codes",
        summary="Read the state of one code",
        scopes=("coupons:read",),
        answers={200: schemas.CodeAnswer},
        outcomes=(Outcome.CODE_NOT_FOUND, Outcome.LEDGER_BEHIND),
    ),
    Operation(
        name="read_job",
        method="GET",
        path="/coupons/jobs/{job_id}",
        tag="Codes",
        summary="Read an upload's job; no upload makes one yet, so there is none to read",
        scopes=("codes:write",),
        outcomes=(Outcome.JOB_NOT_FOUND,),
    ),
    Operation(
        name="read_book",
        method="GET",
        path="/coupons/{book_id}",
        tag="Books",
        summary="Read a book with its live counters",
        scopes=_READ_SCOPES,
        answers={200: schemas.BookAnswer},
        outcomes=(Outcome.BOOK_NOT_FOUND,),
    ),
    Operation(
        name="update_book",
        method="PATCH",
        path="/coupons/{book_id}",
        tag="Books",
        summary="Change a book; what was answered is in force",
        scopes=("books:write",),
        body=schemas.UpdateBook,
        answers={200: schemas.BookAnswer},
        outcomes=(*_BODY, Outcome.BOOK_NOT_FOUND, Outcome.BOOK_CLOSED, Outcome.OUTCOME_UNKNOWN),
    ),
)
"""In the order in which their paths are matched: the hot ones first."""
