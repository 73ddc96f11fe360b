"""Which book a computed code belongs to: told from its number and the ranges of books, without a look at any code.

A range never changes its book, so what a process has read of ranges holds for good: a code of a known range is found in
memory. That a code was never issued can only be told by what was read after the question. So these questions are asked
together, a few times per second, however many there are.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import Collection
from enum import Enum
from time import monotonic

from coupon_svc.domain.computed import PatternCipher
from coupon_svc.postgres.computed.ciphers import Ciphers
from coupon_svc.postgres.computed.reading import Range, read_patterns
from coupon_svc.postgres.database import Database
from coupon_svc.postgres.errors import DatabaseUnfit, LedgerUnavailable

REFRESH_EVERY_S = 0.05


class Verdict(Enum):
    """What is known of a code where no book is."""

    NOT_ISSUED = "not issued"
    """As far as ranges were read, nobody has it."""
    ASK = "ask"
    """Only its row, if it has one, can tell."""


class _Pattern:
    """A pattern of a tenant, with the ranges that this process knows."""

    def __init__(self, cipher: PatternCipher) -> None:
        self.cipher = cipher
        self.uploaded = False
        """Codes lie in it that were uploaded. Their rows tell, whatever their numbers are."""
        self.begins: list[int] = []
        self.ranges: list[Range] = []

    @property
    def known_upto(self) -> int:
        return self.ranges[-1].ends if self.ranges else 0

    def book_of(self, number: int) -> str | None:
        at = bisect_right(self.begins, number) - 1
        return self.ranges[at].book_id if at >= 0 and number < self.ranges[at].ends else None


class IssuedCodes:
    """One process's memory of the ranges of books, by tenant."""

    def __init__(self, database: Database, ciphers: Ciphers) -> None:
        self._database = database
        self._ciphers = ciphers
        self._tenants: dict[int, dict[int, _Pattern]] = {}
        self._asked: set[int] = set()
        self._next: asyncio.Task[None] | None = None
        self._refreshed_at = 0.0

    def look(self, tenant_id: int, code: str) -> str | Verdict:
        """The id of the book that has the code, as far as this process knows."""
        for pattern in self._tenants.get(tenant_id, {}).values():
            number = pattern.cipher.number_of(code)
            if number is not None:  # patterns of a tenant do not overlap
                if pattern.uploaded:
                    return Verdict.ASK
                return pattern.book_of(number) or Verdict.NOT_ISSUED
        return Verdict.ASK

    def look_behind_rows(self, tenant_id: int, code: str) -> str | None:
        """The book of a code that has no row. What was uploaded has one."""
        for pattern in self._tenants.get(tenant_id, {}).values():
            number = pattern.cipher.number_of(code)
            if number is not None:
                return pattern.book_of(number)
        return None

    async def refresh_soon(self, tenant_id: int) -> None:
        """Return when the tenant's patterns and ranges have been read after this call: with all who ask meanwhile, and
        REFRESH_EVERY_S after the last time. Raises LedgerUnavailable."""
        self._asked.add(tenant_id)
        if self._next is None:
            self._next = asyncio.create_task(self._refresh_asked())
        await asyncio.shield(self._next)

    async def _refresh_asked(self) -> None:
        await asyncio.sleep(self._refreshed_at + REFRESH_EVERY_S - monotonic())
        asked, self._asked, self._next = self._asked, set(), None
        self._refreshed_at = monotonic()
        await self.refresh(asked)

    async def refresh(self, tenants: Collection[int]) -> None:
        """Read the patterns of these tenants, and what ranges they have beyond those known. Raises LedgerUnavailable."""
        known = {number: one.known_upto for tenant in tenants for number, one in self._tenants.get(tenant, {}).items()}
        try:
            read = await read_patterns(self._database, tenants, known, self._ciphers)
        except DatabaseUnfit as error:
            raise LedgerUnavailable(str(error)) from None
        for one in read:
            pattern = self._tenants.setdefault(one.tenant_id, {}).setdefault(one.pattern_id, _Pattern(one.cipher))
            pattern.uploaded |= one.uploaded  # first: no range may be known without
            for found in one.ranges:
                if found.begins >= pattern.known_upto:  # another refresh may have been faster
                    pattern.begins.append(found.begins)
                    pattern.ranges.append(found)
