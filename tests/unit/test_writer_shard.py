"""The life of a shard in its owner: every transition from every state."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from coupon_svc.domain.chain import CHAIN_START
from coupon_svc.postgres.errors import NotOwner
from coupon_svc.postgres.shards import OwnedShard
from coupon_svc.redis.errors import ClocksApart, CountsDiffer
from coupon_svc.redis.server import Identity
from coupon_svc.writer.shard import (
    TRIM_KEPT_S,
    Hole,
    ImpossibleTransition,
    Open,
    Opening,
    Recovering,
    Shard,
    Shut,
    State,
    Stopped,
    term_of,
)

TAKEN = OwnedShard(3, 1, 7, 2, CHAIN_START, "")
AFTER = TAKEN._replace(epoch=2, committed=0, chain=b"r" * 32)
HERE = Identity("run", "history")
SHUT, OPENING, RECOVERING, OPEN, STOPPED = Shut(), Opening(), Recovering(), Open(HERE), Stopped("forked")
REFUSED = None
"""In place of a state: the transition raises ImpossibleTransition."""

Transition = Callable[[Shard], object]


def shard_in(state: State) -> Shard:
    shard = Shard(TAKEN)
    steps: dict[State, tuple[Transition, ...]] = {
        SHUT: (),
        OPENING: (Shard.opening_begins,),
        RECOVERING: (Shard.opening_begins, lambda one: one.recovery_begins("gone")),
        OPEN: (Shard.opening_begins, lambda one: one.opened(HERE)),
        STOPPED: (lambda one: one.stopped("forked"),),
    }
    for step in steps[state]:
        step(shard)
    assert shard.state == state
    return shard


def found(shard: Shard) -> None:
    shard.report(term_of(TAKEN), Hole("event 8 is missing"))


def found_beyond_mending(shard: Shard) -> None:
    shard.report(term_of(TAKEN), CountsDiffer("book b is gone"), recover=True)


def found_in_another_term(shard: Shard) -> None:
    shard.report(term_of(TAKEN._replace(epoch=0)), Hole("event 8 is missing"))


def opening_begins(shard: Shard) -> None:
    shard.opening_begins()


def recovery_begins(shard: Shard) -> None:
    shard.recovery_begins("gone")


def recovered(shard: Shard) -> None:
    shard.recovered(AFTER)


def opened(shard: Shard) -> None:
    shard.opened(HERE)


def opening_failed(shard: Shard) -> None:
    shard.opening_failed("it has to wait")


def found_in_ledger(shard: Shard) -> None:
    shard.found_in_ledger(TAKEN)


def found_clocks_apart(shard: Shard) -> None:
    shard.found_clocks_apart()


def superseded(shard: Shard) -> None:
    shard.superseded()


def stopped(shard: Shard) -> None:
    shard.stopped("forked")


def stop_failed(shard: Shard) -> None:
    shard.stop_failed()


STATES = (SHUT, OPENING, RECOVERING, OPEN, STOPPED)
TABLE: dict[Transition, tuple[State | None, State | None, State | None, State | None, State | None]] = {
    # from:                Shut     Opening     Recovering  Open     Stopped
    opening_begins:        (OPENING, REFUSED,    REFUSED,    REFUSED, REFUSED),
    found_in_ledger:       (REFUSED, OPENING,    REFUSED,    REFUSED, STOPPED),
    found_clocks_apart:    (REFUSED, OPENING,    REFUSED,    REFUSED, STOPPED),
    recovery_begins:       (REFUSED, RECOVERING, REFUSED,    REFUSED, STOPPED),
    recovered:             (REFUSED, REFUSED,    OPENING,    REFUSED, STOPPED),
    opened:                (REFUSED, OPEN,       REFUSED,    REFUSED, STOPPED),
    opening_failed:        (REFUSED, SHUT,       SHUT,       REFUSED, STOPPED),
    found:                 (SHUT,    OPENING,    RECOVERING, SHUT,    STOPPED),
    found_beyond_mending:  (SHUT,    OPENING,    RECOVERING, SHUT,    STOPPED),
    found_in_another_term: (SHUT,    OPENING,    RECOVERING, OPEN,    STOPPED),
    superseded:            (SHUT,    OPENING,    RECOVERING, SHUT,    SHUT),
    stopped:               (STOPPED, STOPPED,    STOPPED,    STOPPED, STOPPED),
    stop_failed:           (SHUT,    OPENING,    RECOVERING, OPEN,    SHUT),
}  # fmt: skip


@pytest.mark.parametrize("transition", TABLE, ids=lambda one: one.__name__)
@pytest.mark.parametrize("before", STATES, ids=lambda one: type(one).__name__)
def test_each_transition_leads_where_the_table_says(before: State, transition: Transition) -> None:
    shard, expected = shard_in(before), TABLE[transition][STATES.index(before)]

    if expected is REFUSED:
        with pytest.raises(ImpossibleTransition, match=f"in state {type(before).__name__}"):
            transition(shard)
        assert shard.state == before
    else:
        transition(shard)
        assert shard.state == expected


@pytest.mark.parametrize("transition", TABLE, ids=lambda one: one.__name__)
@pytest.mark.parametrize("before", STATES, ids=lambda one: type(one).__name__)
def test_each_change_of_state_is_one_line_of_the_log(
    before: State, transition: Transition, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    shard, expected = shard_in(before), TABLE[transition][STATES.index(before)]
    if expected is REFUSED:
        return
    caplog.clear()
    transition(shard)

    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == (expected != before or transition is stopped)
    assert all(line.startswith("shard 03 is ") for line in lines)


def test_only_an_open_shard_has_an_identity() -> None:
    assert {type(state): shard_in(state).identity for state in STATES} == {
        Shut: None,
        Opening: None,
        Recovering: None,
        Open: HERE,
        Stopped: None,
    }


@pytest.mark.parametrize("state", [SHUT, OPENING, RECOVERING, OPEN], ids=lambda one: type(one).__name__)
def test_what_opening_again_would_not_mend_asks_for_a_recovery(state: State) -> None:
    shard = shard_in(state)

    found(shard)
    assert shard.recovery_wanted is None
    found_beyond_mending(shard)

    assert shard.recovery_wanted == "book b is gone"


def test_a_finding_during_the_opening_keeps_the_shard_shut() -> None:
    shard = shard_in(OPENING)

    found_beyond_mending(shard)
    opened(shard)

    assert shard.state == SHUT
    assert shard.recovery_wanted == "book b is gone"


def test_a_recovery_that_is_wanted_stays_wanted_until_there_was_one() -> None:
    shard = shard_in(OPEN)
    found_beyond_mending(shard)
    opening_begins(shard)
    opening_failed(shard)
    assert shard.recovery_wanted == "book b is gone"

    opening_begins(shard)
    recovery_begins(shard)
    recovered(shard)
    assert shard.recovery_wanted is None


def test_clocks_that_were_apart_ask_for_a_recovery_once() -> None:
    shard = shard_in(OPEN)
    shard.report(term_of(TAKEN), ClocksApart("90 s"))
    shard.report(term_of(TAKEN), Hole("event 8 is missing"))
    assert shard.clocks_were_apart, "another finding does not undo it"
    assert shard.recovery_wanted is None, "whether a recovery is needed is for the opener to judge"

    opening_begins(shard)
    assert shard.found_clocks_apart() is False
    assert shard.recovery_wanted == "the clocks of Redis and Postgres were apart"
    recovery_begins(shard)
    recovered(shard)

    assert not shard.clocks_were_apart
    assert shard.found_clocks_apart() is True


def test_a_recovery_forgets_what_was_known_of_the_epoch_before() -> None:
    shard = shard_in(OPEN)
    assert shard.advanced(shard.term, 9, b"h" * 32, "tip")
    found(shard)
    opening_begins(shard)
    recovery_begins(shard)
    recovered(shard)

    assert (shard.term.epoch, shard.committed, shard.chain, shard.tip) == (2, 0, AFTER.chain, "")


def test_a_position_of_another_term_changes_nothing() -> None:
    shard = shard_in(OPEN)

    assert not shard.advanced(term_of(AFTER), 9, b"h" * 32, "tip")

    assert (shard.committed, shard.chain, shard.tip) == (7, CHAIN_START, "")


def test_the_opener_takes_the_shard_as_the_ledger_has_it() -> None:
    shard = shard_in(OPENING)

    shard.found_in_ledger(TAKEN._replace(committed=12, tip="t12"))

    assert (shard.committed, shard.tip) == (12, "t12")


def test_the_log_says_what_was_found_but_no_text_of_an_unforeseen_error(caplog: pytest.LogCaptureFixture) -> None:
    for error in (NotOwner(), Hole("event 8 is missing"), ValueError("a secret code")):
        shard_in(OPEN).report(term_of(TAKEN), error)

    assert "shard 03 is shut: the shard has another owner, epoch or position" in caplog.text
    assert "shard 03 is shut: event 8 is missing" in caplog.text
    assert "shard 03 is shut: ValueError at nowhere" in caplog.text
    assert "secret" not in caplog.text


def test_events_are_trimmed_a_minute_late_and_few_positions_are_kept_for_that() -> None:
    shard, trimmed = shard_in(OPEN), 0
    for tenths in range(10 * 200):
        shard.advanced(term_of(TAKEN), 100 + tenths, CHAIN_START, "t")
        shard.mark(tenths / 10)
        if seq := shard.trim_seq(tenths / 10):
            trimmed += 1
            assert 100 <= seq <= 100 + tenths - 10 * TRIM_KEPT_S
        assert len(shard._marks) <= TRIM_KEPT_S + 1
    assert trimmed == 140


def test_the_diagram_in_the_docs_shows_these_transitions() -> None:
    text = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text()
    section = text[text.index("### In its owner") :]
    diagram = section[section.index("```mermaid") : section.index("```\n")]
    drawn = {
        (before, after, name)
        for before, after, names in re.findall(r"^ +(\w+) --> (\w+): (.+)$", diagram, re.MULTILINE)
        for name in re.findall(r"\w+_\w+|\b(?:opened|recovered|report|superseded|stopped)\b", names)
    }
    names: dict[Transition, str] = {found: "report", found_beyond_mending: "report"}

    assert drawn == {
        (type(before).__name__, type(after).__name__, names.get(transition, transition.__name__))
        for transition, row in TABLE.items()
        for before, after in zip(STATES, row, strict=True)
        if after is not REFUSED and after != before
    }
