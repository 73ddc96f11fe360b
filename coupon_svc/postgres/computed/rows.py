"""Rows beside ranges: codes that are uploaded where a range may have them, and rows of computed codes that need one."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Sequence

import asyncpg

from coupon_svc.domain.computed import PatternCipher
from coupon_svc.postgres.computed.ciphers import AT_ONCE, Ciphers, known_patterns
from coupon_svc.postgres.computed.ranges import PATTERNS_LOCK, pass_over

_RANGES_OF_NUMBERS = """
    SELECT asked.number, r.book_id, r.begins, r.lent_upto, p.named
    FROM unnest($2::bigint[]) AS asked (number)
    JOIN LATERAL (SELECT * FROM code_ranges WHERE pattern_id = $1 AND begins <= asked.number
                  ORDER BY begins DESC LIMIT 1) r ON true
    LEFT JOIN passed_over p ON p.pattern_id = $1 AND p.number = asked.number::numeric
    WHERE asked.number < r.ends
"""
_ADD_ROWS = """
    INSERT INTO codes (tenant_id, code, book_id, place, computed) SELECT $1, code, $2, 0, true
    FROM unnest($3::text[]) AS code ORDER BY code ON CONFLICT DO NOTHING RETURNING code
"""
COUNT_LENT = "UPDATE books SET computed_unlent = computed_unlent - $2, lent = lent + $2 WHERE book_id = $1"
_TAKE_OUT = "UPDATE code_ranges SET unlent = unlent - 1 WHERE pattern_id = $1 AND begins = $2"


async def shut_out_issued(
    connection: asyncpg.Connection, tenant_id: int, codes: Collection[str], ciphers: Ciphers
) -> set[str]:
    """Those of the codes that a range has. The numbers of all others are passed over for good, so their rows may be added
    in this transaction: until its end, nobody takes a range of the tenant."""
    await connection.execute("SELECT pg_advisory_xact_lock_shared($1, $2)", PATTERNS_LOCK, tenant_id)
    issued: set[str] = set()
    for known in await known_patterns(connection, tenant_id, ciphers):
        numbers = await numbers_of(known.cipher, codes)
        taken = {code: number for code, number in numbers.items() if number < known.taken}
        within = await books_of_numbers(connection, known.pattern_id, taken.values())
        issued |= {code for code, number in taken.items() if number in within}
        rest = [number for code, number in numbers.items() if code not in issued]
        if rest:
            await pass_over(connection, known.pattern_id, rest)
    return issued


async def books_of_computed(
    connection: asyncpg.Connection, tenant_id: int, codes: Collection[str], ciphers: Ciphers
) -> dict[str, str]:
    """The books of those codes that a range has and no row: whoever asks has looked for rows before."""
    found: dict[str, str] = {}
    for known in await known_patterns(connection, tenant_id, ciphers):
        numbers = await numbers_of(known.cipher, codes)
        taken = {code: number for code, number in numbers.items() if number < known.taken}
        books = await books_of_numbers(connection, known.pattern_id, taken.values())
        found |= {code: books[number] for code, number in taken.items() if number in books}
    return found


async def lent_by_number(
    connection: asyncpg.Connection, tenant_id: int, book_id: str, codes: Collection[str], ciphers: Ciphers
) -> set[str]:
    """Those of the codes whose numbers were lent as numbers of this book."""
    lent: set[str] = set()
    for known in await known_patterns(connection, tenant_id, ciphers):
        numbers = {number: code for code, number in (await numbers_of(known.cipher, codes)).items()}
        reachable = [number for number in numbers if number < known.taken]
        for row in await connection.fetch(_RANGES_OF_NUMBERS, known.pattern_id, reachable) if reachable else []:
            below = row["named"] is None and row["number"] < row["lent_upto"]
            if row["book_id"] == book_id and (below or row["named"]):
                lent.add(numbers[row["number"]])
    return lent


async def give_rows(
    connection: asyncpg.Connection, tenant_id: int, book_id: str, codes: Collection[str], ciphers: Ciphers
) -> None:
    """Make rows of those of the codes that are the book's by number and have none. They are lent then: those that were not
    are lent now, before their turn. The caller has locked the book's row."""
    early = 0
    for known in await known_patterns(connection, tenant_id, ciphers):
        numbers = {number: code for code, number in (await numbers_of(known.cipher, codes)).items()}
        reachable = [number for number in numbers if number < known.taken]
        rows = await connection.fetch(_RANGES_OF_NUMBERS, known.pattern_id, reachable) if reachable else []
        mine = [row for row in rows if row["book_id"] == book_id and row["named"] is None]
        inserted = await insert_computed_rows(connection, tenant_id, book_id, [numbers[row["number"]] for row in mine])
        ahead = [row for row in mine if row["number"] >= row["lent_upto"] and numbers[row["number"]] in inserted]
        await pass_over(connection, known.pattern_id, [row["number"] for row in ahead], named=True)
        for row in ahead:
            await connection.execute(_TAKE_OUT, known.pattern_id, row["begins"])
        early += len(ahead)
    if early:
        await connection.execute(COUNT_LENT, book_id, early)


async def insert_computed_rows(
    connection: asyncpg.Connection, tenant_id: int, book_id: str, codes: Sequence[str]
) -> set[str]:
    """Rows of computed codes that are lent."""
    if not codes:
        return set()
    rows = await connection.fetch(_ADD_ROWS, tenant_id, book_id, list(codes))
    return {row["code"] for row in rows}


async def books_of_numbers(connection: asyncpg.Connection, pattern_id: int, numbers: Collection[int]) -> dict[int, str]:
    """The books of those numbers that lie in a range and were not uploaded before it was taken."""
    if not numbers:
        return {}
    rows = await connection.fetch(_RANGES_OF_NUMBERS, pattern_id, list(numbers))
    return {row["number"]: row["book_id"] for row in rows if row["named"] in (None, True)}


async def numbers_of(cipher: PatternCipher, codes: Iterable[str]) -> dict[str, int]:
    """As `PatternCipher.numbers_of`, and others have their turn in between."""
    every, numbers = list(codes), dict[str, int]()
    for start in range(0, len(every), AT_ONCE):
        if start:
            await asyncio.sleep(0)
        numbers |= cipher.numbers_of(every[start : start + AT_ONCE])
    return numbers
