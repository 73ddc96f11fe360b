"""A coupon, as Redis keeps it under its code: `4-1/4-17 2 1700000000000 ann`."""

from __future__ import annotations

from typing import NamedTuple

from coupon_svc.domain.position import Position


class Holding(NamedTuple):
    """Who holds a code, since when, and how often it was redeemed."""

    assigned: Position
    """Of the event that assigned the code."""
    last: Position
    """Of the last redemption that Redis saw itself; that of the assignment before it, and after a recovery."""
    uses: int
    at_ms: int
    """When the code was assigned, in Unix milliseconds."""
    user_id: str
    """May contain spaces, and is therefore the last field of the text."""

    @classmethod
    def parse(cls, text: str) -> Holding:
        """The holding in the text that Redis keeps. Raises ValueError."""
        positions, uses, at_ms, user_id = text.split(" ", 3)
        assigned, last = parse_positions(positions)
        return cls(assigned, last, int(uses), int(at_ms), user_id)

    def format(self) -> str:
        """The text that Redis keeps."""
        return f"{format_positions(self.assigned, self.last)} {self.uses} {self.at_ms} {self.user_id}"


class ListedCoupon(NamedTuple):
    """A member of a user's list of coupons in a shard: `bk_07…:SUMMER-1`. They are in the order of their text."""

    book_id: str
    code: str

    @classmethod
    def parse(cls, text: str) -> ListedCoupon:
        """The member in the text that Redis keeps."""
        book_id, _, code = text.partition(":")
        return cls(book_id, code)

    def format(self) -> str:
        """The text that Redis keeps."""
        return f"{self.book_id}:{self.code}"

    @staticmethod
    def range(book_id: str | None, after: str = "") -> tuple[str, str]:
        """The range of members, as `ZRANGE … BYLEX` takes it, of a book or of all, behind the text `after`."""
        low = f"[{book_id}:" if book_id else "-"
        high = f"({book_id};" if book_id else "+"
        return f"({after}" if after else low, high


def parse_positions(text: str) -> tuple[Position, Position]:
    """(assigned, last) from `4-1`, or from `4-1/4-17` of a code that was redeemed since. Raises ValueError."""
    assigned, redeemed, last = text.partition("/")
    first = Position.parse(assigned)
    return first, Position.parse(last) if redeemed else first


def format_positions(assigned: Position, last: Position) -> str:
    """The text that `parse_positions` takes."""
    return str(assigned) if last == assigned else f"{assigned}/{last}"
