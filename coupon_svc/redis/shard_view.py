"""The life of a shard as one API process sees it: whether operations may run in it, and what was seen of it.

`docs/architecture.md`, *The life of a shard*, shows the states beside those of the shard's owner.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple

import msgspec

from coupon_svc.domain.events import Entry
from coupon_svc.redis.keys import ShardKeys

log = logging.getLogger(__name__)


class ViewState(StrEnum):
    """What this process knows of the shard's Redis. Operations run in an OPEN shard alone."""

    UNVERIFIED = "unverified"
    """No server was verified: this process has not connected yet, or its connection broke. `store_unavailable`."""
    OPEN = "open"
    """The owner certified the shard for this server, and for an epoch that is not over."""
    SHUT = "shut"
    """The server was verified, and the shard is not certified for it. `recovering`."""
    SUSPECT = "suspect"
    """A reply has said since that something is wrong; the server is verified again at once. `recovering`."""
    OVER = "over"
    """Postgres has begun a newer epoch: the shard opens when its owner has certified it there. `recovering`."""


class Seen(NamedTuple):
    """How far a shard was seen to be: a Redis that is behind it is not believed."""

    epoch: int
    seq: int


class Certificate(NamedTuple):
    """What the shard's meta says, where it certifies the shard for the server that was asked."""

    epoch: int
    seq: int
    committed: int
    backlog_max: int


class MadeEntry(msgspec.Struct, frozen=True):
    """An entry that a call of this process has made, as the reply told of it."""

    seq: int
    tip: str
    content: Sequence[str]
    """[n, after, at_ms, events]"""


class ShardView:
    """One shard. The methods are the transitions; each is complete before anything else runs."""

    __slots__ = ("backlog_max", "epoch", "epoch_min", "keys", "ledger_unseen_s", "made", "seen_seq", "shard", "state")

    def __init__(self, shard: int, keys: ShardKeys) -> None:
        self.shard = shard
        self.keys = keys
        self.state = ViewState.UNVERIFIED
        self.epoch = 0
        """The last epoch in which the shard was open; 0 before the first."""
        self.epoch_min = 0
        """The ledger has begun this epoch, so older ones are over, whatever a Redis says."""
        self.seen_seq = 0
        self.made: deque[MadeEntry] = deque()
        """Entries of this epoch that the ledger may lack, in the order in which their replies came: the second copy of what
        was answered before the ledger knew."""
        self.backlog_max = 0
        self.ledger_unseen_s = math.inf
        """How long ago the ledger was seen last, by Redis's clock when it was verified last."""

    @property
    def is_open(self) -> bool:
        return self.state is ViewState.OPEN

    @property
    def seen(self) -> Seen:
        """The highest position that this process has seen: in a reply, in a message, or in meta at a verification."""
        return Seen(self.epoch, self.seen_seq)

    def heard_of_ledger(self, unseen_s: float) -> None:
        """The shard's owner saw the ledger `unseen_s` seconds before Redis was asked; infinite when it does not see it."""
        self.ledger_unseen_s = unseen_s

    # --- the transitions

    def disconnect(self) -> None:
        """The connection is gone: whoever is reached next must be verified."""
        self.state = ViewState.UNVERIFIED

    def suspect(self) -> None:
        """A reply says that this Redis may not be the one that was certified."""
        if self.state is ViewState.OPEN:
            log.warning("shard %02d is suspect; it is shut until its owner has certified it again", self.shard)
            self.state = ViewState.SUSPECT

    def refuse(self) -> None:
        """The server was verified, and does not certify the shard for itself."""
        self.state = ViewState.SHUT

    def certify(self, certificate: Certificate, seen: Seen) -> None:
        """The server was verified, and certifies the shard. `seen`: what was seen when the server was asked.

        The shard opens unless the certificate is of an epoch that is over, or of a Redis that went back.
        """
        epoch = certificate.epoch
        if epoch < max(self.epoch, self.epoch_min) or (epoch, certificate.seq) < seen:
            self.state = ViewState.SHUT
            return
        self.state = ViewState.OPEN
        if epoch > self.epoch:
            self.epoch, self.seen_seq = epoch, 0
            self.made.clear()
        self.seen_seq = max(self.seen_seq, certificate.seq, certificate.committed)
        self.backlog_max = certificate.backlog_max

    def epoch_began(self, epoch: int, live: int) -> Seen | None:
        """Postgres is in `epoch`: from now on nothing of an older one is answered early.

        `live` is the epoch in which Redis decided last and that is not settled, 0 for none: the only one about which a
        recovery asks. Returns what was seen of it, to be reported, once it is over.
        """
        if epoch <= self.epoch_min:
            return None
        self.epoch_min = epoch
        if self.epoch < epoch and self.state in (ViewState.OPEN, ViewState.SUSPECT):
            self.state = ViewState.OVER
        if not 0 < live < epoch:
            return None
        # No newer epoch than `live` was entered: the next one is certified only when this one is settled.
        return Seen(live, self.seen_seq if self.epoch == live else 0)

    # --- what is seen

    def observe(self, epoch: int, seq: int) -> None:
        """A reply, or a message, shows the position. One of another epoch says nothing about this one."""
        if epoch == self.epoch and seq > self.seen_seq:
            self.seen_seq = seq

    def keep(self, epoch: int, seq: int, tip: str, content: Sequence[str]) -> None:
        """A call of this process made an entry. One of an epoch that is over comes too late for its report."""
        if epoch == self.epoch:
            self.made.append(MadeEntry(seq, tip, content))

    def forget(self, committed: int) -> None:
        """The ledger has all entries of this epoch up to there."""
        made = self.made
        while made and made[0].seq <= committed:
            made.popleft()

    def made_entries(self) -> list[Entry]:
        """What `made` keeps, as a report carries it."""
        entries = []
        for one in self.made:
            n, after, at_ms, events = one.content
            entries.append(Entry(self.epoch, one.seq, int(n), after, one.tip, int(at_ms), events.encode()))
        return entries
