"""Numbers that are lent to Redis, and accounted for: as `lending` and `outstanding` do with rows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import NamedTuple

import asyncpg

from coupon_svc.domain.computed import PatternCipher
from coupon_svc.postgres.computed.ciphers import AT_ONCE, PATTERN_COLUMNS, Ciphers
from coupon_svc.postgres.computed.ranges import not_passed_over, past
from coupon_svc.postgres.computed.rows import COUNT_LENT, insert_computed_rows

_UNLENT_RANGES = f"""
    SELECT {PATTERN_COLUMNS}, begins, ends, lent_upto, unlent
    FROM code_ranges JOIN computed_patterns USING (pattern_id)
    WHERE book_id = $1 AND unlent > 0 ORDER BY pattern_id, begins
"""
_FIRST_TO_ACCOUNT = f"""
    SELECT {PATTERN_COLUMNS}, begins, lent_upto, accounted_upto
    FROM code_ranges JOIN computed_patterns USING (pattern_id)
    WHERE book_id = $1 AND accounted_upto < lent_upto ORDER BY pattern_id, begins LIMIT 1
"""
_NAME = "INSERT INTO outstanding_codes SELECT $1, unnest($2::text[]) ON CONFLICT DO NOTHING"
_ACCOUNT = "UPDATE code_ranges SET accounted_upto = $4 WHERE pattern_id = $1 AND begins = $2 AND accounted_upto = $3"
_ANY_TO_ACCOUNT = "SELECT EXISTS (SELECT FROM code_ranges WHERE book_id = $1 AND accounted_upto < lent_upto)"
_RANGES = f"""
    SELECT {PATTERN_COLUMNS}, begins, accounted_upto FROM code_ranges JOIN computed_patterns USING (pattern_id)
    WHERE book_id = $1 ORDER BY pattern_id, begins
"""
_LEND = "UPDATE code_ranges SET lent_upto = $3, unlent = unlent - $4 WHERE pattern_id = $1 AND begins = $2"
_WITHOUT_COUPON = """
    SELECT code FROM unnest($2::text[]) AS code
    WHERE (SELECT true FROM coupons WHERE coupons.book_id = $1 AND coupons.code = code.code) IS NULL
"""


class Numbers(NamedTuple):
    """Numbers of one pattern, whose codes are still to be computed."""

    cipher: PatternCipher
    numbers: list[int]

    async def codes(self) -> list[str]:
        """Computed a bounded part at a time: others have their turn in between."""
        codes: list[str] = []
        for start in range(0, len(self.numbers), AT_ONCE):
            if start:
                await asyncio.sleep(0)
            codes += self.cipher.codes(self.numbers[start : start + AT_ONCE])
        return codes


async def lend_numbers(connection: asyncpg.Connection, book_id: str, count: int, ciphers: Ciphers) -> list[Numbers]:
    """Lend the next `count` numbers of the book's ranges, fewer at their end, and count them as lent. The caller has locked
    the book's row."""
    lent: list[Numbers] = []
    for row in await connection.fetch(_UNLENT_RANGES, book_id):
        if count == 0:
            break
        wanted = min(count, row["unlent"])
        numbers, upto = await _next(connection, row["pattern_id"], row["lent_upto"], wanted)
        await connection.execute(_LEND, row["pattern_id"], row["begins"], upto, wanted)
        lent.append(Numbers(ciphers.of(row), numbers))
        count -= wanted
    number = sum(len(part.numbers) for part in lent)
    if number:
        await connection.execute(COUNT_LENT, book_id, number)
    return lent


async def _next(connection: asyncpg.Connection, pattern_id: int, begin: int, count: int) -> tuple[list[int], int]:
    """The next `count` numbers that are not to be passed over, and where they end."""
    upto = await past(connection, pattern_id, begin, count)
    return await not_passed_over(connection, pattern_id, begin, upto), upto


async def account_numbers(connection: asyncpg.Connection, book_id: str, at_most: int, ciphers: Ciphers) -> int | None:
    """Of the next numbers that were lent, make rows of those that have no coupon, and name them as outstanding. Returns how
    many numbers it looked at; None where there is nothing to do."""
    row = await connection.fetchrow(_FIRST_TO_ACCOUNT, book_id)
    if row is None:
        return None
    begin, end = row["accounted_upto"], min(row["accounted_upto"] + at_most, row["lent_upto"])
    numbers = await not_passed_over(connection, row["pattern_id"], begin, end)
    codes = await Numbers(ciphers.of(row), numbers).codes()
    lacking = [lacking["code"] for lacking in await connection.fetch(_WITHOUT_COUPON, book_id, codes)]
    await insert_computed_rows(connection, row["tenant_id"], book_id, lacking)
    await connection.execute(_NAME, book_id, lacking)
    await connection.execute(_ACCOUNT, row["pattern_id"], row["begins"], begin, end)
    return len(numbers)


async def numbers_to_account(connection: asyncpg.Connection, book_id: str) -> bool:
    """Whether numbers of the book were lent for which `account_numbers` has not been run."""
    more: bool = await connection.fetchval(_ANY_TO_ACCOUNT, book_id)
    return more


async def accounted_codes(connection: asyncpg.Connection, book_id: str, ciphers: Ciphers) -> AsyncIterator[list[str]]:
    """The codes of all numbers of the book that were lent and accounted for, a bounded part at a time."""
    for row in await connection.fetch(_RANGES, book_id):
        for begin in range(row["begins"], row["accounted_upto"], AT_ONCE):
            end = min(begin + AT_ONCE, row["accounted_upto"])
            numbers = await not_passed_over(connection, row["pattern_id"], begin, end)
            yield ciphers.of(row).codes(numbers)
