"""What Redis keeps, as text and as types: stream entries, idempotency records, books. Holdings: domain/holding.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from coupon_svc.domain.books import Ack, Book
from coupon_svc.domain.holding import format_positions, parse_positions
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

    @classmethod
    def decode(cls, text: str) -> AssignRecord:
        """The record in the JSON that Redis keeps. Raises ValueError."""
        fingerprint, code, at_ms, positions, ack, left, *already_yours = _texts(text)
        assigned, last = parse_positions(positions)
        return cls(
            fingerprint, code, int(at_ms), assigned, last, Ack(ack), _limit(left), already_yours == [ALREADY_YOURS]
        )

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

    @classmethod
    def decode(cls, text: str) -> RedeemRecord:
        """The record in the JSON that Redis keeps. Raises ValueError."""
        fingerprint, user_id, at_ms, position, uses, left = _texts(text)
        return cls(fingerprint, user_id, int(at_ms), Position.parse(position), int(uses), _limit(left))

    def encode(self) -> str:
        """The JSON that Redis keeps."""
        left = _text(self.redemptions_left)
        return _json([self.fingerprint, self.user_id, str(self.at_ms), str(self.position), str(self.uses), left])


class LockRecord(NamedTuple):
    """The idempotency record of a lock. The positions are those of the coupon."""

    fingerprint: str
    user_id: str
    lock_token: str
    until_ms: int
    ttl_ms: int
    assigned: Position
    last: Position
    ack: Ack

    @classmethod
    def decode(cls, text: str) -> LockRecord:
        """The record in the JSON that Redis keeps. Raises ValueError."""
        fingerprint, user_id, token, until_ms, ttl_ms, positions, ack = _texts(text)
        assigned, last = parse_positions(positions)
        return cls(fingerprint, user_id, token, int(until_ms), int(ttl_ms), assigned, last, Ack(ack))

    def encode(self) -> str:
        """The JSON that Redis keeps."""
        times = (str(self.until_ms), str(self.ttl_ms))
        positions = format_positions(self.assigned, self.last)
        return _json([self.fingerprint, self.user_id, self.lock_token, *times, positions, self.ack.value])


class UnlockRecord(NamedTuple):
    """The idempotency record of an unlock, whose answer says nothing else."""

    fingerprint: str

    @classmethod
    def decode(cls, text: str) -> UnlockRecord:
        """The record in the JSON that Redis keeps. Raises ValueError."""
        (fingerprint,) = _texts(text)
        return cls(fingerprint)

    def encode(self) -> str:
        """The JSON that Redis keeps."""
        return _json([self.fingerprint])


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


def _limit(text: str) -> int | None:
    return int(text) if text else None


def _texts(text: str) -> list[str]:
    return msgspec.json.decode(text, type=list[str])


def _json(answer: list[str]) -> str:
    return msgspec.json.encode(answer).decode()
