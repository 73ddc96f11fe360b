"""Whether a process should be sent requests, by what it knows already."""

from __future__ import annotations

import math
from typing import Any

from coupon_svc.domain.outcomes import Outcome
from coupon_svc.redis.data_plane import LEDGER_UNSEEN_MAX_S, DataPlane
from coupon_svc.redis.scripts import Scripts
from coupon_svc.redis.shard_view import Certificate
from coupon_svc.service.health import Health


def test_the_first_reason_that_applies_is_told() -> None:
    plane = DataPlane("redis://127.0.0.1:1", 2, Scripts())
    health, connection = Health(plane), Any
    assert health.why_unready() is Outcome.STORE_UNAVAILABLE
    plane._connection = connection  # type: ignore[assignment]
    plane.refuses_writes = True
    assert health.why_unready() is Outcome.STORE_UNAVAILABLE
    plane.refuses_writes = False
    assert health.why_unready() is Outcome.RECOVERING
    for view in plane.views:
        view.certify(Certificate(4, 9, committed=9, backlog_max=10), view.seen)
        plane.waiters.advance(view.shard, 4, 9)
        view.heard_of_ledger(LEDGER_UNSEEN_MAX_S)
    assert health.why_unready() is None
    plane.views[1].heard_of_ledger(math.inf)
    assert health.why_unready() is Outcome.LEDGER_BEHIND
    plane.views[1].observe(4, 19)
    assert health.why_unready() is Outcome.BACKLOG_FULL
    plane.views[0].suspect()
    assert health.why_unready() is Outcome.RECOVERING
