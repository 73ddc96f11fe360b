"""What Redis keeps, as text and as types: stream entries, books, and the idempotency records that a recovery restores.
Holdings: domain/holding.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from coupon_svc.domain.books import Ack, Book
from coupon_svc.domain.holding import format_positions
from coupon_svc.domain.position import Position

ALREADY_YOURS = "already_yours"


class StreamEntry(NamedTuple):
    """An entry of a shard's stream, whoever wrote it. What a script wrote is an `Entry` (domain/events.py)."""

    position: Position
    fields: list[bytes]
    """Names and values in turn."""

    @classmethod
    def of(cls, raw: Sequence[Any]) -> StreamEntry:
        """The entry in what Redis replies, as bytes: its id, and its fields."""
        entry_id, fields = raw
        return cls(Position.parse(entry_id.decode()), fields)


class AssignRecord(NamedTuple):
    """The idempotency record of an assign."""

    fingerprint: str
    code: str
    at_ms: int
    assigned: Position
    last: Position
    ack: Ack
    redemptions_left: int | None
    already_yours: bool = False

    def encode(self) -> str:
        """The JSON that Redis keeps."""
        positions = format_positions(self.assigned, self.last)
        answer = [self.fingerprint, self.code, str(self.at_ms), positions, self.ack.value, _text(self.redemptions_left)]
        return _json([*answer, ALREADY_YOURS] if self.already_yours else answer)


class RedeemRecord(NamedTuple):
    """The idempotency record of a redeem."""

    fingerprint: str
    user_id: str
    at_ms: int
    position: Position
    uses: int
    redemptions_left: int | None

    def encode(self) -> str:
        """The JSON that Redis keeps."""
        left = _text(self.redemptions_left)
        return _json([self.fingerprint, self.user_id, str(self.at_ms), str(self.position), str(self.uses), left])


class ListRecord(NamedTuple):
    """The idempotency record of a list of assigns as a whole; its users have records of their own."""

    fingerprint: str

    def encode(self) -> str:
        """The JSON that Redis keeps."""
        return _json([self.fingerprint])


def encode_book(book: Book) -> dict[str, str]:
    """A book's rules as fields of its hash. What is unlimited or unset is the empty text."""
    return {
        "tenant_id": str(book.tenant_id),
        "status": book.status.value,
        "starts_at_ms": _text(book.starts_at_ms),
        "expires_at_ms": _text(book.expires_at_ms),
        "ack": book.ack.value,
        "max_redemptions_per_code": _text(book.max_redemptions_per_code),
        "max_codes_per_user": _text(book.max_codes_per_user),
        "lock_ttl_ms": str(book.lock_ttl_seconds * 1000),
        "total": str(book.total),
        "unlent": str(book.unlent),
        "stored": msgspec.json.encode(book).decode(),
    }


def decode_stored_book(stored: str) -> Book:
    """The book in the field `stored` of its hash. Raises ValueError."""
    return msgspec.json.decode(stored, type=Book)


def _text(number: int | None) -> str:
    return "" if number is None else str(number)


def _json(answer: list[str]) -> str:
    return msgspec.json.encode(answer).decode()
