"""The operations of one class that wait to be sent, served in turns by tenant.

A turn of the round takes one operation of each tenant that has any: so a tenant with a thousand operations in the queue
delays another's by no more than a call. The queue has its bounds, in all and for each tenant.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Any

from coupon_svc.hot import Slot
from coupon_svc.redis.calls import BoundOperation
from coupon_svc.redis.contract import Reply
from coupon_svc.redis.shard_view import ShardView

QUEUED_MAX = 20_000
"""Operations that a queue holds."""
TENANT_QUEUED_MAX = 10_000
"""Operations of one tenant that it holds: who floods it must leave the others a place. As many as a process has connections
(COUPON_CONNECTIONS_MAX, if nobody sets it): to refuse costs about as much as to serve, and who was refused comes again at
once. With places for 4,096 only, 8,192 callers got a tenth of what 1,000 got."""
WAIT_MAX_S = 2.0
"""How long the first operation of a tenant may have waited when another one is put behind it: whoever comes later would be
sent when it is late, or be answered when its caller has gone. With places alone, 8,192 callers of a Redis that does 770 per
second got a third of them."""
CALL_WEIGHT_MAX = 256
"""What a call may weigh: 256 assigns, which is about 3 ms of Redis's time and less than 256 KiB."""


class PendingOperation:
    """An operation on its way to Redis, and the caller who waits for its reply."""

    __slots__ = ("deadline", "epoch", "operation", "parameters", "reply", "tenant_id", "view", "weight")

    def __init__(self, operation: BoundOperation, view: ShardView, parameters: dict[str, Any], deadline: float) -> None:
        self.operation = operation
        self.view = view
        self.parameters = parameters
        self.tenant_id: int = parameters["tenant_id"]
        self.weight = 1 if operation.weigh is None else operation.weigh(parameters)
        self.deadline = deadline
        """When it must have been sent, by the monotonic clock."""
        self.reply: Slot[Reply] = Slot()
        self.reply.withdrawable = True
        self.epoch = 0
        """In which it was sent; 0 before."""


class CallQueue:
    """Operations in the order in which they are to be sent."""

    def __init__(self) -> None:
        self._by_tenant: dict[int, OrderedDict[PendingOperation, None]] = {}
        """None of them is empty. An operation is removed without a search: thousands of callers may hang up together."""
        self._turns: deque[int] = deque()
        """The tenants in `_by_tenant`, whose turn comes next first."""
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def put(self, operation: PendingOperation) -> bool:
        """Whether there was a place for the operation."""
        queued = self._by_tenant.get(operation.tenant_id)
        if self._size >= QUEUED_MAX:
            return False
        if queued is None:
            self._by_tenant[operation.tenant_id] = queued = OrderedDict()
            self._turns.append(operation.tenant_id)
        elif (number := len(queued)) >= CALL_WEIGHT_MAX and (
            number >= TENANT_QUEUED_MAX or operation.deadline - next(iter(queued)).deadline > WAIT_MAX_S
        ):  # the two deadlines show how long the first has waited; as many as one call takes may always wait
            return False
        queued[operation] = None
        self._size += 1
        return True

    def take(self) -> list[PendingOperation]:
        """Those of the next call: as many as it may carry, and at least one."""
        taken: list[PendingOperation] = []
        weight = 0
        turns, by_tenant = self._turns, self._by_tenant
        while turns:
            queued = by_tenant[turns[0]]
            operation = next(iter(queued))
            weight += operation.weight
            if weight > CALL_WEIGHT_MAX and taken:
                break
            taken.append(operation)
            del queued[operation]
            if queued:
                turns.rotate(-1)
            else:
                del by_tenant[turns.popleft()]
        self._size -= len(taken)
        return taken

    def remove(self, operation: PendingOperation) -> None:
        """Its caller is gone. Does nothing to an operation that is not in the queue."""
        queued = self._by_tenant.get(operation.tenant_id)
        if queued is not None and operation in queued:
            del queued[operation]
            self._size -= 1
            self._forget_empty(operation.tenant_id)

    def take_late(self, now: float) -> list[PendingOperation]:
        """Those that must not be sent any more."""
        late = [one for queued in self._by_tenant.values() for one in queued if one.deadline <= now]
        for operation in late:
            self.remove(operation)
        return late

    def _forget_empty(self, tenant_id: int) -> None:
        if not self._by_tenant[tenant_id]:
            del self._by_tenant[tenant_id]
            self._turns.remove(tenant_id)
