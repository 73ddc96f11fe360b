"""Whole milliseconds inside, RFC 3339 outside."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coupon_svc.domain.clock import boot_s, now_ms, rfc3339, to_ms

LAST_MS = 253_402_300_799_999  # 9999-12-31T23:59:59.999Z


@pytest.mark.parametrize(
    ("at_ms", "text"),
    [
        (0, "1970-01-01T00:00:00.000Z"),
        (1_795_357_061_878, "2026-11-22T14:17:41.878Z"),
        (1_709_164_799_009, "2024-02-28T23:59:59.009Z"),
        (LAST_MS, "9999-12-31T23:59:59.999Z"),
    ],
)
def test_a_time_on_the_wire(at_ms: int, text: str) -> None:
    assert rfc3339(at_ms) == text


@given(st.integers(0, LAST_MS))
def test_a_time_comes_back_from_the_wire(at_ms: int) -> None:
    assert to_ms(datetime.fromisoformat(rfc3339(at_ms))) == at_ms


@given(st.integers(0, LAST_MS), st.integers(-23, 23))
def test_a_moment_is_the_same_in_every_zone(at_ms: int, hours: int) -> None:
    moment = datetime.fromisoformat(rfc3339(at_ms // 2 + 10**9))
    assert to_ms(moment.astimezone(timezone(timedelta(hours=hours)))) == to_ms(moment)


def test_parts_of_a_millisecond_are_left_out() -> None:
    assert to_ms(datetime(1970, 1, 1, 0, 0, 1, 999, tzinfo=UTC)) == 1000


def test_now_is_the_wall_clock() -> None:
    before = time.time() * 1000 - 1
    assert before <= now_ms() <= time.time() * 1000


def test_the_clock_of_promises_that_end_never_goes_back() -> None:
    readings = [boot_s() for _ in range(100)]
    assert readings == sorted(readings)
