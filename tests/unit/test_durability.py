"""When an answer may leave, and how long a request may wait in all."""

from __future__ import annotations

import asyncio

import pytest

from coupon_svc.domain.clock import boot_s
from coupon_svc.domain.outcomes import Outcome, Refused
from coupon_svc.domain.position import Epoch, Position, Seq
from coupon_svc.redis import waiters as waiters_module
from coupon_svc.redis.data_plane import DataPlane
from coupon_svc.redis.scripts import Scripts
from coupon_svc.redis.shard_view import Certificate
from coupon_svc.service import durability as durability_module
from coupon_svc.service.durability import PATIENCE_S, Durability

LEDGER_WAIT_S = 3.0
EPOCH = 4


class Clock:
    now = 1000.0


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The monotonic clock, which goes on only when it is told to."""
    clock = Clock()
    for module in (durability_module, waiters_module):
        monkeypatch.setattr(module, "monotonic", lambda: clock.now)
    return clock


@pytest.fixture
def plane() -> DataPlane:
    """With one shard, open in EPOCH."""
    plane = DataPlane("redis://127.0.0.1:1", 1, Scripts())
    plane.views[0].certify(Certificate(EPOCH, 9, committed=0, backlog_max=100), plane.views[0].seen)
    return plane


def at(epoch: int, seq: int = 1) -> Position:
    return Position(Epoch(epoch), Seq(seq))


DURABLE, EARLY, WAITS = True, False, None


@pytest.mark.parametrize("made", [True, False])
@pytest.mark.parametrize("registered", [True, False])
@pytest.mark.parametrize("ack", ["ledger", "redis"])
def test_an_answer_leaves_early_only_in_a_redis_book_of_a_registered_process(
    plane: DataPlane, ack: str, registered: bool, made: bool
) -> None:
    if registered:
        plane.register_until(boot_s() + 100)
    verdict = Durability(plane, 3000).durable_or_early(plane.views[0], at(EPOCH), ack, made=made)
    assert verdict is (EARLY if ack == "redis" and registered else WAITS)


def test_a_record_of_an_older_epoch_is_durable_and_an_event_of_one_s_own_is_not(plane: DataPlane) -> None:
    plane.register_until(boot_s() + 100)
    durability, view = Durability(plane, 3000), plane.views[0]
    for ack in ("ledger", "redis"):
        assert durability.durable_or_early(view, at(EPOCH - 1), ack, made=False) is DURABLE
    plane.epoch_began(0, EPOCH, 0)
    for ack in ("ledger", "redis"):
        assert durability.durable_or_early(view, at(EPOCH - 1), ack, made=True) is WAITS


def test_nothing_of_an_epoch_that_is_over_leaves_early(plane: DataPlane) -> None:
    plane.register_until(boot_s() + 100)
    plane.epoch_began(0, EPOCH + 1, 0)
    assert Durability(plane, 3000).durable_or_early(plane.views[0], at(EPOCH), "redis", made=True) is WAITS


def test_all_that_a_request_does_has_one_deadline(plane: DataPlane, clock: Clock) -> None:
    durability, begun = Durability(plane, int(1000 * LEDGER_WAIT_S)), clock.now
    assert durability.left_s(begun, 100) == PATIENCE_S + LEDGER_WAIT_S
    assert durability.left_s(begun, 1.0) == 1.0
    clock.now += 2.0
    assert durability.left_s(begun, 100) == PATIENCE_S + LEDGER_WAIT_S - 2.0
    clock.now += 100
    assert durability.left_s(begun, 100) == 0.0


@pytest.mark.parametrize(("spent_s", "left_s"), [(0.0, LEDGER_WAIT_S), (PATIENCE_S, LEDGER_WAIT_S), (2.0, 1.5)])
async def test_the_ledger_is_waited_for_within_the_deadline(
    plane: DataPlane, clock: Clock, spent_s: float, left_s: float
) -> None:
    begun = clock.now
    clock.now += spent_s
    durability = Durability(plane, int(1000 * LEDGER_WAIT_S))
    waiting = asyncio.create_task(durability.wait(plane.views[0], at(EPOCH), begun))
    await asyncio.sleep(0)
    clock.now += left_s - 0.01
    plane.waiters.expire()
    await asyncio.sleep(0)
    assert not waiting.done()
    clock.now += 0.02
    plane.waiters.expire()
    with pytest.raises(Refused) as refusal:
        await asyncio.wait_for(waiting, 1)
    assert refusal.value.outcome is Outcome.OUTCOME_UNKNOWN


async def test_a_read_that_waits_too_long_says_that_nothing_was_done(plane: DataPlane, clock: Clock) -> None:
    waiting = asyncio.create_task(
        Durability(plane, 3000).wait(plane.views[0], at(EPOCH), clock.now, Outcome.LEDGER_BEHIND)
    )
    await asyncio.sleep(0)
    plane.waiters.advance(0, EPOCH + 1, 0)
    with pytest.raises(Refused) as refusal:
        await asyncio.wait_for(waiting, 1)
    assert refusal.value.outcome is Outcome.LEDGER_BEHIND


async def test_what_the_ledger_has_is_durable(plane: DataPlane, clock: Clock) -> None:
    plane.waiters.advance(0, EPOCH, 5)
    assert await Durability(plane, 3000).wait(plane.views[0], at(EPOCH, 5), clock.now - 100) is True
