"""Operations wait in turns by tenant, and within bounds."""

from __future__ import annotations

from typing import Any

import pytest

from coupon_svc.redis import call_queue
from coupon_svc.redis.call_queue import CALL_WEIGHT_MAX, WAIT_MAX_S, CallQueue, PendingOperation
from coupon_svc.redis.calls import bind_operation
from coupon_svc.redis.keys import ShardKeys
from coupon_svc.redis.scripts import Scripts
from coupon_svc.redis.shard_view import ShardView

OPERATIONS = {name: bind_operation(one.contract) for name, one in Scripts().operations.items()}
VIEW = ShardView(0, ShardKeys(0, 1))


def assign(tenant_id: int, deadline: float = 1.0) -> PendingOperation:
    return PendingOperation(OPERATIONS["assign_coupon"], VIEW, {"tenant_id": tenant_id}, deadline)


def read(tenant_id: int, codes: int) -> PendingOperation:
    parameters: dict[str, Any] = {"tenant_id": tenant_id, "codes": ["A"] * codes}
    return PendingOperation(OPERATIONS["read_codes"], VIEW, parameters, 1.0)


def tenants(operations: list[PendingOperation]) -> list[int]:
    return [operation.tenant_id for operation in operations]


def filled(*tenant_ids: int) -> CallQueue:
    queue = CallQueue()
    for tenant_id in tenant_ids:
        assert queue.put(assign(tenant_id))
    return queue


def test_tenants_take_turns_and_each_has_its_own_order() -> None:
    queue, operations = CallQueue(), [assign(tenant_id) for tenant_id in (1, 1, 1, 2, 3, 3)]
    for operation in operations:
        queue.put(operation)
    taken = queue.take()
    assert tenants(taken) == [1, 2, 3, 1, 3, 1]
    assert [one for one in taken if one.tenant_id == 1] == operations[:3]
    assert len(queue) == 0
    assert queue.take() == []


def test_whoever_comes_late_does_not_wait_for_a_thousand_of_another_tenant() -> None:
    queue = filled(*[1] * 1_000)
    first = queue.take()
    assert tenants(first) == [1] * CALL_WEIGHT_MAX
    queue.put(assign(2))
    assert 2 in tenants(queue.take())[:2]


def test_a_turn_that_was_not_reached_comes_first_in_the_next_call() -> None:
    queue = filled(*[1] * CALL_WEIGHT_MAX, *[2] * CALL_WEIGHT_MAX, 3)
    assert tenants(queue.take())[:3] == [1, 2, 3]
    assert sorted(tenants(queue.take())[:2]) == [1, 2]


def test_a_call_is_bounded_by_weight() -> None:
    queue = CallQueue()
    for _ in range(5):
        queue.put(read(1, 800))  # each weighs 101
    assert [len(queue.take()) for _ in range(3)] == [2, 2, 1]


def test_what_weighs_more_than_a_call_may_goes_alone() -> None:
    queue = CallQueue()
    queue.put(read(1, 8 * CALL_WEIGHT_MAX))
    queue.put(read(1, 1))
    assert [len(queue.take()) for _ in range(2)] == [1, 1]


def test_a_flood_of_one_tenant_leaves_the_others_a_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_queue, "TENANT_QUEUED_MAX", 3)
    monkeypatch.setattr(call_queue, "CALL_WEIGHT_MAX", 1)
    queue = filled(1, 1, 1)
    assert not queue.put(assign(1))
    assert queue.put(assign(2))
    assert len(queue) == 4


def test_nobody_is_put_behind_one_that_has_waited_long_unless_a_call_carries_them() -> None:
    queue = CallQueue()
    for _ in range(CALL_WEIGHT_MAX - 1):
        assert queue.put(assign(1, deadline=4.0))
    late = 4.0 + WAIT_MAX_S + 0.1
    assert queue.put(assign(1, deadline=late))
    assert not queue.put(assign(1, deadline=late))
    assert queue.put(assign(1, deadline=4.0 + WAIT_MAX_S))
    assert queue.put(assign(2, deadline=late))
    queue.take()
    assert queue.put(assign(1, deadline=late))


def test_the_queue_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_queue, "QUEUED_MAX", 3)
    queue = filled(1, 2, 3)
    assert not queue.put(assign(4))
    queue.take()
    assert queue.put(assign(4))


def test_who_is_gone_leaves_the_queue() -> None:
    queue, gone = filled(1, 2), assign(3)
    queue.put(gone)
    queue.remove(gone)
    queue.remove(gone)
    queue.remove(assign(1))
    assert len(queue) == 2
    assert tenants(queue.take()) == [1, 2]


def test_what_is_late_is_taken_out() -> None:
    queue = CallQueue()
    for tenant_id, deadline in ((1, 3.0), (1, 1.0), (2, 1.0), (1, 2.0)):
        queue.put(assign(tenant_id, deadline))
    assert tenants(queue.take_late(2.0)) == [1, 1, 2]
    assert len(queue) == 1
    assert [operation.deadline for operation in queue.take()] == [3.0]
