"""Recovery looks at what happened of late, not at all that ever was; it goes on as long as it gets on; and what it waits
for holds up nothing else."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

import asyncpg
import pytest

from coupon_svc.config import load_settings
from coupon_svc.dev.servers import EmbeddedRedis
from coupon_svc.domain.books import Book
from coupon_svc.domain.events import COUPON_ASSIGNED, COUPON_CONFIRMED, Event
from coupon_svc.domain.position import Position
from coupon_svc.domain.receipts import Receipt
from coupon_svc.domain.reports import Report
from coupon_svc.postgres import draining, epochs, late_events, outstanding, processes, rebuild_source, settling
from coupon_svc.postgres.books import books_of_shard
from coupon_svc.postgres.database import one_row, open_connection
from coupon_svc.postgres.epochs import NewEpoch, Verdict
from coupon_svc.postgres.errors import LedgerUnavailable, NotOwner
from coupon_svc.postgres.events import Batch
from coupon_svc.postgres.late_events import redeem_receipt
from coupon_svc.postgres.lone_leases import BROUGHT_AT_ONCE, lease_code, note_lone_brought
from coupon_svc.postgres.marks import Mark, mark_of_a_day_ago, note_marks
from coupon_svc.postgres.migrations import migrate
from coupon_svc.postgres.quarantine import deal_again
from coupon_svc.postgres.shards import OwnedShard, owned_shards
from coupon_svc.redis.control import ShardControl
from coupon_svc.redis.keys import ShardKeys
from coupon_svc.redis.scripts import Scripts
from coupon_svc.resources import resource_folder
from coupon_svc.writer import recover as recover_module
from coupon_svc.writer import upkeep as upkeep_module
from coupon_svc.writer.lend import Lender
from coupon_svc.writer.portion import BYTES_PER_COMMIT_MAX
from coupon_svc.writer.recover import Recoverer
from coupon_svc.writer.shard import Shard
from coupon_svc.writer.upkeep import Upkeep
from coupon_svc.writer.writer import Writer
from tests.entries import entry_of, fields_of
from tests.harness import Stack, fresh_database, running_stack, until
from tests.owned import open_shard

SHARDS = 4
HOUR_MS = 3_600_000


class Bench(NamedTuple):
    """A ledger whose shard 0 is the writer `w`'s, a Redis, and a connection to each."""

    url: str
    ledger: asyncpg.Connection
    store: ShardControl
    redis: Any
    recoverer: Recoverer

    async def owned(self) -> OwnedShard:
        (owned,) = await owned_shards(self.ledger, "w")
        return owned

    async def recover(self) -> OwnedShard:
        return await self.recoverer.recover(self.ledger, await self.owned())

    async def book(self, name: str, *, held: int = 0, free: int = 0, ack: str = "ledger") -> str:
        """A book whose codes are all lent: so many are held, the others are not assigned yet."""
        book_id, lent = f"bk_00{name:0>16}", held + free
        await self.ledger.execute(
            "INSERT INTO books (book_id, shard, tenant_id, name, lock_ttl_seconds, max_redemptions_per_code, ack, metadata,"
            " created_at_ms, total, lent, leased_upto, places_upto, loaded, loaded_version)"
            " VALUES ($1, 0, 1, 'b', 60, 1, $2, '{}', 1, $3, $3, $3, $3, true, 1)",
            book_id, ack, lent,
        )  # fmt: skip
        await self.ledger.execute(
            "INSERT INTO codes SELECT 1, $1 || '-' || n, $2, n FROM generate_series(1, $3::int) n", name, book_id, lent
        )
        epoch = await self.ledger.fetchval("SELECT certified_epoch FROM shards WHERE shard = 0")
        done = await self.ledger.fetchval("SELECT coalesce(max(seq), 0) FROM events WHERE shard = 0")
        await self.ledger.execute(
            "INSERT INTO coupons SELECT $1, $2 || '-' || n, 'u' || n, 1, 0, $4, $5 + n FROM generate_series(1, $3::int) n",
            book_id, name, held, epoch, done,
        )  # fmt: skip
        return book_id

    async def row(self, book_id: str) -> dict[str, Any]:
        return dict(
            await one_row(
                self.ledger,
                "SELECT total, lent, quarantined, leased_upto, accounted_upto FROM books WHERE book_id = $1",
                book_id,
            )
        )

    async def counts(self, book_id: str) -> tuple[int, int, int]:
        """Codes in the pool, codes held, and how many were ever brought, as Redis says."""
        return await self.store.pool_counts(0, book_id)


@pytest.fixture(scope="module")
def own_redis(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with EmbeddedRedis(tmp_path_factory.mktemp("recovered")) as server:
        yield server


@pytest.fixture
async def bench(postgres_url: str, own_redis: EmbeddedRedis) -> AsyncIterator[Bench]:
    from redis.asyncio import Redis

    redis = Redis.from_url(own_redis.admin_url, decode_responses=True)
    await redis.flushall()
    url = await fresh_database(postgres_url, SHARDS)
    ledger = await open_connection(url, "coupon-writer w")
    await ledger.execute("INSERT INTO tenants (name) VALUES ('t')")
    await ledger.execute("UPDATE shards SET owner = 'w', generation = 1 WHERE shard = 0")
    store = ShardControl(own_redis.url, SHARDS, Scripts())
    bench = Bench(url, ledger, store, redis, Recoverer("w", store, 1000))
    await bench.recover()
    yield bench
    store.close()
    ledger.terminate()
    await redis.aclose()


async def rows_read(url: str, ledger: asyncpg.Connection, *tables: str) -> int:
    """Rows and index entries of these tables that were read so far."""
    await ledger.execute("SELECT pg_stat_force_next_flush()")
    await asyncio.sleep(0.1)
    other = await asyncpg.connect(url)
    try:
        number: int = await other.fetchval(
            "SELECT sum(seq_tup_read + coalesce(idx_tup_fetch, 0)"
            " + (SELECT sum(idx_tup_read) FROM pg_stat_user_indexes i WHERE i.relid = t.relid))"
            " FROM pg_stat_user_tables t WHERE relname = ANY ($1)",
            list(tables),
        )
        return number
    finally:
        await other.close()


async def keep_up(bench: Bench, *, sweep: bool) -> None:
    shard = open_shard(await bench.owned(), await bench.store.connect())
    upkeep = Upkeep(bench.url, "w", {0: shard})
    await upkeep.turn(sweep=sweep)
    upkeep.session.close()


async def account(bench: Bench, book_id: str) -> None:
    while await outstanding.account_piece(bench.ledger, book_id):
        pass


# --- what the stream still holds


@pytest.mark.parametrize("reported", [False, True], ids=["stream", "reports"])
async def test_large_entries_are_drained_in_several_transactions(
    bench: Bench, reported: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All in one might not end in time, and would be tried again for ever."""
    await bench.book("E", free=1, ack="redis")  # without one, nobody asks for reports
    epoch, keys, number, size = (await bench.owned()).epoch, ShardKeys(0, SHARDS), 20, 512 * 1024
    for seq in range(1, number + 1):
        event = Event(epoch, seq, COUPON_ASSIGNED, "bk_00none", f"D-{seq}", "u", 1, fingerprint="f" * size)
        entry = entry_of(event, after=f"t{seq - 1}" if seq > 1 else "", tip=f"t{seq}")
        if reported:
            await bench.ledger.execute(
                "INSERT INTO reported_entries (shard, epoch, seq, n, after, tip, at_ms, events)"
                " VALUES (0, $1, $2, 1, $3, $4, 1, $5)",
                epoch, seq, entry.after, entry.tip, entry.body,
            )  # fmt: skip
        else:
            await bench.redis.xadd(keys.events, fields_of(entry), id=f"{epoch}-{seq}")
    if not reported:
        await bench.redis.hset(keys.meta, mapping={"seq": number, "tip": f"t{number}"})
    sizes: list[int] = []
    drain = draining.drain

    async def drain_piece(connection: Any, writer_id: str, begun: NewEpoch, batch: Batch) -> int:
        sizes.append(sum(len(entry.body) for entry in batch.entries))
        return await drain(connection, writer_id, begun, batch)

    monkeypatch.setattr(draining, "drain", drain_piece)
    await bench.recover()
    assert await epochs.last_seq(bench.ledger, 0, epoch) == number
    assert max(sizes) < BYTES_PER_COMMIT_MAX + 2 * size


# --- what is still to come


async def test_a_book_is_not_exhausted_while_codes_that_were_lent_alone_are_on_their_way(bench: Bench) -> None:
    """Those of a later turn, and a block that may have been lent: with an empty pool an assign says `refilling`."""
    book_id = await bench.book("W", free=BROUGHT_AT_ONCE + 2)
    shard = open_shard(await bench.recover(), await bench.store.connect())
    await bench.ledger.execute("UPDATE codes SET place = 0 WHERE book_id = $1", book_id)
    await bench.ledger.execute("UPDATE books SET lent = total, loaded_version = version WHERE book_id = $1", book_id)
    await bench.ledger.execute("INSERT INTO lone_leases SELECT book_id, code, 0 FROM codes WHERE book_id = $1", book_id)
    lender = Lender(bench.url, "w", bench.store, {0: shard}, 20, 20)
    for doubtful, still_to_come in ((True, 2 + 1), (False, 0)):
        lender._in_doubt = {book_id: shard} if doubtful else {}
        await lender.turn(bench.ledger)
        assert await bench.redis.hget(ShardKeys(0, SHARDS).book(book_id), "unlent") == str(still_to_come)
    assert await bench.counts(book_id) == (BROUGHT_AT_ONCE + 2, 0, BROUGHT_AT_ONCE + 2)


async def test_a_book_is_not_exhausted_while_a_code_that_was_lent_alone_meanwhile_is_still_to_come(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shard is certified before such codes are brought."""
    book_id = await bench.book("M", free=1)

    async def lend_alone_first(connection: Any, shard: int) -> list[Book]:
        async with bench.ledger.transaction():
            await lease_code(bench.ledger, 1, book_id, "M-1")
        return await books_of_shard(connection, shard)

    monkeypatch.setattr(recover_module, "books_of_shard", lend_alone_first)
    await bench.recover()
    assert await bench.counts(book_id) == (0, 0, 0)
    assert await bench.redis.hget(ShardKeys(0, SHARDS).book(book_id), "unlent") == "1"


# --- what a restart looks at


async def test_a_restart_does_not_look_at_every_code_that_was_ever_lent(bench: Bench) -> None:
    book_id = await bench.book("A", held=20_000, free=50)
    tables = ("codes", "coupons", "events", "outstanding_codes", "lone_leases")
    await bench.ledger.execute("ANALYZE")
    before = await rows_read(bench.url, bench.ledger, *tables)
    await keep_up(bench, sweep=True)
    assert await rows_read(bench.url, bench.ledger, *tables) - before < 8 * 20_050, "each code is looked at once"
    before = await rows_read(bench.url, bench.ledger, *tables)
    lease = await outstanding.outstanding_lease(bench.ledger, book_id)
    assert sorted(lease.codes) == [f"A-{number}" for number in range(20_001, 20_051)]
    assert await rows_read(bench.url, bench.ledger, *tables) - before < 500
    await bench.ledger.execute("UPDATE shards SET rebuild = true WHERE shard = 0")
    await bench.recover()
    assert await bench.counts(book_id) == (0, 20_000, 20_000)
    await bench.redis.hset(ShardKeys(0, SHARDS).book(book_id), "redeemed", 7)

    before = await rows_read(bench.url, bench.ledger, *tables)
    await bench.recover()
    assert await rows_read(bench.url, bench.ledger, *tables) - before < 500
    assert await bench.counts(book_id) == (0, 20_000, 20_000)
    assert await bench.redis.hget(ShardKeys(0, SHARDS).book(book_id), "redeemed") == "7", "Redis was kept"


@pytest.mark.parametrize(("tip", "kept"), [("t1", True), ("another", False)])
async def test_a_redis_of_another_history_that_has_come_as_far_is_not_kept(bench: Bench, tip: str, kept: bool) -> None:
    """Its counts agree, and its stream says nothing any more."""
    book_id = await bench.book("K", held=1)
    await bench.ledger.execute("UPDATE shards SET rebuild = true WHERE shard = 0")
    owned, keys = await bench.recover(), ShardKeys(0, SHARDS)
    await bench.ledger.execute("UPDATE shards SET committed = 1, tip = 't1' WHERE shard = 0")
    await bench.redis.hset(keys.meta, mapping={"seq": 1, "committed": 1, "tip": tip})
    await bench.redis.hset(keys.holders(book_id), "K-1", f"{owned.epoch}-1 0 1 thief")
    await bench.recover()
    holder = await bench.redis.hget(keys.holders(book_id), "K-1")
    assert holder.endswith(" thief") is kept


async def test_a_redis_that_decides_until_it_is_shut_is_kept(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when an operator asks for a recovery under load."""
    book_id, keys = await bench.book("L", free=1), ShardKeys(0, SHARDS)
    await bench.ledger.execute("UPDATE shards SET rebuild = true WHERE shard = 0")
    epoch = (await bench.recover()).epoch
    await bench.redis.hset(keys.book(book_id), "redeemed", 7)
    shut_shard = bench.store.shut_shard

    async def decide_first(term: Any) -> None:
        async with bench.ledger.transaction():
            await lease_code(bench.ledger, 1, book_id, "L-1")
        event = Event(epoch, 1, COUPON_ASSIGNED, book_id, "L-1", "u", 1, fingerprint="f")
        await bench.redis.xadd(keys.events, fields_of(entry_of(event, after="", tip="t1")), id=f"{epoch}-1")
        await bench.redis.hset(keys.meta, mapping={"seq": 1, "tip": "t1"})
        await bench.redis.hset(keys.holders(book_id), "L-1", f"{epoch}-1 0 1 u")
        await bench.redis.hincrby(keys.book(book_id), "lent", 1)
        await shut_shard(term)

    monkeypatch.setattr(bench.store, "shut_shard", decide_first)
    await bench.recover()
    assert await bench.counts(book_id) == (0, 1, 1)
    assert await bench.redis.hget(keys.book(book_id), "redeemed") == "7", "Redis was rebuilt"


async def test_a_redis_with_a_key_of_another_type_is_rebuilt(bench: Bench) -> None:
    """Not by a second recovery, after one that failed."""
    book_id = await bench.book("T", held=1)
    await bench.ledger.execute("UPDATE shards SET rebuild = true WHERE shard = 0")
    await bench.recover()
    await bench.redis.set(ShardKeys(0, SHARDS).holders(book_id), "no hash")
    await bench.recover()
    assert await bench.counts(book_id) == (0, 1, 1)


async def test_the_codes_that_are_lent_and_not_assigned_are_found_wherever_they_stand(bench: Bench) -> None:
    """One accounted for before and named, one behind that, one lent alone that was brought, one that was not."""
    book_id = await bench.book("B", held=3, free=2)
    await account(bench, book_id)
    await bench.ledger.execute("UPDATE books SET total = 10, places_upto = 10 WHERE book_id = $1", book_id)
    await bench.ledger.execute("INSERT INTO codes SELECT 1, 'B-' || n, $1, n FROM generate_series(6, 10) n", book_id)
    await bench.ledger.execute("UPDATE books SET lent = 6, leased_upto = 6 WHERE book_id = $1", book_id)
    for code in ("B-8", "B-9"):
        async with bench.ledger.transaction():
            await lease_code(bench.ledger, 1, book_id, code)
    await note_lone_brought(bench.ledger, book_id, ["B-8"])
    assert await bench.ledger.fetchval("SELECT lent FROM books WHERE book_id = $1", book_id) == 8
    await bench.recover()
    row = await bench.row(book_id)
    assert (row["lent"], row["quarantined"], row["accounted_upto"]) == (3, 0, row["leased_upto"])
    places = await bench.ledger.fetch("SELECT code FROM codes WHERE place <= $1 ORDER BY code", row["leased_upto"])
    assert [place["code"] for place in places] == ["B-1", "B-2", "B-3"]
    for table in ("outstanding_codes", "lone_leases"):
        assert await bench.ledger.fetchval(f"SELECT count(*) FROM {table}") == 0
    assert await bench.counts(book_id) == (0, 3, 3)


async def test_what_is_outstanding_no_longer_is_dropped(bench: Bench) -> None:
    book_id = await bench.book("C", held=2, free=3)
    await account(bench, book_id)
    await bench.ledger.execute("INSERT INTO coupons VALUES ($1, 'C-4', 'u', 1, 0, 1, 9)", book_id)
    await keep_up(bench, sweep=True)
    rows = await bench.ledger.fetch("SELECT code FROM outstanding_codes ORDER BY code")
    assert [row["code"] for row in rows] == ["C-3", "C-5"]


async def test_codes_that_were_lent_alone_before_the_migration_are_known_to_be_outstanding(
    postgres_url: str, tmp_path: Path
) -> None:
    older = tmp_path / "sql"
    older.mkdir()
    for path in resource_folder("sql").glob("*.sql"):
        if path.name < "0009":
            shutil.copy(path, older)
    url = await fresh_database(postgres_url, SHARDS)
    ledger = await asyncpg.connect(url)
    await ledger.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    await migrate(ledger, SHARDS, older)
    await ledger.execute("INSERT INTO tenants (name) VALUES ('t')")
    await ledger.execute(
        "INSERT INTO books (book_id, shard, tenant_id, name, lock_ttl_seconds, ack, metadata, created_at_ms, total, lent)"
        " VALUES ('bk_00', 0, 1, 'b', 60, 'redis', '{}', 1, 3, 2)"
    )
    await ledger.execute(
        "INSERT INTO codes VALUES (1, 'HELD', 'bk_00', 0), (1, 'FREE', 'bk_00', 0), (1, 'UNLENT', 'bk_00', 5)"
    )
    await ledger.execute("INSERT INTO coupons VALUES ('bk_00', 'HELD', 'u', 1, 0, 1, 1)")
    await migrate(ledger, SHARDS)
    assert [row["code"] for row in await ledger.fetch("SELECT code FROM outstanding_codes")] == ["FREE"]
    await ledger.close()


# --- Idempotency-Keys


async def add_event(bench: Bench, seq: int, book_id: str, key: str | None, age_h: float, *, epoch: int = 1) -> None:
    now = round(time.time() * 1000)
    await bench.ledger.execute(
        "INSERT INTO old_events (shard, epoch, seq, event, book_id, code, user_id, at_ms, idem, fingerprint)"
        " VALUES (0, $1, $2, 'coupon_assigned', $3, $4, 'u', $5, $6, 'f')",
        epoch, seq, book_id, f"I-{epoch}-{seq}", now - round(age_h * HOUR_MS), key,
    )  # fmt: skip


async def keys_in_redis(bench: Bench) -> dict[str, str]:
    found = {}
    async for name in bench.redis.scan_iter("*:idem:*"):
        found[name.rsplit(":", 1)[1]] = json.loads(await bench.redis.get(name))[1]
    return found


async def test_a_rebuild_reads_the_events_of_the_last_day_once_for_all_books(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rebuild_source, "EVENTS_PAGE", 7)
    books = [await bench.book(f"{number}") for number in range(20)]
    await bench.ledger.execute(
        "INSERT INTO old_events (shard, epoch, seq, event, book_id, code, user_id, at_ms, idem, fingerprint)"
        " SELECT n % 2, 1, n, 'coupon_assigned', $1, 'old', 'u', 1, 'old' || n, 'f' FROM generate_series(1, 40000) n",
        books[0],
    )
    await bench.ledger.execute(
        "INSERT INTO ledger_marks (shard, at, epoch, seq) VALUES (0, now() - interval '26 hours', 1, 40000)"
    )
    for number in range(60):  # some without a key, some too old
        key = None if number % 5 == 0 else f"k{number}"
        await add_event(bench, 40_001 + number, books[number % 20], key, 24.5 if number < 10 else 1)
    await add_event(bench, 40_100, books[13], "k13", 0.5)  # once more the key of another position of the book
    await bench.ledger.execute("ANALYZE old_events")
    before = await rows_read(bench.url, bench.ledger, "old_events")
    await bench.ledger.execute("UPDATE shards SET rebuild = true WHERE shard = 0")
    await bench.recover()
    read = await rows_read(bench.url, bench.ledger, "old_events") - before
    assert read < 61 * 2 + 50, "each event of the last day once, and no other"
    expected = {f"k{n}": f"I-1-{40_001 + n}" for n in range(10, 60) if n % 5}
    assert await keys_in_redis(bench) == {**expected, "k13": "I-1-40100"}


async def test_without_a_mark_a_rebuild_begins_at_the_first_event(bench: Bench) -> None:
    book_id = await bench.book("M")
    await add_event(bench, 1, book_id, "first", 1)
    await add_event(bench, 2, "bk_00nobodys", "made-up", 1)  # by hand, in the stream
    await bench.ledger.execute("UPDATE shards SET rebuild = true WHERE shard = 0")
    await bench.recover()
    assert await keys_in_redis(bench) == {"first": "I-1-1"}


async def test_a_confirmed_coupon_that_the_ledger_lacks_holds_up_no_rebuild(bench: Bench) -> None:
    """Its assign may be a dead letter. The keys of the others are restored."""
    book_id, now = await bench.book("C"), round(time.time() * 1000)
    await bench.ledger.execute("INSERT INTO coupons VALUES ($1, 'HELD', 'u', 7, 0, 1, 1)", book_id)
    confirmed = [
        Event(1, seq, COUPON_CONFIRMED, book_id, code, "u", now, 0, idem=code.lower(), fingerprint="f")
        for seq, code in ((2, "HELD"), (3, "LOST"))
    ]
    entry = entry_of(*confirmed, tip="t")
    await bench.ledger.execute(
        "INSERT INTO entries (shard, epoch, seq, n, after, tip, at_ms, keyed, events, chain)"
        " VALUES (0, $1, $2, $3, $4, $5, $6, true, $7, '')",
        *entry,
    )
    await bench.ledger.execute("UPDATE shards SET rebuild = true WHERE shard = 0")
    await bench.recover()
    assert await keys_in_redis(bench) == {"held": "HELD"}


async def test_a_key_whose_event_came_late_is_restored_though_it_stands_before_the_mark(bench: Bench) -> None:
    book_id = await bench.book("L", ack="redis")
    await bench.ledger.execute("INSERT INTO codes VALUES (1, 'LATE', $1, -1)", book_id)
    await bench.ledger.execute(
        "INSERT INTO quarantine (book_id, code, shard, epoch) VALUES ($1, 'LATE', 0, 1)", book_id
    )
    await bench.ledger.execute(
        "UPDATE books SET total = 1, quarantined = 1, places_upto = 9 WHERE book_id = $1", book_id
    )
    await bench.recover()
    await bench.ledger.execute(
        "INSERT INTO ledger_marks (shard, at, epoch, seq) VALUES (0, now() - interval '26 hours', 2, 0)"
    )
    begun = NewEpoch(await bench.owned(), 0, False)
    event = Event(1, 5, COUPON_ASSIGNED, book_id, "LATE", "u", round(time.time() * 1000), None, None, None, "late", "f")
    await late_events.take_late(bench.ledger, "w", begun, 1, [event])
    await bench.ledger.execute("UPDATE shards SET rebuild = true WHERE shard = 0")
    await bench.recover()
    assert await keys_in_redis(bench) == {"late": "LATE"}


async def test_marks_are_made_hourly_while_redis_decides_and_the_one_to_begin_at_stays(bench: Bench) -> None:
    async def ages() -> list[int]:
        rows = await bench.ledger.fetch(
            "SELECT round(extract(epoch FROM now() - at) / 3600)::int AS h FROM ledger_marks WHERE shard = 0 ORDER BY at"
        )
        return [row["h"] for row in rows]

    assert await mark_of_a_day_ago(bench.ledger, 0) == Mark(0, 0)
    for _ in range(2):
        await note_marks(bench.ledger, "w")
    assert await ages() == [0]
    assert await bench.ledger.fetchval("SELECT count(*) FROM ledger_marks") == 1, "only of shards of one's own"
    for hours in (70, 60, 50):
        await bench.ledger.execute(
            "INSERT INTO ledger_marks VALUES (0, now() - $1 * interval '1 hour', 1, $1::int)", hours
        )
    await note_marks(bench.ledger, "w")
    assert await ages() == [50, 0], "the newest that is old enough, however old it is"
    assert await mark_of_a_day_ago(bench.ledger, 0) == Mark(1, 50)
    await bench.ledger.execute("UPDATE ledger_marks SET at = at - interval '2 hours'")
    await bench.ledger.execute("UPDATE shards SET epoch = epoch + 1 WHERE shard = 0")  # a recovery is under way
    await note_marks(bench.ledger, "w")
    assert await ages() == [52, 2]


# --- settling


async def settle(bench: Bench, begun: NewEpoch, verdict: Verdict, book_id: str) -> settling.Settled:
    await account(bench, book_id)
    settled, more = await settling.settle_piece(bench.ledger, "w", begun, verdict, book_id, 1000)
    assert not more
    return settled


async def test_a_code_that_an_operator_dealt_again_is_not_quarantined_for_its_old_dead_letter(bench: Bench) -> None:
    book_id = await bench.book("D", free=3)
    await bench.ledger.execute(
        "INSERT INTO dead_letters (shard, epoch, seq, fields, reason, book_id, code) VALUES (0, 1, 1, '', 'odd', $1, 'D-2')",
        book_id,
    )
    await bench.recover()
    assert (await bench.row(book_id))["quarantined"] == 1
    assert await deal_again(bench.ledger, book_id) == 1
    for _ in range(2):
        await bench.recover()
        await bench.ledger.execute("UPDATE books SET leased_upto = places_upto, lent = 3 WHERE book_id = $1", book_id)
    await bench.recover()
    row = await bench.row(book_id)
    assert (row["lent"], row["quarantined"]) == (0, 0)


async def test_a_book_whose_row_is_held_is_settled_after_the_others_and_holds_up_no_commit(bench: Bench) -> None:
    books = [await bench.book(name, free=2) for name in ("X", "Y", "Z")]
    upload = await asyncpg.connect(bench.url)
    transaction = upload.transaction()
    await transaction.start()
    await upload.execute("SELECT FROM books WHERE book_id = $1 FOR UPDATE", books[0])
    recovery_ = asyncio.create_task(bench.recover())
    other = await asyncpg.connect(bench.url)

    async def others_settled() -> bool:
        return bool(await other.fetchval("SELECT count(*) FROM books WHERE lent = 0") == 2)

    await until(others_settled, what="the other books should be settled")
    for _ in range(30):
        async with other.transaction():
            await other.execute("SET LOCAL lock_timeout = 500")
            await other.execute("SELECT FROM shards WHERE shard = 0 FOR UPDATE")
        await asyncio.sleep(0.05)
    assert not recovery_.done()
    await transaction.rollback()
    await asyncio.wait_for(recovery_, 15)
    assert await other.fetchval("SELECT count(*) FROM books WHERE lent = 0") == 3
    await upload.close()
    await other.close()


async def test_a_recovery_that_waits_for_a_book_ends_when_another_writer_has_the_shard(bench: Bench) -> None:
    book_id = await bench.book("X", free=2)
    upload = await asyncpg.connect(bench.url)
    transaction = upload.transaction()
    await transaction.start()
    await upload.execute("SELECT FROM books WHERE book_id = $1 FOR UPDATE", book_id)
    recovery_ = asyncio.create_task(bench.recover())
    await asyncio.sleep(0.5)
    other = await asyncpg.connect(bench.url)
    await other.execute("UPDATE shards SET owner = 'v', generation = generation + 1 WHERE shard = 0")
    with pytest.raises(NotOwner):
        await asyncio.wait_for(recovery_, 10)
    await transaction.rollback()
    await upload.close()
    await other.close()


async def test_a_settlement_that_ended_half_way_is_gone_on_with(bench: Bench) -> None:
    """The first recoverer could not tell whether something was lost. When the second comes all have reported, and the Redis
    before it has an event of that epoch which the first one's had not: neither changes what is to become of the codes."""
    done, left = [await bench.book(name, held=1, free=2, ack="redis") for name in ("H", "L")]
    begun = await epochs.begin_epoch(bench.ledger, "w", await bench.owned())
    verdict = await settling.end_live_epoch(bench.ledger, "w", begun, lost=True)
    assert await settle(bench, begun, verdict, done) == (0, 2)
    again = await epochs.begin_epoch(bench.ledger, "w", await bench.owned())
    assert (again.live_epoch, again.verdict) == (0, verdict)
    live = begun.live_epoch
    event = Event(live, 900, COUPON_ASSIGNED, left, "L-2", "late", 1)
    await late_events.take_late(bench.ledger, "w", again, live, [event])
    await bench.recover()
    rows = [await bench.row(book_id) for book_id in (done, left)]
    assert [(row["lent"], row["quarantined"]) for row in rows] == [(1, 2), (1, 2)]
    assert [await bench.counts(book_id) for book_id in (done, left)] == [(0, 1, 1)] * 2
    quarantined = await bench.ledger.fetch("SELECT epoch FROM quarantine")
    assert {row["epoch"] for row in quarantined} == {live}
    assert (await epochs.begin_epoch(bench.ledger, "w", await bench.owned())).verdict is None


# --- rebuilding


async def test_a_receipt_that_comes_in_the_middle_of_a_rebuild_makes_no_second_recovery(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    book_id = await bench.book("R", held=998, free=1, ack="redis")  # R-999 is the last by name
    begun = await epochs.begin_epoch(bench.ledger, "w", await bench.owned())
    await settle(bench, begun, await settling.end_live_epoch(bench.ledger, "w", begun, lost=True), book_id)
    honest = bench.store.restore_coupons
    came: list[bool] = []

    async def restore_coupons(*args: Any) -> None:
        if not came:
            came.append(True)
            other = await asyncpg.connect(bench.url)
            async with other.transaction():
                assert await redeem_receipt(other, 0, book_id, "R-999", Receipt("late", Position.parse("1-5000"), 1))
            await other.close()
        await honest(*args)

    monkeypatch.setattr(rebuild_source, "PAGE", 500)
    monkeypatch.setattr(bench.store, "restore_coupons", restore_coupons)
    await bench.recover()
    in_pool, held, lent = await bench.counts(book_id)
    assert came
    assert in_pool + held == lent
    assert held == 999


async def test_a_recovery_may_take_as_long_as_it_gets_on(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    book_id = await bench.book("S", held=2_000)
    honest = bench.store.restore_coupons

    async def slow(*args: Any) -> None:
        await asyncio.sleep(0.3)
        await honest(*args)

    monkeypatch.setattr(rebuild_source, "PAGE", 250)
    monkeypatch.setattr(recover_module, "STEP_TIMEOUT_S", 1.0)
    monkeypatch.setattr(bench.store, "restore_coupons", slow)
    began = time.monotonic()
    await bench.recover()
    assert time.monotonic() - began > 2.0, "it was to take longer than a step may"
    assert await bench.counts(book_id) == (0, 2_000, 2_000)


async def test_a_step_that_does_not_end_ends_the_recovery(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    await bench.book("S", held=20)
    monkeypatch.setattr(recover_module, "STEP_TIMEOUT_S", 1.0)
    other = await asyncpg.connect(bench.url)
    async with other.transaction():
        await other.execute("LOCK TABLE coupons IN ACCESS EXCLUSIVE MODE")
        with pytest.raises(LedgerUnavailable):
            await asyncio.wait_for(bench.recover(), 10)
    await other.close()


# --- bringing what may not have arrived


async def test_a_book_that_cannot_be_brought_again_now_stays_in_doubt_and_holds_up_no_other(bench: Bench) -> None:
    held_up, other = [await bench.book(name) for name in ("P", "Q")]
    await bench.recover()
    shard = Shard(await bench.owned())
    for book_id, name in ((held_up, "P"), (other, "Q")):  # as a commit whose reply was lost
        await bench.ledger.execute(
            "UPDATE books SET total = 2, lent = 2, leased_upto = 2, places_upto = 9 WHERE book_id = $1", book_id
        )
        await bench.ledger.execute(
            "INSERT INTO codes SELECT 1, $1 || '-' || n, $2, n FROM generate_series(1, 2) n", name, book_id
        )
    lender = Lender(bench.url, "w", bench.store, {0: shard}, 20, 20)
    upload = await asyncpg.connect(bench.url)
    transaction = upload.transaction()
    await transaction.start()
    await upload.execute("SELECT FROM books WHERE book_id = $1 FOR UPDATE", held_up)
    await lender.bring_outstanding_of_shard(bench.ledger, shard)
    assert [await bench.counts(book_id) for book_id in (held_up, other)] == [(0, 0, 0), (2, 0, 2)]
    await lender._bring_doubtful(bench.ledger)  # the shard is not open yet: the doubt stays
    await transaction.rollback()
    await upload.close()
    shard.opening_begins()
    shard.opened(await bench.store.connect())
    await lender._bring_doubtful(bench.ledger)
    assert await bench.counts(held_up) == (2, 0, 2)
    assert not lender._in_doubt


# --- all shards at once


async def test_a_process_that_does_not_report_is_waited_for_once_and_one_that_is_gone_not_at_all(bench: Bench) -> None:
    async def waited() -> float:
        began = time.monotonic()
        assert await bench.recoverer._wait_for_reports(bench.ledger, 0, 1) == 1
        return time.monotonic() - began

    add = "INSERT INTO api_processes (process_id, gone) VALUES ($1, $2)"
    await bench.ledger.execute(add, "gone", True)
    assert await waited() < 1.0
    await bench.ledger.execute("DELETE FROM api_processes")
    await bench.ledger.execute(add, "silent", False)
    assert await waited() >= recover_module.REPORTS_WAIT_S
    assert await waited() < 1.5
    await bench.ledger.execute("DELETE FROM api_processes")
    await bench.ledger.execute(add, "another", False)
    assert await waited() >= recover_module.REPORTS_WAIT_S


async def test_a_book_whose_row_is_held_keeps_no_other_shard_shut(
    make_stack: Callable[[], Awaitable[Stack]],
) -> None:
    stack = await make_stack()
    stack.writer()
    stack.api()
    await stack.ready()
    async with await stack.client() as http:
        answer = await http.post("/coupons", json={"name": "b", "generate": {"pattern": "########", "total": 5}})
        book_id = answer.json()["book_id"]
    shard = int(book_id[3:5])

    async def recovered() -> set[int]:
        rows = await stack.ledger("SELECT shard FROM shards WHERE certified_epoch >= 2")
        return {row["shard"] for row in rows}

    async def lent() -> bool:
        return bool(await stack.ledger("SELECT FROM books WHERE lent = total AND lent > 0"))

    await until(lent)
    upload = await asyncpg.connect(stack.database_url)
    transaction = upload.transaction()
    await transaction.start()
    await upload.execute("SELECT FROM books WHERE book_id = $1 FOR UPDATE", book_id)
    async with stack.redis() as redis:
        await redis.flushall()

    async def others() -> bool:
        return await recovered() >= set(range(stack.shards)) - {shard}

    await until(others, what="the other shards should be recovered")
    assert shard not in await recovered()
    await transaction.rollback()
    await upload.close()

    async def all_of_them() -> bool:
        return len(await recovered()) == stack.shards

    await until(all_of_them, what="the shard should be recovered once the row is free")


async def test_a_writer_keeps_up_its_shards_while_it_runs(
    make_stack: Callable[[], Awaitable[Stack]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep_module, "LOOK_EVERY_S", 0.1)
    stack, stop = await make_stack(), asyncio.Event()
    writer = Writer(load_settings(stack.environment))
    running = asyncio.create_task(writer.run(stop))

    async def marked() -> bool:
        assert not running.done()
        return len(await stack.ledger("SELECT FROM ledger_marks")) == stack.shards

    await until(marked)
    stop.set()
    await running


async def test_shards_do_not_wait_one_after_the_other_for_a_process_that_was_killed(
    tmp_path: Path, postgres_url: str
) -> None:
    async with running_stack(tmp_path, postgres_url, 10) as stack:
        async with await stack.client() as http:
            shards: set[str] = set()
            while len(shards) < stack.shards:
                rules = {"name": "b", "ack": "redis", "generate": {"pattern": "########", "total": 5}}
                answer = await http.post("/coupons", json=rules)
                assert answer.status_code == 201
                shards.add(answer.json()["book_id"][3:5])

        async def lent() -> bool:
            return not await stack.ledger("SELECT FROM books WHERE lent < total")

        await until(lent, 30)
        epochs = {row["shard"]: row["epoch"] for row in await stack.ledger("SELECT shard, epoch FROM shards")}
        api = stack.parts[-1]
        assert stack.redis_server is not None
        api.kill()
        stack.redis_server.kill()
        stack.redis_server.start()
        began = time.monotonic()

        async def certified() -> bool:
            rows = await stack.ledger("SELECT shard, certified_epoch FROM shards")
            return all(row["certified_epoch"] > epochs[row["shard"]] for row in rows)

        await until(certified, 60)
        took_s = time.monotonic() - began
        assert took_s < 15, "the shards have waited for the killed process one after the other"


async def test_a_report_has_a_bound_and_what_lies_above_it_counts_as_lost(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "ENTRIES_REPORTED_MAX", 2)
    entries = [
        entry_of(Event(1, seq, COUPON_ASSIGNED, "bk_00x", f"C-{seq}", "u", 1), tip=f"t{seq}") for seq in (1, 2, 3)
    ]
    await processes.report_seen(bench.ledger, "p", [Report(0, 1, 3, entries)])
    kept = await bench.ledger.fetch("SELECT seq FROM reported_entries ORDER BY seq")
    assert [row["seq"] for row in kept] == [1, 2]
    assert await bench.ledger.fetchval("SELECT seen_seq FROM api_reports") == 3, (
        "so the recovery knows that it lacks one"
    )
