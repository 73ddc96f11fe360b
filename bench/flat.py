"""Whether an assign, a lock and a redeem take as long in a large book as in a small one, in turns."""

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
from coupon_svc.load.client import Connections
from coupon_svc.postgres.database import open_connection

SMALL_CODES = 1_000
LEASE_CODES = 50
"""Codes of a block: few, so that both books are lent blocks while they are measured."""
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


class FlatFigure(NamedTuple):
    """Of one operation: median ms in the small and in the large book, and the median of the rounds' ratios."""

    operation: str
    small_ms: float
    large_ms: float
    ratio: float


def bench_flat(codes: int, say: Callable[[str], None]) -> list[FlatFigure]:
    """Measure a book of SMALL_CODES beside one of `codes`, whose rows SQL makes. Raises BenchError."""
    with Stand(COUPON_LEASE_CODES_MIN=str(LEASE_CODES), COUPON_LEASE_CODES_MAX=str(LEASE_CODES)) as stand:
        stand.writer()
        api = stand.api()
        stand.await_ready(api)
        books = [stand.make_empty_book(api, "redis") for _ in range(2)]
        say(f"making {codes:,} rows")
        named = asyncio.run(_fill(stand.postgres.url, dict(zip(books, (SMALL_CODES, codes), strict=True))))
        say("measuring")
        return asyncio.run(_measure(api.port, stand.key, books, named))


def show_flat(codes: int, figures: Sequence[FlatFigure]) -> None:
    """Print the figures."""
    print(f"{'':16} {SMALL_CODES:>14,} {codes:>14,} codes")
    for figure in figures:
        print(
            f"{figure.operation:16} {figure.small_ms:11.2f} ms {figure.large_ms:11.2f} ms    ratio {figure.ratio:.2f}"
        )


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
    taken: list[list[dict[str, list[float]]]] = [[], []]
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
    small, large = ([statistics.median(one[operation]) for one in of_book] for of_book in taken)
    ratios = [b / a for a, b in zip(small, large, strict=True)]
    return FlatFigure(operation, statistics.median(small), statistics.median(large), statistics.median(ratios))
