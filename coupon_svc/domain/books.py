"""A coupon book: its rules and what of it may change."""

from __future__ import annotations

from enum import StrEnum

import msgspec

from coupon_svc.domain.errors import CouponError


class Ack(StrEnum):
    """When an assign is answered: once the ledger has it, or as soon as Redis has decided."""

    LEDGER = "ledger"
    REDIS = "redis"


class BookStatus(StrEnum):
    ACTIVE = "active"
    PAUSED = "paused"
    CLOSED = "closed"


class BookRules(msgspec.Struct, frozen=True, kw_only=True):
    """What a caller says of a book. Times are Unix milliseconds; None means unlimited or unset."""

    name: str
    max_codes_per_user: int | None
    max_redemptions_per_code: int | None
    lock_ttl_seconds: int
    starts_at_ms: int | None
    expires_at_ms: int | None
    ack: Ack
    metadata: msgspec.Raw
    """The caller's own JSON object, kept to the letter."""


class Book(BookRules, frozen=True, kw_only=True):
    """A book as the ledger stores it.

    `version` grows by one with every change of the rules or of the codes; Redis takes only a newer one.
    `total` counts the codes of the book, `lent` those of them that Redis was lent. `quarantined` counts those that may have
    been assigned before records were lost.
    """

    book_id: str
    tenant_id: int
    status: BookStatus
    created_at_ms: int
    version: int
    total: int
    lent: int
    quarantined: int
    guess_probability: float | None = None
    """The chance that one guess within the pattern by which codes were generated last names a code of the tenant, as it was
    then; the highest, where there were several patterns."""

    @property
    def unlent(self) -> int:
        """Codes that are still to be lent."""
        return self.total - self.lent - self.quarantined


class InvalidPeriod(CouponError):
    """A book would end before it begins. `reason` says what to change."""

    def __init__(self) -> None:
        self.reason = "must be later than starts_at"
        super().__init__(f"expires_at {self.reason}")


def check_period(starts_at_ms: int | None, expires_at_ms: int | None) -> None:
    """Raises InvalidPeriod when a book would end before it begins."""
    if starts_at_ms is not None and expires_at_ms is not None and starts_at_ms >= expires_at_ms:
        raise InvalidPeriod
