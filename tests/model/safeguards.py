"""Every safeguard that can be taken out of the model, where the service has it, and the bounds at which its absence shows.

Some cover for each other; taken out alone they break nothing within any bounds that were walked. `also` names the one that
must be out as well, and both together break a promise:

| safeguard | is covered by | because |
|---|---|---|
| `seen` | `fence_replid` | a Redis that went back on a live connection has another replid |
| `commit_owner` | `commit_position` | whoever committed since has moved the position |
| `redemption_user` | `after` | whoever holds another's coupon was given it in a history that is not the ledger's |
| `after` | `redemption_user` | what it refuses is mostly about what the ledger knows otherwise |
| `publish_term`, `own_epoch`, `entry` | `tip` | whoever made an event waits for its entry, not for a position |
"""

from __future__ import annotations

from typing import NamedTuple

from tests.model.faults import APPLY_FAILS, CLOCK, CUT, DEAL_AGAIN, RAISES, WISH
from tests.model.state import Bounds


class Safeguard(NamedTuple):
    """What it does, where it stands, and where the walk goes to see that it is needed."""

    does: str
    stands_in: str
    bounds: Bounds
    also: str = ""


_SMALL = Bounds(users=1, tries=1)
_EARLY = Bounds(mode="redis", tries=1)
_PUT_BACK = Bounds(tries=1, processes=2)
_UNHEARD = _PUT_BACK._replace(messages=True, kinds=frozenset({"put_back_told"}))
_CALLS = Bounds(tries=1, calls=True, faults=0)
_UPGRADE = _EARLY._replace(codes=2, processes=2, upgrade=True, epochs=3, faults=0)
_STARTS = _PUT_BACK._replace(joins=True, messages=True, kinds=frozenset({"put_back"}))
_OPERATOR = _EARLY._replace(redeems=1, faults=3, epochs=6)

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
        "coupon_svc/redis/verification.py, coupon_svc/redis/control.py",
        _EARLY._replace(kinds=frozenset({"swap"}), processes=2),
    ),
    "certification": Safeguard(
        "no script runs on a Redis that was not certified",
        "coupon_svc/redis/data_plane.py, lua/open_shard.lua",
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
        "coupon_svc/postgres/events.py",
        _SMALL._replace(faults=0),
    ),
    "commit_epoch": Safeguard(
        "a commit compares the epoch",
        "coupon_svc/postgres/events.py",
        _SMALL._replace(kinds=frozenset({"empty"})),
    ),
    "commit_owner": Safeguard(
        "a commit compares owner and generation",
        "coupon_svc/postgres/events.py",
        _SMALL._replace(faults=0, writers=2, takeovers=1),
        also="commit_position",
    ),
    "publish_term": Safeguard(
        "a position is told with the epoch of the batch that brought the ledger there",
        "coupon_svc/writer/persist.py",
        _SMALL._replace(redeems=1, kinds=frozenset({"restart"})),
        also="tip",
    ),
    "own_epoch": Safeguard(
        "a request waits for a position of its own epoch",
        "coupon_svc/redis/waiters.py",
        _SMALL._replace(users=2, kinds=frozenset({"empty"})),
        also="tip",
    ),
    "replay": Safeguard(
        "an Idempotency-Key that was used is looked up before anything else",
        "lua/include/replay.lua",
        _SMALL._replace(codes=2, tries=2, faults=0),
    ),
    "limit": Safeguard(
        "a user's codes are counted in the step that gives one more",
        "lua/include/users_coupons.lua",
        _SMALL._replace(codes=2, tries=2, faults=0, limit=True),
    ),
    "quarantine": Safeguard(
        "codes that somebody may have been answered are dealt to nobody",
        "coupon_svc/postgres/settling.py",
        _EARLY._replace(kinds=frozenset({"empty"})),
    ),
    "registered": Safeguard(
        "only a registered process answers early, and only of an epoch that is not over",
        "coupon_svc/service/durability.py, coupon_svc/redis/data_plane.py",
        _EARLY._replace(kinds=frozenset({"empty"})),
    ),
    "shut": Safeguard(
        "the shard is shut before its stream is drained",
        "coupon_svc/writer/recover.py",
        _SMALL._replace(kinds=frozenset({WISH}), epochs=3),
    ),
    "late": Safeguard(
        "an event of a settled epoch gives its code to nobody, but out of the quarantine",
        "coupon_svc/postgres/late_events.py",
        _SMALL._replace(order=("promote", "failback"), faults=2, epochs=3),
    ),
    "late_epoch": Safeguard(
        "a late event releases its code only from the quarantine of its own epoch",
        "coupon_svc/postgres/late_events.py",
        _EARLY._replace(order=("promote", "failback", CUT), faults=3, epochs=4),
    ),
    "release_epoch": Safeguard(
        "a receipt releases its code only from the quarantine of its own epoch",
        "coupon_svc/postgres/late_events.py",
        _OPERATOR._replace(receipts=True, order=("empty", DEAL_AGAIN, "empty")),
    ),
    "dead_epoch": Safeguard(
        "a dead letter quarantines its code only when its own epoch is settled",
        "coupon_svc/postgres/settling.py",
        _OPERATOR._replace(users=1, order=("trim", DEAL_AGAIN, "empty")),
    ),
    "verdict": Safeguard(
        "the epoch ends, and its verdict is kept, before the first book is settled",
        "coupon_svc/postgres/settling.py",
        _EARLY._replace(users=1, order=("promote", CUT, "failback"), faults=3, epochs=4),
    ),
    "message_seen": Safeguard(
        "a message that the ledger holds a position raises what an API process has seen",
        "coupon_svc/redis/data_plane.py",
        _PUT_BACK._replace(mode="redis", kinds=frozenset({"put_back"})),
    ),
    "tip": Safeguard(
        "an event that a request made is durable when the ledger has its very entry, by position and tip",
        "coupon_svc/redis/waiters.py",
        _PUT_BACK._replace(kinds=frozenset({"put_back_any"})),
    ),
    "entry": Safeguard(
        "an owner compares the entry at the committed position with the ledger's",
        "lua/publish_positions.lua, lua/open_shard.lua",
        _PUT_BACK._replace(kinds=frozenset({"put_back_committed"})),
        also="tip",
    ),
    "after": Safeguard(
        "an entry is committed only when it was made after the ledger's last",
        "coupon_svc/writer/persist.py",
        _STARTS._replace(redeems=1, anonymous=True),
        also="redemption_user",
    ),
    "shard_result": Safeguard(
        "a commit says of each shard whether it moved, and only what moved is told",
        "coupon_svc/writer/persist.py",
        _SMALL._replace(faults=0, writers=2, takeovers=1),
    ),
    "overlay_code": Safeguard(
        "an operation passes over the codes that others of its call have taken",
        "lua/call.lua",
        _CALLS,
    ),
    "overlay_user": Safeguard(
        "an operation sees what others of its call have given its user, and their Idempotency-Keys",
        "lua/call.lua",
        _CALLS._replace(codes=2, twins=True, limit=True),
    ),
    "log_first": Safeguard(
        "operations write nothing before all of the call have decided, and their entry is made",
        "lua/call.lua",
        _CALLS._replace(codes=2, tries=2, faults=1, kinds=frozenset({RAISES})),
    ),
    "apply_doubt": Safeguard(
        "an error behind the entry puts the shard in doubt",
        "lua/call.lua",
        _CALLS._replace(faults=1, kinds=frozenset({APPLY_FAILS})),
    ),
    "reports": Safeguard(
        "a report carries the records of what was answered early, and the ledger gets them",
        "coupon_svc/writer/recover.py",
        _EARLY._replace(kinds=frozenset({"empty"}), reports=True),
    ),
    "format": Safeguard(
        "a shard of an older version is recovered before it is opened",
        "lua/open_shard.lua, coupon_svc/redis/verification.py",
        _UPGRADE,
    ),
    "run": Safeguard(
        "an older version takes a shard of the new format for uncertified",
        "lua/certify_shard.lua",
        _UPGRADE,
    ),
    "redemption_user": Safeguard(
        "the ledger refuses a redemption by another user than the coupon's",
        "coupon_svc/postgres/events.py",
        _STARTS._replace(redeems=1, anonymous=True),
        also="after",
    ),
    "observed": Safeguard(
        "a process is counted as gone by the observer's own clock, when it has stopped to answer early",
        "coupon_svc/postgres/liveness.py",
        _EARLY._replace(users=1, order=(CLOCK, "empty"), faults=2),
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
        "lua/include/find_holding.lua, lua/load_codes.lua",
        _SMALL._replace(kinds=frozenset({"del_holders"}), redeems=1),
    ),
    "attempt": Safeguard(
        "a script of a recovery compares which recovery shut the shard, not the generation alone",
        "lua/include/recoverer.lua, lua/shut_shard.lua",
        _SMALL._replace(kinds=frozenset({WISH}), faults=2, epochs=4, delays=True),
    ),
    "pinned": Safeguard(
        "Redis is certified as the server that it was when the recovery began",
        "coupon_svc/writer/recover.py",
        _SMALL._replace(kinds=frozenset({"old"}), faults=2),
    ),
    "mark": Safeguard(
        "Postgres notes that an epoch is certified before Redis is",
        "coupon_svc/writer/recover.py",
        _EARLY._replace(users=1, kinds=frozenset({"flush"}), epochs=3, faults=2, takeovers=1),
    ),
}

LIMITS: dict[str, Bounds] = {
    "rolled back within one commit, and a retry is shown": _PUT_BACK._replace(
        tries=2, kinds=frozenset({"put_back_any"})
    ),
    "rolled back after an early answer": _PUT_BACK._replace(mode="redis", kinds=frozenset({"put_back_any"})),
    "rolled back while a message is on its way, and a retry is shown": _UNHEARD._replace(tries=2),
    "a process starts after a rollback and answers early": _STARTS._replace(mode="redis"),
    "a process starts after a rollback and refuses a redeem": _STARTS._replace(redeems=1),
}
"""Histories in which a promise is broken with every safeguard in. Keys go back in a running Redis, and an API process that
has not heard of what was lost asks it. Whatever it makes there is never durable: the ledger has another entry at that
position. But it may answer early, it may be shown what is not the ledger's (a replay waits for a position, and the first
history has reached it), and it may find nothing where the ledger has something. A limit that breaks nothing any more moves
to the scopes."""

BY_HAND = frozenset({"after", "release_epoch"})
"""Safeguards whose histories tests do not look for: they are too long, or those of the safeguard that covers for it.
`python -m tests.model --without` does."""
