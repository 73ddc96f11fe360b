"""Every safeguard that can be taken out of the model, where the service has it, and the bounds at which its absence shows.

Some cover for each other; taken out alone they break nothing within any bounds that were walked. `also` names the one that
must be out as well, and both together break a promise:

| safeguard | is covered by | because |
|---|---|---|
| `seen` | `fence_replid` | a Redis that went back on a live connection has another replid |
| `commit_owner` | `commit_position` | whoever committed since has moved the position |
"""

from __future__ import annotations

from typing import NamedTuple

from tests.model.faults import WISH
from tests.model.state import Bounds


class Safeguard(NamedTuple):
    """What it does, where it stands, and where the walk goes to see that it is needed."""

    does: str
    stands_in: str
    bounds: Bounds
    also: str = ""


_SMALL = Bounds(users=1, tries=1)
_EARLY = Bounds(mode="redis", tries=1)

SAFEGUARDS = {
    "lease_first": Safeguard(
        "a code is lent in Postgres before Redis is brought it",
        "coupon_svc/writer/lend.py",
        _SMALL._replace(codes=2, faults=0),
    ),
    "epoch": Safeguard(
        "a script of the data plane compares the epoch",
        "lua/include/fence.lua",
        _SMALL._replace(kinds=frozenset({WISH}), epochs=3),
    ),
    "seen": Safeguard(
        "a script compares the highest seq that its caller has seen",
        "lua/include/fence.lua",
        _EARLY._replace(kinds=frozenset({"swap"})),
        also="fence_replid",
    ),
    "fence_replid": Safeguard(
        "a script compares the server's replid with the certified one",
        "lua/include/fence.lua, lua/include/owner.lua",
        _EARLY._replace(kinds=frozenset({"swap"}), mode="ledger", processes=2),
    ),
    "replid": Safeguard(
        "certified is a replid and not a run_id alone, wherever it is looked at",
        "coupon_svc/store/client.py, coupon_svc/store/owner.py",
        _EARLY._replace(kinds=frozenset({"swap"}), processes=2),
    ),
    "certification": Safeguard(
        "no script runs on a Redis that was not certified",
        "coupon_svc/store/client.py, lua/open_shard.lua",
        _EARLY._replace(kinds=frozenset({"old"})),
    ),
    "load_epoch": Safeguard(
        "a load compares epoch and generation",
        "lua/load_codes.lua",
        _SMALL._replace(kinds=frozenset({"empty"})),
    ),
    "load_term": Safeguard(
        "a load carries the epoch and generation in which its codes were lent",
        "coupon_svc/writer/lend.py",
        _SMALL._replace(kinds=frozenset({"empty"})),
    ),
    "load_held": Safeguard(
        "a load skips codes that somebody holds",
        "lua/load_codes.lua",
        _SMALL._replace(codes=2, users=2, faults=0),
    ),
    "commit_position": Safeguard(
        "a commit compares the position at which its batch begins",
        "coupon_svc/ledger/events.py",
        _SMALL._replace(faults=0),
    ),
    "commit_epoch": Safeguard(
        "a commit compares the epoch",
        "coupon_svc/ledger/events.py",
        _SMALL._replace(kinds=frozenset({"empty"})),
    ),
    "commit_owner": Safeguard(
        "a commit compares owner and generation",
        "coupon_svc/ledger/events.py",
        _SMALL._replace(faults=0, writers=2, takeovers=1),
        also="commit_position",
    ),
    "publish_term": Safeguard(
        "a position is told with the epoch of the batch that brought the ledger there",
        "coupon_svc/writer/persist.py",
        _SMALL._replace(users=2, codes=2, kinds=frozenset({"restart"})),
    ),
    "own_epoch": Safeguard(
        "a request waits for a position of its own epoch",
        "coupon_svc/store/positions.py",
        _SMALL._replace(users=2, kinds=frozenset({"empty"})),
    ),
    "replay": Safeguard(
        "an Idempotency-Key that was used is looked up before anything else",
        "lua/include/replay.lua",
        _SMALL._replace(codes=2, tries=2, faults=0),
    ),
    "limit": Safeguard(
        "a user's codes are counted in the step that gives one more",
        "lua/include/limit.lua",
        _SMALL._replace(codes=2, tries=2, faults=0, limit=True),
    ),
    "quarantine": Safeguard(
        "codes that somebody may have been answered are dealt to nobody",
        "coupon_svc/ledger/recovery.py",
        _EARLY._replace(kinds=frozenset({"empty"})),
    ),
    "registered": Safeguard(
        "only a registered process answers early, and only of an epoch that is not over",
        "coupon_svc/api/coupons.py, coupon_svc/store/client.py",
        _EARLY._replace(kinds=frozenset({"empty"})),
    ),
    "shut": Safeguard(
        "the shard is shut before its stream is drained",
        "coupon_svc/writer/recover.py",
        _SMALL._replace(kinds=frozenset({WISH}), epochs=3),
    ),
    "late": Safeguard(
        "an event of a settled epoch gives its code to nobody, but out of the quarantine",
        "coupon_svc/ledger/recovery.py",
        _SMALL._replace(kinds=frozenset({"promote", "failback"}), faults=2, epochs=3),
    ),
    "rebuild": Safeguard(
        "Redis is kept only when it is shown to stand where the ledger stands",
        "coupon_svc/writer/recover.py",
        _SMALL._replace(kinds=frozenset({"old"})),
    ),
    "empty_pool": Safeguard(
        "a recovery empties the pool",
        "lua/restore_book.lua",
        _SMALL._replace(kinds=frozenset({"restart"})),
    ),
    "counts": Safeguard(
        "pool and held codes are counted before a code is said to be nobody's",
        "lua/include/holder.lua, lua/load_codes.lua",
        _SMALL._replace(kinds=frozenset({"del_holders"}), redeems=1),
    ),
    "attempt": Safeguard(
        "a script of a recovery compares which recovery shut the shard, not the generation alone",
        "lua/include/recoverer.lua, lua/shut_shard.lua",
        _SMALL._replace(kinds=frozenset({"empty"}), faults=2, epochs=3, delays=True),
    ),
    "pinned": Safeguard(
        "Redis is certified as the server that it was when the recovery began",
        "coupon_svc/writer/recover.py",
        _SMALL._replace(kinds=frozenset({"old"}), faults=2),
    ),
    "mark": Safeguard(
        "Postgres notes that an epoch is certified before Redis is",
        "coupon_svc/writer/recover.py",
        _EARLY._replace(users=1, kinds=frozenset({"empty"}), epochs=3, faults=2, takeovers=1),
    ),
}
