"""How far the ledger is in each shard, and the requests that wait for it.

An event that a request made is durable when the ledger holds its own entry: position and tip. What a request is only shown
is durable when the ledger has passed its position.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from itertools import count
from time import monotonic
from typing import NamedTuple

from coupon_svc.domain.outcomes import Outcome, Refused
from coupon_svc.hot import Slot

OVERDUE_S = 0.1
"""A commit is published within milliseconds. A request that has waited this long may have missed the message."""
HEARD_KEPT_S = 1.0
"""How long a tip is remembered: the message of a commit may be read before the reply of the call that made the entry."""
ASKED_AT_ONCE_MAX = 1_000


class EntryKey(NamedTuple):
    """A shard and the `EntryId` of an entry in its stream."""

    shard: int
    epoch: int
    seq: int
    tip: str


class _PositionWaiter(NamedTuple):
    epoch: int
    seq: int
    tie: int
    overdue_at: float
    until: float
    slot: Slot[None]


class _EntryWaiter:
    """`ask_at` is when Postgres is to be asked for the entry: then no message came."""

    __slots__ = ("ask_at", "begun", "entry", "slot", "until")

    def __init__(self, entry: EntryKey, begun: float, until: float) -> None:
        self.entry = entry
        self.begun = begun
        self.ask_at = begun + OVERDUE_S
        self.until = until
        self.slot: Slot[None] = Slot()


class DurabilityWaiters:
    """One commit of the writer wakes every request it serves; a request that waits costs one entry in a table.

    Times are those of the monotonic clock, in seconds. Who is woken goes on at once: all that is left of its request runs
    within `set_result` (coupon_svc/hot.py), and may come to wait again.
    """

    def __init__(self, shards: int) -> None:
        self._committed = [(0, 0)] * shards
        self._for_positions: list[list[_PositionWaiter]] = [[] for _ in range(shards)]
        self._for_entries: dict[str, list[_EntryWaiter]] = {}
        """By tip."""
        self._heard: set[str] = set()
        self._heard_before: set[str] = set()
        """Tips of messages: of this HEARD_KEPT_S, and of the one before."""
        self._heard_since = monotonic()
        self._tie = count()

    def committed(self, shard: int) -> tuple[int, int]:
        """(epoch, seq) up to which the ledger is known to be."""
        return self._committed[shard]

    # --- what is heard

    def hear(self, tips: Sequence[str]) -> None:
        """The ledger holds the entries with these tips."""
        self._heard.update(tips)
        for tip in tips:
            for waiter in self._for_entries.pop(tip, ()):
                waiter.slot.set_result(None)

    def advance(self, shard: int, epoch: int, seq: int) -> None:
        """The ledger is at `seq` of `epoch`. Whoever is shown something of an older epoch learns that its outcome is
        unknown."""
        if (epoch, seq) <= self._committed[shard]:
            return
        self._committed[shard] = (epoch, seq)
        waiting = self._for_positions[shard]
        while waiting and (waiting[0].epoch, waiting[0].seq) <= (epoch, seq):
            waiter = heapq.heappop(waiting)
            if waiter.epoch == epoch:
                waiter.slot.set_result(None)
            else:
                waiter.slot.set_exception(Refused(Outcome.OUTCOME_UNKNOWN))

    # --- waiting

    async def wait(self, shard: int, epoch: int, seq: int, until: float) -> None:
        """Return once the ledger has passed `seq` of `epoch`.

        Raises Refused(outcome_unknown) when the epoch ends before that, or at `until`.
        """
        known_epoch, known_seq = self._committed[shard]
        if known_epoch == epoch and known_seq >= seq:
            return
        if known_epoch > epoch:
            raise Refused(Outcome.OUTCOME_UNKNOWN)
        slot: Slot[None] = Slot()
        overdue_at = monotonic() + OVERDUE_S
        heapq.heappush(
            self._for_positions[shard], _PositionWaiter(epoch, seq, next(self._tie), overdue_at, until, slot)
        )
        await slot

    async def wait_for_entry(self, entry: EntryKey, until: float) -> None:
        """Return once the ledger holds the entry.

        Raises Refused(outcome_unknown) when it holds another one in its place, when the epoch ended without it, or at
        `until`.
        """
        tip = entry.tip
        if tip in self._heard or tip in self._heard_before:
            return
        waiter = _EntryWaiter(entry, monotonic(), until)
        waiters = self._for_entries.get(tip)
        if waiters is None:
            self._for_entries[tip] = [waiter]
        else:
            waiters.append(waiter)
        await waiter.slot

    def expire(self) -> bool:
        """End the waits whose time is over. True when somebody has waited so long that a message may be lost."""
        now = monotonic()
        overdue = False
        late: list[Slot[None]] = []
        for shard, waiting in enumerate(self._for_positions):
            late += [waiter.slot for waiter in waiting if waiter.until <= now]
            self._for_positions[shard] = waiting = [w for w in waiting if w.until > now and not w.slot.done()]
            heapq.heapify(waiting)
            overdue = overdue or any(waiter.overdue_at <= now for waiter in waiting)
        for tip, waiters in list(self._for_entries.items()):
            late += [waiter.slot for waiter in waiters if waiter.until <= now]
            waiters[:] = [w for w in waiters if w.until > now and not w.slot.done()]
            if not waiters:
                del self._for_entries[tip]
            overdue = overdue or any(waiter.begun + OVERDUE_S <= now for waiter in waiters)
        if now >= self._heard_since + HEARD_KEPT_S:
            self._heard, self._heard_before, self._heard_since = set(), self._heard, now
        for slot in late:
            slot.set_exception(Refused(Outcome.OUTCOME_UNKNOWN))
        return overdue or bool(late)

    # --- what no message told: coupon_svc/service/missed_messages.py asks Postgres

    def unheard(self) -> list[EntryKey]:
        """Entries that somebody waits for and of which no message came, to be asked for: at most ASKED_AT_ONCE_MAX, and each
        again when its request has waited twice as long."""
        now = monotonic()
        asked = []
        for waiters in self._for_entries.values():
            if waiters[0].ask_at <= now:
                waiters[0].ask_at = now + (now - waiters[0].begun)
                asked.append(waiters[0].entry)
                if len(asked) == ASKED_AT_ONCE_MAX:
                    break
        return asked

    def learn(self, asked: Sequence[EntryKey], found: Mapping[tuple[int, int, int], str]) -> None:
        """What Postgres said: `found` has the tip of each entry that is there, by (shard, epoch, seq)."""
        for entry in asked:
            tip = found.get((entry.shard, entry.epoch, entry.seq))
            if tip is None and self._committed[entry.shard][0] <= entry.epoch:
                continue  # it may still come
            for waiter in self._for_entries.pop(entry.tip, ()):
                if tip == entry.tip:
                    waiter.slot.set_result(None)
                else:
                    waiter.slot.set_exception(Refused(Outcome.OUTCOME_UNKNOWN))
