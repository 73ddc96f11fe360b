"""A book's pool as its owner counts it."""

from __future__ import annotations

from coupon_svc.domain.books import Ack


class Pool:
    """The codes of one book that Redis has and nobody holds, as counted from the events."""

    __slots__ = ("ack", "block", "in_pool", "refilled_at", "to_lend", "unlent")

    def __init__(self, ack: Ack, block: int) -> None:
        self.ack = ack
        self.in_pool = 0
        self.unlent = 0
        self.block = block
        self.to_lend = 0
        """Codes of the block under way that are not lent yet."""
        self.refilled_at = 0.0

    def wants_refill(self) -> bool:
        """Whether a block is under way, or half a block or less is left; and Postgres has more."""
        return self.unlent > 0 and (self.to_lend > 0 or self.in_pool <= self.block // 2)
