"""Which book has a number, and which numbers a book has, for whoever only looks."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

import asyncpg

from coupon_svc.domain.computed import PatternCipher, codes_beginning_with, count_beginning_with
from coupon_svc.postgres.computed.ciphers import PATTERN_COLUMNS, Ciphers, Known
from coupon_svc.postgres.computed.lending import Numbers
from coupon_svc.postgres.computed.ranges import not_passed_over
from coupon_svc.postgres.computed.rows import books_of_numbers, numbers_of
from coupon_svc.postgres.database import Database

BY_PREFIX_MAX = 30_000
"""Where at most so many codes of a pattern begin with a prefix, each of them is decoded: about 150 ms."""
_NUMBER_END = (1 << 63) - 1
# In one statement, and so of one moment: a range that is seen comes with the uploads that were there before it.
_READ_PATTERNS = f"""
    SELECT p.*, begins, ends, book_id FROM (
        SELECT {PATTERN_COLUMNS}, since, EXISTS (
            SELECT FROM passed_over o WHERE o.pattern_id = c.pattern_id AND number >= since AND NOT named) AS uploaded
        FROM computed_patterns c
        LEFT JOIN unnest($2::bigint[], $3::bigint[]) AS known (id, number_known) ON id = pattern_id,
        LATERAL (SELECT coalesce(number_known, 0) AS since) AS from_number
        WHERE tenant_id = ANY ($1)) p
    LEFT JOIN code_ranges r ON r.pattern_id = p.pattern_id AND begins >= since
    ORDER BY p.pattern_id, begins
"""
_NEXT_RANGES = f"""
    SELECT {PATTERN_COLUMNS}, begins, ends FROM code_ranges JOIN computed_patterns USING (pattern_id)
    WHERE book_id = $1 AND (pattern_id, ends) > ($2, $3) ORDER BY pattern_id, begins LIMIT 2
"""


class Range(NamedTuple):
    """Numbers from `begins` on and before `ends` are the book's, but for those that were uploaded before."""

    begins: int
    ends: int
    book_id: str


class PatternRead(NamedTuple):
    """A pattern as it was read, with its ranges from a number on. With `uploaded`, codes with such numbers were uploaded."""

    pattern_id: int
    tenant_id: int
    cipher: PatternCipher
    uploaded: bool
    ranges: list[Range]


async def read_patterns(
    database: Database, tenants: Collection[int], since: Mapping[int, int], ciphers: Ciphers
) -> list[PatternRead]:
    """The computed patterns of some tenants, as they were at one moment; `since`: from which number on, by pattern. Raises
    LedgerUnavailable, DatabaseUnfit."""
    rows = await database.fetch(_READ_PATTERNS, list(tenants), list(since), list(since.values()))
    read: dict[int, PatternRead] = {}
    for row in rows:
        number = row["pattern_id"]
        if number not in read:
            read[number] = PatternRead(number, row["tenant_id"], ciphers.of(row), row["uploaded"], [])
        if row["begins"] is not None:
            read[number].ranges.append(Range(row["begins"], row["ends"], row["book_id"]))
    return list(read.values())


class NumbersPage(NamedTuple):
    """Codes of a book in the order of their numbers, each with its number, and where the next page begins."""

    pattern_id: int
    codes: list[tuple[int, str]]
    next: tuple[int, int] | None
    """Pattern and number; None at the end."""


async def codes_by_number(
    connection: asyncpg.Connection, book_id: str, begin: tuple[int, int], prefix: str, at_most: int, ciphers: Ciphers
) -> NumbersPage | None:
    """The next `at_most` numbers of a book from a pattern and number on; of their codes, those that begin with `prefix`.
    Where few codes of the pattern do, all of the book's that do. None where it has no more."""
    rows = await connection.fetch(_NEXT_RANGES, book_id, *begin)
    if not rows:
        return None
    row, cipher = rows[0], ciphers.of(rows[0])
    pattern_id = row["pattern_id"]
    first = max(row["begins"], begin[1]) if pattern_id == begin[0] else row["begins"]
    if prefix and count_beginning_with(cipher.pattern, prefix) <= BY_PREFIX_MAX:
        found = await _numbers_beginning_with(connection, book_id, Known(pattern_id, cipher, row["taken"]), prefix)
        codes = [(number, code) for number, code in found if number >= first]
        return NumbersPage(pattern_id, codes, (pattern_id, _NUMBER_END))
    end = min(first + at_most, row["ends"])
    numbers = await not_passed_over(connection, pattern_id, first, end, uploaded_only=True)
    listed = zip(numbers, await Numbers(cipher, numbers).codes(), strict=True)
    codes = [(number, code) for number, code in listed if code.startswith(prefix)]
    over = end == row["ends"] and len(rows) == 1
    return NumbersPage(pattern_id, codes, None if over else (pattern_id, end))


async def _numbers_beginning_with(
    connection: asyncpg.Connection, book_id: str, known: Known, prefix: str
) -> list[tuple[int, str]]:
    """The book's numbers of a pattern whose codes begin so, in their order, with these codes."""
    if not count_beginning_with(known.cipher.pattern, prefix):
        return []
    numbers = await numbers_of(known.cipher, codes_beginning_with(known.cipher.pattern, prefix))
    taken = {number: code for code, number in numbers.items() if number < known.taken}
    books = await books_of_numbers(connection, known.pattern_id, taken)
    return [(number, taken[number]) for number in sorted(books) if books[number] == book_id]
