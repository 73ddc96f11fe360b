"""Times and shares that more than one part of the service goes by; scripts get them when they are loaded."""

from __future__ import annotations

IDEMPOTENCY_MS = 24 * 3600 * 1000
"""How long an idempotency record is kept."""
LEDGER_UNSEEN_MAX_MS = 3_000
"""A ledger that was not seen for longer is behind: requests that would wait for it are refused at once."""
CLOCKS_APART_MAX_MS = 60_000
"""Redis's clock may differ from Postgres's by so much. Idempotency records and locks end by Redis's clock."""
REDEEM_BACKLOG_SHARE = 1.25
"""A redemption may use more of the backlog than an assign, by this factor."""
