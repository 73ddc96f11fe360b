"""The hash chain: whatever is done to rows of the ledger afterwards is found, and named by its position."""

from __future__ import annotations

import json
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import asyncpg
import pytest

from coupon_svc.domain.events import COUPON_ASSIGNED, COUPON_REDEEMED, Event
from coupon_svc.domain.position import Position
from coupon_svc.domain.receipts import Receipt
from coupon_svc.invariants.chains import Head, walk_history
from coupon_svc.invariants.ledger import LedgerCheck
from coupon_svc.postgres.draining import drain
from coupon_svc.postgres.epochs import begin_epoch, mark_certified
from coupon_svc.postgres.events import Batch, DeadLetter, commit_batches
from coupon_svc.postgres.late_events import note_late, redeem_receipt
from coupon_svc.postgres.marks import Mark
from coupon_svc.postgres.migrations import migrate
from coupon_svc.postgres.rebuild_source import idempotent_events
from coupon_svc.postgres.shards import owned_shards
from coupon_svc.resources import resource_folder
from tests.entries import batch_of, entry_of
from tests.forked import run_command
from tests.harness import Stack, fresh_database, until

OWNER = "wr_me"
AT_MS = 1_795_357_061_878


def assigned(seq: int, epoch: int = 1) -> Event:
    return Event(epoch, seq, COUPON_ASSIGNED, "bk_00x", f"CODE-{seq}", "ann", AT_MS, idem=f"key-{seq}", fingerprint="f")


def redeemed(seq: int, of: int) -> Event:
    return Event(1, seq, COUPON_REDEEMED, "bk_00x", f"CODE-{of}", "ann", AT_MS, 1, "till 3", '{"a": 1}')


@pytest.fixture
async def ledger(postgres_url: str) -> AsyncIterator[asyncpg.Connection]:
    """Positions 1-1 to 1-8 in two batches, 1-4 and 1-7 of them dead letters, and two late events of epoch 0: one of them
    recorded."""
    connection = await asyncpg.connect(await fresh_database(postgres_url, 1))
    await connection.execute("UPDATE shards SET epoch = 1, generation = 1, certified_epoch = 1, owner = $1", OWNER)
    events = [assigned(1), assigned(2), redeemed(3, 1), assigned(5), assigned(6), redeemed(8, 2)]
    dead = [DeadLetter(4, b'["a"]', "DataError", "bk_00x", "CODE-4"), DeadLetter(7, b"", "missing from the stream")]
    await write(connection, events[:3], dead[:1])
    await write(connection, events[3:], dead[1:])
    async with connection.transaction():
        await note_late(connection, 0, [(assigned(90, 0), True), (assigned(91, 0), False)])
    yield connection
    await connection.close()


async def write(
    ledger: asyncpg.Connection, events: list[Event], dead: list[DeadLetter] | tuple[DeadLetter, ...] = ()
) -> None:
    """Write what follows the ledger's position, as the writer does."""
    (owned,) = await owned_shards(ledger, OWNER)
    batch = batch_of(0, owned.epoch, owned.generation, owned.committed, events, dead, chain=owned.chain, tip=owned.tip)
    outcomes, _ = await commit_batches(ledger, OWNER, [batch])
    assert outcomes == {0: "moved"}


async def findings(ledger: asyncpg.Connection, earlier: Head | None = None) -> list[str]:
    return [what for what, _ in (await walk_history(ledger, 0, earlier)).findings]


async def test_what_nobody_touched_holds_and_says_where_it_ends(ledger: asyncpg.Connection) -> None:
    history = await walk_history(ledger, 0)
    assert history.findings == []
    assert (history.head.position, history.head.late_events, history.head.unhashed) == ("00:1-8", 2, 0)
    assert history.head.chain == (await ledger.fetchval("SELECT chain FROM shards")).hex()


SWAP = """
    UPDATE {table} SET seq = -seq WHERE seq IN ({a}, {b}); UPDATE {table} SET seq = {a} WHERE seq = -{b};
    UPDATE {table} SET seq = {b} WHERE seq = -{a};
"""
CHANGES = {
    **{f"{column} edited": (f"UPDATE entries SET {column} = {value} WHERE seq = 3 AND epoch = 1", "00:1-3")
       for column, value in {
           "events": "'[]'", "n": "2", "after": "'x'", "tip": "'x'", "at_ms": "at_ms + 1",
           "chain": "decode(repeat('ab', 32), 'hex')",
       }.items()},
    "moved to another epoch": ("UPDATE entries SET epoch = 2 WHERE seq = 3 AND epoch = 1", "00:1-4"),
    "the first removed": ("DELETE FROM entries WHERE seq = 1", "00:1-2"),
    "removed": ("DELETE FROM entries WHERE seq = 3", "00:1-4"),
    "the last removed": ("DELETE FROM entries WHERE seq = 8", "last hash of the positions"),
    "added between": (
        "INSERT INTO entries SELECT 0, 0, 5, n, after, tip, at_ms, keyed, events, chain FROM entries WHERE seq = 2",
        "00:0-5",
    ),
    "added at the end": (
        "INSERT INTO entries SELECT 0, 1, 9, n, after, tip, at_ms, keyed, events, chain FROM entries WHERE seq = 2",
        "00:1-9",
    ),
    "swapped": (SWAP.format(table="entries", a=5, b=6), "00:1-5"),
    "the head edited": ("UPDATE shards SET chain = decode(repeat('ab', 32), 'hex')", "last hash of the positions"),
    "a late event edited": ("UPDATE late_events SET user_id = 'thief' WHERE link = 1", "late event 1 "),
    "a late event recorded after all": ("UPDATE late_events SET recorded = true WHERE link = 2", "late event 2 "),
    "a late event removed": ("DELETE FROM late_events WHERE link = 1", "late event 2 "),
    "the last late event removed": ("DELETE FROM late_events WHERE link = 2", "last hash of the late events"),
    "a late event without its hash": ("UPDATE late_events SET chain = NULL WHERE link = 2", "carries no hash"),
    "late events swapped": (SWAP.format(table="late_events", a=90, b=91), "late event 1 "),
    "the head of late events edited": ("UPDATE late_heads SET chain = 'x'", "last hash of the late events"),
}  # fmt: skip


@pytest.mark.parametrize(("statement", "named"), CHANGES.values(), ids=CHANGES.keys())
async def test_a_change_is_found_and_named(ledger: asyncpg.Connection, statement: str, named: str) -> None:
    await ledger.execute(statement)
    assert named in (await findings(ledger))[0]


async def test_many_pages_are_one_chain(ledger: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coupon_svc.invariants.chains.PAGE", 2)
    assert await findings(ledger) == []
    await ledger.execute("UPDATE entries SET at_ms = 1 WHERE seq = 8")
    assert "00:1-8" in (await findings(ledger))[0]


async def test_history_that_was_written_anew_does_not_run_through_an_earlier_head(ledger: asyncpg.Connection) -> None:
    """Who may write to the ledger can compute the chain anew; not so the head that somebody else has kept."""
    earlier = (await walk_history(ledger, 0)).head
    await write(ledger, [assigned(9)])
    assert await findings(ledger, earlier) == []
    rows = await ledger.fetch("SELECT * FROM events WHERE epoch = 1 ORDER BY seq")
    forged = [Event(*(row[name] for name in Event._fields))._replace(user_id="thief") for row in rows]
    forged = [event._replace(seq=seq) for seq, event in enumerate(forged, 1)]
    await ledger.execute("TRUNCATE coupons, redemptions, entries, dead_letters")
    await ledger.execute("UPDATE shards SET committed = 0, chain = decode(repeat('00', 32), 'hex')")
    await write(ledger, forged)
    assert await findings(ledger) == [], "the forged chain fits by itself"
    assert "earlier report, that of 00:1-8" in (await findings(ledger, earlier))[0]


async def test_late_events_that_were_written_anew_do_not_run_through_an_earlier_head(
    ledger: asyncpg.Connection,
) -> None:
    earlier = (await walk_history(ledger, 0)).head
    await ledger.execute("TRUNCATE late_events, late_heads; DELETE FROM coupons")
    async with ledger.transaction():
        await note_late(ledger, 0, [(assigned(91, 0), False), (assigned(92, 0), True), (assigned(93, 0), False)])
    assert await findings(ledger) == [], "the forged chain fits by itself"
    assert "earlier report, that of late event 2" in (await findings(ledger, earlier))[0]


async def test_the_chain_goes_on_over_a_recovery_that_finds_holes_and_poison(ledger: asyncpg.Connection) -> None:
    (owned,) = await owned_shards(ledger, OWNER)
    begun = await begin_epoch(ledger, OWNER, owned)
    poison = assigned(12)._replace(user_id="nul \0")
    found = [assigned(8), assigned(10), poison, assigned(13)]  # 9 and 11 are missing
    found[0] = redeemed(8, 2)
    assert await drain(ledger, OWNER, begun, batch_of(0, 1, 0, 7, found)) == 13
    assert await ledger.fetchval("SELECT count(*) FROM dead_letters WHERE seq > 8") == 3
    again = await mark_certified(ledger, OWNER, begun)
    assert again == (await owned_shards(ledger, OWNER))[0]
    await write(ledger, [assigned(1, 2)._replace(code="CODE-99")])
    history = await walk_history(ledger, 0)
    assert (history.findings, history.head.position) == ([], "00:2-1")


async def test_a_recovery_that_finds_poison_keeps_the_keys_of_the_other_events(ledger: asyncpg.Connection) -> None:
    """Else a rebuild would not restore their records, and the same Idempotency-Key have a second effect."""
    (owned,) = await owned_shards(ledger, OWNER)
    begun = await begin_epoch(ledger, OWNER, owned)
    events = [assigned(9), assigned(10)._replace(user_id="nul \0")]
    found = Batch(0, 1, 0, 8, 10, [entry_of(*events, after=owned.tip, tip="t10")], events)
    assert await drain(ledger, OWNER, begun, found) == 10
    assert await ledger.fetchval("SELECT user_id FROM coupons WHERE code = 'CODE-9'") == "ann"
    page = await idempotent_events(ledger, 0, Mark(1, 8), 0)
    assert [(event.seq, event.idem) for event in page.events] == [(9, "key-9")]


async def test_a_note_of_a_dead_letter_is_no_row_of_the_chain(ledger: asyncpg.Connection) -> None:
    """Wherever it stands: before the first entry, at its beginning or its end."""
    (owned,) = await owned_shards(ledger, OWNER)
    begun = await begin_epoch(ledger, OWNER, owned)
    await ledger.execute("TRUNCATE entries, dead_letters, coupons, redemptions; UPDATE epochs SET seq = 0, tip = ''")
    await ledger.execute("UPDATE shards SET chain = decode(repeat('00', 32), 'hex')")
    events = [assigned(3)._replace(user_id="nul \0"), assigned(4), assigned(5)._replace(user_id="nul \0")]
    found = Batch(0, 1, 0, 2, 5, [entry_of(*events, after="lost", tip="t5")], events)
    assert await drain(ledger, OWNER, begun, found) == 5
    assert await ledger.fetchval("SELECT count(*) FROM dead_letters WHERE seq IN (1, 2, 3, 5)") == 4
    history = await walk_history(ledger, 0)
    assert (history.findings, history.head.unhashed) == ([], 0)
    for check in LedgerCheck:
        if "position" in check or "entry" in check:
            assert await ledger.fetchval(check.statement, 0) == 0, check


async def test_the_end_of_an_epoch_that_is_over_is_compared_with_its_entries(ledger: asyncpg.Connection) -> None:
    check = LedgerCheck.END.statement
    (owned,) = await owned_shards(ledger, OWNER)
    await begin_epoch(ledger, OWNER, owned)
    assert await ledger.fetchval(check, 0) == 0
    for edit in ("seq = seq + 1", "tip = 'another'"):
        async with ledger.transaction():
            await ledger.execute(f"UPDATE epochs SET {edit} WHERE epoch = 1")
            assert await ledger.fetchval(check, 0) == 1
            await ledger.execute(
                "UPDATE epochs SET seq = 8, tip = (SELECT tip FROM entries WHERE seq = 8) WHERE epoch = 1"
            )
            assert await ledger.fetchval(check, 0) == 0


async def test_a_receipt_for_a_dead_letter_leaves_it_in_the_chain(ledger: asyncpg.Connection) -> None:
    await ledger.execute(
        """
        INSERT INTO tenants (name) VALUES ('t');
        INSERT INTO books (book_id, shard, tenant_id, name, lock_ttl_seconds, ack, metadata, created_at_ms, total,
                           quarantined)
        SELECT 'bk_00x', 0, tenant_id, 'b', 60, 'redis', '{}', 0, 1, 1 FROM tenants;
        INSERT INTO codes SELECT tenant_id, 'CODE-4', 'bk_00x', -1 FROM tenants;
        INSERT INTO quarantine VALUES ('bk_00x', 'CODE-4', 0, 1)
        """
    )
    async with ledger.transaction():
        assert await redeem_receipt(ledger, 0, "bk_00x", "CODE-4", Receipt("ann", Position.parse("1-4"), AT_MS))
    history = await walk_history(ledger, 0)
    assert (history.findings, history.head.position, history.head.late_events) == ([], "00:1-8", 3)
    checks = (LedgerCheck.POSITIONS, LedgerCheck.LATE_EVENT)
    assert [await ledger.fetchval(check.statement, 0) for check in checks] == [0, 0]
    await ledger.execute("DELETE FROM entries WHERE seq = 5")
    assert [await ledger.fetchval(check.statement, 0) for check in checks] == [1, 0]


async def test_a_batch_behind_another_last_hash_is_not_taken(ledger: asyncpg.Connection) -> None:
    (owned,) = await owned_shards(ledger, OWNER)
    batch = batch_of(0, 1, 1, 8, [assigned(9)], chain=owned.chain)
    await ledger.execute("UPDATE shards SET chain = decode(repeat('ab', 32), 'hex')")
    assert (await commit_batches(ledger, OWNER, [batch]))[0] == {0: "edited"}
    moved = batch._replace(committed=7)  # another position says that it was somebody else's turn
    assert (await commit_batches(ledger, OWNER, [moved]))[0] == {0: "lost"}


async def test_rows_from_before_the_chain_are_counted_and_the_chain_begins_behind_them(
    postgres_url: str, tmp_path: Path
) -> None:
    connection = await asyncpg.connect(await fresh_database(postgres_url, 1))
    await connection.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    for path in resource_folder("sql").glob("000[1-4]*.sql"):
        (tmp_path / path.name).write_text(path.read_text())
    await migrate(connection, 1, tmp_path)
    await connection.execute(
        """
        UPDATE shards SET epoch = 1, generation = 1, certified_epoch = 1, committed = 2, owner = 'wr_me';
        INSERT INTO events SELECT 0, 1, i, 'coupon_assigned', 'bk_00x', 'OLD-' || i, 'ann', i FROM generate_series(1, 2) i;
        INSERT INTO late_events VALUES (0, 0, 7, 'coupon_assigned', 'bk_00x', 'OLD-7', 'ann', 7)
        """
    )
    assert (await migrate(connection, 1))[0] == "0005_hash_chain"
    assert (await walk_history(connection, 0)).head == Head(0, None, "00" * 32, 0, "00" * 32, 3)
    await write(connection, [assigned(3), assigned(4)])
    async with connection.transaction():
        await note_late(connection, 0, [(assigned(91, 0), False)])
    history = await walk_history(connection, 0)
    assert history.findings == []
    assert (history.head.position, history.head.late_events, history.head.unhashed) == ("00:1-4", 2, 3)
    await connection.execute("UPDATE entries SET at_ms = 1 WHERE seq = 3")
    assert "00:1-3" in (await findings(connection))[0]
    await connection.close()


def verify(stack: Stack, *options: str) -> subprocess.CompletedProcess[str]:
    return run_command("verify", *options, **stack.environment)


async def test_a_running_service_is_verified_against_earlier_heads_and_stops_at_a_head_that_was_edited(
    make_stack: Callable[[], Awaitable[Stack]], tmp_path: Path
) -> None:
    stack = await make_stack()
    stack.writer()
    stack.api()
    await stack.ready()
    kept, forged = tmp_path / "kept.json", tmp_path / "forged.json"
    async with await stack.client() as http:
        made = await http.post("/coupons", json={"name": "b", "generate": {"pattern": "H-########", "total": 20}})
        book_id = made.json()["book_id"]

        async def assign() -> int:
            return (await http.post("/coupons/assign", json={"book_id": book_id, "user_id": "ann"})).status_code

        assert await assign() == 201
        kept.write_text(verify(stack, "--json").stdout)
        assert await assign() == 201
        assert verify(stack, "--heads", str(kept)).returncode == 0
        heads = json.loads(kept.read_text())
        (head,) = [head for head in heads["heads"] if head["position"]]
        head["chain"] = head["chain"][::-1]
        forged.write_text(json.dumps(heads))
        refused = verify(stack, "--heads", str(forged))
        assert (refused.returncode, head["position"] in refused.stdout) == (1, True)
        forged.write_text("{}")
        assert verify(stack, "--heads", str(forged)).returncode == 2

        shard = int(book_id[3:5])
        await stack.ledger("UPDATE shards SET chain = sha256(chain) WHERE shard = $1", shard)
        await assign()

        async def stopped() -> object:
            (row,) = await stack.ledger("SELECT stopped FROM shards WHERE shard = $1", shard)
            return row["stopped"]

        assert "hash" in str(await until(stopped))
        assert await assign() == 503
    assert verify(stack).returncode == 1
