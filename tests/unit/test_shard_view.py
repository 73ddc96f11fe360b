"""The life of a shard in an API process: each state, each transition."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from coupon_svc.redis.keys import ShardKeys
from coupon_svc.redis.shard_view import Certificate, Seen, ShardView, ViewState

UNVERIFIED, OPEN, SHUT, SUSPECT, OVER = ViewState

EPOCH, SEEN_SEQ = 3, 20
"""The epoch in which the shard was open, and what was seen of it."""


def certify(view: ShardView, epoch: int, seq: int) -> None:
    view.certify(Certificate(epoch, seq, committed=0, backlog_max=100), view.seen)


TRANSITIONS: dict[str, Callable[[ShardView], object]] = {
    "disconnect": lambda view: view.disconnect(),
    "suspect": lambda view: view.suspect(),
    "refuse": lambda view: view.refuse(),
    "certified as it was seen": lambda view: certify(view, EPOCH, SEEN_SEQ),
    "certified behind what was seen": lambda view: certify(view, EPOCH, SEEN_SEQ - 1),
    "certified in an older epoch": lambda view: certify(view, EPOCH - 1, 99),
    "certified in a newer epoch": lambda view: certify(view, EPOCH + 1, 0),
    "the same epoch begins": lambda view: view.epoch_began(EPOCH, 0),
    "a newer epoch begins": lambda view: view.epoch_began(EPOCH + 1, 0),
}

#                                   UNVERIFIED  OPEN        SHUT        SUSPECT     OVER
TABLE = {
    "disconnect":                     (UNVERIFIED, UNVERIFIED, UNVERIFIED, UNVERIFIED, UNVERIFIED),
    "suspect":                        (UNVERIFIED, SUSPECT,    SHUT,       SUSPECT,    OVER),
    "refuse":                         (SHUT,       SHUT,       SHUT,       SHUT,       SHUT),
    "certified as it was seen":       (OPEN,       OPEN,       OPEN,       OPEN,       SHUT),
    "certified behind what was seen": (SHUT,       SHUT,       SHUT,       SHUT,       SHUT),
    "certified in an older epoch":    (SHUT,       SHUT,       SHUT,       SHUT,       SHUT),
    "certified in a newer epoch":     (OPEN,       OPEN,       OPEN,       OPEN,       OPEN),
    "the same epoch begins":          (UNVERIFIED, OPEN,       SHUT,       SUSPECT,    OVER),
    "a newer epoch begins":           (UNVERIFIED, OVER,       SHUT,       OVER,       OVER),
}  # fmt: skip
"""Transition -> the state after it, for each state before it in the order of ViewState."""


def in_state(state: ViewState) -> ShardView:
    """A shard that was open in EPOCH, up to SEEN_SEQ, and has come to this state since."""
    view = ShardView(0, ShardKeys(0, 1))
    certify(view, EPOCH, SEEN_SEQ)
    ways: dict[ViewState, Callable[[], object]] = {
        UNVERIFIED: view.disconnect,
        OPEN: lambda: None,
        SHUT: view.refuse,
        SUSPECT: view.suspect,
        OVER: lambda: view.epoch_began(EPOCH + 1, 0),
    }
    ways[state]()
    assert view.state is state
    return view


def test_the_table_has_every_transition() -> None:
    assert TABLE.keys() == TRANSITIONS.keys()


@pytest.mark.parametrize("transition", TRANSITIONS)
@pytest.mark.parametrize("before", ViewState)
def test_a_transition_leads_where_the_table_says(before: ViewState, transition: str) -> None:
    view = in_state(before)
    TRANSITIONS[transition](view)
    assert view.state is TABLE[transition][list(ViewState).index(before)]
    assert view.is_open == (view.state is OPEN)


def test_the_diagram_in_the_docs_shows_these_transitions() -> None:
    text = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text()
    diagram = text[text.index("    [*] --> Unverified\n") :].partition("```\n")[0]
    drawn = {
        (before, after, part.split()[0])
        for before, after, parts in re.findall(r"^ +(\w+) --> (\w+): (.+)$", diagram, re.MULTILINE)
        for part in parts.split(", ")
    }
    methods = {"certified": "certify", "begins": "epoch_began"}
    assert drawn == {
        (before.name.title(), after.name.title(), next((m for word, m in methods.items() if word in name), name))
        for name, row in TABLE.items()
        for before, after in zip(ViewState, row, strict=True)
        if after is not before and name != "disconnect"
    }
    assert "disconnect leads here from every state" in diagram


def test_what_was_seen_outlives_every_state_but_a_newer_epoch() -> None:
    for state in ViewState:
        assert in_state(state).seen == (EPOCH, SEEN_SEQ)
    view = in_state(SHUT)
    certify(view, EPOCH + 1, 2)
    assert view.seen == (EPOCH + 1, 2)


def test_a_shard_that_opens_has_seen_what_redis_has_and_what_the_ledger_has() -> None:
    view = ShardView(0, ShardKeys(0, 1))
    view.certify(Certificate(EPOCH, 5, committed=7, backlog_max=100), view.seen)
    assert view.seen == (EPOCH, 7)
    certify(view, EPOCH, 9)
    assert view.seen == (EPOCH, 9)


def test_a_position_is_observed_in_its_own_epoch_alone_and_never_goes_back() -> None:
    view = in_state(OPEN)
    view.observe(EPOCH, SEEN_SEQ + 5)
    view.observe(EPOCH, SEEN_SEQ + 1)
    view.observe(EPOCH - 1, 99)
    view.observe(EPOCH + 1, 99)
    assert view.seen == (EPOCH, SEEN_SEQ + 5)


def test_entries_are_kept_until_the_ledger_has_them() -> None:
    view = in_state(OPEN)
    for seq in range(1, 101):
        view.keep(EPOCH, seq, f"tip-{seq}", ["1", "", "5", "[]"])
        view.forget(seq - 3)
        assert [entry.seq for entry in view.made_entries()] == list(range(max(1, seq - 2), seq + 1))
    certify(view, EPOCH + 1, 0)
    view.keep(EPOCH, 101, "tip-101", ["1", "", "5", "[]"])
    assert view.made_entries() == [], "the epoch to which they belong is over"


def test_a_message_that_outran_the_server_does_not_make_it_look_gone_back() -> None:
    view = in_state(OPEN)
    seen = view.seen
    view.observe(EPOCH, SEEN_SEQ + 5)
    view.certify(Certificate(EPOCH, SEEN_SEQ, committed=0, backlog_max=100), seen)
    assert view.is_open
    assert view.seen == (EPOCH, SEEN_SEQ + 5)


def test_an_epoch_that_is_over_is_reported_once_however_far_the_numbers_are_apart() -> None:
    view = in_state(OPEN)
    assert view.epoch_began(1_800_000_000_000, live=EPOCH) == Seen(EPOCH, SEEN_SEQ)
    assert view.epoch_began(1_800_000_000_000, live=EPOCH) is None
    assert view.epoch_began(1_900_000_000_000, live=1_800_000_000_000) == Seen(1_800_000_000_000, 0)
    assert view.epoch_began(1_900_000_000_001, live=0) is None


def test_an_epoch_that_is_over_is_never_entered_again() -> None:
    view = in_state(OVER)
    certify(view, EPOCH, SEEN_SEQ + 1)
    assert view.state is SHUT
    certify(view, EPOCH + 1, 0)
    assert view.is_open
