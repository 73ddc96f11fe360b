"""A tenant spends what it has, gets it back at an even pace, and costs no other tenant anything."""

from __future__ import annotations

import pytest

from coupon_svc.domain.outcomes import Outcome, Refused
from coupon_svc.service import budgets
from coupon_svc.service.budgets import Budget, Budgets

PER_S, AT_ONCE = 5.0, 20


class Clock:
    now_s = 1_000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(budgets, "monotonic", clock)
    return clock


def spend(budget: Budget, times: int, tenant_id: int = 1) -> None:
    for _ in range(times):
        budget.spend(tenant_id)


def test_what_is_spent_comes_back_at_an_even_pace(clock: Clock) -> None:
    budget = Budget(PER_S, AT_ONCE)
    spend(budget, AT_ONCE - 1)
    assert budget.wait_s(1) == 0
    spend(budget, 1)
    assert budget.wait_s(1) == pytest.approx(1 / PER_S)
    clock.now_s += 1 / PER_S
    assert budget.wait_s(1) == pytest.approx(0)
    clock.now_s += 3_600
    spend(budget, AT_ONCE)
    assert budget.wait_s(1) > 0, "a rest of any length gives no more than a full budget"


def test_nobody_owes_more_than_a_second(clock: Clock) -> None:
    budget = Budget(PER_S, AT_ONCE)
    spend(budget, 1_000)
    assert budget.wait_s(1) == pytest.approx(1 + 1 / PER_S)
    assert budget.wait_s(2) == 0, "another tenant owes nothing"


def test_of_many_tenants_some_are_forgotten(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budgets, "TENANTS_KEPT_MAX", 2)
    budget = Budget(PER_S, 1)
    for tenant_id in (1, 2, 2, 3):
        budget.spend(tenant_id)
    assert [budget.wait_s(tenant_id) > 0 for tenant_id in (1, 2, 3)] == [False, True, True]


def refusal(budgets: Budgets, code: str | None) -> tuple[str, object] | None:
    try:
        budgets.admit(1, code)
    except Refused as refused:
        return refused.outcome, refused.facts["retry_after_seconds"]
    return None


def test_who_named_too_many_unknown_codes_is_refused_for_codes_that_were_not_met(clock: Clock) -> None:
    unknown = Budget(PER_S, AT_ONCE)
    both = Budgets(None, unknown, lambda tenant_id, code: code == "MET-1")
    assert refusal(both, "NEW-1") is None
    spend(unknown, 1_000)
    assert refusal(both, "new-1") == (Outcome.TOO_MANY_UNKNOWN_CODES, 2)
    assert refusal(both, " met-1 ") is None
    assert refusal(both, None) is None, "it names no code"
    assert refusal(both, "!") is None, "no code at all, which costs nothing: not found"


def test_requests_are_limited_where_that_is_wanted(clock: Clock) -> None:
    unknown = Budget(PER_S, AT_ONCE)
    both = Budgets(Budget(2, 2), unknown, lambda *_: True)
    spend(unknown, 1_000)
    assert [refusal(both, None) for _ in range(3)] == [None, None, (Outcome.RATE_LIMITED, 1)]
    assert refusal(both, "A-1") == (Outcome.RATE_LIMITED, 1), "the first that applies"
    clock.now_s += 0.5
    assert [refusal(both, None) for _ in range(2)] == [None, (Outcome.RATE_LIMITED, 1)], (
        "a refused request costs nothing"
    )
