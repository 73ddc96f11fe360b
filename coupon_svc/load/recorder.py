"""Counts answers by verb and outcome, and how long they took, in windows of about a second."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from coupon_svc.load.client import Failure
from coupon_svc.load.histogram import Histogram

GOOD = frozenset({"ok", "replayed"})
UNANSWERED = "no_answer_at_the_end"
"""The outcome of what was still waited for when the load was over."""
NO_ANSWER = frozenset({UNANSWERED, *(failure.value for failure in Failure)})
"""Outcomes that are none of the service's. How long they were waited for is counted among the latencies all the same."""


class Window(NamedTuple):
    """What came between two moments, in seconds since the load began; `latency` has what was not answered, too."""

    began_s: float
    ended_s: float
    answers: int
    good: int
    latency: Histogram

    @property
    def per_second(self) -> float:
        return self.answers / max(1e-9, self.ended_s - self.began_s)


class Recorder:
    """One load's figures."""

    def __init__(self) -> None:
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.latencies: dict[str, Histogram] = {}
        self.windows: list[Window] = []
        self._open: dict[str, Histogram] = {}
        self.good = 0
        self.answers = 0
        self._before = (0, 0)
        self._began_s = 0.0

    def count(self, verb: str, outcome: str, seconds: float) -> None:
        """One answer, or the lack of one."""
        self.outcomes[verb, outcome] += 1
        if outcome in GOOD:
            self.good += 1
        if outcome not in NO_ANSWER:
            self.answers += 1
        histogram = self._open.get(verb)
        if histogram is None:
            histogram = self._open[verb] = Histogram()
        histogram.add(seconds)

    def close_window(self, now_s: float) -> Window:
        """End the current window at this moment of the load."""
        answers, good = self.answers - self._before[0], self.good - self._before[1]
        window = Window(self._began_s, now_s, answers, good, Histogram(self._open.values()))
        for verb, histogram in self._open.items():
            self.latencies.setdefault(verb, Histogram()).merge(histogram)
        self._open = {}
        self._before = (self.answers, self.good)
        self._began_s = now_s
        self.windows.append(window)
        return window

    def overall(self) -> Histogram:
        """Of all verbs, up to the last window that was closed."""
        return Histogram(self.latencies.values())
