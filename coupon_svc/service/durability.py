"""How long a request may wait, and when its answer may leave.

A request of the data plane has one deadline for all it does: polls, operations and their repetitions, look-ups of a code,
the wait for the ledger. It is counted from `begun`, when its use case began, and ends PATIENCE_S + COUPON_LEDGER_WAIT_MS
later. Within that

- a book or codes that are on their way to Redis are waited for until PATIENCE_S from the begin: `recovering`, `refilling`;
- the ledger is waited for during COUPON_LEDGER_WAIT_MS at most: `outcome_unknown`, or `ledger_behind` for a read;
- an operation waits to be sent for QUEUED_S at most (coupon_svc/redis/dispatcher.py): `store_unavailable`.

Beyond that, the reply to what was sent is waited for as long as Redis goes on answering: until nothing has come for SILENT_S
(coupon_svc/redis/connection.py), `outcome_unknown`.

A request of the control plane waits SLOT_WAIT_S for one of its tenant's connections, and TURN_WAIT_S for its turn
(coupon_svc/postgres/uploads.py). Once Postgres has committed, it waits IN_FORCE_WAIT_S for Redis.
"""

from __future__ import annotations

from time import monotonic

from coupon_svc.domain.outcomes import Outcome, Refused
from coupon_svc.domain.position import Position
from coupon_svc.redis.data_plane import DataPlane
from coupon_svc.redis.shard_view import ShardView
from coupon_svc.redis.waiters import EntryKey

PATIENCE_S = 0.5
"""How long a request waits for a book or for codes before its caller is told to try again."""
IN_FORCE_WAIT_S = 5.0
"""How long a change of a book waits for Redis to have it."""
SLOT_WAIT_S = 10.0
STATEMENTS_S = 5.0
"""How long the statements of one transaction may take together, within the deadline."""


class Durability:
    """Decides when an answer may leave: see `docs/guarantees.md` for what it promises then.

    `begun` is when the request began, by the monotonic clock, in seconds.
    """

    def __init__(self, plane: DataPlane, ledger_wait_ms: int) -> None:
        self._plane = plane
        self._ledger_wait_s = ledger_wait_ms / 1000
        self.request_s = PATIENCE_S + self._ledger_wait_s
        """How long a request may take in all."""

    def left_s(self, begun: float, most: float = STATEMENTS_S) -> float:
        """Seconds that the request may still take, at most `most`."""
        return max(0.0, min(most, begun + self.request_s - monotonic()))

    def durable_or_early(self, view: ShardView, position: Position, ack: str, *, made: bool) -> bool | None:
        """Whether an answer that shows the event at `position` is durable; None when it must not leave before that is known.

        False says that it may leave early: the book has `ack = redis`, and this process is registered. `made`: this very
        request made the event. A record that a certified Redis has of an older epoch is durable; an event of one's own of
        an older epoch may be lost.
        """
        if position.epoch < view.epoch and not made:
            return True
        if ack != "ledger" and self._plane.may_answer_early(view, position.epoch):
            return False
        return None

    async def wait(
        self,
        view: ShardView,
        position: Position,
        begun: float,
        late: Outcome = Outcome.OUTCOME_UNKNOWN,
        *,
        entry: tuple[int, int, str] | None = None,
    ) -> bool:
        """Return True once the ledger holds the event at `position`; for one that this request made, its `entry`:
        epoch, seq of its last event, tip.

        Raises Refused(`late`) when its epoch ends before, when the ledger holds another entry, or when the wait takes too
        long.
        """
        waiters = self._plane.waiters
        until = monotonic() + self.left_s(begun, self._ledger_wait_s)
        try:
            if entry is not None:
                await waiters.wait_for_entry(EntryKey(view.shard, *entry), until)
            else:
                await waiters.wait(view.shard, position.epoch, position.seq, until)
        except Refused:
            raise Refused(late) from None
        return True
