"""What the writer began in one epoch does nothing in the next: a recovery may come between any two of its steps."""

from __future__ import annotations

from collections.abc import AsyncIterator
from itertools import count
from typing import Any, NamedTuple

import asyncpg
import msgspec
import pytest

from coupon_svc.dev.servers import EmbeddedRedis
from coupon_svc.domain.events import COUPON_ASSIGNED, Event
from coupon_svc.postgres import lending
from coupon_svc.postgres.events import Batch
from coupon_svc.postgres.lending import BookNow, Lease
from coupon_svc.postgres.shards import OwnedShard
from coupon_svc.redis.control import CODES_PER_CALL_MAX, ShardControl
from coupon_svc.redis.errors import OutOfMemory, ShardNotUsable, StoreError
from coupon_svc.redis.keys import ShardKeys
from coupon_svc.redis.scripts import Scripts
from coupon_svc.writer.clock import LedgerClock
from coupon_svc.writer.lend import Lender
from coupon_svc.writer.persist import Persister
from coupon_svc.writer.shard import Shard, Shut, term_of
from tests.books import A_BOOK
from tests.entries import batch_of
from tests.harness import fresh_database
from tests.owned import recovered_shard
from tests.scripts.runner import new_rules

SHARDS = 64
NUMBERS = count()
CHAIN = bytes(32)


class Recovered(NamedTuple):
    """A shard that was recovered from `before` into the epoch that it is in now, with one book whose pool is empty."""

    store: ShardControl
    shard: Shard
    before: OwnedShard
    book_id: str


@pytest.fixture
async def recovered(cluster_redis: EmbeddedRedis) -> AsyncIterator[Recovered]:
    number = next(NUMBERS)
    store = ShardControl(cluster_redis.url, SHARDS, Scripts())
    before = OwnedShard(number, 1, 0, 3, CHAIN, "")
    after = before._replace(epoch=2)
    for owned in (before, after):
        term = term_of(owned)
        await store.shut_shard(term)
        await store.certify_shard(term, await store.connect(), 1000)
    shard = recovered_shard(before, after, await store.connect())
    book_id = f"bk_{number:02d}" + "m" * 16
    rules = {name: str(value) for name, value in new_rules().items()}
    await store.put_book(shard.term, book_id, 1, rules, known=False)
    yield Recovered(store, shard, before, book_id)
    store.close()


async def test_a_position_of_the_epoch_before_is_not_told_in_the_next(recovered: Recovered) -> None:
    """Else an event of the new epoch would pass for one that the ledger has."""
    store, shard, before, book_id = recovered
    assigned: list[str] = []
    persister = Persister(
        "", "wr", store, {before.shard: shard}, lambda _, book, number: assigned.append(book), LedgerClock()
    )
    event = Event(before.epoch, 1, COUPON_ASSIGNED, book_id, "A-1", "u", 1)
    old = batch_of(before.shard, before.epoch, before.generation, 0, [event])
    await persister._publish([(shard, old, b"x" * 32)])
    assert (shard.committed, shard.chain, assigned) == (0, CHAIN, [])
    assert (await store.read_meta(before.shard)).committed == 0


async def test_codes_that_were_lent_in_the_epoch_before_are_not_brought_in_the_next(recovered: Recovered) -> None:
    """The recovery has settled them: by now they may be lent anew, or in quarantine."""
    store, shard, before, book_id = recovered
    lender = Lender("", "wr", store, {before.shard: shard}, 20, 20)
    with pytest.raises(ShardNotUsable):
        await lender._bring(shard, before, book_id, Lease(["A-1"], 0), doubtful=False)
    assert await store.pool_counts(before.shard, book_id) == (0, 0, 0)
    assert await lender._bring(shard, shard.owned, book_id, Lease(["A-1"], 0), doubtful=False) == 1


async def test_a_changed_book_is_not_exhausted_while_a_code_is_on_its_way(
    recovered: Recovered, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last code was lent alone, and is not in the pool yet."""
    store, shard, before, book_id = recovered
    book = msgspec.structs.replace(A_BOOK, book_id=book_id, version=2, total=1, lent=1)

    async def read_book_now(*_: Any) -> BookNow:
        return BookNow(book, True, lone=1)

    async def unchanged(*_: Any, **__: Any) -> None: ...

    monkeypatch.setattr(lending, "read_book_now", read_book_now)
    monkeypatch.setattr(lending, "mark_loaded", unchanged)
    lender = Lender("", "wr", store, {before.shard: shard}, 20, 20)
    monkeypatch.setattr(lender, "_refill", unchanged)
    no_ledger: Any = None
    await lender._load_book(no_ledger, shard, book)
    assert await store._ask("HGET", ShardKeys(before.shard, SHARDS).book(book_id), "unlent") == "1"


async def test_a_book_is_not_exhausted_between_the_pieces_of_what_is_brought(
    recovered: Recovered, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, shard, before, book_id = recovered
    run, calls = store._own, count()

    async def run_once(*named: Any, **more: Any) -> Any:
        if next(calls) > 0:
            raise OutOfMemory
        return await run(*named, **more)

    monkeypatch.setattr(store, "_own", run_once)
    with pytest.raises(OutOfMemory):
        await store.load_codes(shard.term, book_id, [f"A-{no}" for no in range(CODES_PER_CALL_MAX + 7)], kept_back=2)
    assert await store._ask("HGET", ShardKeys(before.shard, SHARDS).book(book_id), "unlent") == "9"


async def test_work_that_a_recovery_overtook_does_not_shut_the_shard_again(recovered: Recovered) -> None:
    store, shard, before, _ = recovered
    lender = Lender("", "wr", store, {before.shard: shard}, 20, 20)

    async def refused() -> None:
        raise ShardNotUsable

    await lender._guarded(shard, before, refused())
    assert shard.is_open
    await lender._guarded(shard, shard.owned, refused())
    assert not shard.is_open
    assert shard.recovery_wanted


async def test_codes_are_counted_though_their_position_cannot_be_told(recovered: Recovered) -> None:
    """Else the pool would be thought fuller than it is, run dry, and never be refilled."""
    _, shard, before, book_id = recovered
    assigned: list[tuple[str, int]] = []
    away = ShardControl("redis://127.0.0.1:1", SHARDS, Scripts())
    persister = Persister(
        "", "wr", away, {before.shard: shard}, lambda _, book, number: assigned.append((book, number)), LedgerClock()
    )
    now = shard.owned
    event = Event(now.epoch, 1, COUPON_ASSIGNED, book_id, "A-1", "u", 1)
    batch = batch_of(now.shard, now.epoch, now.generation, 0, [event])
    with pytest.raises(StoreError):
        await persister._publish([(shard, batch, b"x" * 32)])
    assert (shard.committed, assigned) == (1, [(book_id, 1)])


async def test_a_shard_that_cannot_be_shut_when_it_is_stopped_is_shut_by_who_would_open_it(
    recovered: Recovered, postgres_url: str
) -> None:
    """Nothing else would look at it again, and callers be given codes of it."""
    _, shard, before, _ = recovered
    away = ShardControl("redis://127.0.0.1:1", SHARDS, Scripts())
    url = await fresh_database(postgres_url, SHARDS)
    persister = Persister(url, "wr", away, {before.shard: shard}, lambda *_: None, LedgerClock())
    connection = await asyncpg.connect(url)
    with pytest.raises(StoreError):
        await persister._stop(Batch(before.shard, before.epoch, before.generation, 0, 1, [], []), "forked")
    assert await connection.fetchval("SELECT stopped FROM shards WHERE shard = $1", before.shard) == "forked"
    assert shard.state == Shut()
    await connection.close()
    persister.session.close()


def test_what_a_process_can_have_seen_is_asked_anew_in_each_epoch() -> None:
    """Positions begin at 1 again: by the old one its report would come late, and a recovery before it take it for silent."""
    shard = Shard(OwnedShard(0, 1, 0, 3, CHAIN, ""))
    assert shard.answered_by_gone(["api_gone"], 5) == []
    shard.opening_begins()
    shard.recovery_begins("a test")
    shard.recovered(shard.owned._replace(epoch=2))
    assert shard.answered_by_gone(["api_gone"], 0) == [("api_gone", 0)]


async def test_more_books_than_one_write_may_hold_are_counted(recovered: Recovered) -> None:
    store, shard, _, book_id = recovered
    assert await store.lent_counts(shard.owned.shard, ["bk_none", *[book_id] * 20_001]) == [None, *[0] * 20_001]
