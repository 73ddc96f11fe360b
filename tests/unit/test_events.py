"""Events come out of a stream entry as a script put them in, and nothing else is taken for one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coupon_svc.domain.events import (
    COUPON_ASSIGNED,
    COUPON_CONFIRMED,
    COUPON_REDEEMED,
    RECORD_FIELDS,
    Entry,
    Event,
    MalformedEntry,
    events_of,
    parse_entry,
)
from coupon_svc.domain.position import Epoch, Position, Seq
from tests.entries import entry_of, fields_of
from tests.unit.test_position import positions

AT = Position.parse("4-17")
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)
maybe = st.none() | texts
assigned = st.builds(
    lambda at, book, code, user, at_ms, idem, fingerprint: Event(
        at.epoch, at.seq, COUPON_ASSIGNED, book, code, user, at_ms, idem=idem, fingerprint=fingerprint
    ),
    positions, texts, texts, texts, st.integers(1, 2**63 - 1), maybe, maybe,
)  # fmt: skip
redeemed = st.builds(
    lambda at, book, code, user, at_ms, uses, reference, metadata, idem, fingerprint: Event(
        at.epoch, at.seq, COUPON_REDEEMED, book, code, user, at_ms, uses, reference, metadata, idem, fingerprint
    ),
    positions, texts, texts, texts, st.integers(1, 2**63 - 1), st.integers(1, 2**31 - 1), maybe, maybe, maybe, maybe,
)  # fmt: skip
confirmed = st.builds(
    lambda at, book, code, user, at_ms, uses, idem, fingerprint: Event(
        at.epoch, at.seq, COUPON_CONFIRMED, book, code, user, at_ms, uses, idem=idem, fingerprint=fingerprint
    ),
    positions, texts, texts, texts, st.integers(1, 2**63 - 1), st.integers(0, 2**31 - 1), texts, texts,
)  # fmt: skip


def old_fields(event: Event) -> list[bytes]:
    """The fields as scripts of older versions wrote them, one event in each entry."""
    fields = {
        "event": event.event,
        "book": event.book_id,
        "code": event.code,
        "user": event.user_id,
        "at_ms": str(event.at_ms),
    }
    if event.event == COUPON_REDEEMED:
        fields |= {"uses": str(event.uses), "reference": event.reference or "", "metadata": event.metadata or ""}
    fields |= {"idem": event.idem or "", "fingerprint": event.fingerprint or ""}
    return [part.encode() for pair in fields.items() for part in pair]


def new_fields(entry: Entry) -> list[bytes]:
    return [part if isinstance(part, bytes) else part.encode() for pair in fields_of(entry).items() for part in pair]


@given(assigned | redeemed)
def test_an_event_comes_back_from_an_entry_of_an_older_version(event: Event) -> None:
    entry = parse_entry(event.position, old_fields(event))
    assert (entry.n, entry.after, entry.tip) == (1, "", "")
    assert events_of(entry) == [event]


@given(
    st.lists(assigned | redeemed | confirmed, min_size=1, max_size=5),
    texts.filter(lambda text: "\0" not in text),
    texts.filter(lambda text: "\0" not in text),
)
def test_events_come_back_from_their_entry(events: list[Event], after: str, tip: str) -> None:
    epoch, at_ms = events[0].epoch, events[0].at_ms
    events = [event._replace(epoch=epoch, seq=seq, at_ms=at_ms) for seq, event in enumerate(events, 8)]
    entry = entry_of(*events, after=after, tip=tip)
    parsed = parse_entry(Position(Epoch(entry.epoch), Seq(entry.seq)), new_fields(entry))
    assert parsed == entry
    assert events_of(parsed) == events
    assert (parsed.before, list(parsed.seqs)) == (7, [event.seq for event in events])


@given(assigned | redeemed | confirmed)
def test_the_hash_covers_every_field_but_the_epoch_which_it_covers_apart(event: Event) -> None:
    assert set(RECORD_FIELDS) == set(Event._fields) - {"epoch"}
    assert event.record == tuple(getattr(event, name) for name in RECORD_FIELDS)


@pytest.mark.parametrize(
    ("name", "value"),
    [("n", "0"), ("n", "many"), ("n", str(1 << 31)), ("at_ms", "yesterday"), ("at_ms", "0"), ("at_ms", str(1 << 63))],
)
def test_an_entry_with_a_field_that_no_script_writes_is_malformed(name: str, value: str) -> None:
    fields = new_fields(entry_of(Event(4, 17, COUPON_ASSIGNED, "b", "c", "u", 1)))
    fields[fields.index(name.encode()) + 1] = value.encode()
    with pytest.raises(MalformedEntry) as error:
        parse_entry(AT, fields)
    assert value not in str(error.value)


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{}", b"\xff", b"[[]]", b'[["coupon_eaten","b","c","u","",""]]', b'[["coupon_assigned","b","c","u",""]]',
        b'[["coupon_redeemed","b","c","u","","","none","",""]]', b'[["coupon_redeemed","b","c","u","","","0","",""]]',
        b'[["coupon_assigned","b","c",1,"",""]]', b"[]", b'[["coupon_confirmed","b","c","u","k","f","-1"]]',
        b'[["coupon_confirmed","b","c","u","k","f","00"]]', b'[["coupon_confirmed","b","c","u","k","f"]]',
    ],
)  # fmt: skip
def test_events_that_no_script_writes_are_malformed(body: bytes) -> None:
    entry = entry_of(Event(4, 17, COUPON_ASSIGNED, "b", "c", "u", 1))._replace(body=body)
    with pytest.raises(MalformedEntry):
        events_of(entry)


@pytest.mark.parametrize(
    "fields",
    [
        [],
        [b"n", b"1", b"after", b"", b"tip", b"\0", b"at_ms", b"1", b"events", b"[]"],
        [b"by", b"hand"],
        [b"n", b"1"],
        [b"event"],
        [b"event", b"\xff", b"at_ms", b"1"],
    ],
)
def test_what_somebody_put_into_the_stream_is_malformed(fields: list[bytes]) -> None:
    with pytest.raises(MalformedEntry):
        parse_entry(AT, fields)
