"""What an API process says of an epoch that is over: how far it has seen, and what it still knows of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from coupon_svc.domain.events import Entry


class Report(NamedTuple):
    """A promise never to answer from the epoch again, and all that a recovery needs to know of what was answered.

    `seen_seq` is the highest seq that was seen: in a reply, in a message, or when the server was verified. `entries` are
    those that the process's own calls have made, and of which it has not heard that the ledger has them.
    """

    shard: int
    epoch: int
    seen_seq: int
    entries: Sequence[Entry] = ()
