"""Who lives, as judged by whoever looks. A row that is renewed changes its `beat`; an observer that has seen it unchanged
for long enough, by its own monotonic clock, may count it as gone. No wall clock has a say: one that is set would end living
processes, or keep dead ones."""

from __future__ import annotations

from collections.abc import Mapping

LOOKS_APART_MAX_S = 2.0
"""Of the time between two looks no more counts: when the observer itself stood still, the observed may have done so, too."""


class Watch:
    """What an observer has seen of some rows, look by look."""

    def __init__(self, ttl_s: float) -> None:
        self._ttl_s = ttl_s
        self._seen: dict[str, tuple[int, float]] = {}
        """Each row's beat, and for how long it is known to be unchanged."""
        self._answered_at = 0.0

    def look(self, beats: Mapping[str, int], asked_at: float, answered_at: float) -> list[tuple[str, int]]:
        """Take in the beats that were asked for and answered at these times of a monotonic clock, in seconds.

        Returns (row, beat) of those that may be counted as gone. They are gone only once the ledger has taken that, under
        a compare with the beat: they may have been renewed since.
        """
        passed = min(asked_at - self._answered_at, LOOKS_APART_MAX_S)
        seen: dict[str, tuple[int, float]] = {}
        for row, beat in beats.items():
            before, unchanged_s = self._seen.get(row, (None, 0.0))
            seen[row] = (beat, unchanged_s + passed if beat == before else 0.0)
        self._seen, self._answered_at = seen, answered_at
        return [(row, beat) for row, (beat, unchanged_s) in seen.items() if unchanged_s >= self._ttl_s]
