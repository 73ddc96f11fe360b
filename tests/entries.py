"""Entries and batches as a stream would bring them, made of events."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from coupon_svc.domain.chain import CHAIN_START
from coupon_svc.domain.events import COUPON_CONFIRMED, COUPON_REDEEMED, Entry, Event
from coupon_svc.domain.position import Epoch, Position, Seq
from coupon_svc.postgres.events import Batch, DeadLetter
from coupon_svc.redis.codec import StreamEntry


def row_of(event: Event) -> list[str]:
    """An event as it stands in an entry."""
    row = [event.event, event.book_id, event.code, event.user_id, event.idem or "", event.fingerprint or ""]
    if event.event == COUPON_REDEEMED:
        row += [str(event.uses), event.reference or "", event.metadata or ""]
    if event.event == COUPON_CONFIRMED:
        row += [str(event.uses)]
    return row


def entry_of(*events: Event, after: str = "", tip: str = "") -> Entry:
    """One entry with all these events, whose positions follow each other."""
    last = events[-1]
    body = msgspec.json.encode([row_of(event) for event in events])
    return Entry(last.epoch, last.seq, len(events), after, tip, last.at_ms, body)


def fields_of(entry: Entry) -> dict[str, str | bytes]:
    """The fields of the stream's entry."""
    return {
        "n": str(entry.n), "after": entry.after, "tip": entry.tip, "at_ms": str(entry.at_ms), "events": entry.body,
    }  # fmt: skip


def as_read(entry: Entry) -> StreamEntry:
    """The entry as it is read from the stream."""
    fields = [text if isinstance(text, bytes) else text.encode() for pair in fields_of(entry).items() for text in pair]
    return StreamEntry(Position(Epoch(entry.epoch), Seq(entry.seq)), fields)


def batch_of(
    shard: int,
    epoch: int,
    generation: int,
    committed: int,
    events: Sequence[Event],
    dead: Sequence[DeadLetter] = (),
    *,
    chain: bytes = CHAIN_START,
    tip: str = "",
) -> Batch:
    """A batch with an entry for each event and for each dead letter, in the order of their positions; all with this tip."""
    entries = [entry_of(event, after=tip, tip=tip) for event in events]
    entries += [Entry(epoch, letter.seq, 1, tip, tip, 1, letter.fields or b"[]") for letter in dead]
    entries.sort(key=lambda entry: entry.seq)
    upto = entries[-1].seq if entries else committed
    return Batch(shard, epoch, generation, committed, upto, entries, events, dead, tip, chain)
