"""What an assign, a lock and a redeem cost is the same in a book of a thousand codes and in one of 100,000: counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, NamedTuple

import asyncpg
import pytest

from coupon_svc.dev.servers import EmbeddedRedis
from coupon_svc.domain.chain import CHAIN_START
from coupon_svc.domain.events import COUPON_ASSIGNED, COUPON_REDEEMED, Event
from coupon_svc.postgres import lending, lone_leases
from coupon_svc.postgres.codes import find_codes
from coupon_svc.postgres.database import Database
from coupon_svc.postgres.events import commit_batches
from coupon_svc.postgres.shards import OwnedShard
from coupon_svc.redis.scripts import Scripts
from tests.entries import batch_of
from tests.harness import fresh_database
from tests.scripts.runner import Server, Shard

OWNER = "wr_me"
SHARD = OwnedShard(0, epoch=3, generation=7, committed=0, chain=CHAIN_START, tip="")
SMALL, LARGE = ("bk_00aaaaaaaaaaaaaaaa", 1_000), ("bk_00bbbbbbbbbbbbbbbb", 100_000)
BLOCK = 100
_FILL = """
    WITH book AS (
        INSERT INTO books (book_id, shard, tenant_id, name, lock_ttl_seconds, ack, metadata, created_at_ms, total, lent,
                           leased_upto, accounted_upto, loaded)
        SELECT $1, 0, 1, 'b', 120, 'ledger', '{}', 0, codes, codes / 2, codes / 2, codes / 2, true
        FROM (SELECT $2::bigint AS codes) n)
    INSERT INTO codes (tenant_id, code, book_id, place)
    SELECT 1, upper(substr(md5($1 || number), 1, 16)), $1, number FROM generate_series(1, $2::bigint) AS number
"""
_HAND_OUT = """
    INSERT INTO coupons (book_id, code, user_id, assigned_at_ms, epoch, seq)
    SELECT book_id, code, 'u' || place, 1, 2, place FROM codes WHERE book_id = $1 AND place <= $2::bigint / 2 - 200
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


@pytest.fixture(scope="module")
async def ledger(postgres_url: str) -> AsyncIterator[Ledger]:
    """Two books, of each of which half is lent, and nearly all of that in somebody's hands."""
    url = await fresh_database(postgres_url, 1)
    connection = await asyncpg.connect(url)
    await connection.execute("INSERT INTO tenants (name) VALUES ('t')")
    await connection.execute("UPDATE shards SET epoch = 3, generation = 7, owner = $1", OWNER)
    await connection.execute("SET synchronous_commit TO off")
    await connection.execute("SET enable_seqscan TO off")  # as where there are more than two books
    for book_id, codes in (SMALL, LARGE):
        await connection.execute(_FILL, book_id, codes)
        await connection.execute(_HAND_OUT, book_id, codes)
    await connection.execute("ANALYZE")
    yield Ledger(url, connection)
    await connection.close()


async def code_at(ledger: Ledger, book_id: str, place: int) -> str:
    code: str = await ledger.connection.fetchval(
        "SELECT code FROM codes WHERE book_id = $1 AND place = $2", book_id, place
    )
    return code


async def reads_of(ledger: Ledger, what: str, book_id: str, codes: int) -> Counter[tuple[str, str]]:
    """Rows read for one of the things that Postgres does for a caller."""
    connection = ledger.connection
    waiting, unlent = await code_at(ledger, book_id, codes // 2), await code_at(ledger, book_id, codes // 2 + 50)
    assigned = Event(3, 1, COUPON_ASSIGNED, book_id, waiting, "ann", 5)
    redeemed = Event(3, 2, COUPON_REDEEMED, book_id, waiting, "ann", 6, 1)

    class OnOne(Database):
        async def fetch(self, statement: str, *args: Any) -> list[asyncpg.Record]:
            return list(await connection.fetch(statement, *args))

    work: dict[str, Callable[[], Awaitable[Any]]] = {
        "lend_a_block": lambda: lending.lease_block(connection, OWNER, SHARD, book_id, BLOCK),
        "lend_one_by_name": lambda: lone_leases.lease_code(connection, 1, book_id, unlent),
        "find_its_book": lambda: find_codes(OnOne(ledger.url, "test"), {(1, waiting), (1, "NONE-1")}),
        "assign_and_redeem": lambda: commit_batches(connection, OWNER, [batch_of(0, 3, 7, 0, [assigned, redeemed])]),
    }
    transaction = connection.transaction()
    await transaction.start()
    before = await ledger.counted()
    try:
        await work[what]()
        return await ledger.counted() - before
    finally:
        await transaction.rollback()


@pytest.mark.parametrize("what", ["lend_a_block", "lend_one_by_name", "find_its_book", "assign_and_redeem"])
async def test_postgres_reads_as_many_rows_for_a_large_book(ledger: Ledger, what: str) -> None:
    small, large = [await reads_of(ledger, what, *book) for book in (SMALL, LARGE)]
    assert small == large
    rows = sum(number for (_, kind), number in large.items() if kind.startswith("rows"))
    assert 1 <= rows <= 2 * BLOCK + 20


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
        assert shard.load_codes(book, more, unlent=unlent, scores=range(begin, begin + 500))[0] == "ok"
    server.admin.config_resetstat()
    assert shard.assign_coupon(book, "u")[0] == "ok"
    assert shard.assign_code(book, "u", "CODE-77")[0] == "ok"
    assert shard.lock_coupon(book, "CODE-0", user_id="u", new_token="t")[0] == "ok"
    assert shard.redeem_coupon(book, "CODE-0", user_id="u", token="t")[0] == "ok"
    stats = server.admin.info("commandstats")
    return Counter({name.removeprefix("cmdstat_"): one["calls"] for name, one in stats.items() if "config" not in name})


def test_redis_runs_as_many_commands_for_a_large_book(server: Server) -> None:
    small, large = commands_of(server, 500, 500), commands_of(server, 20_000, 49_980_000)
    assert small == large
    assert small["evalsha"] == 4
