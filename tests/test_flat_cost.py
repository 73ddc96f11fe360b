"""What an assign, a lock, a redeem and a page of the list cost is the same in a book of a thousand codes and in a large one:
in one of 100,000 that are stored, and in one of a billion that are computed. Counted."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, NamedTuple

import asyncpg
import pytest

from coupon_svc.dev.servers import EmbeddedRedis
from coupon_svc.domain.chain import CHAIN_START
from coupon_svc.domain.codes import CodeStatus, parse_pattern
from coupon_svc.domain.events import COUPON_ASSIGNED, COUPON_REDEEMED, Event
from coupon_svc.domain.master_key import MasterKeys
from coupon_svc.domain.outcomes import Refused
from coupon_svc.domain.position import Epoch, Position, Seq
from coupon_svc.postgres import lending, listing, lone_leases
from coupon_svc.postgres.computed.ciphers import Ciphers
from coupon_svc.postgres.computed.ranges import take_range
from coupon_svc.postgres.database import Database, one_row
from coupon_svc.postgres.events import commit_batches
from coupon_svc.postgres.listing import CodesRange, codes_as_of, look_at_codes
from coupon_svc.postgres.shards import OwnedShard
from coupon_svc.redis.scripts import Scripts
from coupon_svc.service.budgets import Budget
from coupon_svc.service.code_directory import CodeDirectory
from coupon_svc.service.issued_codes import IssuedCodes
from tests.entries import batch_of
from tests.harness import MASTER_KEY, fresh_database
from tests.scripts.runner import Server, Shard

OWNER = "wr_me"
SHARD = OwnedShard(0, epoch=3, generation=7, committed=0, chain=CHAIN_START, tip="")
BLOCK, PAGE = 100, 50
CIPHERS = Ciphers(MasterKeys.parse(MASTER_KEY))
PATTERN = parse_pattern("C-########", "unambiguous")
_FILL = """
    WITH book AS (
        INSERT INTO books (book_id, shard, tenant_id, name, lock_ttl_seconds, ack, metadata, created_at_ms, total, lent,
                           leased_upto, accounted_upto, loaded)
        SELECT $1, 0, 1, 'b', 120, 'ledger', '{}', 0, codes, codes / 2, codes / 2, codes / 2, true
        FROM (SELECT $2::bigint AS codes) n)
    INSERT INTO codes (tenant_id, code, book_id, place)
    SELECT 1, upper($1) || lpad(number::text, 9, '0'), $1, number FROM generate_series(1, $2::bigint) AS number
"""
_HAND_OUT = """
    INSERT INTO coupons (book_id, code, user_id, assigned_at_ms, epoch, seq)
    SELECT book_id, code, 'u' || place, 1, 2, place FROM codes WHERE book_id = $1 AND place <= ($2::bigint - 99) / 2
"""
_EMPTY_BOOK = """
    INSERT INTO books (book_id, shard, tenant_id, name, lock_ttl_seconds, ack, metadata, created_at_ms, loaded)
    VALUES ($1, 0, 1, 'b', 120, 'ledger', '{}', 0, true)
"""
_LEND_HALF = """
    WITH half AS (UPDATE code_ranges SET lent_upto = begins + total / 2, accounted_upto = begins + total / 2 - $2,
                                         unlent = total - total / 2
                  WHERE book_id = $1 RETURNING unlent)
    UPDATE books SET lent = total - unlent, computed_unlent = unlent FROM half WHERE book_id = $1
"""
_COUNTED = """
    SELECT relname, seq_scan, seq_tup_read, coalesce(idx_scan, 0), coalesce(idx_tup_fetch, 0) FROM pg_stat_xact_user_tables
"""


# --- Postgres


class Ledger(NamedTuple):
    url: str
    connection: asyncpg.Connection

    async def counted(self) -> Counter[tuple[str, str]]:
        """Scans and rows read by this connection, of each table."""
        kinds = ("scans", "rows by scan", "scans of an index", "rows by index")
        rows = await self.connection.fetch(_COUNTED)
        return Counter({(name, kind): n for name, *counts in rows for kind, n in zip(kinds, counts, strict=True)})


class Book(NamedTuple):
    """Of half of its codes nearly all are in somebody's hands, where they are stored; of computed ones the last that were
    lent. `code` is lent and nobody's, `unlent` is not lent, `page` is the `after` of a page before both."""

    book_id: str
    code: str
    unlent: str
    page: str


@pytest.fixture(scope="module")
async def ledger(postgres_url: str) -> AsyncIterator[Ledger]:
    url = await fresh_database(postgres_url, 1)
    connection = await asyncpg.connect(url)
    await connection.execute("INSERT INTO tenants (name) VALUES ('t')")
    await connection.execute("UPDATE shards SET epoch = 3, generation = 7, owner = $1", OWNER)
    await connection.execute("SET synchronous_commit TO off")
    await connection.execute("SET enable_seqscan TO off")  # as where there are more than two books
    await connection.execute("SET plan_cache_mode TO force_custom_plan")  # of two ranges any index is as good
    yield Ledger(url, connection)
    await connection.close()


async def stored_book(ledger: Ledger, book_id: str, codes: int) -> Book:
    await ledger.connection.execute(_FILL, book_id, codes)
    await ledger.connection.execute(_HAND_OUT, book_id, codes)
    code, unlent, page = (f"{book_id.upper()}{codes // 2 + place:09}" for place in (0, BLOCK // 2, 1 - BLOCK))
    return Book(book_id, code, unlent, page)


async def computed_book(ledger: Ledger, book_id: str, codes: int) -> Book:
    connection = ledger.connection
    await connection.execute(_EMPTY_BOOK, book_id)
    async with connection.transaction():
        assert await take_range(connection, 1, book_id, PATTERN, codes, CIPHERS)
    await connection.execute(_LEND_HALF, book_id, BLOCK)
    row = await one_row(
        connection,
        "SELECT p.*, lent_upto FROM code_ranges JOIN computed_patterns p USING (pattern_id) WHERE book_id = $1",
        book_id,
    )
    lent_upto = row["lent_upto"]
    near = CIPHERS.of(row).codes(range(lent_upto - BLOCK, lent_upto + BLOCK))
    await connection.execute(
        "INSERT INTO coupons (book_id, code, user_id, assigned_at_ms, epoch, seq)"
        " SELECT $1, code, 'u', 1, 2, nr FROM unnest($2::text[]) WITH ORDINALITY AS held (code, nr)",
        book_id,
        near[: BLOCK // 2],
    )
    return Book(book_id, near[BLOCK - 1], near[-1], f"#{row['pattern_id']}:{lent_upto - BLOCK}")


class Pair(NamedTuple):
    small: Book
    large: Book


@pytest.fixture(scope="module")
async def books(ledger: Ledger) -> dict[str, Pair]:
    books = {
        "stored": Pair(
            await stored_book(ledger, "bk_00aaaaaaaaaaaaaaaa", 1_000),
            await stored_book(ledger, "bk_00bbbbbbbbbbbbbbbb", 100_000),
        ),
        "computed": Pair(
            await computed_book(ledger, "bk_00cccccccccccccccc", 1_000),
            await computed_book(ledger, "bk_00dddddddddddddddd", 1_000_000_000),
        ),
    }
    await ledger.connection.execute("ANALYZE")
    return books


class Cost(NamedTuple):
    statements: int
    reads: Counter[tuple[str, str]]


async def cost_of(ledger: Ledger, what: str, book: Book) -> Cost:
    """Statements, and rows read, for one of the things that Postgres does for a caller."""
    connection, book_id = ledger.connection, book.book_id
    assigned = Event(3, 1, COUPON_ASSIGNED, book_id, book.code, "ann", 5)
    redeemed = Event(3, 2, COUPON_REDEEMED, book_id, book.code, "ann", 6, 1)

    class OnOne(Database):
        async def fetch(self, statement: str, *args: Any) -> list[asyncpg.Record]:
            return list(await connection.fetch(statement, *args))

    async def find_its_book() -> None:
        database = OnOne(ledger.url, "test")
        directory = CodeDirectory(database, IssuedCodes(database, CIPHERS), Budget(1, 1))
        assert await directory.book_of_code(1, book.code, 5) == book_id
        with pytest.raises(Refused):
            await directory.book_of_code(1, "NONE-1", 5)

    async def list_a_page(status: CodeStatus | None) -> None:
        page = await look_at_codes(connection, CodesRange(book_id, "", book.page), status, 1, PAGE, CIPHERS)
        assert len(page.candidates) >= PAGE

    work: dict[str, Callable[[], Awaitable[Any]]] = {
        "lend_a_block": lambda: lending.lease_block(connection, OWNER, SHARD, book_id, BLOCK, CIPHERS),
        "lend_one_by_name": lambda: lone_leases.lease_code(connection, 1, book_id, book.unlent, CIPHERS),
        "find_its_book": find_its_book,
        "assign_and_redeem": lambda: commit_batches(connection, OWNER, [batch_of(0, 3, 7, 0, [assigned, redeemed])]),
        "list_a_page": lambda: list_a_page(None),
        "list_a_page_of_one_status": lambda: list_a_page("available"),
        "export_a_page": lambda: codes_as_of(
            connection, CodesRange(book_id, "", book.page), Position(Epoch(3), Seq(1)), None, CIPHERS
        ),
    }
    statements: list[object] = []
    transaction = connection.transaction()
    await transaction.start()
    before = await ledger.counted()
    try:
        with connection.query_logger(statements.append):
            await work[what]()
            await asyncio.sleep(0)  # the logger hears of the last one a moment later
        return Cost(len(statements), await ledger.counted() - before)
    finally:
        await transaction.rollback()


@pytest.mark.parametrize("kind", ["stored", "computed"])
@pytest.mark.parametrize(
    ("what", "rows_max"),
    [
        ("lend_a_block", 2 * BLOCK + 20),
        ("lend_one_by_name", 20),
        ("find_its_book", 20),
        ("assign_and_redeem", 20),
        ("list_a_page", 2 * PAGE),
        ("list_a_page_of_one_status", 2 * BLOCK),
        ("export_a_page", 3 * BLOCK),
    ],
)
async def test_postgres_does_as_much_for_a_large_book(
    ledger: Ledger,
    books: dict[str, Pair],
    kind: str,
    what: str,
    rows_max: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(listing, "LOOKED_AT_MAX", BLOCK)  # the small book must be larger than what is looked at
    monkeypatch.setattr(listing, "ROWS_PER_PAGE", BLOCK)
    pair = books[kind]
    await cost_of(ledger, what, pair.small)  # the driver learns types with the first use of a statement
    small, large = [await cost_of(ledger, what, book) for book in pair]
    assert small.statements == large.statements
    assert {name: (n, large.reads[name]) for name, n in small.reads.items() if n != large.reads[name]} == {}
    assert small.reads.keys() == large.reads.keys()
    assert 1 <= large.statements <= 12
    assert 1 <= sum(number for (_, counted), number in large.reads.items() if counted.startswith("rows")) <= rows_max


# --- Redis


@pytest.fixture(scope="module")
def server(plain_redis: EmbeddedRedis) -> Iterator[Server]:
    with Server(plain_redis, Scripts()) as loaded:
        yield loaded


def commands_of(server: Server, in_pool: int, unlent: int) -> Counter[str]:
    """Commands that an assign, an assign by name, a lock and a redeem run, by name."""
    shard = Shard(server)
    shard.certify()
    book = shard.new_book(*(f"CODE-{number}" for number in range(500)), unlent=unlent)
    for begin in range(500, in_pool, 500):
        more = [f"CODE-{number}" for number in range(begin, begin + 500)]
        assert shard.load_codes(book, more, kept_back=unlent, scores=range(begin, begin + 500))[0] == "ok"
    server.admin.config_resetstat()
    assert shard.assign_coupon(book, "u")[0] == "ok"
    assert shard.assign_code(book, "u", "CODE-77")[0] == "ok"
    assert shard.lock_coupon(book, "CODE-0", user_id="u", new_token="t")[0] == "ok"
    assert shard.redeem_coupon(book, "CODE-0", user_id="u", token="t")[0] == "ok"
    stats = server.admin.info("commandstats")
    return Counter({name.removeprefix("cmdstat_"): one["calls"] for name, one in stats.items() if "config" not in name})


def test_redis_keeps_no_more_for_a_large_book(server: Server) -> None:
    """Its memory is for what is lent and held."""

    def memory(unlent: int) -> int:
        shard = Shard(server)
        shard.certify()
        shard.new_book(*(f"CODE-{number}" for number in range(500)), unlent=unlent)
        return sum(server.admin.memory_usage(key, samples=0) for key in server.admin.scan_iter())

    assert memory(999_999_500) <= memory(500) + 64


def test_redis_runs_as_many_commands_for_a_large_book(server: Server) -> None:
    small, large = commands_of(server, 500, 500), commands_of(server, 20_000, 49_980_000)
    assert small == large
    assert small["fcall"] == 4
