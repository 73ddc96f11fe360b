"""What requests and answers look like. The structs that validate are the ones the OpenAPI document is made of."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from coupon_svc.domain.books import Ack, BookStatus

CODES_PER_UPLOAD_MAX = 20_000
GENERATED_PER_CALL_MAX = 1_000_000
METADATA_BYTES_MAX = 4_096
METADATA_DEPTH_MAX = 100
"""Whoever reads it may stand deeper in its own calls than who wrote it did."""
REJECTED_SHOWN_MAX = 100

_NO_CONTROLS = r"^[^\x00-\x1f\x7f-\x9f]*(?![\s\S])"  # `$` would let a line break pass at the end
Name = Annotated[str, Meta(min_length=1, max_length=200, pattern=_NO_CONTROLS, description="1..200 characters")]
_WHITE = r"[ \u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
"""White space of Unicode that is no control character; `\\s` means other sets in other engines."""
USER_ID_RULE = "1..128 characters, no control character or U+FFFD, no white space at either end; not . or .."
UserId = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=128,
        # `.` and `..` would be resolved away in a path; U+FFFD is what bytes that are no UTF-8 arrive as.
        pattern=rf"^(?!\.\.?(?![\s\S]))(?!{_WHITE})[^\x00-\x1f\x7f-\x9f\ufffd]*(?<!{_WHITE})(?![\s\S])",
        description=f"the caller's own id: {USER_ID_RULE}",
    ),
]
Reference = Annotated[str, Meta(min_length=1, max_length=200, pattern=_NO_CONTROLS, description="the caller's own")]
LockToken = Annotated[str, Meta(min_length=1, max_length=100, pattern=_NO_CONTROLS)]
Receipt = Annotated[str, Meta(min_length=1, max_length=1500, pattern=_NO_CONTROLS)]
BookId = str
Limit = Annotated[int, Meta(ge=1, le=2_147_483_647)]
TtlSeconds = Annotated[int, Meta(ge=1, le=3600)]
Moment = Annotated[datetime, Meta(tz=True, description="RFC 3339")]
Metadata = Annotated[dict[str, Any], Meta(description="the caller's own JSON object, at most 4 KiB")]


class Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Bodies are closed: a field nobody knows is refused, for it is most likely a misspelt one."""


class Generate(Request, frozen=True):
    pattern: Annotated[str, Meta(min_length=3, max_length=64, description="each # is one random symbol")]
    total: Annotated[int, Meta(ge=1, le=GENERATED_PER_CALL_MAX)]
    alphabet: Annotated[
        str,
        Meta(
            min_length=2,
            max_length=64,
            description="unambiguous, alphanumeric, letters, digits, or the symbols themselves",
        ),
    ] = "unambiguous"


class CreateBook(Request, frozen=True):
    name: Name
    max_codes_per_user: Limit | None = None
    max_redemptions_per_code: Limit | None = 1
    lock_ttl_seconds: TtlSeconds = 120
    starts_at: Moment | None = None
    expires_at: Moment | None = None
    ack: Ack = Ack.LEDGER
    generate: Generate | None = None
    metadata: Metadata | None = None


class UpdateBook(Request, frozen=True):
    """Any of the fields. `ack` and `max_redemptions_per_code` are not among them: they never change."""

    status: BookStatus | UnsetType = UNSET
    name: Name | UnsetType = UNSET
    starts_at: Moment | UnsetType | None = UNSET
    expires_at: Moment | UnsetType | None = UNSET
    max_codes_per_user: Limit | UnsetType | None = UNSET
    lock_ttl_seconds: TtlSeconds | UnsetType = UNSET
    metadata: Metadata | UnsetType | None = UNSET


class UploadCodes(Request, frozen=True):
    """Either codes or a pattern to generate them by."""

    book_id: BookId
    codes: Annotated[list[str], Meta(max_length=CODES_PER_UPLOAD_MAX)] | None = None
    generate: Generate | None = None


class AssignCoupon(Request, frozen=True):
    book_id: BookId
    user_id: UserId


class AssignCode(Request, frozen=True):
    user_id: UserId
    receipt: Receipt | None = None


class LockCoupon(Request, frozen=True):
    user_id: UserId | None = None
    ttl_seconds: TtlSeconds | None = None
    lock_token: LockToken | None = None
    receipt: Receipt | None = None


class UnlockCoupon(Request, frozen=True):
    lock_token: LockToken


class RedeemCoupon(Request, frozen=True):
    user_id: UserId | None = None
    lock_token: LockToken | None = None
    reference: Reference | None = None
    metadata: Metadata | None = None
    receipt: Receipt | None = None


class CodeCounters(msgspec.Struct, frozen=True):
    """The states exclude each other and add up to `total`."""

    total: int
    available: int
    assigned: int
    redeemed: int
    quarantined: int


class BookAnswer(msgspec.Struct, frozen=True, kw_only=True):
    book_id: str
    name: str
    max_codes_per_user: int | None
    max_redemptions_per_code: int | None
    lock_ttl_seconds: int
    starts_at: str | None
    expires_at: str | None
    ack: Ack
    metadata: dict[str, Any] | msgspec.Raw
    status: BookStatus
    created_at: str
    redemptions: int
    codes: CodeCounters


class BooksPage(msgspec.Struct, frozen=True):
    books: list[BookAnswer]
    next_cursor: str | None


class RejectedCode(msgspec.Struct, frozen=True):
    row: int
    code: str
    reason: Literal["duplicate", "invalid"]


class UploadAnswer(msgspec.Struct, frozen=True, kw_only=True):
    book_id: str
    received: int
    inserted: int
    duplicates: int
    invalid: int
    rejected: list[RejectedCode]
    rejected_truncated: bool


class AssignAnswer(msgspec.Struct, frozen=True, kw_only=True):
    code: str
    book_id: str
    user_id: str
    assigned_at: str
    redemptions_left: int | None
    position: str
    durable: bool
    receipt: (
        Annotated[str, Meta(description="in ack = redis books: brings the record back should it be lost")] | UnsetType
    ) = UNSET


class LockAnswer(msgspec.Struct, frozen=True, kw_only=True):
    code: str
    book_id: str
    user_id: str
    lock_token: str
    locked_until: str
    ttl_seconds: int


class RedeemAnswer(msgspec.Struct, frozen=True, kw_only=True):
    redemption_id: str
    code: str
    book_id: str
    user_id: str
    redeemed_at: str
    redemptions_used: int
    redemptions_left: int | None
    position: str
    durable: bool


class CouponAnswer(msgspec.Struct, frozen=True, kw_only=True):
    code: str
    book_id: str
    user_id: str
    status: Literal["assigned", "locked", "redeemed"]
    assigned_at: str
    redemptions_used: int
    redemptions_left: int | None
    locked_until: str | None


class CouponsPage(msgspec.Struct, frozen=True):
    coupons: list[CouponAnswer]
    next_cursor: str | None


CodeBookStatus = Literal["active", "paused", "closed", "not_started", "expired"]


class CodeAnswer(msgspec.Struct, frozen=True, kw_only=True):
    code: str
    book_id: str
    status: Literal["available", "assigned", "locked", "redeemed", "quarantined"]
    book_status: CodeBookStatus
    user_id: str | None
    assigned_at: str | None
    redemptions_used: int
    redemptions_left: int | None
    locked_until: str | None


class JobAnswer(msgspec.Struct, frozen=True, kw_only=True):
    job_id: str
    book_id: str
    status: Literal["running", "succeeded", "failed"]
    progress: float
    received: int
    inserted: int
    duplicates: int
    invalid: int
    rejected: list[RejectedCode]
    error: str | None


class Problem(msgspec.Struct, kw_only=True):
    """RFC 9457, as `application/problem+json`; more members as the outcome has numbers to act on."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    request_id: str


Cursor = tuple[
    Annotated[int, Meta(ge=0, le=9_007_199_254_740_991)], Annotated[str, Meta(max_length=300, pattern=_NO_CONTROLS)]
]
