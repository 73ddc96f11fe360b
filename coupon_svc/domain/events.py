"""What a script did, as it travels from the stream to the ledger."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import Any, NamedTuple

from coupon_svc.domain.errors import CouponError
from coupon_svc.domain.position import Epoch, Position, Seq

COUPON_ASSIGNED = "coupon_assigned"
COUPON_REDEEMED = "coupon_redeemed"


class Event(NamedTuple):
    """One event of a shard. `uses` tells which use of the code a redemption was, from 1."""

    epoch: int
    seq: int
    event: str
    book_id: str
    code: str
    user_id: str
    at_ms: int
    uses: int | None = None
    reference: str | None = None
    metadata: str | None = None
    idem: str | None = None
    fingerprint: str | None = None

    @property
    def position(self) -> Position:
        return Position(Epoch(self.epoch), Seq(self.seq))

    @property
    def record(self) -> tuple[Any, ...]:
        """The fields of RECORD_FIELDS: what the event's hash covers beside its shard and epoch."""
        fields: tuple[Any, ...] = _record(self)
        return fields


RECORD_FIELDS = (
    "seq", "event", "book_id", "code", "user_id", "at_ms", "uses", "reference", "metadata", "idem", "fingerprint",
)  # fmt: skip
_record = itemgetter(*map(Event._fields.index, RECORD_FIELDS))


class MalformedEvent(CouponError):
    """A stream entry that no script of ours wrote. The message names what is wrong and holds no value of it."""


def parse_event(position: Position, fields: Sequence[str]) -> Event:
    """The event in a stream entry's fields, a flat list of names and values. Raises MalformedEvent."""
    epoch, seq = position
    try:
        if fields[1] == COUPON_ASSIGNED and len(fields) == 14:
            _, event, _, book_id, _, code, _, user_id, _, at_ms, _, idem, _, fingerprint = fields
            return Event(
                epoch, seq, event, book_id, code, user_id, _int(at_ms, 63), idem=idem or None,
                fingerprint=fingerprint or None,
            )  # fmt: skip
        values = dict(zip(fields[::2], fields[1::2], strict=True))
        if values["event"] != COUPON_REDEEMED:
            raise MalformedEvent("an event of no known kind")
        return Event(
            epoch,
            seq,
            COUPON_REDEEMED,
            values["book"],
            values["code"],
            values["user"],
            _int(values["at_ms"], 63),
            _int(values["uses"], 31),
            values["reference"] or None,
            values["metadata"] or None,
            values["idem"] or None,
            values["fingerprint"] or None,
        )
    except (KeyError, ValueError, IndexError) as error:
        raise MalformedEvent(f"a field is missing, no number, or out of bounds ({type(error).__name__})") from None


def is_event(fields: Sequence[str], event: Event | None) -> bool:
    """Whether a stream entry's fields are those of `event`."""
    try:
        return event is not None and parse_event(event.position, fields) == event
    except MalformedEvent:
        return False


def _int(text: str, bits: int) -> int:
    """A whole number from 1 that the ledger's column can hold. Raises ValueError."""
    number = int(text)
    if not 0 < number < 1 << bits:
        raise ValueError
    return number
