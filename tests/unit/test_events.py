"""Events come out of a stream entry as a script put them in, and nothing else is taken for one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coupon_svc.domain.events import (
    COUPON_ASSIGNED,
    COUPON_REDEEMED,
    RECORD_FIELDS,
    Event,
    MalformedEvent,
    is_event,
    parse_event,
)
from coupon_svc.domain.position import Position
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


def entry(event: Event) -> list[str]:
    """The fields as assign_coupon.lua and redeem_coupon.lua write them."""
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
    return [part for pair in fields.items() for part in pair]


@given(assigned | redeemed)
def test_an_event_comes_back_from_its_entry(event: Event) -> None:
    assert parse_event(event.position, entry(event)) == event
    assert is_event(entry(event), event)


@given(assigned | redeemed)
def test_the_hash_covers_every_field_but_the_epoch_which_it_covers_apart(event: Event) -> None:
    assert set(RECORD_FIELDS) == set(Event._fields) - {"epoch"}
    assert event.record == tuple(getattr(event, name) for name in RECORD_FIELDS)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("event", "coupon_eaten"),
        ("at_ms", "yesterday"),
        ("at_ms", "0"),
        ("at_ms", str(1 << 63)),
        ("uses", str(1 << 31)),
    ],
)
def test_an_entry_with_a_field_that_no_script_writes_is_malformed(name: str, value: str) -> None:
    fields = entry(Event(4, 17, COUPON_REDEEMED, "b", "c", "u", 1, 1))
    fields[fields.index(name) + 1] = value
    with pytest.raises(MalformedEvent) as error:
        parse_event(AT, fields)
    assert value not in str(error.value)


@pytest.mark.parametrize("number", range(0, 10, 2))
def test_an_entry_without_one_of_its_fields_is_malformed(number: int) -> None:
    fields = entry(Event(4, 17, COUPON_REDEEMED, "b", "c", "u", 1, 1))
    with pytest.raises(MalformedEvent):
        parse_event(AT, fields[:number] + fields[number + 2 :])
