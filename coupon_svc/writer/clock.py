"""Postgres's clock as the writer knows it: asked once a second, and carried on by this process's own in between."""

from __future__ import annotations

import time

from coupon_svc.postgres.database import LedgerConnection

KNOWN_FOR_S = 10.0
_CLOCK = "SELECT (extract(epoch FROM clock_timestamp()) * 1000)::bigint"


async def ledger_clock_ms(connection: LedgerConnection) -> int:
    """Unix milliseconds by Postgres's clock, now."""
    now_ms: int = await connection.fetchval(_CLOCK)
    return now_ms


class LedgerClock:
    """The time by Postgres, whose clock the ledger's rows are dated by."""

    def __init__(self) -> None:
        self._ahead_ms = 0
        self._asked_at = float("-inf")

    def asked(self, ledger_ms: int) -> None:
        """Postgres said just now that it is `ledger_ms`."""
        self._asked_at = time.monotonic()
        self._ahead_ms = ledger_ms - int(1000 * self._asked_at)

    def now_ms(self) -> int | None:
        """Unix milliseconds by Postgres's clock; None when it was not asked of late."""
        now = time.monotonic()
        return self._ahead_ms + int(1000 * now) if now - self._asked_at < KNOWN_FOR_S else None
