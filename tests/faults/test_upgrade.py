"""A ledger and a Redis of the version before entries are taken over: nothing is lost, and what was hashed stays as it is."""

from __future__ import annotations

import shutil
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import asyncpg
import pytest
from redis.asyncio import Redis

from coupon_svc.config import load_settings
from coupon_svc.dev.servers import EmbeddedRedis
from coupon_svc.domain.chain import CHAIN_START, chain_hash
from coupon_svc.domain.events import COUPON_ASSIGNED, COUPON_REDEEMED, Event
from coupon_svc.domain.holding import Holding
from coupon_svc.domain.position import Position
from coupon_svc.invariants.stores import Verifier
from coupon_svc.postgres.database import open_connection
from coupon_svc.postgres.migrations import migrate
from coupon_svc.postgres.shards import owned_shards
from coupon_svc.redis.control import ShardControl, Term
from coupon_svc.redis.errors import ShardNotUsable
from coupon_svc.redis.keys import ShardKeys
from coupon_svc.redis.scripts import Scripts
from coupon_svc.resources import resource_folder
from coupon_svc.writer.recover import Recoverer
from tests.harness import fresh_database

SHARDS = 2
BOOK = "bk_000123456789abcdef"
NOW_MS = round(time.time() * 1000)


def assigned(seq: int, key: str | None = None) -> Event:
    return Event(1, seq, COUPON_ASSIGNED, BOOK, f"A-{seq}", f"u{seq}", NOW_MS, idem=key, fingerprint=key and "f")


COMMITTED = [assigned(1, "k1"), assigned(2), Event(1, 3, COUPON_REDEEMED, BOOK, "A-1", "u1", NOW_MS, 1, "till")]
UNDER_WAY = [assigned(4, "k4"), Event(1, 5, COUPON_REDEEMED, BOOK, "A-2", "u2", NOW_MS, 1, idem="k5", fingerprint="f")]
"""What the ledger has, and what only the stream has."""
HELD = {"A-1": ("u1", 1, 1), "A-2": ("u2", 2, 1), "A-4": ("u4", 4, 0)}
"""By code: who, since which seq, how many uses."""


class Older(NamedTuple):
    """Both stores as the version before left them; the ledger is migrated."""

    ledger: asyncpg.Connection
    url: str
    store: ShardControl
    redis: Any
    keys: ShardKeys
    chain: bytes
    """The hash of the last row."""

    async def recover(self) -> None:
        (owned,) = await owned_shards(self.ledger, "w")
        with pytest.raises(ShardNotUsable, match="format"):
            await self.store.open_shard(Term(0, owned.epoch, owned.generation), owned.committed, owned.tip, 1000)
        await Recoverer("w", self.store, 1000).recover(self.ledger, owned)


@pytest.fixture(scope="module")
def own_redis(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with EmbeddedRedis(tmp_path_factory.mktemp("older")) as server:
        yield server


@pytest.fixture
async def older(postgres_url: str, own_redis: EmbeddedRedis, tmp_path: Path) -> AsyncIterator[Older]:
    url = await fresh_database(postgres_url, SHARDS)
    ledger = await open_connection(url, "coupon-writer w")
    await ledger.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    for path in resource_folder("sql").glob("*.sql"):
        if path.name < "0012":
            shutil.copy(path, tmp_path)
    await migrate(ledger, SHARDS, tmp_path)
    chain = await fill_ledger(ledger)
    assert "0012_entries" in await migrate(ledger, SHARDS)
    installation = await ledger.fetchval("SELECT installation FROM settings")
    redis = Redis.from_url(own_redis.admin_url, decode_responses=True)
    await redis.flushall()
    store, keys = ShardControl(own_redis.url, SHARDS, Scripts(), installation), ShardKeys(0, SHARDS)
    await fill_redis(redis, keys, installation)
    yield Older(ledger, url, store, redis, keys, chain)
    store.close()
    ledger.terminate()
    await redis.aclose()


async def fill_ledger(ledger: asyncpg.Connection) -> bytes:
    """Returns the hash of the last row."""
    chain = CHAIN_START
    for event in COMMITTED:
        chain = chain_hash(chain, 0, 1, event.record)
        values = ", ".join(f"${number}" for number in range(1, 15))
        await ledger.execute(f"INSERT INTO events VALUES ({values})", 0, *event, chain)
    await ledger.execute("INSERT INTO tenants (name) VALUES ('t')")
    await ledger.execute(
        "INSERT INTO books (book_id, shard, tenant_id, name, lock_ttl_seconds, max_redemptions_per_code, ack, metadata,"
        " created_at_ms, total, lent, leased_upto, places_upto, loaded, loaded_version)"
        " VALUES ($1, 0, 1, 'b', 60, 3, 'ledger', '{}', 1, 6, 5, 5, 6, true, 1)",
        BOOK,
    )
    await ledger.execute("INSERT INTO codes SELECT 1, 'A-' || n, $1, n FROM generate_series(1, 6) n", BOOK)
    await ledger.execute(
        "INSERT INTO coupons VALUES ($1, 'A-1', 'u1', $2, 1, 1, 1), ($1, 'A-2', 'u2', $2, 0, 1, 2)", BOOK, NOW_MS
    )
    await ledger.execute("INSERT INTO redemptions VALUES ($1, 'A-1', 1, 'u1', $2, 'till', NULL, 1, 3)", BOOK, NOW_MS)
    await ledger.execute(
        "UPDATE shards SET epoch = 1, certified_epoch = 1, committed = 3, generation = 1, owner = 'w', chain = $1"
        " WHERE shard = 0",
        chain,
    )
    return chain


async def fill_redis(redis: Any, keys: ShardKeys, installation: str) -> None:
    info = await redis.info()
    await redis.hset(
        keys.meta,
        mapping={
            "installation": installation, "epoch": 1, "generation": 1, "recovery": "1-1", "run_id": info["run_id"],
            "replid": info["master_replid"], "seq": 5, "committed": 3, "backlog_max": 1000, "ledger_at_ms": NOW_MS,
            "owner_at_ms": NOW_MS,
        },
    )  # fmt: skip
    for event in (*COMMITTED, *UNDER_WAY):
        fields = {
            "event": event.event, "book": BOOK, "code": event.code, "user": event.user_id, "at_ms": event.at_ms,
            "idem": event.idem or "", "fingerprint": event.fingerprint or "",
        }  # fmt: skip
        if event.event == COUPON_REDEEMED:
            fields |= {"uses": event.uses, "reference": event.reference or "", "metadata": ""}
        await redis.xadd(keys.events, fields, id=f"1-{event.seq}")
    book = {"tenant_id": 1, "version": 1, "lent": 5, "redeemed": 0, "partly_redeemed": 2, "quarantined": 0}
    await redis.hset(keys.book(BOOK), mapping=book)
    for code, (user, seq, uses) in HELD.items():
        last = Position.parse(f"1-{seq}")
        await redis.hset(keys.holders(BOOK), code, Holding(last, last, uses, NOW_MS, user).format())
        await redis.zadd(keys.coupons(1, user), {f"{BOOK}:{code}": 0})
    await redis.zadd(keys.free(BOOK), {"A-3": 1, "A-5": 2})
    await redis.set(keys.lock(BOOK, "A-4"), "token", px=60_000)


@pytest.mark.parametrize("kept", [True, False])
async def test_what_the_version_before_left_is_taken_over(older: Older, kept: bool) -> None:
    ledger, redis, keys = older.ledger, older.redis, older.keys
    if not kept:
        await ledger.execute("UPDATE shards SET rebuild = true")
    await older.recover()

    names = ", ".join(Event._fields)
    rows = await ledger.fetch(f"SELECT {names} FROM events WHERE shard = 0 ORDER BY epoch, seq")
    assert [Event(*row) for row in rows] == [*COMMITTED, *UNDER_WAY]
    assert await ledger.fetchval("SELECT count(*) FROM old_events") == 3, "what was hashed stays as it is"
    assert await ledger.fetchval("SELECT count(*) FROM entries") == 2
    meta = await redis.hgetall(keys.meta)
    assert (meta["format"], meta["epoch"], meta["seq"], meta["tip"]) == ("2", "2", "0", "")
    assert "run_id" not in meta, "for the version before, the shard is not certified"
    held = await redis.hgetall(keys.holders(BOOK))
    assert {code: Holding.parse(text)[2:] for code, text in held.items()} == {
        code: (uses, NOW_MS, user) for code, (user, _, uses) in HELD.items()
    }
    assert bool(await redis.exists(keys.lock(BOOK, "A-4"))) is kept
    if not kept:
        for key in ("k1", "k4", "k5"):
            assert await redis.exists(keys.idem(1, BOOK, key)), key

    settings = load_settings(
        {"COUPON_DATABASE_URL": older.url, "COUPON_REDIS_URL": "redis://x", "COUPON_SHARDS": str(SHARDS)}
    )
    report = await Verifier(settings, ledger, redis, show_progress=False).verify()
    assert [finding for finding in report.findings if finding.shard == 0] == []
    assert report.heads[0].position == "00:1-5"


async def test_an_end_that_was_edited_before_the_upgrade_is_found_after_it(older: Older) -> None:
    await older.ledger.execute("UPDATE old_events SET user_id = 'thief' WHERE seq = 2")
    await older.redis.xdel(older.keys.events, "1-2")  # else the recovery sees it, and stops the shard
    await older.recover()
    settings = load_settings(
        {"COUPON_DATABASE_URL": older.url, "COUPON_REDIS_URL": "redis://x", "COUPON_SHARDS": str(SHARDS)}
    )
    report = await Verifier(settings, older.ledger, older.redis, show_progress=False).verify()
    assert any("the first is 00:1-2" in finding.what for finding in report.findings)
