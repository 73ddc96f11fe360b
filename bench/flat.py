"""Whether an assign, a lock and a redeem take as long in a large book as in a small one, in turns: in one of uploaded codes,
and in one of computed ones."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import asyncpg
import msgspec

from bench.figures import BenchError
from bench.stand import Stand
from coupon_svc.domain.master_key import MasterKeys, new_master_key
from coupon_svc.load.client import Connections
from coupon_svc.postgres.computed.ciphers import PATTERN_COLUMNS, Ciphers
from coupon_svc.postgres.database import one_row, open_connection

SMALL_CODES = 1_000
COMPUTED_CODES = 1_000_000_000
LEASE_CODES = 50
"""Codes of a block: few, so that all books are lent blocks while they are measured."""
ROUNDS = 15
OF_A_ROUND = 20
FILL_TIMEOUT_S = 7200
OPERATIONS = ("assign", "assign by name", "lock", "redeem")

_FILL = """
    INSERT INTO codes (tenant_id, code, book_id, place)
    SELECT tenant_id, $3 || upper(substr(md5(number::text), 1, 20)), book_id, 1 + floor(random() * 4294967295)::bigint
    FROM books, generate_series(1, $2::bigint) AS number WHERE book_id = $1
"""
_COUNT_IN = "UPDATE books SET total = $2, version = version + 1 WHERE book_id = $1"
_NAMED = "SELECT code FROM codes WHERE book_id = $1 ORDER BY place DESC LIMIT $2"
"""Codes that are lent last: not before all of this is over."""
_LAST_RANGE = (
    f"SELECT {PATTERN_COLUMNS}, ends FROM code_ranges JOIN computed_patterns USING (pattern_id) WHERE book_id = $1"
)


class FlatFigure(NamedTuple):
    """Of one operation: median ms in the small book, the large and the computed one; and of the latter two the medians of
    the rounds' ratios to the small one."""

    operation: str
    ms: list[float]
    ratios: list[float]


def bench_flat(codes: int, say: Callable[[str], None]) -> list[FlatFigure]:
    """Measure a book of SMALL_CODES beside one of `codes`, whose rows SQL makes, and one of COMPUTED_CODES that have none.
    Raises BenchError."""
    block, master_key = str(LEASE_CODES), new_master_key()
    settings = {"COUPON_LEASE_CODES_MIN": block, "COUPON_LEASE_CODES_MAX": block, "COUPON_MASTER_KEY": master_key}
    with Stand(16, **settings) as stand:
        stand.writer()
        api = stand.api()
        stand.await_ready(api)
        books = [stand.make_empty_book(api, "redis") for _ in range(2)]
        say(f"making {codes:,} rows")
        named = asyncio.run(_fill(stand.postgres.url, dict(zip(books, (SMALL_CODES, codes), strict=True))))
        computed = stand.make_computed_book(api, "redis", COMPUTED_CODES)
        named.append(asyncio.run(_last_computed(stand.postgres.url, computed, master_key)))
        say("measuring")
        return asyncio.run(_measure(api.port, stand.key, [*books, computed], named))


def show_flat(codes: int, figures: Sequence[FlatFigure]) -> None:
    """Print the figures."""
    heads = (f"{SMALL_CODES:,} stored", f"{codes:,} stored", f"{COMPUTED_CODES:,} computed")
    print(f"{'':16}" + "".join(f"{head:>25}" for head in heads))
    for figure in figures:
        cells = [f"{figure.ms[0]:.2f} ms"]
        cells += [f"{ms:.2f} ms ({ratio:.2f})" for ms, ratio in zip(figure.ms[1:], figure.ratios, strict=True)]
        print(f"{figure.operation:16}" + "".join(f"{cell:>25}" for cell in cells))


async def _fill(url: str, codes_of: dict[str, int]) -> list[list[str]]:
    """Give each book its codes. Returns some of each that are not lent. Indexes come last: that saves most of the time."""
    connection = await open_connection(url, "coupon-bench")
    try:
        indexes = await _take_indexes(connection)
        for number, (book_id, codes) in enumerate(codes_of.items()):
            await connection.execute(_FILL, book_id, codes, f"FLAT{number}-", timeout=FILL_TIMEOUT_S)
        for statement in indexes:
            await connection.execute(statement, timeout=FILL_TIMEOUT_S)
        await connection.execute("VACUUM ANALYZE codes", timeout=FILL_TIMEOUT_S)
        await connection.execute("CHECKPOINT", timeout=FILL_TIMEOUT_S)
        named = []
        for book_id, codes in codes_of.items():
            await connection.execute(_COUNT_IN, book_id, codes)
            rows = await connection.fetch(_NAMED, book_id, ROUNDS * OF_A_ROUND)
            named.append([row["code"] for row in rows])
        await _in_force(connection)
        return named
    finally:
        await connection.close()


async def _last_computed(url: str, book_id: str, master_key: str) -> list[str]:
    """As _NAMED, of a book whose codes are computed."""
    connection = await open_connection(url, "coupon-bench")
    try:
        row = await one_row(connection, _LAST_RANGE, book_id)
        return (
            Ciphers(MasterKeys.parse(master_key)).of(row).codes(range(row["ends"] - ROUNDS * OF_A_ROUND, row["ends"]))
        )
    finally:
        await connection.close()


async def _in_force(connection: asyncpg.Connection) -> None:
    """Wait until Redis has the books as they are."""
    while True:
        if await connection.fetchval("SELECT bool_and(loaded_version = version) FROM books"):
            return
        await asyncio.sleep(0.1)


async def _take_indexes(connection: asyncpg.Connection) -> list[str]:
    """Drop all indexes of `codes`. Returns the statements that make them again."""
    again = []
    for row in await connection.fetch(
        "SELECT conname, pg_get_constraintdef(oid) AS told FROM pg_constraint"
        " WHERE conrelid = 'codes'::regclass AND contype IN ('p', 'u')"
    ):
        await connection.execute(f"ALTER TABLE codes DROP CONSTRAINT {row['conname']}")
        again.append(f"ALTER TABLE codes ADD CONSTRAINT {row['conname']} {row['told']}")
    for row in await connection.fetch("SELECT indexname, indexdef FROM pg_indexes WHERE tablename = 'codes'"):
        await connection.execute(f"DROP INDEX {row['indexname']}")
        again.append(row["indexdef"])
    return again


class _Caller:
    """One caller, who asks for one thing after the other, and how long each took."""

    def __init__(self, port: int, key: str) -> None:
        self._connections = Connections("127.0.0.1", port, 1)
        self._headers = f"authorization: Bearer {key}\r\ncontent-type: application/json\r\n".encode()

    async def ask(self, path: str, **body: str) -> tuple[dict[str, Any], float]:
        """The answer, and ms. Asks again when the service asks for patience; then only the last time counts."""
        for _ in range(100):
            begun = time.perf_counter()
            reply = await self._connections.send(b"POST", path.encode(), self._headers, msgspec.json.encode(body))
            took_ms = 1000 * (time.perf_counter() - begun)
            if reply.status in (200, 201):
                return msgspec.json.decode(reply.body), took_ms
            if reply.status != 503:
                break
            await asyncio.sleep(0.1)
        raise BenchError(f"{path.split('/')[2]} was answered {reply.status}")

    def close(self) -> None:
        self._connections.close()


async def _measure(port: int, key: str, books: Sequence[str], named: Sequence[list[str]]) -> list[FlatFigure]:
    caller = _Caller(port, key)
    taken: list[list[dict[str, list[float]]]] = [[] for _ in books]
    try:
        for book_id in books:
            await caller.ask("/coupons/assign", book_id=book_id, user_id="first")
        for _ in range(ROUNDS):
            for at, book_id in enumerate(books):
                taken[at].append(await _round(caller, book_id, [named[at].pop() for _ in range(OF_A_ROUND)]))
    finally:
        caller.close()
    return [_figure(operation, taken) for operation in OPERATIONS]


async def _round(caller: _Caller, book_id: str, named: Sequence[str]) -> dict[str, list[float]]:
    taken: dict[str, list[float]] = {operation: [] for operation in OPERATIONS}
    for code in named:
        coupon, took = await caller.ask("/coupons/assign", book_id=book_id, user_id="u")
        taken["assign"].append(took)
        _, took = await caller.ask(f"/coupons/assign/{code}", user_id="u")
        taken["assign by name"].append(took)
        lock, took = await caller.ask(f"/coupons/lock/{coupon['code']}", user_id="u")
        taken["lock"].append(took)
        _, took = await caller.ask(f"/coupons/redeem/{coupon['code']}", user_id="u", lock_token=lock["lock_token"])
        taken["redeem"].append(took)
    return taken


def _figure(operation: str, taken: list[list[dict[str, list[float]]]]) -> FlatFigure:
    small, *others = ([statistics.median(one[operation]) for one in of_book] for of_book in taken)
    ratios = [statistics.median(b / a for a, b in zip(small, other, strict=True)) for other in others]
    return FlatFigure(operation, [statistics.median(of_book) for of_book in (small, *others)], ratios)
