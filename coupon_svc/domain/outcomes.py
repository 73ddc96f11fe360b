"""The words the service answers with. One word is the Lua reply, the problem's code, the metric label and the docs."""

from __future__ import annotations

from enum import StrEnum

from coupon_svc.domain.errors import CouponError


class Outcome(StrEnum):
    """Every way a request can be refused, in the order in which they are judged: the first that applies is answered."""

    TOO_MANY_CONNECTIONS = "too_many_connections"
    REQUEST_TIMEOUT = "request_timeout"
    SHUTTING_DOWN = "shutting_down"
    MALFORMED_HTTP = "malformed_http"
    NOT_FOUND = "not_found"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    UNAUTHENTICATED = "unauthenticated"
    MISSING_SCOPE = "missing_scope"
    RATE_LIMITED = "rate_limited"
    TOO_MANY_UNKNOWN_CODES = "too_many_unknown_codes"
    BODY_TOO_LARGE = "body_too_large"
    UNSUPPORTED_MEDIA_TYPE = "unsupported_media_type"
    MALFORMED_JSON = "malformed_json"
    INVALID_IDEMPOTENCY_KEY = "invalid_idempotency_key"
    INVALID_REQUEST = "invalid_request"
    PATTERN_CAPACITY = "pattern_capacity"
    RECOVERING = "recovering"
    STORE_UNAVAILABLE = "store_unavailable"
    IDEMPOTENCY_KEY_REUSED = "idempotency_key_reused"
    IDEMPOTENCY_IN_PROGRESS = "idempotency_in_progress"
    BOOK_NOT_FOUND = "book_not_found"
    CODE_NOT_FOUND = "code_not_found"
    JOB_NOT_FOUND = "job_not_found"
    BOOK_CLOSED = "book_closed"
    BOOK_PAUSED = "book_paused"
    BOOK_NOT_STARTED = "book_not_started"
    BOOK_EXPIRED = "book_expired"
    ALREADY_ASSIGNED = "already_assigned"
    CODE_QUARANTINED = "code_quarantined"
    USER_CODE_LIMIT = "user_code_limit"
    BOOK_EXHAUSTED = "book_exhausted"
    REFILLING = "refilling"
    NOT_ASSIGNED = "not_assigned"
    NOT_HOLDER = "not_holder"
    ALREADY_REDEEMED = "already_redeemed"
    LOCK_NOT_HELD = "lock_not_held"
    LOCKED = "locked"
    BACKLOG_FULL = "backlog_full"
    LEDGER_BEHIND = "ledger_behind"
    OUTCOME_UNKNOWN = "outcome_unknown"
    INTERNAL_ERROR = "internal_error"


class Refused(CouponError):
    """A request is answered with an outcome instead of a result.

    `facts` are what a caller can act on: `limit` and `held`, `capacity`, `errors`, … `detail` says more to people than the
    outcome does. Neither may hold a code, a key or a token.
    """

    def __init__(self, outcome: Outcome, detail: str = "", **facts: object) -> None:
        super().__init__(outcome.value)
        self.outcome = outcome
        self.detail = detail
        self.facts = facts
