"""Which book a code belongs to, and whether a book exists: what Redis is not asked, and Postgres once.

Questions of one moment go out as one statement. What can never change (the book of a code) is kept; what can is asked
again. When Postgres is away the answer is LedgerUnavailable, never "there is none".
"""

from __future__ import annotations

import asyncio

from coupon_svc.domain.outcomes import Outcome, Refused
from coupon_svc.hot import in_a_task
from coupon_svc.postgres.books import find_codes, is_loaded
from coupon_svc.postgres.database import Database
from coupon_svc.postgres.errors import LedgerUnavailable

CODES_KEPT_MAX = 200_000
QUESTIONS_MAX = 5_000


class CodeDirectory:
    """One process's memory of codes, and its questions under way."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._books: dict[tuple[int, str], str] = {}
        self._asked: dict[tuple[int, str], asyncio.Future[str | None]] = {}
        self._asking: asyncio.Task[None] | None = None

    def learn_code(self, tenant_id: int, code: str, book_id: str) -> None:
        """Keep what Redis has told: the code is of this book, for good."""
        if len(self._books) >= CODES_KEPT_MAX:
            del self._books[next(iter(self._books))]
        self._books[tenant_id, code] = book_id

    def known_book(self, tenant_id: int, code: str) -> str | None:
        """The id of the book that has the code, if this process has met it."""
        return self._books.get((tenant_id, code))

    async def book_of_code(self, tenant_id: int, code: str, within_s: float) -> str:
        """The id of the book that has the code.

        Raises Refused(code_not_found) when the tenant has no such code; LedgerUnavailable, also when Postgres does not say
        so `within_s`.
        """
        known = self._books.get((tenant_id, code))
        if known is not None:
            return known
        await in_a_task()
        future = self._asked.get((tenant_id, code))
        if future is None:
            if len(self._asked) >= QUESTIONS_MAX:
                raise LedgerUnavailable("too many codes are being looked up")
            future = asyncio.get_running_loop().create_future()
            self._asked[tenant_id, code] = future
            if self._asking is None or self._asking.done():
                self._asking = asyncio.create_task(self._ask())
        try:
            async with asyncio.timeout(within_s):
                book_id = await asyncio.shield(future)
        except TimeoutError:
            raise LedgerUnavailable("the code was not found in time") from None
        if book_id is None:
            raise Refused(Outcome.CODE_NOT_FOUND)
        return book_id

    async def book_loaded(self, tenant_id: int, book_id: str, within_s: float) -> bool | None:
        """Whether the tenant's book was ever brought to Redis; None when there is no such book. Raises LedgerUnavailable."""
        await in_a_task()
        async with self._database.connection(within_s, only_reads=True, wait_s=within_s) as connection:
            return await is_loaded(connection, tenant_id, book_id)

    async def _ask(self) -> None:
        """Ask everything that is asked now with one statement, until nothing is asked any more."""
        while self._asked:
            asked, self._asked = self._asked, {}
            try:
                found = await find_codes(self._database, asked)
            except Exception as error:  # whatever it is, nobody may be left waiting
                for future in asked.values():
                    if not future.done():
                        future.set_exception(error)
                        future.exception()  # it may be that nobody waits any more
                continue
            for (tenant_id, code), book_id in found.items():
                self.learn_code(tenant_id, code, book_id)
            for (tenant_id, code), future in asked.items():
                if not future.done():
                    future.set_result(found.get((tenant_id, code)))
