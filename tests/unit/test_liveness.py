"""Who counts as gone, by the observer's own clock alone."""

from __future__ import annotations

from collections.abc import Mapping

from coupon_svc.postgres.liveness import LOOKS_APART_MAX_S, Watch

TTL_S = 5.0


class Observer:
    """Looks once a second, unless told to wait longer."""

    def __init__(self) -> None:
        self.watch = Watch(TTL_S)
        self.now = 1000.0

    def look(self, beats: Mapping[str, int], after_s: float = 1.0, takes_s: float = 0.0) -> list[tuple[str, int]]:
        asked_at = self.now + after_s
        self.now = asked_at + takes_s
        return self.watch.look(beats, asked_at, self.now)


def test_a_row_that_is_not_renewed_for_its_time_counts_as_gone() -> None:
    observer = Observer()
    found = [observer.look({"a": 7}) for _ in range(7)]
    assert found == [[]] * 5 + [[("a", 7)]] * 2


def test_a_row_that_is_renewed_never_does() -> None:
    observer = Observer()
    assert [observer.look({"a": beat // 4}) for beat in range(40)] == [[]] * 40


def test_a_renewal_begins_the_time_anew() -> None:
    observer = Observer()
    for _ in range(5):
        observer.look({"a": 1})
    assert observer.look({"a": 2}) == []
    assert [observer.look({"a": 2}) for _ in range(5)] == [[]] * 4 + [[("a", 2)]]


def test_rows_are_judged_by_themselves() -> None:
    observer = Observer()
    for beat in range(5):
        observer.look({"dead": 1, "living": beat})
    assert observer.look({"dead": 1, "living": 9, "new": 1}) == [("dead", 1)]


def test_a_row_that_was_away_is_a_new_one() -> None:
    observer = Observer()
    for _ in range(4):
        observer.look({"a": 1})
    observer.look({})
    assert [observer.look({"a": 1}) for _ in range(5)] == [[]] * 5


def test_an_observer_that_stood_still_believes_nobody_gone_for_it() -> None:
    """It may have been suspended together with those it observes."""
    observer = Observer()
    observer.look({"a": 1})
    assert observer.look({"a": 1}, after_s=3600.0) == []
    assert [observer.look({"a": 1}) for _ in range(3)] == [[], [], [("a", 1)]], f"an hour counts {LOOKS_APART_MAX_S} s"


def test_the_time_that_an_answer_takes_does_not_count() -> None:
    """The row may have been renewed just after it was read."""
    observer = Observer()
    observer.look({"a": 1}, takes_s=2.0)
    assert [observer.look({"a": 1}, after_s=0.0, takes_s=2.0) for _ in range(10)] == [[]] * 10
