"""Ranges of a pattern's numbers: how a book takes the next one, and which numbers are passed over.

A lock keeps numbers and rows apart: who adds rows of a tenant holds the tenant's patterns as they are (shared), who takes a
range changes them (exclusive). So each code that is uploaded is either refused as a range's, or noted before a range can
take its number.

Order of locks: the tenant's generations, the book's row, the tenant's patterns."""

from __future__ import annotations

import secrets
from collections.abc import Iterable

import asyncpg

from coupon_svc.domain.codes import Pattern
from coupon_svc.domain.computed import KEY_BYTES, TOTAL_MIN, PatternCipher, may_compute, overlap, share_of_capacity
from coupon_svc.postgres.computed.ciphers import AT_ONCE, PATTERN_COLUMNS, Ciphers, Known, seal_of

NOTED_MAX = 200_000
"""Of a pattern in which more of the tenant's codes lie already, no code is computed: each would have to be noted."""
PATTERNS_LOCK = 0x70617474  # "patt"; the advisory lock of a tenant's computed patterns
_CODES_IN_PATTERN = """
    SELECT code FROM codes WHERE tenant_id = $1 AND code >= $2 AND code < $3 AND code ~ $4 LIMIT $5
"""
_PASS_OVER = """
    INSERT INTO passed_over (pattern_id, number, named)
    SELECT $1, passed.number::numeric, $3 FROM unnest($2::text[]) AS passed (number)
    ON CONFLICT DO NOTHING
"""
_PASSED_OVER_IN = """
    SELECT number::bigint AS number FROM passed_over WHERE pattern_id = $1 AND number >= $2::bigint AND number < $3::bigint
      AND NOT (named AND $4)
"""
_COUNT_PASSED_OVER_IN = """
    SELECT count(*) FROM passed_over WHERE pattern_id = $1 AND number >= $2::bigint AND number < $3::bigint
"""
_PATTERNS_TAKEN = "SELECT pattern_id, pattern, symbols, taken FROM computed_patterns WHERE tenant_id = $1"
_ADD_RANGE = """
    INSERT INTO code_ranges (pattern_id, begins, ends, book_id, total, unlent, lent_upto, accounted_upto)
    VALUES ($1, $2, $3, $4, $5, $5, $2, $2)
"""
_COUNT_IN = """
    UPDATE books SET total = total + $2, computed_total = computed_total + $2, computed_unlent = computed_unlent + $2,
                     version = version + 1
    WHERE book_id = $1
"""
_ADD_PATTERN = """
    INSERT INTO computed_patterns (tenant_id, pattern, symbols, sealed_key, master_key_id) VALUES ($1, $2, $3, $4, $5)
    RETURNING pattern_id
"""
_MOVE_COUNTER = "UPDATE computed_patterns SET taken = taken + $2 WHERE pattern_id = $1"
_COUNT_PASSED_OVER_FROM = "SELECT count(*) FROM passed_over WHERE pattern_id = $1 AND number >= $2::bigint"


async def numbers_used(connection: asyncpg.Connection, tenant_id: int, pattern: Pattern) -> tuple[int, bool]:
    """How many computed codes of the tenant lie in the pattern, and whether that is all of its codes that do: uploaded ones
    are noted where the pattern's own codes are computed. Of a pattern that only overlaps, about how many."""
    used = 0
    for row in await connection.fetch(_PATTERNS_TAKEN, tenant_id):
        other = Pattern(row["pattern"], row["symbols"])
        if other == pattern:
            above = await connection.fetchval(_COUNT_PASSED_OVER_FROM, row["pattern_id"], row["taken"])
            return row["taken"] + above, True
        used += round(row["taken"] * share_of_capacity(pattern, other))
    return used, False


def is_computed(pattern: Pattern, total: int) -> bool:
    """Whether codes of the pattern would be computed, as far as the request alone tells."""
    return may_compute(pattern) and total >= TOTAL_MIN


async def take_range(
    connection: asyncpg.Connection, tenant_id: int, book_id: str, pattern: Pattern, total: int, ciphers: Ciphers
) -> bool:
    """Take the next `total` numbers of the pattern for a book, and count them into it; the caller has locked the book's row.

    False, with nothing done, where the codes must be stored as rows: the pattern overlaps another computed one of the
    tenant, or too many codes lie in it. Capacity is the caller's concern.
    """
    await connection.execute("SELECT pg_advisory_xact_lock($1, $2)", PATTERNS_LOCK, tenant_id)
    known = await _own_pattern(connection, tenant_id, pattern, ciphers)
    if known is None:
        return False
    ends = await past(connection, known.pattern_id, known.taken, total)
    await connection.execute("UPDATE computed_patterns SET taken = $2 WHERE pattern_id = $1", known.pattern_id, ends)
    await connection.execute(_ADD_RANGE, known.pattern_id, known.taken, ends, book_id, total)
    await connection.execute(_COUNT_IN, book_id, total)
    return True


async def _own_pattern(
    connection: asyncpg.Connection, tenant_id: int, pattern: Pattern, ciphers: Ciphers
) -> Known | None:
    """The pattern as a computed one, made so if it is new; None where its codes must be rows."""
    rows = await connection.fetch(f"SELECT {PATTERN_COLUMNS} FROM computed_patterns WHERE tenant_id = $1", tenant_id)
    for row in rows:
        if Pattern(row["pattern"], row["symbols"]) == pattern:
            return Known(row["pattern_id"], ciphers.of(row), row["taken"])
    if any(overlap(pattern, Pattern(row["pattern"], row["symbols"])) for row in rows):
        return None
    uploaded = [
        row["code"]
        for row in await connection.fetch(_CODES_IN_PATTERN, tenant_id, *pattern.bounds, pattern.regex, NOTED_MAX + 1)
    ]
    if len(uploaded) > NOTED_MAX:
        return None
    key = secrets.token_bytes(KEY_BYTES)
    cipher = PatternCipher(pattern, key)
    # Under the key that the newest pattern is under: while keys are changed, processes differ in which is their first.
    newest = await connection.fetchval("SELECT master_key_id FROM computed_patterns ORDER BY pattern_id DESC LIMIT 1")
    master = newest if newest in ciphers.keys else ciphers.keys.first
    sealed = ciphers.keys.seal(master, key, seal_of(tenant_id, pattern))
    pattern_id = await connection.fetchval(_ADD_PATTERN, tenant_id, pattern.text, pattern.symbols, sealed, master)
    for start in range(0, len(uploaded), AT_ONCE):
        await pass_over(connection, pattern_id, cipher.numbers_of(uploaded[start : start + AT_ONCE]).values())
    return Known(pattern_id, cipher, 0)


async def past(connection: asyncpg.Connection, pattern_id: int, begins: int, total: int) -> int:
    """Where `total` numbers from `begins` on end, without those to be passed over."""
    ends = begins + total
    looked_at = begins
    while more := await connection.fetchval(_COUNT_PASSED_OVER_IN, pattern_id, looked_at, ends):
        looked_at, ends = ends, ends + more
    return ends


async def pass_over(
    connection: asyncpg.Connection, pattern_id: int, numbers: Iterable[int], *, named: bool = False
) -> None:
    await connection.execute(_PASS_OVER, pattern_id, list(map(str, numbers)), named)


async def not_passed_over(
    connection: asyncpg.Connection, pattern_id: int, begin: int, end: int, *, uploaded_only: bool = False
) -> list[int]:
    """Numbers from `begin` on and before `end`; with `uploaded_only`, those that were named are among them."""
    rows = await connection.fetch(_PASSED_OVER_IN, pattern_id, begin, end, uploaded_only)
    passed_over = {row["number"] for row in rows}
    return [number for number in range(begin, end) if number not in passed_over]


async def move_counters(connection: asyncpg.Connection, gap: int) -> None:
    """Pass over the next `gap` numbers of every pattern, at most an eighth of what it can name: codes that were printed
    after a backup are never issued to somebody else once that is restored."""
    for row in await connection.fetch("SELECT pattern_id, pattern, symbols FROM computed_patterns"):
        most = Pattern(row["pattern"], row["symbols"]).capacity // 8
        await connection.execute(_MOVE_COUNTER, row["pattern_id"], min(gap, most))
