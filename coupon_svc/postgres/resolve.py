"""The data plane's one way to Postgres: which book a code belongs to, whose a key is, whether a book exists.

Questions of one moment go out as one statement. What can never change (the book of a code) is kept; what can is asked
again. When Postgres is away the answer is LedgerUnavailable, never "there is none".
"""

from __future__ import annotations

import asyncio

from coupon_svc.postgres.database import Database
from coupon_svc.postgres.errors import LedgerUnavailable
from coupon_svc.postgres.keys import KeyRow, find_key

CODES_KEPT_MAX = 200_000
QUESTIONS_MAX = 5_000

_FIND_CODES = """
    SELECT tenant_id, code, book_id FROM codes
    JOIN unnest($1::int[], $2::text[]) AS asked (tenant_id, code) USING (tenant_id, code)
    WHERE place >= -1 -- others are of an upload that may still come to nothing
"""


class Resolver:
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

    async def book_of_code(self, tenant_id: int, code: str) -> str | None:
        """The id of the book that holds the code, or None when the tenant has no such code. Raises LedgerUnavailable."""
        known = self._books.get((tenant_id, code))
        if known is not None:
            return known
        future = self._asked.get((tenant_id, code))
        if future is None:
            if len(self._asked) >= QUESTIONS_MAX:
                raise LedgerUnavailable("too many codes are being looked up")
            future = asyncio.get_running_loop().create_future()
            self._asked[tenant_id, code] = future
            if self._asking is None or self._asking.done():
                self._asking = asyncio.create_task(self._ask())
        return await asyncio.shield(future)

    async def find_key(self, key_hash: bytes) -> KeyRow | None:
        """The API key with this hash, or None. Raises LedgerUnavailable."""
        async with self._database.connection(only_reads=True) as connection:
            return await find_key(connection, key_hash)

    async def book_loaded(self, tenant_id: int, book_id: str) -> bool | None:
        """Whether the tenant's book was ever brought to Redis; None when there is no such book. Raises LedgerUnavailable."""
        rows = await self._database.fetch(
            "SELECT loaded FROM books WHERE book_id = $1 AND tenant_id = $2", book_id, tenant_id
        )
        return rows[0]["loaded"] if rows else None

    async def _ask(self) -> None:
        """Ask everything that is asked now with one statement, until nothing is asked any more."""
        while self._asked:
            asked, self._asked = self._asked, {}
            try:
                rows = await self._database.fetch(
                    _FIND_CODES, [tenant_id for tenant_id, _ in asked], [code for _, code in asked]
                )
            except Exception as error:  # whatever it is, nobody may be left waiting
                for future in asked.values():
                    if not future.done():
                        future.set_exception(error)
                        future.exception()  # it may be that nobody waits any more
                continue
            for row in rows:
                self.learn_code(row["tenant_id"], row["code"], row["book_id"])
            for (tenant_id, code), future in asked.items():
                if not future.done():
                    future.set_result(self._books.get((tenant_id, code)))
