"""Books whose codes are computed: patterns with their keys and counters, and the ranges of numbers that books have of them.

A number is a book's when it lies in one of its ranges and was not passed over. A lock keeps numbers and rows apart: who
adds rows of a tenant holds the tenant's patterns as they are (shared), who takes a range changes them (exclusive). So each
code that is uploaded is either refused as a range's, or noted before a range can take its number.

Order of locks: the tenant's generations, the book's row, the tenant's patterns.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import asyncpg

from coupon_svc.domain.codes import Pattern
from coupon_svc.domain.computed import (
    KEY_BYTES,
    TOTAL_MIN,
    PatternCipher,
    codes_beginning_with,
    count_beginning_with,
    may_compute,
    overlap,
    share_of_capacity,
)
from coupon_svc.domain.master_key import InvalidMasterKey, MasterKeys
from coupon_svc.postgres.database import Database
from coupon_svc.postgres.errors import DatabaseUnfit

AT_ONCE = 500
"""Codes that are computed before others have their turn: about 2 ms."""
CIPHERS_KEPT_MAX = 10_000
NOTED_MAX = 200_000
"""Of a pattern in which more of the tenant's codes lie already, no code is computed: each would have to be noted."""
BY_PREFIX_MAX = 30_000
"""Where at most so many codes of a pattern begin with a prefix, each of them is decoded: about 150 ms."""
_NUMBER_END = (1 << 63) - 1
_PATTERNS_LOCK = 0x70617474  # "patt"; the advisory lock of a tenant's computed patterns

_PATTERN_COLUMNS = "pattern_id, tenant_id, pattern, symbols, sealed_key, master_key_id, taken"
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
_RANGES_OF_NUMBERS = """
    SELECT asked.number, r.book_id, r.begins, r.lent_upto, p.named
    FROM unnest($2::bigint[]) AS asked (number)
    JOIN LATERAL (SELECT * FROM code_ranges WHERE pattern_id = $1 AND begins <= asked.number
                  ORDER BY begins DESC LIMIT 1) r ON true
    LEFT JOIN passed_over p ON p.pattern_id = $1 AND p.number = asked.number::numeric
    WHERE asked.number < r.ends
"""
# In one statement, and so of one moment: a range that is seen comes with the uploads that were there before it.
_READ_PATTERNS = f"""
    SELECT p.*, begins, ends, book_id FROM (
        SELECT {_PATTERN_COLUMNS}, since, EXISTS (
            SELECT FROM passed_over o WHERE o.pattern_id = c.pattern_id AND number >= since AND NOT named) AS uploaded
        FROM computed_patterns c
        LEFT JOIN unnest($2::bigint[], $3::bigint[]) AS known (id, number_known) ON id = pattern_id,
        LATERAL (SELECT coalesce(number_known, 0) AS since) AS from_number
        WHERE tenant_id = ANY ($1)) p
    LEFT JOIN code_ranges r ON r.pattern_id = p.pattern_id AND begins >= since
    ORDER BY p.pattern_id, begins
"""


class Ciphers:
    """The patterns' ciphers that a process has made, and the master keys to make others with."""

    def __init__(self, keys: MasterKeys) -> None:
        self.keys = keys
        self._made: dict[int, PatternCipher] = {}

    def of(self, row: asyncpg.Record) -> PatternCipher:
        """The cipher of a row of `computed_patterns`. Raises DatabaseUnfit where its key cannot be read."""
        cipher = self._made.get(row["pattern_id"])
        if cipher is None:
            pattern = Pattern(row["pattern"], row["symbols"])
            try:
                key = self.keys.open(row["master_key_id"], row["sealed_key"], _seal_of(row["tenant_id"], pattern))
            except KeyError:
                raise DatabaseUnfit(_lacks_key({row["master_key_id"]}, self.keys)) from None
            except InvalidMasterKey as error:
                raise DatabaseUnfit(f"{error}: restore it from a backup") from None
            if len(self._made) >= CIPHERS_KEPT_MAX:
                del self._made[next(iter(self._made))]
            cipher = self._made[row["pattern_id"]] = PatternCipher(pattern, key)
        return cipher


NO_CIPHERS = Ciphers(MasterKeys({}))
"""Of a process without a master key: it computes no codes, and refuses to work where there are computed books."""


class Known(NamedTuple):
    """A pattern of a tenant as it was read: its cipher, and below which number all are taken."""

    pattern_id: int
    cipher: PatternCipher
    taken: int


async def check_master_key(connection: asyncpg.Connection, keys: MasterKeys) -> None:
    """Raises DatabaseUnfit when there are computed codes, and a master key of theirs is missing."""
    if missing := await _missing_keys(connection, keys):
        raise DatabaseUnfit(_lacks_key(missing, keys))


async def has_master_key(connection: asyncpg.Connection, keys: MasterKeys) -> bool:
    """Whether every computed code can be told with these keys."""
    return not await _missing_keys(connection, keys)


async def _missing_keys(connection: asyncpg.Connection, keys: MasterKeys) -> set[str]:
    rows = await connection.fetch("SELECT DISTINCT master_key_id FROM computed_patterns")
    return {row["master_key_id"] for row in rows if row["master_key_id"] not in keys}


def _lacks_key(missing: Collection[str], keys: MasterKeys) -> str:
    names = ", ".join(sorted(missing))
    if not keys:
        return (
            f"This database has computed codes, and COUPON_MASTER_KEY is not set: give the key {names}. Nothing is lost; no"
            " code can be computed without it."
        )
    return (
        f"This database has computed codes under the master key {names}, and COUPON_MASTER_KEY is another one"
        f" ({keys.first}): give the key under which they were made. Nothing is lost."
    )


async def rotate(connection: asyncpg.Connection, keys: MasterKeys) -> int:
    """Encrypt every pattern's key under the first master key. Returns how many were under another. The codes stay as they
    are. Raises DatabaseUnfit when one of the others is missing; then nothing was changed."""
    await check_master_key(connection, keys)
    async with connection.transaction():
        await connection.execute("LOCK TABLE computed_patterns IN SHARE ROW EXCLUSIVE MODE")
        rows = await connection.fetch(
            f"SELECT {_PATTERN_COLUMNS} FROM computed_patterns WHERE master_key_id <> $1", keys.first
        )
        for row in rows:
            of = _seal_of(row["tenant_id"], Pattern(row["pattern"], row["symbols"]))
            if row["master_key_id"] not in keys:
                raise DatabaseUnfit(_lacks_key({row["master_key_id"]}, keys))
            await connection.execute(
                "UPDATE computed_patterns SET sealed_key = $2, master_key_id = $3 WHERE pattern_id = $1",
                row["pattern_id"],
                keys.seal(keys.first, keys.open(row["master_key_id"], row["sealed_key"], of), of),
                keys.first,
            )
    return len(rows)


async def known_patterns(connection: asyncpg.Connection, tenant_id: int, ciphers: Ciphers) -> list[Known]:
    """The tenant's computed patterns as they are now."""
    rows = await connection.fetch(f"SELECT {_PATTERN_COLUMNS} FROM computed_patterns WHERE tenant_id = $1", tenant_id)
    return [Known(row["pattern_id"], ciphers.of(row), row["taken"]) for row in rows]


async def numbers_used(connection: asyncpg.Connection, tenant_id: int, pattern: Pattern) -> tuple[int, bool]:
    """How many computed codes of the tenant lie in the pattern, and whether that is all of its codes that do: uploaded ones
    are noted where the pattern's own codes are computed. Of a pattern that only overlaps, about how many."""
    used = 0
    for row in await connection.fetch(
        "SELECT pattern_id, pattern, symbols, taken FROM computed_patterns WHERE tenant_id = $1", tenant_id
    ):
        other = Pattern(row["pattern"], row["symbols"])
        if other == pattern:
            above = await connection.fetchval(
                "SELECT count(*) FROM passed_over WHERE pattern_id = $1 AND number >= $2::bigint",
                row["pattern_id"],
                row["taken"],
            )
            return row["taken"] + above, True
        used += round(row["taken"] * share_of_capacity(pattern, other))
    return used, False


# --- taking ranges


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
    await connection.execute("SELECT pg_advisory_xact_lock($1, $2)", _PATTERNS_LOCK, tenant_id)
    known = await _own_pattern(connection, tenant_id, pattern, ciphers)
    if known is None:
        return False
    ends = await _past(connection, known.pattern_id, known.taken, total)
    await connection.execute("UPDATE computed_patterns SET taken = $2 WHERE pattern_id = $1", known.pattern_id, ends)
    await connection.execute(
        "INSERT INTO code_ranges (pattern_id, begins, ends, book_id, total, unlent, lent_upto, accounted_upto)"
        " VALUES ($1, $2, $3, $4, $5, $5, $2, $2)",
        known.pattern_id,
        known.taken,
        ends,
        book_id,
        total,
    )
    await connection.execute(
        "UPDATE books SET total = total + $2, computed_total = computed_total + $2, computed_unlent = computed_unlent + $2,"
        " version = version + 1 WHERE book_id = $1",
        book_id,
        total,
    )
    return True


async def _own_pattern(
    connection: asyncpg.Connection, tenant_id: int, pattern: Pattern, ciphers: Ciphers
) -> Known | None:
    """The pattern as a computed one, made so if it is new; None where its codes must be rows."""
    rows = await connection.fetch(f"SELECT {_PATTERN_COLUMNS} FROM computed_patterns WHERE tenant_id = $1", tenant_id)
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
    sealed = ciphers.keys.seal(master, key, _seal_of(tenant_id, pattern))
    pattern_id = await connection.fetchval(
        "INSERT INTO computed_patterns (tenant_id, pattern, symbols, sealed_key, master_key_id) VALUES ($1, $2, $3, $4, $5)"
        " RETURNING pattern_id",
        tenant_id,
        pattern.text,
        pattern.symbols,
        sealed,
        master,
    )
    for start in range(0, len(uploaded), AT_ONCE):
        await _pass_over(connection, pattern_id, cipher.numbers_of(uploaded[start : start + AT_ONCE]).values())
    return Known(pattern_id, cipher, 0)


async def _past(connection: asyncpg.Connection, pattern_id: int, begins: int, total: int) -> int:
    """Where `total` numbers from `begins` on end, without those to be passed over."""
    ends = begins + total
    looked_at = begins
    while more := await connection.fetchval(_COUNT_PASSED_OVER_IN, pattern_id, looked_at, ends):
        looked_at, ends = ends, ends + more
    return ends


async def _pass_over(
    connection: asyncpg.Connection, pattern_id: int, numbers: Iterable[int], *, named: bool = False
) -> None:
    await connection.execute(_PASS_OVER, pattern_id, list(map(str, numbers)), named)


# --- rows beside ranges


async def shut_out_issued(
    connection: asyncpg.Connection, tenant_id: int, codes: Collection[str], ciphers: Ciphers
) -> set[str]:
    """Those of the codes that a range has. The numbers of all others are passed over for good, so their rows may be added
    in this transaction: until its end, nobody takes a range of the tenant."""
    await connection.execute("SELECT pg_advisory_xact_lock_shared($1, $2)", _PATTERNS_LOCK, tenant_id)
    issued: set[str] = set()
    for known in await known_patterns(connection, tenant_id, ciphers):
        numbers = await _numbers_of(known.cipher, codes)
        taken = {code: number for code, number in numbers.items() if number < known.taken}
        within = await _books_of_numbers(connection, known.pattern_id, taken.values())
        issued |= {code for code, number in taken.items() if number in within}
        rest = [number for code, number in numbers.items() if code not in issued]
        if rest:
            await _pass_over(connection, known.pattern_id, rest)
    return issued


async def books_of_computed(
    connection: asyncpg.Connection, tenant_id: int, codes: Collection[str], ciphers: Ciphers
) -> dict[str, str]:
    """The books of those codes that a range has and no row: whoever asks has looked for rows before."""
    found: dict[str, str] = {}
    for known in await known_patterns(connection, tenant_id, ciphers):
        numbers = await _numbers_of(known.cipher, codes)
        taken = {code: number for code, number in numbers.items() if number < known.taken}
        books = await _books_of_numbers(connection, known.pattern_id, taken.values())
        found |= {code: books[number] for code, number in taken.items() if number in books}
    return found


async def _books_of_numbers(
    connection: asyncpg.Connection, pattern_id: int, numbers: Collection[int]
) -> dict[int, str]:
    """The books of those numbers that lie in a range and were not uploaded before it was taken."""
    if not numbers:
        return {}
    rows = await connection.fetch(_RANGES_OF_NUMBERS, pattern_id, list(numbers))
    return {row["number"]: row["book_id"] for row in rows if row["named"] in (None, True)}


async def _numbers_of(cipher: PatternCipher, codes: Iterable[str]) -> dict[str, int]:
    """As `PatternCipher.numbers_of`, and others have their turn in between."""
    every, numbers = list(codes), dict[str, int]()
    for start in range(0, len(every), AT_ONCE):
        if start:
            await asyncio.sleep(0)
        numbers |= cipher.numbers_of(every[start : start + AT_ONCE])
    return numbers


# --- reading


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
    rows = await connection.fetch(
        f"SELECT {_PATTERN_COLUMNS}, begins, ends FROM code_ranges JOIN computed_patterns USING (pattern_id)"
        " WHERE book_id = $1 AND (pattern_id, ends) > ($2, $3) ORDER BY pattern_id, begins LIMIT 2",
        book_id,
        *begin,
    )
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
    numbers = await _not_passed_over(connection, pattern_id, first, end, uploaded_only=True)
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
    numbers = await _numbers_of(known.cipher, codes_beginning_with(known.cipher.pattern, prefix))
    taken = {number: code for code, number in numbers.items() if number < known.taken}
    books = await _books_of_numbers(connection, known.pattern_id, taken)
    return [(number, taken[number]) for number in sorted(books) if books[number] == book_id]


# --- lending


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
    for row in await connection.fetch(
        f"SELECT {_PATTERN_COLUMNS}, begins, ends, lent_upto, unlent"
        " FROM code_ranges JOIN computed_patterns USING (pattern_id)"
        " WHERE book_id = $1 AND unlent > 0 ORDER BY pattern_id, begins",
        book_id,
    ):
        if count == 0:
            break
        wanted = min(count, row["unlent"])
        numbers, upto = await _next(connection, row["pattern_id"], row["lent_upto"], wanted)
        await connection.execute(
            "UPDATE code_ranges SET lent_upto = $3, unlent = unlent - $4 WHERE pattern_id = $1 AND begins = $2",
            row["pattern_id"],
            row["begins"],
            upto,
            wanted,
        )
        lent.append(Numbers(ciphers.of(row), numbers))
        count -= wanted
    number = sum(len(part.numbers) for part in lent)
    if number:
        await connection.execute(
            "UPDATE books SET computed_unlent = computed_unlent - $2, lent = lent + $2 WHERE book_id = $1",
            book_id,
            number,
        )
    return lent


async def _next(connection: asyncpg.Connection, pattern_id: int, begin: int, count: int) -> tuple[list[int], int]:
    """The next `count` numbers that are not to be passed over, and where they end."""
    upto = await _past(connection, pattern_id, begin, count)
    return await _not_passed_over(connection, pattern_id, begin, upto), upto


async def _not_passed_over(
    connection: asyncpg.Connection, pattern_id: int, begin: int, end: int, *, uploaded_only: bool = False
) -> list[int]:
    """Numbers from `begin` on and before `end`; with `uploaded_only`, those that were named are among them."""
    rows = await connection.fetch(_PASSED_OVER_IN, pattern_id, begin, end, uploaded_only)
    passed_over = {row["number"] for row in rows}
    return [number for number in range(begin, end) if number not in passed_over]


async def give_rows(
    connection: asyncpg.Connection, tenant_id: int, book_id: str, codes: Collection[str], ciphers: Ciphers
) -> None:
    """Make rows of those of the codes that are the book's by number and have none. They are lent then: those that were not
    are lent now, before their turn. The caller has locked the book's row."""
    early = 0
    for known in await known_patterns(connection, tenant_id, ciphers):
        numbers = {number: code for code, number in (await _numbers_of(known.cipher, codes)).items()}
        reachable = [number for number in numbers if number < known.taken]
        rows = await connection.fetch(_RANGES_OF_NUMBERS, known.pattern_id, reachable) if reachable else []
        mine = [row for row in rows if row["book_id"] == book_id and row["named"] is None]
        inserted = await _insert_rows(connection, tenant_id, book_id, [numbers[row["number"]] for row in mine])
        ahead = [row for row in mine if row["number"] >= row["lent_upto"] and numbers[row["number"]] in inserted]
        await _pass_over(connection, known.pattern_id, [row["number"] for row in ahead], named=True)
        for row in ahead:
            await connection.execute(
                "UPDATE code_ranges SET unlent = unlent - 1 WHERE pattern_id = $1 AND begins = $2",
                known.pattern_id,
                row["begins"],
            )
        early += len(ahead)
    if early:
        await connection.execute(
            "UPDATE books SET computed_unlent = computed_unlent - $2, lent = lent + $2 WHERE book_id = $1",
            book_id,
            early,
        )


async def _insert_rows(connection: asyncpg.Connection, tenant_id: int, book_id: str, codes: Sequence[str]) -> set[str]:
    """Rows of computed codes that are lent."""
    if not codes:
        return set()
    rows = await connection.fetch(
        "INSERT INTO codes (tenant_id, code, book_id, place, computed) SELECT $1, code, $2, 0, true"
        " FROM unnest($3::text[]) AS code ORDER BY code ON CONFLICT DO NOTHING RETURNING code",
        tenant_id,
        book_id,
        list(codes),
    )
    return {row["code"] for row in rows}


async def account_numbers(connection: asyncpg.Connection, book_id: str, at_most: int, ciphers: Ciphers) -> int | None:
    """Of the next numbers that were lent, make rows of those that have no coupon, and name them as outstanding. Returns how
    many numbers it looked at; None where there is nothing to do."""
    row = await connection.fetchrow(
        f"SELECT {_PATTERN_COLUMNS}, begins, lent_upto, accounted_upto"
        " FROM code_ranges JOIN computed_patterns USING (pattern_id)"
        " WHERE book_id = $1 AND accounted_upto < lent_upto ORDER BY pattern_id, begins LIMIT 1",
        book_id,
    )
    if row is None:
        return None
    begin, end = row["accounted_upto"], min(row["accounted_upto"] + at_most, row["lent_upto"])
    numbers = await _not_passed_over(connection, row["pattern_id"], begin, end)
    codes = await Numbers(ciphers.of(row), numbers).codes()
    lacking = [
        lacking["code"]
        for lacking in await connection.fetch(
            "SELECT code FROM unnest($2::text[]) AS code"
            " WHERE (SELECT true FROM coupons WHERE coupons.book_id = $1 AND coupons.code = code.code) IS NULL",
            book_id,
            codes,
        )
    ]
    await _insert_rows(connection, row["tenant_id"], book_id, lacking)
    await connection.execute(
        "INSERT INTO outstanding_codes SELECT $1, unnest($2::text[]) ON CONFLICT DO NOTHING", book_id, lacking
    )
    await connection.execute(
        "UPDATE code_ranges SET accounted_upto = $4 WHERE pattern_id = $1 AND begins = $2 AND accounted_upto = $3",
        row["pattern_id"],
        row["begins"],
        begin,
        end,
    )
    return len(numbers)


async def lent_by_number(
    connection: asyncpg.Connection, tenant_id: int, book_id: str, codes: Collection[str], ciphers: Ciphers
) -> set[str]:
    """Those of the codes whose numbers were lent as numbers of this book."""
    lent: set[str] = set()
    for known in await known_patterns(connection, tenant_id, ciphers):
        numbers = {number: code for code, number in (await _numbers_of(known.cipher, codes)).items()}
        reachable = [number for number in numbers if number < known.taken]
        for row in await connection.fetch(_RANGES_OF_NUMBERS, known.pattern_id, reachable) if reachable else []:
            below = row["named"] is None and row["number"] < row["lent_upto"]
            if row["book_id"] == book_id and (below or row["named"]):
                lent.add(numbers[row["number"]])
    return lent


async def accounted_codes(connection: asyncpg.Connection, book_id: str, ciphers: Ciphers) -> AsyncIterator[list[str]]:
    """The codes of all numbers of the book that were lent and accounted for, a bounded part at a time."""
    for row in await connection.fetch(
        f"SELECT {_PATTERN_COLUMNS}, begins, accounted_upto FROM code_ranges JOIN computed_patterns USING (pattern_id)"
        " WHERE book_id = $1 ORDER BY pattern_id, begins",
        book_id,
    ):
        for begin in range(row["begins"], row["accounted_upto"], AT_ONCE):
            end = min(begin + AT_ONCE, row["accounted_upto"])
            numbers = await _not_passed_over(connection, row["pattern_id"], begin, end)
            yield ciphers.of(row).codes(numbers)


async def move_counters(connection: asyncpg.Connection, gap: int) -> None:
    """Pass over the next `gap` numbers of every pattern, at most an eighth of what it can name: codes that were printed
    after a backup are never issued to somebody else once that is restored."""
    for row in await connection.fetch("SELECT pattern_id, pattern, symbols FROM computed_patterns"):
        most = Pattern(row["pattern"], row["symbols"]).capacity // 8
        await connection.execute(
            "UPDATE computed_patterns SET taken = taken + $2 WHERE pattern_id = $1", row["pattern_id"], min(gap, most)
        )


async def numbers_to_account(connection: asyncpg.Connection, book_id: str) -> bool:
    """Whether numbers of the book were lent for which `account_numbers` has not been run."""
    more: bool = await connection.fetchval(
        "SELECT EXISTS (SELECT FROM code_ranges WHERE book_id = $1 AND accounted_upto < lent_upto)", book_id
    )
    return more


def _seal_of(tenant_id: int, pattern: Pattern) -> str:
    return f"{tenant_id}\n{pattern.text}\n{pattern.symbols}"
