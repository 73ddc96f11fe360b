"""Which book a code belongs to, and whether a book exists: what Redis is not asked, and Postgres once. The book of a
computed code follows from its number.

What can never change (the book of a code) is kept; what can is asked again: that there is no such code, each time. When
Postgres is away the answer is LedgerUnavailable, never "there is none".
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Collection

from coupon_svc.domain.outcomes import Outcome, Refused
from coupon_svc.hot import in_a_task
from coupon_svc.postgres.books import is_loaded
from coupon_svc.postgres.codes import find_codes
from coupon_svc.postgres.database import Database
from coupon_svc.postgres.errors import LedgerUnavailable
from coupon_svc.service.budgets import Budget
from coupon_svc.service.issued_codes import IssuedCodes, Verdict
from coupon_svc.service.questions import Asked, Questions

CODES_KEPT_MAX = 200_000


class CodeDirectory:
    """One process's memory of codes, and its questions about others. One that does not exist costs its tenant one of
    `unknown_codes`."""

    def __init__(self, database: Database, issued: IssuedCodes, unknown_codes: Budget) -> None:
        self._database = database
        self._issued = issued
        self._unknown_codes = unknown_codes
        # Not a dict: to take its first item out walks over all the places of those that went before.
        self._books: OrderedDict[tuple[int, str], str] = OrderedDict()
        self._questions = Questions(self._find)

    def learn_code(self, tenant_id: int, code: str, book_id: str) -> None:
        """Keep what Redis has told: the code is of this book, for good."""
        self._books[tenant_id, code] = book_id
        if len(self._books) > CODES_KEPT_MAX:
            self._books.popitem(last=False)

    def known_book(self, tenant_id: int, code: str) -> str | None:
        """The id of the book that has the code, if this process has met it."""
        return self._books.get((tenant_id, code))

    def has_met(self, tenant_id: int, code: str) -> bool:
        """Whether this process knows the book of the code without a look anywhere."""
        return (tenant_id, code) in self._books

    async def book_of_code(self, tenant_id: int, code: str, within_s: float) -> str:
        """The id of the book that has the code.

        Raises Refused(code_not_found) when the tenant has no such code; LedgerUnavailable, also when Postgres does not say
        so `within_s`.
        """
        known = self._books.get((tenant_id, code))
        if known is not None:
            return known
        computed = self._issued.look(tenant_id, code)
        if isinstance(computed, str):
            self.learn_code(tenant_id, code, computed)
            return computed
        await in_a_task()
        try:
            async with asyncio.timeout(within_s):
                if computed is Verdict.NOT_ISSUED:
                    await self._issued.refresh_soon(tenant_id)
                    computed = self._issued.look(tenant_id, code)
                book_id: str | Verdict | None = computed
                if computed is Verdict.ASK:
                    book_id = await asyncio.shield(self._questions.ask(tenant_id, code))
        except TimeoutError:
            raise LedgerUnavailable("the code was not found in time") from None
        if not isinstance(book_id, str):
            self._unknown_codes.spend(tenant_id)
            raise Refused(Outcome.CODE_NOT_FOUND)
        return book_id

    async def book_loaded(self, tenant_id: int, book_id: str, within_s: float) -> bool | None:
        """Whether the tenant's book was ever brought to Redis; None when there is no such book. Raises LedgerUnavailable."""
        await in_a_task()
        async with self._database.connection(within_s, only_reads=True, wait_s=within_s) as connection:
            return await is_loaded(connection, tenant_id, book_id)

    async def _find(self, asked: Collection[Asked]) -> dict[Asked, str]:
        found = await find_codes(self._database, asked)
        if missed := [one for one in asked if one not in found]:
            await self._issued.refresh({tenant_id for tenant_id, _ in missed})
            behind = {one: self._issued.look_behind_rows(*one) for one in missed}
            found |= {one: book_id for one, book_id in behind.items() if book_id is not None}
        for (tenant_id, code), book_id in found.items():
            self.learn_code(tenant_id, code, book_id)
        return found
