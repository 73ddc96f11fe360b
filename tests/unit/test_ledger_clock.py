"""Postgres's clock, carried on for a while."""

from __future__ import annotations

import pytest

from coupon_svc.writer.clock import KNOWN_FOR_S, LedgerClock


class Monotonic:
    now = 500.0


@pytest.fixture
def monotonic(monkeypatch: pytest.MonkeyPatch) -> Monotonic:
    clock = Monotonic()
    monkeypatch.setattr("time.monotonic", lambda: clock.now)
    return clock


def test_a_clock_that_was_never_asked_is_not_known(monotonic: Monotonic) -> None:
    assert LedgerClock().now_ms() is None


def test_it_goes_on_from_what_postgres_said(monotonic: Monotonic) -> None:
    clock = LedgerClock()
    clock.asked(1_795_357_061_878)
    assert clock.now_ms() == 1_795_357_061_878
    monotonic.now += 2.5
    assert clock.now_ms() == 1_795_357_064_378


def test_what_was_said_too_long_ago_is_not_believed(monotonic: Monotonic) -> None:
    clock = LedgerClock()
    clock.asked(1_795_357_061_878)
    monotonic.now += KNOWN_FOR_S
    assert clock.now_ms() is None
    clock.asked(1)
    assert clock.now_ms() == 1
