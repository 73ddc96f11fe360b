"""The months for which parts of the ledger are made."""

from __future__ import annotations

from datetime import UTC, datetime

from coupon_svc.postgres.parts import month_names


def test_the_months_to_come_follow_each_other_over_the_turn_of_the_year() -> None:
    assert month_names(datetime(2026, 11, 30, tzinfo=UTC)) == [
        ("entries_2026_12", "2026-12-01", "2027-01-01"),
        ("entries_2027_01", "2027-01-01", "2027-02-01"),
    ]
