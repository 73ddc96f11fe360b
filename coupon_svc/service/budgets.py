"""What a tenant may ask of one process: requests per second, where that is limited, and codes that do not exist.

What a budget refuses is refused first, before anything of the request is read. A code that the process has met is
answered whatever was guessed: so customers go on while somebody tries codes with their shop's key.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from math import ceil
from time import monotonic

from coupon_svc.domain.codes import normalise_code
from coupon_svc.domain.outcomes import Outcome, Refused

TENANTS_KEPT_MAX = 10_000


class Budget:
    """What each tenant may spend: `per_s` on average, `at_once` after a rest. It may owe what it gets within a second."""

    def __init__(self, per_s: float, at_once: float) -> None:
        self._per_s = per_s
        self._at_once = at_once
        self._left: OrderedDict[int, tuple[float, float]] = OrderedDict()
        """Of the tenants that have spent something: what was left of it, and when."""

    def spend(self, tenant_id: int) -> None:
        """Take one from what the tenant has left."""
        left = max(self._left_of(tenant_id) - 1, -self._per_s)
        self._left[tenant_id] = left, monotonic()
        if len(self._left) > TENANTS_KEPT_MAX:
            self._left.popitem(last=False)

    def wait_s(self, tenant_id: int) -> float:
        """Seconds until the tenant may spend one; 0 when it may now."""
        return max(0.0, (1 - self._left_of(tenant_id)) / self._per_s)

    def _left_of(self, tenant_id: int) -> float:
        kept = self._left.get(tenant_id)
        if kept is None:
            return self._at_once
        left, at = kept
        return min(left + (monotonic() - at) * self._per_s, self._at_once)


class Budgets:
    """The budgets of all tenants. `requests` is None where there is no limit; `has_met` tells whether the process has met a
    code of a tenant."""

    def __init__(self, requests: Budget | None, unknown_codes: Budget, has_met: Callable[[int, str], bool]) -> None:
        self._requests = requests
        self._unknown_codes = unknown_codes
        self._has_met = has_met

    def admit(self, tenant_id: int, code: str | None) -> None:
        """Let a request in, which names this code, as it was sent. Raises Refused: rate_limited, too_many_unknown_codes."""
        if self._requests is not None:
            if wait_s := self._requests.wait_s(tenant_id):
                raise _refused(Outcome.RATE_LIMITED, wait_s)
            self._requests.spend(tenant_id)
        if code is not None and (wait_s := self._unknown_codes.wait_s(tenant_id)):
            spelled = normalise_code(code)
            if spelled is not None and not self._has_met(tenant_id, spelled):
                raise _refused(Outcome.TOO_MANY_UNKNOWN_CODES, wait_s)


def _refused(outcome: Outcome, wait_s: float) -> Refused:
    return Refused(outcome, retry_after_seconds=max(1, ceil(wait_s)))
