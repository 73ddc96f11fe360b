"""A figure: what was measured, every sample of it, and what it is held against."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import msgspec

from coupon_svc.domain.errors import CouponError


class BenchError(CouponError):
    """Something could not be measured; the message says what and why."""


MEASURABLE = 0.15
"""How far apart the quartiles of a figure may be, as part of its median."""


class Figure(msgspec.Struct, kw_only=True):
    """One line of a table. Its samples are ratios, one a round."""

    id: str
    """names the line for `benchmarks.template.md`"""
    what: str
    samples: list[float] = []
    goal: float | None = None
    less_is_better: bool = False
    failed: str | None = None
    """why there is no figure, or none that counts"""
    note: str = ""
    """absolute figures behind the ratio, for orientation: they are the machine's"""

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The lower and the upper one."""
        if len(self.samples) < 2:
            return self.median, self.median
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return low, high

    @property
    def reached(self) -> bool | None:
        """Whether the median is at the goal; None when there is no goal, or no figure."""
        if self.goal is None or self.failed is not None or not self.samples:
            return None
        return self.median <= self.goal if self.less_is_better else self.median >= self.goal

    def mark(self) -> str:
        """What is said of the goal. A goal between the quartiles may have been reached or not."""
        if self.failed or self.goal is None or self.reached is None:
            return "failed" if self.failed else ""
        low, high = self.quartiles
        if low < self.goal < high:
            return "undecided"
        return "reached" if self.reached else "not reached"

    def spread(self) -> str:
        """The median and the quartiles; `not measurable here` where these are further apart than 15 % of the median."""
        if self.failed is not None or not self.samples:
            return f"failed: {self.failed or 'no sample'}"
        low, high = self.quartiles
        text = f"{self.median:.2f} ({low:.2f} to {high:.2f})"
        return f"{text}, not measurable here" if high - low > MEASURABLE * self.median else text

    def target(self) -> str:
        """The goal, as text."""
        return "–" if self.goal is None else f"{self.goal:g}"


class Expectation(msgspec.Struct, kw_only=True):
    """What a reader can expect of one ack and number of books."""

    name: str
    rates: list[float]
    """assigns a second, of each turn, when 64 connections ask as fast as they are answered"""
    cores: dict[str, float]
    """that a thousand assigns a second take, by process"""
    latency_ms: dict[int, tuple[float, ...]]
    """p50 and p99 at each stated rate of assigns a second, counted from when each was due"""


class GrowthRow(msgspec.Struct, kw_only=True):
    """How many assigns a second there were in one setting."""

    ack: str
    setting: str
    samples: list[float]
    refused: str = ""
    """which part of the answers was not good, and what they said; "" when all were"""


class GrowthTable(msgspec.Struct, kw_only=True):
    """One thing that grew while everything else stayed."""

    grows: str
    rows: list[GrowthRow]


class Run(msgspec.Struct, kw_only=True):
    """What a run was taken on, and with which settings."""

    date: str
    command: str
    machine: dict[str, str]
    versions: dict[str, str]
    settings: dict[str, str]
    load_share: tuple[float, float] = (0.0, 0.0)
    """the part of a core that the load took: median and highest turn"""


class Results(msgspec.Struct, kw_only=True):
    """Everything that stands in docs/benchmarks.md, and every sample behind it: docs/benchmarks.json."""

    expected: list[Expectation] = []
    pairs: float = 0.0
    """locks with their redeems a second, as fast as they were answered"""
    sizes: dict[str, float] = {}
    """bytes, by what they are for"""
    toll: list[Figure] = []
    counts: list[str] = []
    """what the stores counted, a sentence for each ack and number of books"""
    table_run: Run | None = None
    table: list[Figure] = []
    growth_run: Run | None = None
    growth: list[GrowthTable] = []


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """One ratio a round."""
    return [a / b for a, b in zip(ours, theirs, strict=True)]


def rate_text(rates: Sequence[float]) -> str:
    """A median of figures a second, rounded to what can be known of it."""
    return f"{round(statistics.median(rates), -1 if statistics.median(rates) < 10_000 else -2):,.0f}/s"
