"""An entry of several events, one of which the ledger cannot take: what becomes of the others, and of other shards."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence

import asyncpg
import pytest

from coupon_svc.domain.events import (
    COUPON_ASSIGNED,
    COUPON_CONFIRMED,
    COUPON_REDEEMED,
    Entry,
    Event,
    MalformedEntry,
    parse_entry,
)
from coupon_svc.domain.position import Position
from coupon_svc.invariants.chains import walk_history
from coupon_svc.invariants.ledger import LedgerCheck
from coupon_svc.postgres.draining import drain
from coupon_svc.postgres.epochs import NewEpoch, begin_epoch
from coupon_svc.postgres.errors import HistoryForked
from coupon_svc.postgres.events import Batch
from coupon_svc.postgres.marks import Mark
from coupon_svc.postgres.rebuild_source import idempotent_events
from coupon_svc.postgres.shards import OwnedShard, owned_shards
from coupon_svc.redis.codec import StreamEntry
from coupon_svc.redis.control import LedgerSeen, Published, ShardControl
from coupon_svc.redis.errors import ShardNotUsable
from coupon_svc.redis.scripts import Scripts
from coupon_svc.redis.server import Identity
from coupon_svc.writer.clock import LedgerClock
from coupon_svc.writer.persist import Persister
from tests.entries import as_read, entry_of
from tests.harness import fresh_database
from tests.owned import open_shard

OWNER = "wr_me"
SHARDS = 2
ENTRY_CHECKS = (
    LedgerCheck.POSITIONS, LedgerCheck.ENTRY_BEFORE, LedgerCheck.EVENTS, LedgerCheck.END,
)  # fmt: skip
EVENTS = [
    Event(1, seq, COUPON_ASSIGNED, "bk_00x", f"CODE-{seq}", user, 5, idem=f"key-{seq}", fingerprint="f")
    for seq, user in enumerate(("ann", "nul \0", "bob"), 1)
]
POISONED = entry_of(*EVENTS, tip="t3")


@pytest.fixture
async def ledger(postgres_url: str) -> AsyncIterator[tuple[str, asyncpg.Connection]]:
    """Shards in epoch 1 of this owner, with nothing committed."""
    url = await fresh_database(postgres_url, SHARDS)
    connection = await asyncpg.connect(url)
    await connection.execute("UPDATE shards SET epoch = 1, generation = 1, certified_epoch = 1, owner = $1", OWNER)
    yield url, connection
    await connection.close()


class Silent(ShardControl):
    """A Redis that has one entry in each stream, and takes what it is told."""

    def __init__(self, *streams: Entry) -> None:
        super().__init__("redis://127.0.0.1:1", SHARDS, Scripts())
        self._streams = streams

    async def read_events(
        self, after: Mapping[int, Position], block_ms: int, count: int
    ) -> dict[int, list[StreamEntry]]:
        return {shard: [as_read(self._streams[shard])] for shard in after}

    async def publish_positions(
        self, published: Sequence[Published], ledger: LedgerSeen, ledger_ms: int | None = None
    ) -> list[int | ShardNotUsable]:
        return [one.committed for one in published]


async def owned_by_number(connection: asyncpg.Connection) -> dict[int, OwnedShard]:
    return {owned.shard: owned for owned in await owned_shards(connection, OWNER)}


async def begun(connection: asyncpg.Connection) -> NewEpoch:
    return await begin_epoch(connection, OWNER, (await owned_by_number(connection))[0])


def batch(*entries: Entry, events: list[Event]) -> Batch:
    return Batch(0, 1, 1, entries[0].before, entries[-1].seq, entries, events)


async def require_whole(connection: asyncpg.Connection) -> None:
    """The entry stands as it was in the stream; what Postgres cannot hold is a dead letter, and all else is recorded."""
    (row,) = await connection.fetch("SELECT seq, n, tip, keyed, events FROM entries WHERE shard = 0")
    assert tuple(row) == (3, 3, "t3", True, POISONED.body)
    dead = await connection.fetch("SELECT seq, book_id, code FROM dead_letters WHERE shard = 0")
    assert [tuple(one) for one in dead] == [(2, "bk_00x", "CODE-2")]
    coupons = await connection.fetch("SELECT code, user_id, seq FROM coupons WHERE book_id = 'bk_00x' ORDER BY seq")
    assert [tuple(one) for one in coupons] == [("CODE-1", "ann", 1), ("CODE-3", "bob", 3)]
    page = await idempotent_events(connection, 0, Mark(1, 0), 0)
    assert [(event.seq, event.idem) for event in page.events] == [(1, "key-1"), (3, "key-3")]


async def test_a_writer_records_the_other_events_of_the_entry_and_the_other_shards(
    ledger: tuple[str, asyncpg.Connection],
) -> None:
    url, connection = ledger
    here = Identity("run", "replid")
    shards = {number: open_shard(owned, here) for number, owned in (await owned_by_number(connection)).items()}
    other = entry_of(EVENTS[0]._replace(book_id="bk_01x"), tip="t1")
    persister = Persister(url, OWNER, Silent(POISONED, other), shards, lambda *_: None, LedgerClock())
    await persister.turn()
    persister.session.close()
    await require_whole(connection)
    assert await connection.fetchval("SELECT user_id FROM coupons WHERE book_id = 'bk_01x'") == "ann"
    rows = await connection.fetch("SELECT committed, tip FROM shards ORDER BY shard")
    assert [tuple(row) for row in rows] == [(3, "t3"), (1, "t1")]


async def test_a_recovery_records_the_other_events_and_their_keys(ledger: tuple[str, asyncpg.Connection]) -> None:
    """Else a rebuild restores no record for them, and the same Idempotency-Key has a second effect."""
    _, connection = ledger
    assert await drain(connection, OWNER, await begun(connection), batch(POISONED, events=EVENTS)) == 3
    await require_whole(connection)


async def test_the_other_events_are_seen_and_verify_has_nothing_to_find(
    ledger: tuple[str, asyncpg.Connection],
) -> None:
    _, connection = ledger
    await drain(connection, OWNER, await begun(connection), batch(POISONED, events=EVENTS))
    seen = await connection.fetch("SELECT seq, user_id FROM events WHERE shard = 0 ORDER BY seq")
    assert [tuple(row) for row in seen] == [(1, "ann"), (3, "bob")]
    for check in ENTRY_CHECKS:
        assert await connection.fetchval(check.statement, 0) == 0, check
    history = await walk_history(connection, 0)
    assert (history.findings, history.head.position, history.head.unhashed) == ([], "00:1-3", 0)


async def test_an_entry_that_is_drained_twice_is_recorded_once(ledger: tuple[str, asyncpg.Connection]) -> None:
    """A recovery may be killed behind any of its commits, and the next one begins at the first entry again."""
    _, connection = ledger
    recovery = await begun(connection)
    redeemed = Event(1, 4, COUPON_REDEEMED, "bk_00x", "CODE-1", "ann", 6, 1)
    both = batch(POISONED, entry_of(redeemed, after="t3", tip="t4"), events=[*EVENTS, redeemed])
    for _ in range(2):
        assert await drain(connection, OWNER, recovery, both) == 4
    assert await connection.fetchval("SELECT count(*) FROM entries") == 2
    assert await connection.fetchval("SELECT count(*) FROM dead_letters") == 1
    assert await connection.fetchval("SELECT uses FROM coupons WHERE code = 'CODE-1'") == 1


async def test_what_was_confirmed_behind_a_lost_event_is_a_dead_letter(
    ledger: tuple[str, asyncpg.Connection],
) -> None:
    """Its answer told of uses that the ledger does not have."""
    _, connection = ledger
    book, key = "bk_00x", {"idem": "k", "fingerprint": "f"}
    behind = [
        Event(1, 5, COUPON_CONFIRMED, book, "CODE-1", "ann", 6, 1, **key),
        Event(1, 6, COUPON_CONFIRMED, book, "LOST", "ann", 6, 0, **key),
        Event(1, 7, COUPON_CONFIRMED, book, "CODE-3", "bob", 6, 0, **key),
    ]  # 4 is missing: it redeemed CODE-1
    entries = batch(POISONED, entry_of(*behind, after="t4", tip="t7"), events=[*EVENTS, *behind])
    assert await drain(connection, OWNER, await begun(connection), entries) == 7
    dead = await connection.fetch("SELECT seq, reason FROM dead_letters WHERE seq > 3 ORDER BY seq")
    lost = "follows a lost event"
    assert [tuple(row) for row in dead] == [(4, "missing from the stream"), (5, lost), (6, lost)]
    page = await idempotent_events(connection, 0, Mark(1, 3), 0)
    assert page.events == [behind[2]]


@pytest.mark.parametrize("other", [POISONED._replace(tip="x"), entry_of(*EVENTS[:2], tip="t2")], ids=["tip", "end"])
async def test_another_entry_where_the_ledger_has_one_is_a_fork(
    ledger: tuple[str, asyncpg.Connection], other: Entry
) -> None:
    _, connection = ledger
    recovery = await begun(connection)
    await drain(connection, OWNER, recovery, batch(POISONED, events=EVENTS))
    with pytest.raises(HistoryForked, match="differs from the one in the ledger"):
        await drain(connection, OWNER, recovery, batch(other, events=EVENTS[: other.n]))


def test_a_tip_that_postgres_cannot_hold_is_malformed() -> None:
    """Else a single entry made by hand ends the commits of all shards, and those of its own for good."""
    raw = [b"n", b"1", b"after", b"", b"tip", b"nul \0", b"at_ms", b"1", b"events", POISONED.body]
    with pytest.raises(MalformedEntry):
        parse_entry(Position.parse("1-1"), raw)
