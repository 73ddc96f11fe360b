"""What scripts did, as it travels from the stream to the ledger: an entry for each call's part of a shard."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import msgspec

from coupon_svc.domain.errors import CouponError
from coupon_svc.domain.position import Epoch, Position, Seq

COUPON_ASSIGNED = "coupon_assigned"
COUPON_REDEEMED = "coupon_redeemed"
COUPON_CONFIRMED = "coupon_confirmed"
"""An assign by name, with an Idempotency-Key, found the code to be the user's already. Nothing follows from it but the key's
answer."""


class Event(NamedTuple):
    """One event of a shard. `uses` tells which use of the code a redemption was, from 1; and how many there had been when a
    coupon was confirmed."""

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


class MalformedEntry(CouponError):
    """A stream entry that no script of ours wrote. The message names what is wrong and holds no value of it."""


class Entry(NamedTuple):
    """An entry of a shard's stream. Its events are at the positions seq - n + 1 … seq."""

    epoch: int
    seq: int
    n: int
    after: str
    """The tip of the entry before it, "" at the beginning of an epoch."""
    tip: str
    """Tells it from every other entry that was ever made at this position; "" in the format of older versions."""
    at_ms: int
    """When its events were decided, by Redis's clock."""
    body: bytes
    """The events as they stand in the stream: a JSON array of arrays of texts."""

    @property
    def before(self) -> int:
        """The seq that it follows."""
        return self.seq - self.n

    @property
    def seqs(self) -> range:
        return range(self.seq - self.n + 1, self.seq + 1)


ENTRY_RECORD_FIELDS = ("seq", "n", "after", "tip", "at_ms", "body")
"""What an entry's hash covers beside its shard and epoch."""


def parse_entry(position: Position, fields: Sequence[bytes]) -> Entry:
    """The entry in a stream entry's fields, a flat list of names and values. Raises MalformedEntry.

    Its events may still be malformed: `events_of` tells.
    """
    epoch, seq = position
    try:
        if fields[0] == b"n":
            _, n, _, after, _, tip, _, at_ms, _, body = fields
            if b"\0" in after + tip:  # which no column of the ledger can hold
                raise ValueError
            return Entry(epoch, seq, _int(n, 31), after.decode(), tip.decode(), _int(at_ms, 63), body)
        values = {name.decode(): value.decode() for name, value in zip(fields[::2], fields[1::2], strict=True)}
        names = ["event", "book", "code", "user", "idem", "fingerprint"]
        if "uses" in values:
            names += ["uses", "reference", "metadata"]
        body = _encode([[values[name] for name in names]])
        return Entry(epoch, seq, 1, "", "", _int(values["at_ms"], 63), body)
    except (KeyError, ValueError, IndexError) as error:
        raise MalformedEntry(
            f"a field is missing, no text, no number or out of bounds ({type(error).__name__})"
        ) from None


def events_of(entry: Entry) -> list[Event]:
    """The events of an entry. Raises MalformedEntry."""
    epoch, seq, at_ms = entry.epoch, entry.before, entry.at_ms
    events = []
    try:
        rows = _decode(entry.body)
        if len(rows) != entry.n:
            raise MalformedEntry("the entry has another number of events than it says")
        for row in rows:
            seq += 1
            if row[0] == COUPON_ASSIGNED:
                kind, book_id, code, user_id, idem, fingerprint = row
                # Not Event(…), which takes twice as long: the writer does this for every assign.
                fields = (
                    epoch, seq, kind, book_id, code, user_id, at_ms, None, None, None, idem or None, fingerprint or None
                )  # fmt: skip
                events.append(tuple.__new__(Event, fields))
            elif row[0] == COUPON_REDEEMED:
                kind, book_id, code, user_id, idem, fingerprint, uses, reference, metadata = row
                events.append(
                    Event(
                        epoch,
                        seq,
                        kind,
                        book_id,
                        code,
                        user_id,
                        at_ms,
                        _int(uses, 31),
                        reference or None,
                        metadata or None,
                        idem or None,
                        fingerprint or None,
                    )
                )
            elif row[0] == COUPON_CONFIRMED:
                kind, book_id, code, user_id, idem, fingerprint, uses = row
                used = 0 if uses == "0" else _int(uses, 31)
                events.append(
                    Event(epoch, seq, kind, book_id, code, user_id, at_ms, used, idem=idem, fingerprint=fingerprint)
                )
            else:
                raise MalformedEntry("an event of no known kind")
    except (ValueError, IndexError, msgspec.MsgspecError) as error:
        raise MalformedEntry(f"its events cannot be read ({type(error).__name__})") from None
    return events


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(list[list[str]]).decode


def _int(text: str | bytes, bits: int) -> int:
    """A whole number from 1 that the ledger's column can hold. Raises ValueError."""
    number = int(text)
    if not 0 < number < 1 << bits:
        raise ValueError
    return number
