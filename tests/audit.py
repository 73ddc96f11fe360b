"""Counts what Redis and Postgres hold, and compares it with itself, with each other, and with what callers were told.

Redis is read as an administrator reads it, the ledger by SQL: nothing here is the service's code, nor that of
`coupon_svc.invariants`, so an error of either is not made twice.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import asyncpg
import httpx
import msgspec

from tests.harness import Stack, until

UNKNOWN_STATUSES = frozenset({0, 500, 502, 504})


class Answer(NamedTuple):
    """What a caller saw of one call. `status` is 0 when the connection broke before an answer came."""

    verb: str
    path: str
    sent: dict[str, Any]
    idempotency_key: str | None
    status: int
    body: dict[str, Any]
    replayed: bool

    @property
    def ok(self) -> bool:
        return 200 <= self.status < 300

    @property
    def code(self) -> str:
        """The outcome's word; `ok`, or `unreachable` when no answer came."""
        return "ok" if self.ok else str(self.body.get("code", "unreachable"))

    @property
    def unknown(self) -> bool:
        """It may or may not have happened."""
        return self.status in UNKNOWN_STATUSES or self.code == "outcome_unknown"


class History:
    """An HTTP client that remembers every call and its answer."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self.client = client
        self.answers: list[Answer] = []

    async def post(self, path: str, body: dict[str, Any] | None = None, key: str | None = None) -> Answer:
        """POST, and remember what came of it. A broken connection is an answer with status 0."""
        sent = body or {}
        answer: dict[str, Any] = {}
        status, replayed = 0, False
        try:
            response = await self.client.post(path, json=sent, headers={"Idempotency-Key": key} if key else {})
            status = response.status_code
            answer = response.json() if response.content else {}
            replayed = response.headers.get("idempotent-replayed") == "true"
        except httpx.TransportError:
            pass
        record = Answer(
            path.split("/")[2] if path.count("/") > 1 else "books", path, sent, key, status, answer, replayed
        )
        self.answers.append(record)
        return record

    async def new_book(self, codes: Iterable[str] = (), **rules: Any) -> str:
        """Make a book with these codes and return its id."""
        made = await self.client.post("/coupons", json={"name": "book", **rules})
        assert made.status_code == 201, made.text
        book_id: str = made.json()["book_id"]
        listed = list(codes)
        if listed:
            added = await self.client.post("/coupons/codes", json={"book_id": book_id, "codes": listed})
            assert added.status_code == 200, added.text
            assert added.json()["inserted"] == len(listed)
        return book_id

    def assigned(self) -> list[Answer]:
        """Every assign that was answered with a code, replays included."""
        return [answer for answer in self.answers if answer.verb == "assign" and answer.ok]

    def redeemed(self) -> list[Answer]:
        return [answer for answer in self.answers if answer.verb == "redeem" and answer.ok]


class Holder(NamedTuple):
    """Who holds a code, and the position of what happened to it last."""

    last: tuple[int, int]
    uses: int
    at_ms: int
    user_id: str


class Redis(NamedTuple):
    """All that one Redis holds of the service."""

    metas: dict[int, dict[str, str]]
    books: dict[str, dict[str, str]]
    free: dict[str, set[str]]
    holders: dict[str, dict[str, Holder]]
    coupons: set[tuple[int, str, str, str]]
    """(tenant_id, user_id, book_id, code)"""
    locks: set[tuple[str, str]]
    streams: dict[int, list[tuple[str, dict[str, str]]]]


@asynccontextmanager
async def _one_connection(stack: Stack) -> AsyncIterator[Any]:
    """A connection for all that is asked: making one takes longer than most questions."""
    connection = await asyncpg.connect(stack.database_url)
    try:
        yield connection
    finally:
        await connection.close()


async def settled(stack: Stack, timeout: float = 20.0) -> None:
    """Wait until nothing is on its way any more: events, books, leases."""
    async with _one_connection(stack) as ledger:
        await _settled(stack, ledger, timeout)


async def _settled(stack: Stack, ledger: Any, timeout: float = 20.0) -> None:
    redis: Any = stack.redis()

    async def at_rest() -> bool:
        if await ledger.fetchval(
            "SELECT (SELECT count(*) FROM lone_leases) + (SELECT count(*) FROM books WHERE version > loaded_version)"
        ):
            return False
        prefixes = await _prefixes(redis)
        for row in await ledger.fetch("SELECT shard, committed FROM shards WHERE epoch > 0"):
            meta = await redis.hmget(prefixes.get(row["shard"], "") + "meta", ["seq", "committed"])
            if meta != [str(row["committed"])] * 2:
                return False
        books = await ledger.fetch("SELECT book_id, shard, lent, total FROM books")
        asked = redis.pipeline(transaction=False)
        for book in books:
            asked.hmget(f"{prefixes.get(book['shard'])}book:{book['book_id']}", ["lent", "unlent"])
        known = await asked.execute()
        return all(
            fields == [str(book["lent"]), str(book["total"] - book["lent"])]
            for book, fields in zip(books, known, strict=True)
        )

    try:
        await until(at_rest, timeout, "books, leases and positions should be the same in Redis and Postgres")
    finally:
        await redis.aclose()


async def read_redis(stack: Stack) -> Redis:
    """Everything under `cb:`; a key that nobody knows fails the audit."""
    seen = Redis({}, {}, {}, {}, set(), set(), {})
    redis: Any = stack.redis()
    try:
        async for key in redis.scan_iter("cb:*", count=1000):
            prefix = key[: key.index("}:") + 2]
            kind, _, rest = key[len(prefix) :].partition(":")
            if kind == "meta":
                seen.metas[_shard(key)] = await redis.hgetall(key)
            elif kind == "events":
                seen.streams[_shard(key)] = await redis.xrange(key)
            elif kind == "book":
                seen.books[rest] = await redis.hgetall(key)
            elif kind == "free":
                seen.free[rest] = set(await redis.zrange(key, 0, -1))
            elif kind == "holders":
                seen.holders[rest] = {code: _holder(value) for code, value in (await redis.hgetall(key)).items()}
            elif kind == "coupons":
                tenant_id, _, user_id = rest.partition(":")
                for member in await redis.zrange(key, 0, -1):
                    book_id, _, code = member.partition(":")
                    seen.coupons.add((int(tenant_id), user_id, book_id, code))
            elif kind == "lock":
                book_id, _, code = rest.partition(":")
                seen.locks.add((book_id, code))
            else:
                assert kind == "idem", f"nobody knows the key {key}"
    finally:
        await redis.aclose()
    return seen


async def _prefixes(redis: Any) -> dict[int, str]:
    """What the keys of each shard begin with, of those that have any."""
    return {_shard(key): key.removesuffix("meta") async for key in redis.scan_iter("cb:*}:meta")}


def _shard(key: str) -> int:
    """The number that a key's tag begins with: 7 of `cb:{07abc}:meta`."""
    return int(key.partition("{")[2][:2])


def _holder(value: str) -> Holder:
    """Of `4-1 0 1700000000000 ann`, or `4-1/4-17 1 1700000000000 ann` once it was redeemed."""
    positions, uses, at_ms, user_id = value.split(" ", 3)
    return Holder(_position(positions.rpartition("/")[2]), int(uses), int(at_ms), user_id)


def _position(text: str) -> tuple[int, int]:
    epoch, seq = text.split("-")
    return int(epoch), int(seq)


async def audit(stack: Stack, history: History | Iterable[Answer] | None = None) -> None:
    """Assert every invariant on a stack that is (or comes) to rest; with `history`, also what callers were told."""
    async with _one_connection(stack) as ledger:
        await _settled(stack, ledger)
        await _audit_ledger(ledger)
        await _audit_history_of_rows(ledger)
        redis = await _audit_books_at_rest(stack, ledger)
        await _audit_streams(ledger, redis)
        if history is not None:
            await _audit_history(ledger, history.answers if isinstance(history, History) else list(history))


async def _audit_books_at_rest(stack: Stack, ledger: Any) -> Any:
    """Audit the books, again while codes that were lent are still on their way. Returns what Redis held at last."""
    deadline = asyncio.get_running_loop().time() + 10
    while True:
        redis = await read_redis(stack)
        try:
            await _audit_books(ledger, redis, await _dead_codes(ledger))
            return redis
        except AssertionError:
            if asyncio.get_running_loop().time() >= deadline:
                raise
        await asyncio.sleep(0.3)


async def _dead_codes(ledger: Any) -> set[str]:
    """Every text in a dead letter: the code of an event that the ledger could not take is among them."""
    texts: set[str] = set()
    for row in await ledger.fetch("SELECT fields FROM dead_letters"):
        texts |= {part for part in json.loads(row["fields"]) if isinstance(part, str)}
    return texts


async def _nothing(ledger: Any, what: str, statement: str) -> None:
    rows = await ledger.fetch(statement)
    assert not rows, f"{what}: {[tuple(row) for row in rows[:5]]}"


async def _audit_ledger(ledger: Any) -> None:
    """The ledger agrees with itself: positions without a gap, projections that are what the events say."""
    await _nothing(
        ledger,
        "positions are not exactly 1..committed",
        """
        SELECT shards.shard, shards.epoch, committed, count(seq), min(seq), max(seq) FROM shards
        LEFT JOIN (SELECT shard, epoch, seq FROM events EXCEPT SELECT shard, epoch, seq FROM late_events WHERE recorded
                   UNION ALL SELECT shard, epoch, seq FROM dead_letters) e
             ON e.shard = shards.shard AND e.epoch = shards.epoch
        GROUP BY shards.shard, shards.epoch, committed
        HAVING count(seq) <> committed OR count(DISTINCT seq) <> committed
            OR (committed > 0 AND (min(seq), max(seq)) <> (1, committed))
        """,
    )
    await _nothing(
        ledger,
        "an older epoch has a gap",
        """
        SELECT shard, epoch, count(*), max(seq)
        FROM (SELECT shard, epoch, seq FROM events EXCEPT SELECT shard, epoch, seq FROM late_events WHERE recorded
              UNION ALL SELECT shard, epoch, seq FROM dead_letters) e
        GROUP BY shard, epoch HAVING count(DISTINCT seq) <> max(seq) OR count(*) <> max(seq) OR min(seq) <> 1
        """,
    )
    await _nothing(
        ledger,
        "coupons are not what the events say",
        """
        WITH told AS (
            SELECT book_id, code, user_id, at_ms, epoch, seq,
                   (SELECT count(*) FROM events r WHERE r.event = 'coupon_redeemed' AND r.book_id = a.book_id
                    AND r.code = a.code) AS uses
            FROM events a WHERE event = 'coupon_assigned'
        )
        (SELECT book_id, code, user_id, at_ms, epoch, seq, uses FROM told EXCEPT ALL
         SELECT book_id, code, user_id, assigned_at_ms, epoch, seq, uses FROM coupons)
        UNION ALL
        (SELECT book_id, code, user_id, assigned_at_ms, epoch, seq, uses FROM coupons EXCEPT ALL
         SELECT book_id, code, user_id, at_ms, epoch, seq, uses FROM told)
        """,
    )
    await _nothing(
        ledger,
        "redemptions are not what the events say",
        """
        (SELECT book_id, code, uses, user_id, at_ms, reference, metadata, epoch, seq FROM events
         WHERE event = 'coupon_redeemed' EXCEPT ALL
         SELECT book_id, code, uses, user_id, redeemed_at_ms, reference, metadata, epoch, seq FROM redemptions)
        UNION ALL
        (SELECT book_id, code, uses, user_id, redeemed_at_ms, reference, metadata, epoch, seq FROM redemptions EXCEPT ALL
         SELECT book_id, code, uses, user_id, at_ms, reference, metadata, epoch, seq FROM events
         WHERE event = 'coupon_redeemed')
        """,
    )
    await _nothing(
        ledger,
        "a use was spent by somebody who does not hold the code, or uses are not 1, 2, 3 …",
        """
        SELECT book_id, code, count(*), max(r.uses), bool_and(r.user_id = coupons.user_id)
        FROM redemptions r LEFT JOIN coupons USING (book_id, code) GROUP BY book_id, code
        HAVING NOT coalesce(bool_and(r.user_id = coupons.user_id), false) OR count(*) <> max(r.uses) OR min(r.uses) <> 1
        """,
    )
    await _nothing(
        ledger,
        "a limit is exceeded",
        """
        SELECT book_id, user_id, count(*) FROM coupons JOIN books USING (book_id)
        GROUP BY book_id, user_id, max_codes_per_user HAVING count(*) > max_codes_per_user
        UNION ALL
        SELECT book_id, code, uses FROM coupons JOIN books USING (book_id) WHERE uses > max_redemptions_per_code
        """,
    )
    await _nothing(
        ledger,
        "an event is of no code of its book",
        """
        SELECT e.book_id, e.code FROM events e JOIN books USING (book_id)
        LEFT JOIN codes ON codes.tenant_id = books.tenant_id AND codes.code = e.code AND codes.book_id = e.book_id
        WHERE codes.code IS NULL
        """,
    )
    await _nothing(
        ledger,
        "a book's counters are not what its codes say",
        """
        SELECT book_id, total, lent, count(code), count(code) FILTER (WHERE place <= leased_upto)
        FROM books LEFT JOIN codes USING (book_id) GROUP BY book_id
        HAVING count(code) <> total OR count(code) FILTER (WHERE place <= leased_upto) <> lent
        """,
    )
    await _nothing(
        ledger,
        "a code that was never lent is in somebody's hands",
        """
        SELECT book_id, code FROM coupons JOIN books USING (book_id) JOIN codes USING (tenant_id, code, book_id)
        WHERE place > leased_upto
        """,
    )


async def _audit_history_of_rows(ledger: Any) -> None:
    """Each entry carries the hash of itself and the one before it, and follows the one before it in its epoch."""
    record = (
        "jsonb_build_array(seq, event, book_id, code, user_id, at_ms, uses, reference, metadata, idem, fingerprint)"
    )
    for end in await ledger.fetch(
        "SELECT shard, s.chain, l.chain AS late FROM shards s LEFT JOIN late_heads l USING (shard)"
    ):
        last, tips = bytes(32), dict[int, tuple[int, str]]()
        for row in await ledger.fetch("SELECT * FROM entries WHERE shard = $1 ORDER BY epoch, seq", end["shard"]):
            what = [row[name] for name in ("seq", "n", "after", "tip", "at_ms", "events")]
            last = _hash(last, end["shard"], row["epoch"], what)
            at = f"{row['epoch']}-{row['seq']}"
            assert last == row["chain"], f"the entry at {at} is not as it was written"
            known_seq, known_tip = tips.get(row["epoch"], (0, ""))
            if row["seq"] - row["n"] == known_seq:
                assert row["after"] == known_tip, f"the entry at {at} does not follow the one before it"
            tips[row["epoch"]] = row["seq"], row["tip"]
        assert last == end["chain"], "the chain does not end where the shard says"
        last = bytes(32)
        late = await ledger.fetch(
            f"SELECT epoch, link, recorded, {record} AS event, chain FROM late_events WHERE shard = $1 ORDER BY link",
            end["shard"],
        )
        for row in late:
            last = _hash(last, end["shard"], row["epoch"], [row["link"], row["recorded"], json.loads(row["event"])])
            assert last == row["chain"], f"late event {row['link']} is not as it was written"
        assert last == (end["late"] or bytes(32)), "the chain of late events does not end where its head says"


def _hash(before: bytes, shard: int, epoch: int, what: list[Any]) -> bytes:
    return hashlib.blake2b(msgspec.msgpack.encode([before, shard, epoch, what]), digest_size=32).digest()


async def _audit_books(ledger: Any, redis: Redis, dead: set[str]) -> None:
    """Each code of each book is in one state, in Redis and in Postgres in the same one."""
    lent: dict[str, set[str]] = {}
    for row in await ledger.fetch(
        "SELECT book_id, code FROM codes JOIN books USING (book_id) WHERE place BETWEEN 0 AND leased_upto"
    ):
        lent.setdefault(row["book_id"], set()).add(row["code"])
    coupons: dict[str, dict[str, Holder]] = {}
    for row in await ledger.fetch(
        """
        SELECT book_id, code, coupons.uses, assigned_at_ms, user_id, last.epoch, last.seq
        FROM coupons JOIN (SELECT DISTINCT ON (book_id, code) book_id, code, epoch, seq FROM events
                           WHERE event <> 'coupon_confirmed'
                           ORDER BY book_id, code, epoch DESC, seq DESC) AS last USING (book_id, code)
        """
    ):
        holder = Holder((row["epoch"], row["seq"]), row["uses"], row["assigned_at_ms"], row["user_id"])
        coupons.setdefault(row["book_id"], {})[row["code"]] = holder
    books = await ledger.fetch("SELECT * FROM books")
    assert set(redis.books) == {book["book_id"] for book in books}, "Redis and Postgres know different books"
    for book in books:
        book_id = book["book_id"]
        fields, free, holders = redis.books[book_id], redis.free.get(book_id, set()), redis.holders.get(book_id, {})
        assert not free & set(holders), f"{book_id}: a code is in the pool and in somebody's hands"
        assert free | set(holders) == lent.get(book_id, set()), f"{book_id}: Redis does not have what it was lent"
        assert len(free) + len(holders) == int(fields["lent"]) == book["lent"]
        assert int(fields["total"]) == book["total"]
        assert int(fields["unlent"]) == book["total"] - book["lent"]
        assert (int(fields["version"]), fields["status"]) == (book["version"], book["status"])
        uses_max = book["max_redemptions_per_code"]
        spent = sum(uses_max is not None and holder.uses >= uses_max for holder in holders.values())
        assert int(fields["redeemed"]) == spent, f"{book_id}: the counter of redeemed codes is off"
        uses = sum(holder.uses for holder in holders.values())
        assert int(fields["partly_redeemed"]) == uses - spent, f"{book_id}: the counter of redemptions is off"
        known = coupons.get(book_id, {})
        for code in set(holders) ^ set(known):
            assert code in dead, f"{book_id}: {code} is held in one store only"
        for code in set(holders) & set(known):
            assert holders[code] == known[code] or code in dead, f"{code}: {holders[code]} is not {known[code]}"
        listed = {(user_id, code) for _, user_id, listed_in, code in redis.coupons if listed_in == book_id}
        assert listed == {(holder.user_id, code) for code, holder in holders.items()}, "a user's list is off"
        held = Counter(holder.user_id for holder in holders.values())
        most = book["max_codes_per_user"]
        assert most is None or max(held.values(), default=0) <= most, f"{book_id}: a user holds too many codes"
    for book_id, code in redis.locks:
        assert code in redis.holders[book_id], "a lock of a code that nobody holds"


async def _audit_streams(ledger: Any, redis: Redis) -> None:
    """What the streams still hold is what the ledger holds, without a gap."""
    rows = await ledger.fetch("SELECT shard, epoch, seq, event, book_id, code, user_id, at_ms, uses FROM events")
    events = {(row["shard"], row["epoch"], row["seq"]): row for row in rows}
    dead = {tuple(row) for row in await ledger.fetch("SELECT shard, epoch, seq FROM dead_letters")}
    for shard, entries in redis.streams.items():
        seqs: list[int] = []
        for entry_id, fields in entries:
            epoch, last = _position(entry_id)
            told = json.loads(fields["events"])
            first = last - int(fields["n"]) + 1
            for seq, (kind, book, code, user, _, _, *more) in enumerate(told, first):
                if (shard, epoch, seq) in dead:
                    continue
                row = events[shard, epoch, seq]
                kept = (row["event"], row["book_id"], row["code"], row["user_id"], str(row["at_ms"]), row["uses"])
                assert kept == (kind, book, code, user, fields["at_ms"], int(more[0]) if more else None)
            seqs += range(first, last + 1)
        assert seqs == list(range(seqs[0], seqs[-1] + 1)) if seqs else True, f"the stream of shard {shard} has a hole"
        assert not seqs or seqs[-1] == int(redis.metas[shard]["seq"])


async def _audit_history(ledger: Any, answers: list[Answer]) -> None:
    """Whatever was answered is in the ledger, once; and the ledger holds nothing that nobody asked for."""
    coupons = {(row["book_id"], row["code"]): row for row in await ledger.fetch("SELECT * FROM coupons")}
    rows = await ledger.fetch("SELECT * FROM events")
    events = {f"{row['shard']:02d}:{row['epoch']}-{row['seq']}": row for row in rows}
    assigned = [answer for answer in answers if answer.verb == "assign" and answer.ok]
    redeemed = [answer for answer in answers if answer.verb == "redeem" and answer.ok]
    owners: dict[tuple[str, str], str] = {}
    for answer in assigned:
        body = answer.body
        book_id, code, user_id = body["book_id"], body["code"], body["user_id"]
        assert user_id == answer.sent["user_id"], "an answer names another user than the one who asked"
        assert owners.setdefault((book_id, code), user_id) == user_id, f"{code} was answered to two users"
        assert (book_id, code) in coupons, f"{code} was answered and is not in the ledger"
        assert coupons[book_id, code]["user_id"] == user_id, f"{code} is another user's in the ledger"
        event = events[body["position"]]
        assert (event["book_id"], event["code"], event["user_id"]) == (book_id, code, user_id)
        if answer.status == 201:
            assert event["event"] == "coupon_assigned"
    for answer in redeemed:
        body = answer.body
        event = events[body["position"]]
        told = ("coupon_redeemed", body["book_id"], body["code"], body["user_id"], body["redemptions_used"])
        assert told == (event["event"], event["book_id"], event["code"], event["user_id"], event["uses"])
        assert answer.sent.get("reference") == event["reference"]
    _audit_keys(answers)
    _audit_once(assigned)
    _audit_once(redeemed)
    asked = {answer.body["book_id"] for answer in (*assigned, *redeemed)}
    asked |= {answer.sent["book_id"] for answer in answers if "book_id" in answer.sent}
    for verb, event_name, ok in (("assign", "coupon_assigned", assigned), ("redeem", "coupon_redeemed", redeemed)):
        told_positions = {answer.body["position"] for answer in ok if answer.status == 201}
        written = {
            position for position, row in events.items() if row["event"] == event_name and row["book_id"] in asked
        }
        unknown = sum(answer.unknown for answer in answers if answer.verb == verb)
        surplus = written - told_positions
        assert len(surplus) <= unknown, (
            f"{len(surplus)} {event_name} that nobody was told of, {unknown} unknown outcomes"
        )
        assert told_positions <= written


def _audit_keys(answers: list[Answer]) -> None:
    """One Idempotency-Key, one effect."""
    first: dict[tuple[str, str, str], Answer] = {}
    for answer in answers:
        if answer.idempotency_key is None or not answer.ok:
            continue
        scope = str(answer.sent.get("book_id") or answer.body.get("book_id") or "")
        known = first.setdefault((scope, answer.path, answer.idempotency_key), answer)
        changing = ("durable", "status", "codes")
        same = {name: value for name, value in answer.body.items() if name not in changing}
        before = {name: value for name, value in known.body.items() if name not in changing}
        assert same == before, "one Idempotency-Key was answered in two ways"


def _audit_once(answers: list[Answer]) -> None:
    """Two calls that are not replays of one another never share an event."""
    made = Counter(answer.body["position"] for answer in answers if answer.status == 201 and not answer.replayed)
    twice = {position for position, times in made.items() if times > 1}
    assert not twice, f"answered twice as new: {twice}"
