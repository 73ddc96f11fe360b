"""Which parts of the protocol are walked through together. All at once would be too many states; each scope names what it
puts side by side. The small bounds are for every test run, `WIDE` is for the command line."""

from __future__ import annotations

from tests.model.faults import APPLY_FAILS, CUT, FAILOVERS, RAISES, RESTARTS, TAMPERING, WISH
from tests.model.state import Bounds

_RESTARTS, _FAILOVERS, _TAMPERING = frozenset(RESTARTS), frozenset(FAILOVERS), frozenset(TAMPERING)

SCOPES = {
    "restarts": Bounds(kinds=_RESTARTS, tries=1),
    "failovers": Bounds(kinds=frozenset({"promote", "failback"}), users=1, tries=1, faults=2),
    "swaps": Bounds(kinds=frozenset({"swap"}), processes=2, tries=1),
    "tampering": Bounds(kinds=_TAMPERING, users=1, redeems=1, tries=1),
    "redeems": Bounds(kinds=frozenset({"old"}), users=1, redeems=2),
    "two_recoverers": Bounds(kinds=frozenset({"restart"}), users=1, tries=1, writers=2, takeovers=1, epochs=3),
    "delays": Bounds(kinds=frozenset({WISH}), users=1, tries=1, epochs=4, faults=2, delays=True),
    "named": Bounds(kinds=frozenset({"old"}), users=1, codes=2, named=True, tries=1),
    "limits": Bounds(kinds=frozenset({"old"}), users=1, codes=2, limit=True),
    "lapses": Bounds(kinds=frozenset({"empty"}), lapses=1, tries=1),
    "wishes": Bounds(kinds=frozenset({WISH}), epochs=3, redeems=1, users=1),
    "receipts": Bounds(kinds=frozenset({"empty"}), redeems=1, receipts=True, tries=1, users=1),
    "interrupted": Bounds(order=("promote", CUT, "failback"), users=1, tries=1, faults=3, epochs=4),
    "put_back": Bounds(kinds=frozenset({"put_back"}), processes=2, tries=1, messages=True),
    "put_back_committed": Bounds(kinds=frozenset({"put_back_committed"}), processes=2, tries=1),
    "put_back_any": Bounds(kinds=frozenset({"put_back_any"}), processes=2, tries=1),
    "put_back_told": Bounds(kinds=frozenset({"put_back_told"}), processes=2, tries=1, messages=True),
    "starts": Bounds(kinds=frozenset({"put_back"}), processes=2, tries=1, messages=True, joins=True),
    "calls": Bounds(kinds=frozenset({APPLY_FAILS, RAISES, "empty"}), tries=1, calls=True),
    "calls_again": Bounds(kinds=frozenset({APPLY_FAILS, RAISES}), calls=True),
    "calls_redeem": Bounds(codes=2, tries=1, faults=0, redeems=1, calls=True),
    "twins": Bounds(kinds=frozenset({APPLY_FAILS}), codes=2, calls=True, twins=True),
    "reports": Bounds(kinds=frozenset({"empty", "old"}), processes=2, tries=1, reports=True),
    "upgrade": Bounds(kinds=frozenset({"restart"}), processes=2, tries=1, epochs=3, upgrade=True),
}
"""Small enough for every run of the tests: seconds each."""

WIDE = {
    "restarts": Bounds(kinds=_RESTARTS, codes=2, tries=1),
    "failovers": Bounds(kinds=_FAILOVERS, faults=2, epochs=3, tries=1),
    "swaps": Bounds(kinds=_FAILOVERS, processes=2),
    "tampering": Bounds(kinds=_TAMPERING, codes=2, tries=1),
    "redeems": Bounds(kinds=_RESTARTS | _FAILOVERS, users=1, redeems=2, epochs=3),
    "two_recoverers": Bounds(kinds=frozenset({"old", "restart"}), users=1, writers=2, takeovers=1, epochs=3),
    "delays": Bounds(kinds=frozenset({"empty"}), users=1, tries=1, epochs=3, faults=2, delays=True),
    "named": Bounds(kinds=frozenset({"empty", "old"}), codes=2, named=True, tries=1),
    "limits": Bounds(kinds=_RESTARTS | _FAILOVERS, users=1, codes=2, limit=True),
    "lapses": Bounds(kinds=_RESTARTS, lapses=1),
    "wishes": Bounds(kinds=frozenset({WISH}), epochs=3, redeems=1, users=2),
    "receipts": Bounds(kinds=frozenset({"empty", "old"}), redeems=1, receipts=True, tries=1),
    "interrupted": Bounds(order=("promote", "failback", CUT), tries=1, faults=3, epochs=4),
    "put_back": Bounds(kinds=frozenset({"put_back"}), processes=2, users=3, codes=2, tries=1, messages=True),
    "put_back_committed": Bounds(kinds=frozenset({"put_back_committed"}), processes=2, users=3, codes=2, tries=1),
    "put_back_any": Bounds(kinds=frozenset({"put_back_any"}), processes=2, users=3, codes=2, tries=1),
    "put_back_told": Bounds(kinds=frozenset({"put_back_told"}), processes=2, users=3, codes=2, tries=1, messages=True),
    "starts": Bounds(kinds=frozenset({"put_back"}), processes=2, users=3, codes=2, tries=1, messages=True, joins=True),
    "calls": Bounds(kinds=frozenset({APPLY_FAILS, RAISES, "empty", "old"}), codes=2, tries=1, calls=True),
    "calls_again": Bounds(kinds=frozenset({APPLY_FAILS, RAISES, "old"}), processes=2, calls=True),
    "calls_redeem": Bounds(kinds=frozenset({APPLY_FAILS}), codes=2, tries=1, redeems=1, calls=True),
    "twins": Bounds(kinds=frozenset({APPLY_FAILS, RAISES, "old"}), codes=2, calls=True, twins=True),
    "reports": Bounds(
        kinds=_RESTARTS | frozenset({"promote", "failback"}), processes=2, codes=2, tries=1, reports=True
    ),
    "upgrade": Bounds(kinds=_RESTARTS, codes=2, processes=2, tries=1, epochs=3, upgrade=True),
}
"""Minutes each, by hand."""

LEDGER_ONLY = frozenset({"put_back_committed", "put_back_any", "put_back_told", "starts"})
"""Scopes that hold with ack = ledger alone: an early answer is lost with the keys that went back (see `LIMITS`)."""
