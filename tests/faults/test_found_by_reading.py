"""Histories that were found by reading, each of which went wrong once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import httpx
import pytest

from coupon_svc.dev.servers import EmbeddedRedis
from coupon_svc.domain.api_keys import ApiKey
from coupon_svc.domain.events import COUPON_ASSIGNED, Event
from coupon_svc.domain.outcomes import Outcome, Refused
from coupon_svc.domain.position import Position
from coupon_svc.domain.receipts import Receipt
from coupon_svc.http.auth import KeyRing
from coupon_svc.postgres import late_events, rebuild_source
from coupon_svc.postgres.epochs import NewEpoch
from coupon_svc.postgres.errors import LedgerUnavailable
from coupon_svc.postgres.late_events import redeem_receipt
from coupon_svc.postgres.lone_leases import lease_code
from coupon_svc.postgres.marks import Mark
from coupon_svc.postgres.shards import OwnedShard
from coupon_svc.redis.control import ShardControl, Term
from coupon_svc.redis.data_plane import DataPlane
from coupon_svc.redis.keys import ShardKeys
from coupon_svc.redis.scripts import Scripts
from coupon_svc.redis.shard_view import Certificate
from coupon_svc.service import registration as registration_module
from coupon_svc.service.durability import Durability
from coupon_svc.service.reading import Reading
from coupon_svc.service.registration import Registration
from tests.harness import Stack, fresh_database, until
from tests.http.helpers import make_book, refused

MakeStack = Callable[[], Awaitable[Stack]]
BOOK = "bk_000123456789abcdef"


@pytest.fixture
async def ledger(postgres_url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(await fresh_database(postgres_url, 1))
    yield connection
    await connection.close()


def nowhere(shards: int) -> DataPlane:
    return DataPlane("redis://127.0.0.1:1", shards, Scripts())


# --- what another installation's ledger holds


async def test_positions_of_another_installation_of_the_server_wake_nobody(plain_redis: EmbeddedRedis) -> None:
    """A channel is heard in all numbered databases of a server."""
    shard, shards = 95, 97  # no other test on this server has this number: shard 0 of 83 and of 89 are the same keys
    plane = DataPlane(plain_redis.url, shards, Scripts())
    owners = [
        ShardControl(plain_redis.url, shards, Scripts(), "inst-1"),
        ShardControl(plain_redis.url + "/1", shards, Scripts(), "inst-2"),
    ]
    term = Term(shard, epoch=1, generation=1)
    plane.join("inst-1")
    await plane.start()
    try:
        for owner in owners:
            await owner.shut_shard(term)
            await owner.certify_shard(term, await owner.connect(), 1000)

        async def heard() -> bool:
            await owners[0].tell_position(shard, 1, 5)
            return plane.waiters.committed(shard) == (1, 5)

        await until(heard)
        await owners[1].tell_position(shard, 1, 77)
        await asyncio.sleep(0.2)
        assert plane.waiters.committed(shard) == (1, 5)
    finally:
        await plane.stop()
        for owner in owners:
            owner.close()


# --- memory is out


async def test_a_shard_is_opened_while_there_is_no_memory_for_the_codes_it_was_lent(make_stack: MakeStack) -> None:
    """Redeems go on, and only its owner takes from the stream what fills the memory."""
    stack = await make_stack()
    writer = stack.writer(COUPON_LEASE_CODES_MIN="5", COUPON_LEASE_CODES_MAX="5")
    stack.api()
    await stack.ready()
    async with await stack.client() as http, stack.redis() as redis:
        book_id = await make_book(http, codes=[f"OUT-{number}" for number in range(50)])
        given = (await http.post("/coupons/assign", json={"book_id": book_id, "user_id": "u"})).json()["code"]
        await stack.drained()
        assert writer.stop() == 0
        rows = await stack.ledger(
            "SELECT codes.tenant_id, code FROM codes JOIN books USING (book_id) WHERE place > leased_upto LIMIT 1"
        )
        connection = await asyncpg.connect(stack.database_url)
        async with connection.transaction():  # lent, and not brought: as by a writer that found no memory
            await lease_code(connection, rows[0]["tenant_id"], book_id, rows[0]["code"])
        await connection.close()
        await redis.config_set("maxmemory", 1)
        stack.writer()

        async def redeemed() -> bool:
            answer = await http.post(f"/coupons/redeem/{given}", json={}, headers={"Idempotency-Key": "k"})
            assert answer.status_code in (201, 503), answer.text
            return answer.status_code == 201

        await until(redeemed, 15)
        answers = [await http.patch(f"/coupons/{book_id}", json={"status": status}) for status in ("paused", "active")]
        assert [answer.status_code for answer in answers] == [200, 200]
        await redis.config_set("maxmemory", 0)

        async def assigned() -> bool:
            path = f"/coupons/assign/{rows[0]['code']}"
            return (await http.post(path, json={"user_id": "v"})).status_code == 201

        await until(assigned, 15)


# --- somebody's hand


@pytest.mark.parametrize("entry_id", ["the epoch's last", "*", "of an epoch to come"])
async def test_an_entry_put_into_the_stream_by_hand_is_passed_over(make_stack: MakeStack, entry_id: str) -> None:
    """One with the time as its id is of an epoch that the ledger will never begin, and nothing may be sized by it."""
    stack = await make_stack()
    stack.writer()
    stack.api()
    await stack.ready()
    async with await stack.client() as http, stack.redis() as redis:
        book_id = await make_book(http)
        assert (await http.post("/coupons/assign", json={"book_id": book_id, "user_id": "u"})).status_code == 201
        await stack.drained()
        shard = int(book_id[3:5])
        keys = ShardKeys(shard, stack.shards)
        epoch = str(await redis.hget(keys.meta, "epoch"))
        ids = {"the epoch's last": f"{epoch}-{1 << 63}", "*": "*", "of an epoch to come": f"{int(epoch) + 1}-1"}
        await redis.xadd(keys.events, {"by": "hand"}, id=ids[entry_id])

        async def mended() -> bool:
            return await redis.hget(keys.meta, "epoch") not in (epoch, "recovering", None)

        await until(mended, 15, "the shard should be recovered before anybody stumbles over the entry")

        async def deals() -> bool:
            answer = await http.post("/coupons/assign", json={"book_id": book_id, "user_id": "u"})
            assert answer.status_code in (201, 503), answer.text
            return answer.status_code == 201

        await until(deals)
        await stack.drained()
        assert await stack.ledger("SELECT FROM dead_letters") == []
        assert await stack.ledger("SELECT FROM shards WHERE stopped IS NOT NULL OR epoch > 100") == []


# --- what is judged by what was read a moment ago


class Talk:
    """A connection to a server whose shard 0 has gone back, while shard 1 goes on at full speed."""

    def __init__(self, plane: DataPlane) -> None:
        self.plane = plane
        self.doubted: list[str] = []

    async def ask(self, *command: str) -> Any:
        if command[0] == "TIME":
            return ["1", "0"]
        return "redis_version:7.2.0\r\nrole:master\r\naof_enabled:1\r\nrun_id:r\r\nmaster_replid:p\r\nloading:0\r\n"

    def send(self, *command: Any) -> asyncio.Future[Any]:
        future = asyncio.get_running_loop().create_future()
        future.set_result(["i", "1", None, "1", "1-1", "2", "r", "p", "10", "t", "0", "100", "1000", "1000"])
        return future

    def submit(self, command: Any, on_reply: Any) -> None:
        if command[0] == "EVALSHA":
            self.doubted.append(command[3])
        self.plane.views[1].observe(1, 11)  # the reply to an assign came meanwhile


async def test_a_shard_that_goes_on_is_not_doubted_because_another_went_back() -> None:
    plane = nowhere(2)
    talk: Any = Talk(plane)
    plane.use(talk)
    plane.join("i")
    for view, seen_seq in zip(plane.views, (20, 10), strict=True):
        view.certify(Certificate(1, seen_seq, 0, 100), view.seen)
    await plane.verify(talk)
    assert talk.doubted == [plane.views[0].keys.meta]
    assert [view.is_open for view in plane.views] == [False, True]


class Replies:
    """A connection to a server whose next reply is known."""

    def __init__(self, *replies: Any) -> None:
        self.replies = list(replies)

    def submit(self, command: Any, on_reply: Callable[[Any], object], **_: bool) -> None:
        on_reply(self.replies.pop(0))

    def flush(self) -> None:
        """All was sent at once."""


async def test_a_list_is_not_durable_because_its_epoch_ended_while_it_was_waited_for() -> None:
    """The first coupon becomes durable, and before the list's turn comes Redis is in a new epoch, without the second."""
    plane = nowhere(1)
    view = plane.views[0]
    view.certify(Certificate(1, 0, 0, 100), view.seen)
    read = ["ok", "1000", "ledger", "1", ["1-1 0 1 u", "1-2 0 1 u"], [-2, -2], "active"]
    replies: Any = Replies([["ok", 2, "", [read]]])
    plane.use(replies)
    nothing: Any = None
    reading = Reading(plane, nothing, nothing, Durability(plane, 1_000))
    asked = asyncio.create_task(reading._read_codes(1, BOOK, ["A-1", "A-2"], time.monotonic()))
    await asyncio.sleep(0.01)
    assert view.seen == (1, 2), "it was observed before anything was waited for"
    plane.waiters.advance(0, 1, 1)
    view.certify(Certificate(2, 0, 0, 100), view.seen)
    plane.waiters.advance(0, 2, 0)
    with pytest.raises(Refused) as refusal:
        await asked
    assert refusal.value.outcome is Outcome.LEDGER_BEHIND


# --- clocks


async def test_a_revoked_key_is_refused_in_time_though_the_clock_was_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    row = ApiKey("key_1", 1, "t", frozenset(), "", None, False)

    async def find_key(_: bytes) -> ApiKey:
        return row

    ring = KeyRing(find_key, kept_ms=20)
    assert await ring.authenticate(b"Bearer k") is row
    row = row._replace(revoked=True)
    hour_ago = time.time_ns() - 3600 * 10**9
    monkeypatch.setattr(time, "time_ns", lambda: hour_ago)
    await asyncio.sleep(0.05)
    with pytest.raises(Refused):
        await ring.authenticate(b"Bearer k")


# --- what was seen, and what was lost


async def test_a_report_that_did_not_arrive_is_made_again(
    ledger: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the process counts as one that cannot be asked, and all codes that were lent as given away."""
    plane = nowhere(1)
    plane.views[0].certify(Certificate(3, 7, 0, 100), plane.views[0].seen)
    await ledger.execute("UPDATE shards SET epoch = 4, certified_epoch = 3")
    registration = Registration("", plane)

    async def fail(*_: Any) -> None:
        raise LedgerUnavailable("slow")

    monkeypatch.setattr(registration_module, "report_seen", fail)
    with pytest.raises(LedgerUnavailable):
        await registration._renew(ledger)
    monkeypatch.undo()
    await registration._renew(ledger)
    assert await ledger.fetchval("SELECT seen_seq FROM api_reports WHERE epoch = 3") == 7


async def lose(ledger: asyncpg.Connection, codes: list[str]) -> NewEpoch:
    """A book of an `ack = redis` book's lost codes, and a recovery of its shard that is under way in epoch 7."""
    await ledger.execute("INSERT INTO tenants (name) VALUES ('t')")
    await ledger.execute(
        "INSERT INTO books (book_id, shard, tenant_id, name, lock_ttl_seconds, ack, metadata, created_at_ms, total,"
        " quarantined) VALUES ($1, 0, 1, 'b', 60, 'redis', '{}', 1, $2, $2)",
        BOOK,
        len(codes),
    )
    for code in codes:
        await ledger.execute("INSERT INTO codes VALUES (1, $1, $2, -1)", code, BOOK)
        await ledger.execute("INSERT INTO quarantine (book_id, code, shard, epoch) VALUES ($1, $2, 0, 5)", BOOK, code)
    await ledger.execute(
        "UPDATE shards SET epoch = 7, owner = 'w', generation = 1, certified_epoch = 6, settled_epoch = 6"
    )
    return NewEpoch(OwnedShard(0, 7, 0, 1, bytes(32), ""), 0, False)


async def test_late_events_before_one_that_a_receipt_brought_back_are_taken_in(ledger: asyncpg.Connection) -> None:
    begun = await lose(ledger, ["A-1", "A-2"])
    async with ledger.transaction():
        assert await redeem_receipt(ledger, 0, BOOK, "A-2", Receipt("bob", Position.parse("5-2"), 1))
    late = [Event(5, seq, COUPON_ASSIGNED, BOOK, f"A-{seq}", user, 1) for seq, user in ((1, "ann"), (2, "bob"))]
    for _ in range(2):
        await late_events.take_late(ledger, "w", begun, 5, late)
    held = await ledger.fetch("SELECT code, user_id FROM coupons ORDER BY code")
    assert [tuple(row) for row in held] == [("A-1", "ann"), ("A-2", "bob")]
    assert await ledger.fetchval("SELECT count(*) FROM quarantine") == 0


async def test_a_key_answers_the_same_after_a_rebuild_though_an_older_record_came_back(
    ledger: asyncpg.Connection,
) -> None:
    for epoch, code in ((6, "NEW"), (5, "OLD")):  # the older one was lost, and came back late
        await ledger.execute(
            "INSERT INTO old_events (shard, epoch, seq, event, book_id, code, user_id, at_ms, idem, fingerprint)"
            " VALUES (0, $1, 1, 'coupon_assigned', $2, $3, 'u', 100, 'key', 'f')",
            epoch,
            BOOK,
            code,
        )
    await ledger.execute("SET enable_indexscan = off; SET enable_bitmapscan = off")  # as the planner may have it
    page = await rebuild_source.old_idempotent_events(ledger, 0, Mark(0, 0), 1)
    assert [event.code for event in page.events] == ["OLD", "NEW"], "the last one is the one that stays"


# --- odd requests


async def test_a_length_of_thousands_of_zeros_is_a_length(service: Stack, client: httpx.AsyncClient) -> None:
    parts = urlsplit(service.base_url)
    for path in ("/coupons", "/coupons/assign"):
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        head = f"POST {path} HTTP/1.1\r\nHost: h\r\nAuthorization: {client.headers['authorization']}\r\n"
        writer.write(f"{head}Content-Type: application/json\r\nContent-Length: {'0' * 5000}2\r\n\r\n{{}}".encode())
        assert (await asyncio.wait_for(reader.readline(), 5)).split()[1] == b"422"
        writer.close()


async def test_a_head_without_an_end_is_refused(service: Stack) -> None:
    parts = urlsplit(service.base_url)
    for start in (b"POST /coupons HTTP/1.1\r\nHost: h\r\nX: ", b"GET /"):
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        writer.write(start)
        for _ in range(20):
            if reader.at_eof() or reader._buffer:  # type: ignore[attr-defined]
                break
            writer.write(b"a" * 8_000)
            await asyncio.sleep(0.01)
        assert (await asyncio.wait_for(reader.readline(), 5)).split()[1] == b"400"
        writer.close()


async def test_what_follows_a_request_and_is_no_http_does_not_take_its_answer(
    service: Stack, client: httpx.AsyncClient
) -> None:
    book_id = await make_book(client)
    parts = urlsplit(service.base_url)
    body = f'{{"book_id": "{book_id}", "user_id": "u"}}'.encode()
    for path in (b"/coupons/assign", b"/coupons/assign?"):  # the fast path, and ASGI
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        head = f"Authorization: {client.headers['authorization']}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        head = b"POST %b HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n" % path + head
        writer.write(head + body + b"\x00 no HTTP\r\n\r\n")
        answer = await asyncio.wait_for(reader.read(), 5)
        assert answer.split()[1] == b"201"
        assert b"connection: close" in answer.lower()
        writer.close()


async def test_metadata_that_is_nested_too_deep_to_be_read_again_is_refused(client: httpx.AsyncClient) -> None:
    book_id = await make_book(client)
    for depth in (100, 900):
        metadata = '{{"metadata": {{"a": {}{}}}, "name": "n"}}'.format("[" * depth, "]" * depth)
        headers = {"Content-Type": "application/json"}
        refused(await client.post("/coupons", content=metadata, headers=headers), 422, "invalid_request")
        refused(await client.patch(f"/coupons/{book_id}", content=metadata, headers=headers), 422, "invalid_request")
    shallow = '{{"metadata": {{"a": {}{}}}}}'.format("[" * 98, "]" * 98)
    sent = await client.patch(f"/coupons/{book_id}", content=shallow, headers={"Content-Type": "application/json"})
    assert sent.status_code == 200
