"""A list of coupons ends in time, however many must be looked at."""

from __future__ import annotations

import time
from typing import Any

import pytest

from coupon_svc.domain.holding import Holding, ListedCoupon
from coupon_svc.domain.position import Epoch, Position, Seq
from coupon_svc.redis.calls import bind_operation
from coupon_svc.redis.contract import Reply
from coupon_svc.redis.data_plane import DataPlane
from coupon_svc.redis.scripts import Scripts
from coupon_svc.redis.shard_view import Certificate, ShardView
from coupon_svc.service import durability, reading
from coupon_svc.service.durability import Durability
from coupon_svc.service.reading import LOOKED_AT_ONCE_MIN, ListCoupons, Reading

SCRIPTS = Scripts()
OPERATIONS = {name: bind_operation(SCRIPTS.operations[name].contract) for name in ("list_coupons", "read_codes")}
EPOCH = 4
MEMBERS = [ListedCoupon("bk_000123456789abcdef", f"A-{number:04}").format() for number in range(1_000)]
AT = Position(Epoch(EPOCH), Seq(1))
HELD = Holding(AT, AT, 0, 0, "ann").format()


class SlowPlane(DataPlane):
    """One shard, open in EPOCH, whose reads take a second each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__("redis://127.0.0.1:1", 1, SCRIPTS)
        self.views[0].certify(Certificate(EPOCH, 9, committed=9, backlog_max=100), self.views[0].seen)
        self.waiters.advance(0, EPOCH, 9)
        self.now = time.monotonic()
        for module in (durability, reading):
            monkeypatch.setattr(module, "monotonic", lambda: self.now)

    async def call(self, name: str, view: ShardView, until: float = 0.0, /, **parameters: Any) -> Reply:
        self.now += 1.0
        if name == "list_coupons":
            members = [member for member in MEMBERS if parameters["low"] == "-" or f"({member}" > parameters["low"]]
            raw: list[Any] = ["ok", members[: parameters["limit"]]]
        else:
            codes = len(parameters["codes"])
            raw = ["ok", 0, "ledger", "1", [HELD] * codes, [0] * codes, "active"]
        return OPERATIONS[name].reply(raw)


async def test_a_page_for_which_too_many_would_have_to_be_looked_at_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    plane = SlowPlane(monkeypatch)
    nobody: Any = None
    service = Reading(plane, nobody, nobody, Durability(plane, 1_000))
    page = await service.list_coupons(ListCoupons(1, "ann", 50, status="redeemed"))
    assert page.coupons == []
    assert page.next is not None
    assert page.next.member == MEMBERS[LOOKED_AT_ONCE_MIN - 1]
