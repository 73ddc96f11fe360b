"""A script that could not decide is run again, for a moment and not for longer; any other refusal is told at once."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from time import monotonic
from typing import Any, Self
from unittest import mock

import pytest

from coupon_svc.domain.outcomes import Outcome, Refused
from coupon_svc.redis.calls import bind_operation
from coupon_svc.redis.contract import Reply
from coupon_svc.redis.data_plane import DataPlane
from coupon_svc.redis.scripts import Scripts
from coupon_svc.redis.shard_view import ShardView
from coupon_svc.service.durability import PATIENCE_S, Durability
from coupon_svc.service.waiting import Waiting

SCRIPTS = Scripts()
LEDGER_WAIT_S = 5
PARAMETERS = {"tenant_id": 1, "book_id": "bk_000123456789abcdef", "code": "A-1"}
OK = ["ok", "A-1", "5", "4-21", "redis", ""]


class Surroundings:
    """Everything that Waiting asks: it notes what it was asked, and says what it was told to say."""

    def __init__(self, *replies: list[Any], loaded: bool | None = False, receipt_holds: bool = True) -> None:
        self.plane = DataPlane("redis://127.0.0.1:1", 1, SCRIPTS)
        self.plane.call = self.call  # type: ignore[method-assign]
        self.plane.doubt = self.doubt  # type: ignore[method-assign]
        self.replies = list(replies)
        self.loaded = loaded
        self.receipt_holds = receipt_holds
        self.did: list[str] = []
        self.begun = 0.0

    async def call(self, name: str, view: ShardView, until: float = math.inf, /, **parameters: Any) -> Reply:
        self.did.append("call")
        assert until == self.begun + PATIENCE_S + LEDGER_WAIT_S, "as long as the request has time"
        assert parameters == PARAMETERS
        return reply(*(self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]))

    async def doubt(self, view: ShardView) -> None:
        self.did.append("doubt")

    async def book_loaded(self, tenant_id: int, book_id: str, within_s: float) -> bool | None:
        self.did.append("ask postgres")
        return self.loaded

    async def restore(self, *_: Any) -> bool:
        self.did.append("restore")
        assert self.did.count("restore") < 5
        return self.receipt_holds

    @asynccontextmanager
    async def connection(self, seconds: float, *, wait_s: float) -> AsyncIterator[Self]:
        assert 0 < seconds <= PATIENCE_S + LEDGER_WAIT_S, "as long as the request has time"
        assert wait_s == seconds
        yield self

    def transaction(self) -> AbstractAsyncContextManager[None]:
        return nullcontext()

    async def lease_code(self, _: object, tenant_id: int, book_id: str, code: str, __: object) -> None:
        self.did.append("lend")
        assert {"tenant_id": tenant_id, "book_id": book_id, "code": code} == PARAMETERS

    async def decide(self, first: Reply, receipt: str | None = None, begun: float | None = None) -> Reply:
        asked: Any = self
        waiting = Waiting(self.plane, asked, asked, Durability(self.plane, 1000 * LEDGER_WAIT_S), asked)
        view = self.plane.views[0]
        self.begun = begun = monotonic() if begun is None else begun
        deciding = waiting.decide(first, "assign_code", view, PARAMETERS, begun, receipt=receipt)
        try:
            with mock.patch("coupon_svc.service.waiting.lease_code", self.lease_code):
                return await asyncio.wait_for(deciding, 5)
        finally:
            assert not waiting._polls, "nothing is kept of a book for which nobody waits"


def reply(*raw: Any) -> Reply:
    operation = SCRIPTS.operations["assign_coupon" if raw[0] == "refilling" else "assign_code"]
    return bind_operation(operation.contract).reply(list(raw))


@pytest.mark.parametrize(
    "outcome",
    ["book_not_found", "book_closed", "already_assigned", "code_quarantined", "backlog_full", "ledger_behind"],
)
async def test_a_refusal_of_the_script_is_told_at_once(outcome: str) -> None:
    around = Surroundings(OK)
    with pytest.raises(Refused) as refusal:
        await around.decide(reply(outcome))
    assert refusal.value.outcome == outcome
    assert around.did == []


async def test_a_refusal_carries_what_to_act_on() -> None:
    with pytest.raises(Refused) as refusal:
        await Surroundings(OK).decide(reply("user_code_limit", 3, 4))
    assert refusal.value.facts == {"limit": 3, "held": 4}


async def test_a_code_that_is_not_lent_is_lent_once_and_waited_for() -> None:
    around = Surroundings(["not_lent"], ["not_lent"], OK)
    assert (await around.decide(reply("not_lent"))).outcome == "ok"
    assert around.did == ["lend", "call", "call", "call"]


@pytest.mark.parametrize(
    ("outcome", "told"),
    [("refilling", Outcome.REFILLING), ("not_lent", Outcome.REFILLING), ("book_not_loaded", Outcome.RECOVERING)],
)
async def test_patience_is_counted_from_the_begin_of_the_request(outcome: str, told: Outcome) -> None:
    around = Surroundings([outcome])
    with pytest.raises(Refused) as refusal:
        await around.decide(reply(outcome), begun=monotonic() - PATIENCE_S)
    assert refusal.value.outcome is told
    assert around.did == []


async def test_patience_ends() -> None:
    around = Surroundings(["refilling"])
    begun = monotonic()
    with pytest.raises(Refused) as refusal:
        await around.decide(reply("refilling"))
    assert refusal.value.outcome is Outcome.REFILLING
    assert monotonic() - begun >= PATIENCE_S


async def test_a_book_on_its_way_is_waited_for() -> None:
    around = Surroundings(["book_not_loaded"], OK)
    assert (await around.decide(reply("book_not_loaded"))).outcome == "ok"
    assert around.did == ["ask postgres", "call", "ask postgres", "call"]


async def test_a_book_that_postgres_does_not_have_is_none() -> None:
    with pytest.raises(Refused) as refusal:
        await Surroundings(OK, loaded=None).decide(reply("book_not_loaded"))
    assert refusal.value.outcome is Outcome.BOOK_NOT_FOUND


async def test_a_book_that_was_brought_and_is_gone_puts_the_shard_in_doubt() -> None:
    around = Surroundings(["book_not_loaded"], loaded=True)
    with pytest.raises(Refused) as refusal:
        await around.decide(reply("book_not_loaded"))
    assert refusal.value.outcome is Outcome.RECOVERING
    assert around.did == ["ask postgres", "call", "doubt"], "it may have come in between: it is asked for once more"


async def test_a_code_in_quarantine_leaves_it_for_a_receipt_that_holds() -> None:
    around = Surroundings(OK)
    assert (await around.decide(reply("code_quarantined"), receipt="rc_x")).outcome == "ok"
    assert around.did == ["restore", "call"]


async def test_a_receipt_that_does_not_hold_changes_nothing() -> None:
    around = Surroundings(OK, receipt_holds=False)
    with pytest.raises(Refused) as refusal:
        await around.decide(reply("code_quarantined"), receipt="rc_x")
    assert refusal.value.outcome is Outcome.CODE_QUARANTINED
    assert around.did == ["restore"]


async def test_a_code_that_is_in_quarantine_again_is_not_restored_twice() -> None:
    around = Surroundings(["code_quarantined"])
    with pytest.raises(Refused) as refusal:
        await around.decide(reply("code_quarantined"), receipt="rc_x")
    assert refusal.value.outcome is Outcome.CODE_QUARANTINED
    assert around.did == ["restore", "call"]
