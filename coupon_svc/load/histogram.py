"""Latencies in buckets whose width grows with them: small however many are counted, exact enough to compare."""

from __future__ import annotations

from collections.abc import Iterable
from math import log

BUCKETS_AN_OCTAVE = 64
ERROR = 2 ** (0.5 / BUCKETS_AN_OCTAVE) - 1
"""A percentile is off by at most this part of itself (0.55 %)."""
_SCALE = BUCKETS_AN_OCTAVE / log(2)
_FLOOR_S = 1e-6


class Histogram:
    """Counts durations in seconds. Below a microsecond counts as one; the greatest is kept as it is."""

    __slots__ = ("buckets", "count", "greatest")

    def __init__(self, parts: Iterable[Histogram] = ()) -> None:
        self.buckets: dict[int, int] = {}
        self.count = 0
        self.greatest = 0.0
        for part in parts:
            self.merge(part)

    def add(self, seconds: float) -> None:
        bucket = int(log(seconds / _FLOOR_S) * _SCALE) if seconds > _FLOOR_S else 0
        self.buckets[bucket] = self.buckets.get(bucket, 0) + 1
        self.count += 1
        if seconds > self.greatest:
            self.greatest = seconds

    def merge(self, other: Histogram) -> None:
        for bucket, number in other.buckets.items():
            self.buckets[bucket] = self.buckets.get(bucket, 0) + number
        self.count += other.count
        self.greatest = max(self.greatest, other.greatest)

    def percentile(self, part: float) -> float:
        """The duration in seconds that `part` (0..1) of all stay within, to within ERROR of itself; 0 when none is known."""
        wanted, seen = part * self.count, 0
        for bucket, number in sorted(self.buckets.items()):
            seen += number
            if seen >= wanted:
                return min(self.greatest, _FLOOR_S * 2 ** ((bucket + 0.5) / BUCKETS_AN_OCTAVE))
        return 0.0
