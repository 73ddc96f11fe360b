"""What requests and answers look like. The structs that validate are the ones the OpenAPI document is made of.

`EXAMPLE` is shown in the document, for each body of a request or an answer.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from coupon_svc.domain.books import Ack, BookStatus
from coupon_svc.domain.codes import CodeStatus

CODES_PER_UPLOAD_MAX = 20_000
GENERATED_MAX = 10**12
METADATA_BYTES_MAX = 4_096
METADATA_DEPTH_MAX = 100
"""Whoever reads it may stand deeper in its own calls than who wrote it did."""
REJECTED_SHOWN_MAX = 100
USERS_PER_CALL_MAX = 1_000

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
Reference = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=200,
        pattern=_NO_CONTROLS,
        description="your own reference for this redemption, e.g. an order number",
    ),
]
LockToken = Annotated[
    str,
    Meta(min_length=1, max_length=100, pattern=_NO_CONTROLS, description="the `lock_token` that a lock answered"),
]
ReceiptText = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=1500,
        pattern=_NO_CONTROLS,
        description="the `receipt` of the assign; brings its record back where it was lost, and changes nothing else",
    ),
]
BookId = Annotated[str, Meta(description="the book's id, as its creation answered it")]
HolderId = Annotated[str, Meta(description="your own id of the user who holds the code")]
Code = Annotated[str, Meta(description="the code, in upper case")]
_LIMIT = Meta(ge=1, le=2_147_483_647)
CodesPerUser = Annotated[int, _LIMIT, Meta(description="how many codes of the book one user may hold; null: unlimited")]
RedemptionsPerCode = Annotated[
    int, _LIMIT, Meta(description="how often each code may be redeemed; null: unlimited. It never changes")
]
TtlSeconds = Annotated[int, Meta(ge=1, le=3600, description="how long a lock lasts unless its caller says otherwise")]
Moment = Annotated[datetime, Meta(tz=True)]
StartsAt = Annotated[
    Moment, Meta(description="RFC 3339 with an offset, 1970 to 9999: no assign, lock or redeem before it")
]
ExpiresAt = Annotated[
    Moment, Meta(description="RFC 3339 with an offset, 1970 to 9999: no assign, lock or redeem from it on")
]
Metadata = Annotated[
    dict[str, Any], Meta(description="your own JSON object, at most 4096 bytes, nested at most 100 levels deep")
]
Time = Annotated[str, Meta(description="RFC 3339, in UTC", extra_json_schema={"format": "date-time"})]
Position = Annotated[
    str, Meta(description="the event's place in the ledger: shard, epoch, number", pattern=r"^[0-9]{2}:[0-9]+-[0-9]+$")
]
UsesLeft = Annotated[int, Meta(ge=0, description="how often the code may still be redeemed; null: without limit")]
UsesMade = Annotated[int, Meta(ge=0, description="how often the code was redeemed")]
LockedUntil = Annotated[Time, Meta(description="when its lock ends by itself; null without a lock")]
PageCursor = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]*(?![\s\S])", description="`next_cursor` of the page before")]
NextCursor = Annotated[str, Meta(description="the `cursor` of the next page; null on the last one")]
_BOOK_ID, _CODE, _USER = "bk_08wazn8pg1mwcdvjs8", "SUMMER-9SJG-2HF7", "user-1"
_TOKEN, _MOMENT = "lk_50kkcqIRntRxrmigCOPKjESC", "2026-11-22T14:48:57.476Z"
CodeBookStatus = Literal["active", "paused", "closed", "not_started", "expired"]


class Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Bodies are closed: a field nobody knows is refused, for it is most likely a misspelt one."""


PatternText = Annotated[
    str,
    Meta(
        min_length=3,
        max_length=64,
        description="each `#` is one random symbol; all else stands for itself and must be a legal code character",
        extra_json_schema={"pattern": "^[A-Za-z0-9#][A-Za-z0-9._~+@#-]*$"},
    ),
]
Alphabet = Annotated[
    str,
    Meta(
        min_length=2,
        max_length=64,
        description="`unambiguous`, `alphanumeric`, `letters`, `digits`, or 2 or more different symbols themselves",
        extra_json_schema={"pattern": "^[A-Za-z0-9._~+@-]*$"},
    ),
]


class PreviewPattern(Request, frozen=True):
    """What codes would be generated by."""

    pattern: PatternText
    total: Annotated[int, Meta(ge=1, le=GENERATED_MAX, description="how many codes you think of")]
    alphabet: Alphabet = "unambiguous"
    EXAMPLE: ClassVar[dict[str, Any]] = {"pattern": "SUMMER-####-####", "total": 1000}


class Generate(Request, frozen=True):
    """Codes to be drawn at random, by a pattern. They may fill at most half of what the pattern can name."""

    pattern: PatternText
    total: Annotated[int, Meta(ge=1, le=GENERATED_MAX, description="how many codes")]
    alphabet: Alphabet = "unambiguous"


class CreateBook(Request, frozen=True):
    """A new book: its rules, and codes to be generated."""

    name: Name
    max_codes_per_user: CodesPerUser | None = None
    max_redemptions_per_code: RedemptionsPerCode | None = 1
    lock_ttl_seconds: TtlSeconds = 120
    starts_at: StartsAt | None = None
    expires_at: ExpiresAt | None = None
    ack: Annotated[
        Ack,
        Meta(description="when an assign is answered: once the ledger has it, or once Redis does. It never changes"),
    ] = Ack.LEDGER
    generate: Generate | None = None
    metadata: Metadata | None = None
    EXAMPLE: ClassVar[dict[str, Any]] = {
        "name": "Summer 2026",
        "max_codes_per_user": 1,
        "generate": {"pattern": "SUMMER-####-####", "total": 1000},
        "metadata": {"campaign": "s26"},
    }


class UpdateBook(Request, frozen=True):
    """Any of the fields. `ack` and `max_redemptions_per_code` are not among them: they never change."""

    status: Annotated[BookStatus, Meta(description="a book that is closed stays closed")] | UnsetType = UNSET
    name: Name | UnsetType = UNSET
    starts_at: StartsAt | UnsetType | None = UNSET
    expires_at: ExpiresAt | UnsetType | None = UNSET
    max_codes_per_user: CodesPerUser | UnsetType | None = UNSET
    lock_ttl_seconds: TtlSeconds | UnsetType = UNSET
    metadata: Metadata | UnsetType | None = UNSET
    EXAMPLE: ClassVar[dict[str, Any]] = {"status": "paused"}


class UploadCodes(Request, frozen=True):
    """Either codes or a pattern to generate them by."""

    book_id: BookId
    codes: Annotated[list[str], Meta(max_length=CODES_PER_UPLOAD_MAX, description="a list of codes")] | None = None
    generate: Generate | None = None
    EXAMPLE: ClassVar[dict[str, Any]] = {"book_id": _BOOK_ID, "codes": ["WELCOME-1", "WELCOME-2"]}


class AssignCoupon(Request, frozen=True):
    """Which book a code is wanted of, and for whom."""

    book_id: BookId
    user_id: UserId
    EXAMPLE: ClassVar[dict[str, Any]] = {"book_id": _BOOK_ID, "user_id": _USER}


class AssignCoupons(Request, frozen=True):
    """Which book codes are wanted of, and for whom."""

    book_id: BookId
    user_ids: Annotated[
        list[UserId],
        Meta(min_length=1, max_length=USERS_PER_CALL_MAX, description="one who is named twice is asked for twice"),
    ]
    EXAMPLE: ClassVar[dict[str, Any]] = {"book_id": _BOOK_ID, "user_ids": [_USER, "user-43"]}


class AssignCode(Request, frozen=True):
    """Whom the code in the path is for."""

    user_id: UserId
    receipt: ReceiptText | None = None
    EXAMPLE: ClassVar[dict[str, Any]] = {"user_id": _USER}


class LockCoupon(Request, frozen=True):
    """How to hold the coupon in the path."""

    user_id: UserId | None = None
    ttl_seconds: (
        Annotated[int, Meta(ge=1, le=3600, description="how long the lock is to last; default: the book's")] | None
    ) = None
    lock_token: (
        Annotated[LockToken, Meta(description="renews the lock that has this token, instead of making one")] | None
    ) = None
    receipt: ReceiptText | None = None
    EXAMPLE: ClassVar[dict[str, Any]] = {"user_id": _USER, "ttl_seconds": 60}


class UnlockCoupon(Request, frozen=True):
    """Which hold to give up."""

    lock_token: LockToken
    EXAMPLE: ClassVar[dict[str, Any]] = {"lock_token": _TOKEN}


class RedeemCoupon(Request, frozen=True):
    """What to note of a redemption."""

    user_id: UserId | None = None
    lock_token: LockToken | None = None
    reference: Reference | None = None
    metadata: Metadata | None = None
    receipt: ReceiptText | None = None
    EXAMPLE: ClassVar[dict[str, Any]] = {"user_id": _USER, "reference": "order-4711"}


class Query(msgspec.Struct, frozen=True, kw_only=True):
    """Query parameters; one that is unknown or given twice is refused."""


class Page(Query, frozen=True):
    """Which part of a list."""

    limit: Annotated[int, Meta(ge=1, le=1000, description="how many entries a page has at most")] = 50
    cursor: PageCursor | UnsetType = UNSET


class UploadFile(Query, frozen=True):
    """Where the codes of a file belong."""

    book_id: Annotated[str, Meta(description="the book that the codes of a file are for; only with a file")]


class ListCoupons(Page, frozen=True):
    """Which of a user's coupons."""

    book_id: Annotated[str, Meta(description="only coupons of this book")] | UnsetType = UNSET
    status: (
        Annotated[Literal["assigned", "locked", "redeemed"], Meta(description="only coupons of this status")]
        | UnsetType
    ) = UNSET


class ListRejected(Query, frozen=True):
    """Which of the rows that were not inserted."""

    limit: (
        Annotated[
            int, Meta(ge=1, le=1000, description="how many rows a page has at most; 50 unless given; not for CSV")
        ]
        | UnsetType
    ) = UNSET
    cursor: PageCursor | UnsetType = UNSET


class ListCodes(Query, frozen=True):
    """Which of a book's codes."""

    limit: (
        Annotated[
            int, Meta(ge=1, le=1000, description="how many codes a page has at most; 50 unless given; not for CSV")
        ]
        | UnsetType
    ) = UNSET
    cursor: PageCursor | UnsetType = UNSET
    status: Annotated[CodeStatus, Meta(description="only codes of this status")] | UnsetType = UNSET
    prefix: (
        Annotated[
            str,
            Meta(
                description="only codes that begin so; case-insensitive, as codes are",
                extra_json_schema={"pattern": r"^\s*([A-Za-z0-9][A-Za-z0-9._~+@-]{0,63})?\s*$"},
            ),
        ]
        | UnsetType
    ) = UNSET


class CodeCounters(msgspec.Struct, frozen=True):
    """The states exclude each other and add up to `total`."""

    total: Annotated[int, Meta(ge=0, description="codes of the book")]
    available: Annotated[int, Meta(ge=0, description="codes that nobody holds")]
    assigned: Annotated[int, Meta(ge=0, description="codes that somebody holds and may redeem; locked ones, too")]
    redeemed: Annotated[int, Meta(ge=0, description="codes with all uses spent")]
    quarantined: Annotated[
        int, Meta(ge=0, description="codes that may have been assigned before records were lost; nobody gets them")
    ]


class BookAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """A book as it is in force."""

    book_id: BookId
    name: Annotated[str, Meta(description="your name for it")]
    max_codes_per_user: CodesPerUser | None
    max_redemptions_per_code: RedemptionsPerCode | None
    lock_ttl_seconds: TtlSeconds
    starts_at: Annotated[Time, Meta(description="RFC 3339, in UTC; null: at once")] | None
    expires_at: Annotated[Time, Meta(description="RFC 3339, in UTC; null: never")] | None
    ack: Annotated[Ack, Meta(description="when an assign is answered: once the ledger has it, or once Redis does")]
    metadata: Annotated[
        msgspec.Raw, Meta(description="your own JSON object, as it was sent", extra_json_schema={"type": "object"})
    ]
    status: Annotated[BookStatus, Meta(description="as it was set; the book's times are apart from it")]
    created_at: Time
    redemptions: Annotated[int, Meta(ge=0, description="every use made of any code")]
    guess_probability: (
        Annotated[
            float,
            Meta(
                ge=0,
                le=1,
                description="the chance that one guess within its pattern names a code of yours, as it was when codes were"
                " generated last; null: none was",
            ),
        ]
        | None
    )
    codes: CodeCounters
    EXAMPLE: ClassVar[dict[str, Any]] = {
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
        "guess_probability": 1.5e-09,
        "codes": {"total": 1000, "available": 1000, "assigned": 0, "redeemed": 0, "quarantined": 0},
    }


class BooksPage(msgspec.Struct, frozen=True):
    """A part of the tenant's books, newest first."""

    books: list[BookAnswer]
    next_cursor: NextCursor | None
    EXAMPLE: ClassVar[dict[str, Any]] = {"books": [BookAnswer.EXAMPLE], "next_cursor": None}


class RejectedCode(msgspec.Struct, frozen=True):
    """An entry of an upload that was not inserted."""

    row: Annotated[int, Meta(ge=1, description="its place in the list, or its line in the file, from 1")]
    code: Annotated[str, Meta(description="the code; of an invalid one the first 64 characters, as sent")]
    reason: Literal["invalid", "duplicate_in_upload", "duplicate_in_book", "duplicate_in_other_book"]
    detail: Annotated[
        str,
        Meta(
            description="which character of an invalid code and where, or its length; the row that is alike; or the id of"
            " the book that has it"
        ),
    ]


class JobAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """How far an upload file is, and what became of its rows."""

    job_id: Annotated[str, Meta(description="the job's id")]
    book_id: BookId
    status: Annotated[
        Literal["running", "succeeded", "failed"],
        Meta(description="`succeeded`: the codes can be assigned; `failed`: what `inserted` counts stays"),
    ]
    progress: Annotated[float, Meta(ge=0, le=1, description="how much of the work is done")]
    received: Annotated[int, Meta(ge=0, description="rows of the file that are neither blank nor its header")]
    inserted: Annotated[int, Meta(ge=0, description="codes that are new in the book, so far")]
    duplicates: Annotated[int, Meta(ge=0, description="codes that the tenant had already, or that the file has twice")]
    invalid: Annotated[int, Meta(ge=0, description="rows that hold no code")]
    blank: Annotated[int, Meta(ge=0, description="rows with nothing in them, which were skipped")]
    header: Annotated[str, Meta(description="the heading of the column of codes; null: the file has none")] | None
    warnings: Annotated[list[str], Meta(description="what looks wrong with the file, for people")]
    rejected: Annotated[list[RejectedCode], Meta(description="the first 100 rows that were not inserted")]
    rejected_truncated: Annotated[bool, Meta(description="whether more rows were not inserted")]
    error: Annotated[str, Meta(description="why it failed: an outcome, as `book_closed`")] | None
    created_at: Time
    finished_at: Annotated[Time, Meta(description="RFC 3339, in UTC; null: not yet")] | None
    EXAMPLE: ClassVar[dict[str, Any]] = {
        "job_id": "job_64d0c4a54b9c2f30af5a1e77",
        "book_id": _BOOK_ID,
        "status": "running",
        "progress": 0.42,
        "received": 3,
        "inserted": 1,
        "duplicates": 0,
        "invalid": 1,
        "blank": 0,
        "header": "code",
        "warnings": [],
        "rejected": [
            {"row": 3, "code": "no", "reason": "invalid", "detail": "it has 2 characters; a code has 3 to 64"}
        ],
        "rejected_truncated": False,
        "error": None,
        "created_at": _MOMENT,
        "finished_at": None,
    }


class RejectedPage(msgspec.Struct, frozen=True):
    """A part of the rows of an upload that were not inserted, in the order of the file."""

    rejected: Annotated[list[RejectedCode], Meta(description="rows of this page, in the order of the file")]
    next_cursor: NextCursor | None
    EXAMPLE: ClassVar[dict[str, Any]] = {"rejected": JobAnswer.EXAMPLE["rejected"], "next_cursor": None}


class UploadAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What became of an upload."""

    book_id: BookId
    received: Annotated[int, Meta(ge=0, description="codes sent, or asked for")]
    inserted: Annotated[int, Meta(ge=0, description="codes that are new in the book")]
    duplicates: Annotated[int, Meta(ge=0, description="codes that the tenant had already, or that the list has twice")]
    invalid: Annotated[int, Meta(ge=0, description="entries that cannot be a code")]
    rejected: Annotated[list[RejectedCode], Meta(description="the first 100 entries that were not inserted")]
    rejected_truncated: Annotated[bool, Meta(description="whether more entries were not inserted")]
    EXAMPLE: ClassVar[dict[str, Any]] = {
        "book_id": _BOOK_ID,
        "received": 2,
        "inserted": 2,
        "duplicates": 0,
        "invalid": 0,
        "rejected": [],
        "rejected_truncated": False,
    }


class AssignAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The code, and who has it now."""

    code: Code
    book_id: BookId
    user_id: HolderId
    assigned_at: Time
    redemptions_left: UsesLeft | None
    position: Position
    durable: Annotated[bool, Meta(description="whether the ledger has it already")]
    receipt: (
        Annotated[str, Meta(description="in `ack = redis` books: brings the record back should it be lost")] | UnsetType
    ) = UNSET
    EXAMPLE: ClassVar[dict[str, Any]] = {
        "code": _CODE,
        "book_id": _BOOK_ID,
        "user_id": _USER,
        "assigned_at": _MOMENT,
        "redemptions_left": 1,
        "position": "08:1-1",
        "durable": True,
    }


class UserResult(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one user of a list: with status 201 the fields of an assign, otherwise those of its problem."""

    user_id: HolderId
    status: Annotated[int, Meta(description="the status that an assign for this user alone would have")]
    code: Annotated[
        str, Meta(description="with status 201 the code that the user has now, otherwise the problem's code")
    ]
    book_id: BookId | UnsetType = UNSET
    assigned_at: Time | UnsetType = UNSET
    redemptions_left: UsesLeft | UnsetType | None = UNSET
    position: Position | UnsetType = UNSET
    durable: Annotated[bool, Meta(description="whether the ledger has it already")] | UnsetType = UNSET
    receipt: (
        Annotated[str, Meta(description="in `ack = redis` books: brings the record back should it be lost")] | UnsetType
    ) = UNSET
    limit: Annotated[int, Meta(description="of `user_code_limit`: codes that a user may hold")] | UnsetType = UNSET
    held: Annotated[int, Meta(description="of `user_code_limit`: codes that this user holds")] | UnsetType = UNSET


class AssignmentsAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What became of each user of a list."""

    book_id: BookId
    assigned: Annotated[int, Meta(ge=0, description="users with status 201")]
    results: Annotated[list[UserResult], Meta(description="in the order of the request")]
    EXAMPLE: ClassVar[dict[str, Any]] = {
        "book_id": _BOOK_ID,
        "assigned": 1,
        "results": [
            {"status": 201, **AssignAnswer.EXAMPLE},
            {"user_id": "user-43", "status": 409, "code": "user_code_limit", "limit": 1, "held": 1},
        ],
    }


class LockAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """A hold on a coupon."""

    code: Code
    book_id: BookId
    user_id: HolderId
    lock_token: Annotated[str, Meta(description="who shows it may redeem, renew and unlock")]
    locked_until: Annotated[Time, Meta(description="when the lock ends by itself; never after its book")]
    ttl_seconds: Annotated[int, Meta(ge=1, le=3600, description="how many seconds that is from now")]
    EXAMPLE: ClassVar[dict[str, Any]] = {
        "code": _CODE,
        "book_id": _BOOK_ID,
        "user_id": _USER,
        "lock_token": _TOKEN,
        "locked_until": _MOMENT,
        "ttl_seconds": 60,
    }


class RedeemAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """One use of a code."""

    redemption_id: Annotated[str, Meta(description="names this use of the code")]
    code: Code
    book_id: BookId
    user_id: HolderId
    redeemed_at: Time
    redemptions_used: UsesMade
    redemptions_left: UsesLeft | None
    position: Position
    durable: Annotated[bool, Meta(description="always true: a redeem waits for the ledger")]
    EXAMPLE: ClassVar[dict[str, Any]] = {
        "redemption_id": "rd_08_1_3",
        "code": _CODE,
        "book_id": _BOOK_ID,
        "user_id": _USER,
        "redeemed_at": _MOMENT,
        "redemptions_used": 1,
        "redemptions_left": 0,
        "position": "08:1-3",
        "durable": True,
    }


class CouponAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """A code that somebody holds."""

    code: Code
    book_id: BookId
    user_id: HolderId
    status: Annotated[Literal["assigned", "locked", "redeemed"], Meta(description="`redeemed`: all uses are spent")]
    assigned_at: Time
    redemptions_used: UsesMade
    redemptions_left: UsesLeft | None
    locked_until: LockedUntil | None
    EXAMPLE: ClassVar[dict[str, Any]] = {
        "code": _CODE,
        "book_id": _BOOK_ID,
        "user_id": _USER,
        "status": "assigned",
        "assigned_at": _MOMENT,
        "redemptions_used": 0,
        "redemptions_left": 1,
        "locked_until": None,
    }


class CouponsPage(msgspec.Struct, frozen=True):
    """A part of a user's coupons."""

    coupons: list[CouponAnswer]
    next_cursor: NextCursor | None
    EXAMPLE: ClassVar[dict[str, Any]] = {"coupons": [CouponAnswer.EXAMPLE], "next_cursor": None}


class CodeAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """A code, whoever holds it."""

    code: Code
    book_id: BookId
    status: Annotated[
        CodeStatus,
        Meta(
            description="`redeemed`: all uses are spent; `quarantined`: it may have been assigned before records were lost"
        ),
    ]
    book_status: Annotated[
        CodeBookStatus, Meta(description="only in a book that is `active` are codes assigned, locked and redeemed")
    ]
    user_id: Annotated[str, Meta(description="who holds it; null: nobody")] | None
    assigned_at: Annotated[Time, Meta(description="RFC 3339, in UTC; null: not assigned")] | None
    redemptions_used: UsesMade
    redemptions_left: UsesLeft | None
    locked_until: LockedUntil | None
    EXAMPLE: ClassVar[dict[str, Any]] = {**CouponAnswer.EXAMPLE, "book_status": "active"}


class CodesPage(msgspec.Struct, frozen=True):
    """A part of a book's codes, in their order. A page may have fewer codes than its limit, or none, before the last one."""

    codes: list[CodeAnswer]
    next_cursor: NextCursor | None
    EXAMPLE: ClassVar[dict[str, Any]] = {"codes": [CodeAnswer.EXAMPLE], "next_cursor": None}


class PatternAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What a pattern is good for. Nothing was made."""

    capacity: Annotated[
        msgspec.Raw,
        Meta(description="how many codes the pattern can name", extra_json_schema={"type": "integer", "minimum": 1}),
    ]
    already_used: Annotated[int, Meta(ge=0, description="your codes that lie in it, uploaded ones too")]
    guess_probability: Annotated[
        float,
        Meta(
            ge=0,
            le=1,
            description="the chance that one guess within it names one of your codes, or of `total` more",
        ),
    ]
    samples: Annotated[
        list[str],
        Meta(
            max_length=10, description="ten codes of its form that you do not have; fewer where it hardly has so many"
        ),
    ]
    fits: Annotated[bool, Meta(description="whether so many codes leave half of the pattern free, as they must")]
    EXAMPLE: ClassVar[dict[str, Any]] = {
        "capacity": 656_100_000_000,
        "already_used": 0,
        "guess_probability": 1.5e-09,
        "samples": ["SUMMER-9SJG-2HF7"],
        "fits": True,
    }


class ProblemBody(msgspec.Struct, kw_only=True):
    """RFC 9457, as `application/problem+json`; more members as the outcome has numbers to act on."""

    type: Annotated[str, Meta(description="the address at which the outcome is explained: `/problems/<code>`")]
    title: Annotated[str, Meta(description="the outcome in a few words")]
    status: Annotated[int, Meta(ge=400, le=599, description="the HTTP status")]
    detail: Annotated[str, Meta(description="what it means, for people")]
    code: Annotated[str, Meta(description="the outcome, to act on")]
    request_id: Annotated[
        str, Meta(description="the request's id, as in `X-Request-Id`; quote it when you ask for help")
    ]
