"""What a pattern would make, told before anything is made."""

from __future__ import annotations

from typing import NamedTuple

from coupon_svc.domain.codes import Generated, Pattern, fits, guess_probability
from coupon_svc.postgres.codes import codes_taken
from coupon_svc.postgres.computed.ciphers import Ciphers
from coupon_svc.postgres.database import Database, LedgerConnection
from coupon_svc.postgres.patterns import COUNT_S, count_used
from coupon_svc.postgres.tenant_slots import TenantSlots

SAMPLES = 10
_DRAWN_AT_ONCE = 50
_DRAWS_MAX = 20
_PREVIEWS_PER_TENANT = 1
_WAIT_S = 2.0


class PatternPreview(NamedTuple):
    """What a pattern is good for. `samples` are SAMPLES codes that the tenant does not have, fewer where the pattern can
    hardly name so many."""

    capacity: int
    already_used: int
    guess_probability: float
    samples: list[str]
    fits: bool


class Patterns:
    """The use case. It raises LedgerUnavailable, and Refused(store_unavailable) while another of the tenant runs."""

    def __init__(self, database: Database, ciphers: Ciphers) -> None:
        self._database = database
        self._ciphers = ciphers
        self._slots = TenantSlots(_PREVIEWS_PER_TENANT)

    async def preview_pattern(self, tenant_id: int, wanted: Generated) -> PatternPreview:
        """Makes nothing. May be repeated at will; the samples differ each time."""
        pattern, total = wanted
        async with (
            self._slots.slot(tenant_id, _WAIT_S),
            self._database.connection(COUNT_S + 1, only_reads=True) as connection,
        ):
            used = await count_used(connection, tenant_id, pattern)
            samples = await self._draw_samples(connection, tenant_id, pattern)
        chance = guess_probability(pattern, used + total)
        return PatternPreview(pattern.capacity, used, chance, samples, fits(pattern, total, used))

    async def _draw_samples(self, connection: LedgerConnection, tenant_id: int, pattern: Pattern) -> list[str]:
        free: set[str] = set()
        for _ in range(_DRAWS_MAX):
            drawn = set(pattern.draw(_DRAWN_AT_ONCE)) - free
            free |= drawn - await codes_taken(connection, tenant_id, drawn, self._ciphers)
            if len(free) >= min(SAMPLES, pattern.capacity):
                break
        return list(free)[:SAMPLES]
