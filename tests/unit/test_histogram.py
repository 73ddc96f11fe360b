"""Percentiles are exact enough to compare."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coupon_svc.load.histogram import ERROR, Histogram

durations = st.lists(st.floats(1e-6, 1e4), min_size=1, max_size=60)
parts = st.sampled_from([0.01, 0.5, 0.9, 0.99, 0.999, 1.0])


def counted(seconds: list[float]) -> Histogram:
    histogram = Histogram()
    for one in seconds:
        histogram.add(one)
    return histogram


@given(durations, parts)
def test_a_percentile_is_off_by_no_more_than_is_said(seconds: list[float], part: float) -> None:
    histogram = counted(seconds)
    within = next(
        one for number, one in enumerate(sorted(seconds), 1) if number >= part * len(seconds)
    )  # the duration that `part` of all stay within
    assert histogram.percentile(part) == pytest.approx(within, rel=1.01 * ERROR)
    assert histogram.percentile(part) <= histogram.greatest


@given(durations, durations, parts)
def test_two_that_are_merged_count_like_one(one: list[float], other: list[float], part: float) -> None:
    merged, whole = Histogram([counted(one), counted(other)]), counted([*one, *other])
    assert (merged.count, merged.greatest, merged.buckets) == (whole.count, whole.greatest, whole.buckets)
    assert merged.percentile(part) == whole.percentile(part)


def test_nothing_counted_is_nothing() -> None:
    assert (Histogram().count, Histogram().percentile(0.5), Histogram().greatest) == (0, 0.0, 0.0)


def test_what_takes_no_time_counts_as_a_microsecond_at_most() -> None:
    histogram = counted([0.0, 1e-9])
    assert histogram.count == 2
    assert 0 <= histogram.percentile(1.0) <= 1e-6
