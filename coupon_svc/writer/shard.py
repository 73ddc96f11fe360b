"""A shard that this writer owns: where in its life it is, and what its owner knows of it.

The shard is one state machine; docs/architecture.md ("The life of a shard") has the diagram. Only its methods change its
state. The opener takes it through `Opening` and `Recovering`; every other part of the writer works on it while it is
`Open`, and reports what it finds amiss.
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass

from coupon_svc.domain.errors import CouponError, error_location
from coupon_svc.domain.position import Epoch, Position, Seq
from coupon_svc.postgres.shards import OwnedShard
from coupon_svc.redis.control import Term
from coupon_svc.redis.errors import ClocksApart
from coupon_svc.redis.server import Identity
from coupon_svc.writer.pool import Pool

log = logging.getLogger(__name__)

TRIM_KEPT_S = 60.0


@dataclass(frozen=True, slots=True)
class Shut:
    """Nothing is persisted or lent, while Redis may go on to decide. The opener tries the shard next."""


@dataclass(frozen=True, slots=True)
class Opening:
    """The opener compares Redis with the ledger, and brings what was lent."""


@dataclass(frozen=True, slots=True)
class Recovering:
    """The opener makes Redis agree with the ledger again, in a new epoch."""


@dataclass(frozen=True, slots=True)
class Open:
    """Events are persisted and codes are lent, on the Redis that is certified for the shard."""

    identity: Identity


@dataclass(frozen=True, slots=True)
class Stopped:
    """Its history contradicts itself: nothing is done until a person has looked."""

    reason: str


State = Shut | Opening | Recovering | Open | Stopped


class ImpossibleTransition(CouponError):
    """A part of the writer moves a shard in a way that its state does not allow: a bug."""


class Hole(CouponError):
    """Events are missing from the stream: they were trimmed by hand, or this Redis is not the one the ledger knows."""


class Unrecorded(CouponError):
    """The ledger could not take events, which are dead letters now. Nobody may be told that they are durable."""


def term_of(owned: OwnedShard) -> Term:
    """What the owner of a shard writes to Redis with."""
    return Term(owned.shard, owned.epoch, owned.generation)


class Shard:
    """One owned shard: its state, where the ledger is, and its books' pools."""

    def __init__(self, owned: OwnedShard) -> None:
        self._state: State = Shut()
        self._own(owned)
        self._committed = owned.committed
        self._chain = owned.chain
        self._tip = owned.tip
        self._recovery_wanted: str | None = None
        self._clocks_were_apart = False
        self.pools: dict[str, Pool] = {}
        self._gone: dict[str, int] = {}
        self._marks: deque[tuple[float, int]] = deque()

    # --- what is known

    @property
    def number(self) -> int:
        return self._owned.shard

    @property
    def owned(self) -> OwnedShard:
        """The shard as the ledger had it when it was taken, opened or recovered last."""
        return self._owned

    @property
    def term(self) -> Term:
        """Names the owner and the epoch. What was found in another term says nothing about this one."""
        return self._term

    @property
    def committed(self) -> int:
        """The seq that the ledger has reached in this epoch."""
        return self._committed

    @property
    def position(self) -> Position:
        """Where the ledger is."""
        return Position(Epoch(self._owned.epoch), Seq(self._committed))

    @property
    def chain(self) -> bytes:
        """The hash of the ledger's entry at `committed`."""
        return self._chain

    @property
    def tip(self) -> str:
        """The tip of the ledger's entry at `committed`: the next one of the stream must follow it."""
        return self._tip

    @property
    def state(self) -> State:
        return self._state

    @property
    def is_open(self) -> bool:
        return isinstance(self._state, Open)

    @property
    def identity(self) -> Identity | None:
        """The Redis that is certified for the open shard; None while it is not open."""
        return self._state.identity if isinstance(self._state, Open) else None

    @property
    def recovery_wanted(self) -> str | None:
        """Why opening the shard again would not mend it; None while nothing says so."""
        return self._recovery_wanted

    @property
    def clocks_were_apart(self) -> bool:
        """Whether locks and idempotency records of this epoch may have ended by a wrong clock."""
        return self._clocks_were_apart

    # --- transitions by the opener

    def opening_begins(self) -> None:
        self._require("opening_begins", Shut)
        self._enter(Opening(), logging.DEBUG, "is being opened")

    def found_in_ledger(self, owned: OwnedShard) -> None:
        """The ledger has the shard as `owned`, whatever was thought. `Opening` stays."""
        if self._allows("found_in_ledger", Opening):
            self._own(owned)
            self._committed, self._chain, self._tip = owned.committed, owned.chain, owned.tip

    def found_clocks_apart(self) -> bool:
        """Redis's clock is wrong, or was a moment ago: what it dated is not kept. `Opening` stays. False if known before."""
        known = self._clocks_were_apart
        if self._allows("found_clocks_apart", Opening):
            self._clocks_were_apart = True
            self._recovery_wanted = "the clocks of Redis and Postgres were apart"
        return not known

    def recovery_begins(self, reason: str) -> None:
        if self._allows("recovery_begins", Opening):
            self._enter(Recovering(), logging.WARNING, f"is being recovered: {reason}")

    def recovered(self, owned: OwnedShard) -> None:
        """A new epoch has begun: nothing that was known of the last one is of use."""
        if self._allows("recovered", Recovering):
            self._own(owned)
            self._committed, self._chain, self._tip = 0, owned.chain, ""
            self._recovery_wanted, self._clocks_were_apart = None, False
            self.pools.clear()
            self._gone.clear()
            self._marks.clear()
            self._enter(Opening(), logging.INFO, f"is recovered, in epoch {owned.epoch}")

    def opened(self, identity: Identity) -> None:
        """`identity` is certified for the shard. What was reported meanwhile keeps it shut."""
        if self._allows("opened", Opening):
            if self._recovery_wanted is None:
                self._enter(Open(identity), logging.INFO, f"is open in epoch {self._owned.epoch}")
            else:
                self._enter(Shut(), logging.WARNING, f"stays shut: {self._recovery_wanted}")

    def opening_failed(self, reason: str, *, recover: bool = False, level: int = logging.WARNING) -> None:
        """The opener tries again. With `recover`, by a recovery."""
        if self._allows("opening_failed", Opening, Recovering):
            if recover:
                self._recovery_wanted = reason
            self._enter(Shut(), level, f"is not opened: {reason}")

    # --- transitions by everybody else

    def report(self, term: Term, error: Exception, *, recover: bool = False) -> None:
        """Work no more for the shard, for what was found amiss in `term`, until it is opened again. With `recover`, opening
        it again would not mend that.

        A term that is over says nothing: the recovery that came between has dealt with what the work was about.
        """
        if term != self.term or isinstance(self._state, Stopped):
            return
        what = _in_words(error)
        if isinstance(error, ClocksApart):
            self._clocks_were_apart = True
        if recover:
            self._recovery_wanted = what
        if self.is_open:
            self._enter(Shut(), logging.ERROR, f"is shut: {what}")

    def superseded(self) -> None:
        """The ledger is in a newer epoch: somebody wants the shard recovered. A recovery under way is just that."""
        if isinstance(self._state, Open | Stopped):
            self._enter(Shut(), logging.WARNING, "is shut: a recovery is wanted")

    def stopped(self, reason: str) -> None:
        """History contradicts itself, in whatever state that was found. The opener leaves the shard alone."""
        self._enter(Stopped(reason), logging.CRITICAL, f"is stopped: {reason}")

    def stop_failed(self) -> None:
        """The ledger or Redis could not be told: who tries to open the shard finds what is wrong again, and tells them."""
        if isinstance(self._state, Stopped):
            self._enter(Shut(), logging.WARNING, "is not stopped in both stores yet")

    def advanced(self, term: Term, committed: int, chain: bytes, tip: str) -> bool:
        """The ledger has reached `committed` in `term`. False, and nothing changes, when that term is over: a position of
        the epoch before says nothing in the new one."""
        if term != self.term:
            return False
        self._committed, self._chain, self._tip = committed, chain, tip
        return True

    def _own(self, owned: OwnedShard) -> None:
        self._owned, self._term = owned, term_of(owned)

    def _enter(self, state: State, level: int, what: str) -> None:
        self._state = state
        log.log(level, "shard %02d %s", self.number, what)

    def _require(self, transition: str, *states: type[State]) -> None:
        if not isinstance(self._state, states):
            raise ImpossibleTransition(f"{transition} in state {type(self._state).__name__}")

    def _allows(self, transition: str, *states: type[State]) -> bool:
        """Whether the opener may go on: not with a shard that was stopped under its hands."""
        if isinstance(self._state, Stopped):
            return False
        self._require(transition, *states)
        return True

    # --- what the owner remembers of an epoch

    def answered_by_gone(self, gone: list[str], seq: int) -> list[tuple[str, int]]:
        """API processes that are gone and all of whose answers the ledger has by now, each with the seq it can have seen.

        `seq` is the shard's, read after they were found gone: they can have seen nothing beyond it.
        """
        self._gone = {process: self._gone.get(process, seq) for process in gone}
        return [(process, seen) for process, seen in self._gone.items() if seen <= self._committed]

    def mark(self, now: float) -> None:
        """Remember where the ledger is at this moment."""
        if not self._marks or now - self._marks[-1][0] >= 1.0:
            self._marks.append((now, self._committed))

    def trim_seq(self, now: float) -> int:
        """Events below this seq have been in the ledger for a minute; 0 when there are none yet."""
        seq = 0
        while self._marks and now - self._marks[0][0] >= TRIM_KEPT_S:
            seq = self._marks.popleft()[1]
        return seq


def _in_words(error: Exception) -> str:
    """What is logged of a finding: the message of an error of ours, only the place of an unforeseen one."""
    if isinstance(error, CouponError):
        return str(error) or type(error).__name__
    return f"{type(error).__name__} at {error_location(error)}"
