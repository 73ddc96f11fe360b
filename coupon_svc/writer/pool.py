"""A book's pool as its owner counts it."""

from __future__ import annotations

from coupon_svc.domain.books import Ack


class Pool:
    """The codes of one book that Redis has and nobody holds, as counted from the events."""

    __slots__ = ("ack", "block", "in_pool", "refilled_at", "unlent")

    def __init__(self, ack: Ack, block: int) -> None:
        self.ack = ack
        self.in_pool = 0
        self.unlent = 0
        self.block = block
        self.refilled_at = 0.0

    def wants_refill(self) -> bool:
        """Whether half a block or less is left, and Postgres has more."""
        return self.unlent > 0 and self.in_pool <= self.block // 2
