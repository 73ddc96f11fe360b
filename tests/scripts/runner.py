"""Runs the real scripts as the service does: keys by ShardKeys, sent by EVALSHA as the service's own Redis user.

Each Shard has a hash tag of its own, so tests on one server do not see each other.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NamedTuple, Self

from redis import Redis

from coupon_svc.dev.servers import EmbeddedRedis
from coupon_svc.domain.events import Event, parse_entry_id, parse_event
from coupon_svc.domain.shards import new_book_id
from coupon_svc.redis.keys import ShardKeys
from coupon_svc.redis.scripts import Scripts

Reply = list[Any]

EPOCH, GENERATION, TENANT = 4, 7, 1
RECOVERED = 5
"""The epoch that the recoveries of the tests make, unless they say otherwise."""
DAY_MS = 86_400_000
CHANNEL = "cb:positions"
INSTALLATION = "inst-1"
RUN_ID = "run-1"


class Caller(NamedTuple):
    """What an API process sends along with every request."""

    epoch: int = EPOCH
    seen_seq: int = 0
    tenant_id: int = TENANT
    idem: str = ""
    fingerprint: str = ""


def recovery(generation: int) -> str:
    """What the scripts of an owner's recovery show."""
    return f"{generation}-{RECOVERED}"


class Owner(NamedTuple):
    """What the owner of a shard sends along with everything it writes."""

    epoch: int = EPOCH
    generation: int = GENERATION


CALLER, OWNER, STRANGER = Caller(), Owner(), Caller(tenant_id=TENANT + 1)


class Server:
    """A Redis with all scripts loaded. `run` is the service's user, `admin` may do anything, `raw` sees bytes."""

    def __init__(self, embedded: EmbeddedRedis, scripts: Scripts) -> None:
        self.scripts = scripts
        self.run: Any = Redis.from_url(embedded.url, decode_responses=True)
        self.admin: Any = Redis.from_url(embedded.admin_url, decode_responses=True)
        self.raw: Any = Redis.from_url(embedded.admin_url)
        self.replid: str = self.run.info("replication")["master_replid"]

    def __enter__(self) -> Self:
        for script in self.scripts:
            assert self.run.script_load(script.source) == script.sha
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for client in (self.run, self.admin, self.raw):
            client.close()


class Shard:
    """One shard of one server. A method named after a script runs it and returns its reply."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.redis = server.admin
        self.keys = ShardKeys(0, 1, tag=secrets.token_hex(6))

    # --- the owner's scripts

    def open_shard(
        self,
        owner: Owner = OWNER,
        *,
        committed: int = 0,
        backlog_max: int = 1000,
        run_id: str = RUN_ID,
        replid: str = "",
        installation: str = INSTALLATION,
    ) -> Reply:
        certified = [run_id, replid or self.server.replid]
        return self._run("open_shard", [self.keys.meta], [*owner, *certified, backlog_max, committed, installation])

    def publish_position(
        self,
        committed: int,
        owner: Owner = OWNER,
        *,
        ledger: str = "committed",
        trim_seq: int = 0,
        message: str = "",
        entry: str = "",
        ledger_ms: int | str = "",
        run_id: str = RUN_ID,
        installation: str = INSTALLATION,
    ) -> Reply:
        keys = [self.keys.meta, self.keys.events]
        args = [*owner, committed, ledger, trim_seq, CHANNEL, message, entry, ledger_ms, run_id, installation]
        return self._run("publish_position", keys, args)

    def put_book(self, book_id: str, version: int, owner: Owner = OWNER, *, known: bool = False, **rules: Any) -> Reply:
        """`rules` are those that differ from an active book's without limits; for a known book only those are sent."""
        sent = rules if known else {**new_rules(), **rules}
        fields = [part for pair in sent.items() for part in pair]
        keys = [self.keys.meta, self.keys.book(book_id)]
        return self._run("put_book", keys, [*owner, version, "known" if known else "", *fields])

    def load_codes(
        self, book_id: str, codes: Sequence[str], owner: Owner = OWNER, *, unlent: int = 0, scores: Sequence[int] = ()
    ) -> Reply:
        """Without `scores` the codes are dealt in the order in which they are given."""
        keys = [self.keys.meta, self.keys.book(book_id), self.keys.free(book_id), self.keys.holders(book_id)]
        entries = [part for pair in zip(scores or range(len(codes)), codes, strict=True) for part in pair]
        return self._run("load_codes", keys, [*owner, unlent, *entries])

    # --- the scripts of a recovery

    def shut_shard(
        self, generation: int = GENERATION, epoch: int = RECOVERED, installation: str = INSTALLATION
    ) -> Reply:
        return self._run("shut_shard", [self.keys.meta], [generation, epoch, installation])

    def wipe_keys(self, doomed: Sequence[str], generation: int = GENERATION) -> Reply:
        return self._run("wipe_keys", [self.keys.meta, *doomed], [recovery(generation)])

    def restore_book(
        self, book_id: str, generation: int = GENERATION, *, quarantined: Sequence[str] = (), **fields: Any
    ) -> Reply:
        """`fields` are those that differ from an active book's without limits, coupons or codes."""
        counters = {"lent": 0, "redeemed": 0, "partly_redeemed": 0, "quarantined": len(quarantined)}
        sent = {**new_rules(), "version": 1, **counters, **fields}
        flat = [part for pair in sent.items() for part in pair]
        keys = [self.keys.meta, self.keys.book(book_id), self.keys.free(book_id), self.keys.quarantine(book_id)]
        return self._run("restore_book", keys, [recovery(generation), len(flat), *flat, *quarantined])

    def restore_quarantine(self, book_id: str, codes: Sequence[str], generation: int = GENERATION) -> Reply:
        """More codes than restore_book could take with the book itself."""
        keys = [self.keys.meta, self.keys.book(book_id), self.keys.free(book_id), self.keys.quarantine(book_id)]
        return self._run("restore_book", keys, [recovery(generation), 0, *codes])

    def restore_coupons(
        self, book_id: str, coupons: Mapping[str, str], generation: int = GENERATION, tenant_id: int = TENANT
    ) -> Reply:
        """`coupons` are codes and their `position uses at_ms user`."""
        users = [self.keys.coupons(tenant_id, user_of(holder)) for holder in coupons.values()]
        flat = [part for pair in coupons.items() for part in pair]
        keys = [self.keys.meta, self.keys.holders(book_id), *users]
        return self._run("restore_coupons", keys, [recovery(generation), book_id, *flat])

    def restore_idem(self, book_id: str, records: Mapping[str, tuple[str, int]], generation: int = GENERATION) -> Reply:
        """`records` are Idempotency-Keys, each with its record and the milliseconds that it has left."""
        keys = [self.keys.meta, *(self.idem_key(book_id, idem) for idem in records)]
        return self._run(
            "restore_idem", keys, [recovery(generation), *(part for record in records.values() for part in record)]
        )

    def certify_shard(
        self, owner: Owner = OWNER, *, run_id: str = RUN_ID, replid: str = "", backlog_max: int = 1000
    ) -> Reply:
        keys = [self.keys.meta, self.keys.events]
        certified = [run_id, replid or self.server.replid]
        return self._run("certify_shard", keys, [recovery(owner.generation), owner.epoch, *certified, backlog_max])

    # --- the API's scripts

    def doubt_shard(self, caller: Caller = CALLER) -> Reply:
        return self._run("doubt_shard", [self.keys.meta], caller[:2])

    def release_coupon(self, book_id: str, code: str, holder: str, caller: Caller = CALLER) -> Reply:
        """`holder` is `position uses at_ms user`."""
        keys = [
            self.keys.meta,
            self.keys.book(book_id),
            self.keys.quarantine(book_id),
            self.keys.holders(book_id),
            self.keys.coupons(caller.tenant_id, user_of(holder)),
        ]
        return self._run("release_coupon", keys, [*caller[:3], book_id, code, holder])

    def assign_coupon(self, book_id: str, user_id: str, caller: Caller = CALLER) -> Reply:
        keys = [*self._assign_keys(book_id, user_id, caller), *self._idem_keys(book_id, caller)]
        return self._run("assign_coupon", keys, self._assign_args(book_id, user_id, caller))

    def assign_code(self, book_id: str, user_id: str, code: str, caller: Caller = CALLER) -> Reply:
        keys = [
            *self._assign_keys(book_id, user_id, caller),
            self.keys.quarantine(book_id),
            *self._idem_keys(book_id, caller),
        ]
        return self._run("assign_code", keys, [*self._assign_args(book_id, user_id, caller), code])

    def lock_coupon(
        self,
        book_id: str,
        code: str,
        caller: Caller = CALLER,
        *,
        user_id: str = "",
        token: str = "",
        new_token: str = "new",
        ttl_ms: int | str = "",
    ) -> Reply:
        keys = [
            self.keys.meta,
            self.keys.book(book_id),
            self.keys.holders(book_id),
            self.keys.lock(book_id, code),
            self.keys.free(book_id),
            self.keys.quarantine(book_id),
            *self._idem_keys(book_id, caller),
        ]
        args = [*caller[:3], code, user_id, token, new_token, ttl_ms, caller.fingerprint]
        return self._run("lock_coupon", keys, args)

    def unlock_coupon(self, book_id: str, code: str, token: str, caller: Caller = CALLER) -> Reply:
        keys = [
            self.keys.meta,
            self.keys.book(book_id),
            self.keys.lock(book_id, code),
            *self._idem_keys(book_id, caller),
        ]
        return self._run("unlock_coupon", keys, [*caller[:3], token, caller.fingerprint])

    def redeem_coupon(
        self,
        book_id: str,
        code: str,
        caller: Caller = CALLER,
        *,
        user_id: str = "",
        token: str = "",
        reference: str = "",
        metadata: str = "",
    ) -> Reply:
        keys = [
            self.keys.meta,
            self.keys.book(book_id),
            self.keys.holders(book_id),
            self.keys.lock(book_id, code),
            self.keys.free(book_id),
            self.keys.events,
            self.keys.quarantine(book_id),
            *self._idem_keys(book_id, caller),
        ]
        args = [*caller[:3], code, user_id, token, book_id, reference, metadata, caller.idem, caller.fingerprint]
        return self._run("redeem_coupon", keys, args)

    def read_book(self, book_id: str, caller: Caller = CALLER) -> Reply:
        keys = [self.keys.meta, self.keys.book(book_id), self.keys.holders(book_id), self.keys.free(book_id)]
        return self._run("read_book", keys, caller[:3])

    def read_codes(self, book_id: str, codes: Sequence[str], caller: Caller = CALLER) -> Reply:
        locks = [self.keys.lock(book_id, code) for code in codes]
        keys = [
            self.keys.meta,
            self.keys.book(book_id),
            self.keys.holders(book_id),
            self.keys.free(book_id),
            self.keys.quarantine(book_id),
            *locks,
        ]
        return self._run("read_codes", keys, [*caller[:3], *codes])

    def list_coupons(
        self, user_id: str, caller: Caller = CALLER, *, low: str = "-", high: str = "+", limit: int = 100
    ) -> Reply:
        keys = [self.keys.meta, self.keys.coupons(caller.tenant_id, user_id)]
        return self._run("list_coupons", keys, [*caller[:2], low, high, limit])

    def _assign_keys(self, book_id: str, user_id: str, caller: Caller) -> list[str]:
        return [
            self.keys.meta,
            self.keys.book(book_id),
            self.keys.free(book_id),
            self.keys.holders(book_id),
            self.keys.coupons(caller.tenant_id, user_id),
            self.keys.events,
        ]

    def _assign_args(self, book_id: str, user_id: str, caller: Caller) -> list[str | int]:
        return [*caller[:3], book_id, user_id, caller.idem, caller.fingerprint]

    def _idem_keys(self, book_id: str, caller: Caller) -> list[str]:
        return [self.keys.idem(caller.tenant_id, book_id, caller.idem)] if caller.idem else []

    def _run(self, name: str, keys: Sequence[str], args: Sequence[Any]) -> Reply:
        reply: Reply = self.server.run.evalsha(self.server.scripts[name].sha, len(keys), *keys, *args)
        return reply

    # --- what the tests prepare

    def certify(self, owner: Owner = OWNER, *, backlog_max: int = 1000) -> None:
        """As at the end of every recovery. The ledger is at hand then, however slow the test is."""
        assert self.shut_shard(owner.generation) == ["ok"]
        assert self.certify_shard(owner, backlog_max=backlog_max) == ["ok"]
        self.keep_ledger_at_hand()

    def new_book(self, *codes: str, unlent: int = 0, **rules: Any) -> str:
        """A book with these codes in its pool, dealt in this order. Returns its id."""
        book_id = new_book_id(1)
        assert self.put_book(book_id, 1, total=len(codes) + unlent, unlent=unlent, **rules) == ["ok"]
        assert self.load_codes(book_id, codes, unlent=unlent) == ["ok", len(codes), len(codes)]
        return book_id

    def assigned(self, code: str = "A-1", user_id: str = "u", **rules: Any) -> str:
        """A book whose only code is assigned to the user. Returns its id."""
        book_id = self.new_book(code, **rules)
        assert self.assign_coupon(book_id, user_id)[0] == "ok"
        return book_id

    def quarantine(self, book_id: str, *codes: str) -> None:
        """Codes that are in nobody's hands, as a recovery leaves them."""
        self.redis.sadd(self.keys.quarantine(book_id), *codes)
        self.redis.hincrby(self.keys.book(book_id), "quarantined", len(codes))

    def idem_key(self, book_id: str, idem: str) -> str:
        """The key of a record that a caller of TENANT left."""
        return self.keys.idem(TENANT, book_id, idem)

    def set_rule(self, book_id: str, **rules: Any) -> None:
        """Change a book in place, with no regard for versions: also what only a tamperer could."""
        self.redis.hset(self.keys.book(book_id), mapping=rules)

    def set_meta(self, **fields: str | int) -> None:
        self.redis.hset(self.keys.meta, mapping=fields)

    def keep_ledger_at_hand(self) -> None:
        """As if the ledger were seen half a minute from now: a slow test is no ledger that is away."""
        self.set_meta(ledger_at_ms=self.now_ms() + 30_000)

    def remember(self, book_id: str, idem: str, *answer: str) -> None:
        """What an earlier request with this Idempotency-Key left: its fingerprint and its answer."""
        texts = ",".join(f'"{text}"' for text in answer)
        self.redis.set(self.idem_key(book_id, idem), f"[{texts}]", px=DAY_MS)

    def hide(self, key: str) -> Callable[[], Any]:
        """Take a key away; what is returned brings it back."""
        self.redis.rename(key, key + ".hidden")
        return lambda: self.redis.rename(key + ".hidden", key)

    # --- what the tests look at

    def now_ms(self) -> int:
        seconds, micros = self.redis.time()
        return int(seconds) * 1000 + int(micros) // 1000

    def meta(self) -> dict[str, str]:
        fields: dict[str, str] = self.redis.hgetall(self.keys.meta)
        return fields

    def book(self, book_id: str) -> dict[str, str]:
        fields: dict[str, str] = self.redis.hgetall(self.keys.book(book_id))
        return fields

    def free(self, book_id: str) -> list[str]:
        """The pool, the code that is dealt next first."""
        codes: list[str] = self.redis.zrange(self.keys.free(book_id), 0, -1)
        return codes

    def holders(self, book_id: str) -> dict[str, str]:
        fields: dict[str, str] = self.redis.hgetall(self.keys.holders(book_id))
        return fields

    def quarantined(self, book_id: str) -> set[str]:
        codes: set[str] = self.redis.smembers(self.keys.quarantine(book_id))
        return codes

    def coupons(self, user_id: str, tenant_id: int = TENANT) -> list[str]:
        members: list[str] = self.redis.zrange(self.keys.coupons(tenant_id, user_id), 0, -1)
        return members

    def entries(self) -> list[tuple[str, dict[str, str]]]:
        """The stream as it is: ids and fields."""
        found: list[tuple[str, dict[str, str]]] = self.redis.xrange(self.keys.events)
        return found

    def events(self) -> list[Event]:
        """The stream as the ledger reads it."""
        parsed = []
        for entry_id, fields in self.entries():
            epoch, seq = parse_entry_id(entry_id)
            assert epoch == EPOCH
            parsed.append(parse_event(seq, [part for pair in fields.items() for part in pair]))
        return parsed

    def snapshot(self) -> dict[str, tuple[bytes, int]]:
        """Every key of the shard: what it holds, and when it ends (-1: never)."""
        raw = self.server.raw
        names = list(raw.scan_iter(self.keys.prefix + "*", count=10_000))
        pipeline = raw.pipeline(transaction=False)
        for name in names:
            pipeline.dump(name)
            pipeline.pexpiretime(name)
        values = pipeline.execute()
        start = len(self.keys.prefix)
        rows = zip(names, values[::2], values[1::2], strict=True)
        return {name.decode()[start:]: (dump, ends_at) for name, dump, ends_at in rows}

    @contextmanager
    def writes(self, *names: str) -> Iterator[None]:
        """Exactly these keys (as they are called after the tag) are made, changed or removed in the block."""
        before = self.snapshot()
        yield
        after = self.snapshot()
        changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
        assert changed == set(names)

    def writes_nothing(self) -> Any:
        """Not one key differs after the block."""
        return self.writes()


def user_of(holder: str) -> str:
    """Whose a coupon is, from its `position uses at_ms user`."""
    return holder.split(" ", 3)[3]


def new_rules() -> dict[str, str | int]:
    """An active book of TENANT without limits, as put_book takes it."""
    return {
        "tenant_id": TENANT,
        "status": "active",
        "starts_at_ms": "",
        "expires_at_ms": "",
        "ack": "ledger",
        "max_redemptions_per_code": "1",
        "max_codes_per_user": "",
        "lock_ttl_ms": 120_000,
        "total": 0,
        "unlent": 0,
        "stored": "{}",
    }


class Obstacle(NamedTuple):
    """A reason to be refused, and how it is taken away. `writes` are keys that this reply writes all the same."""

    reply: str
    remove: Callable[[], Any]
    writes: tuple[str, ...] = ()


def peel(shard: Shard, ask: Callable[[], Reply], obstacles: Sequence[Obstacle]) -> Reply:
    """With every obstacle in place, the first one decides; take it away and the next one does. Returns the last reply.

    So each refusal is tried against all that come after it, and none of them writes.
    """
    for obstacle in obstacles:
        with shard.writes(*obstacle.writes):
            assert ask()[0] == obstacle.reply
        obstacle.remove()
    return ask()


def book_is_shut(shard: Shard, book_id: str) -> list[Obstacle]:
    """Put up all reasons for which a book refuses, in their order."""
    hour_ms, now_ms = 3_600_000, shard.now_ms()
    shard.set_rule(book_id, status="closed", starts_at_ms=now_ms + hour_ms, expires_at_ms=now_ms - hour_ms)
    return [
        Obstacle("book_closed", lambda: shard.set_rule(book_id, status="paused")),
        Obstacle("book_paused", lambda: shard.set_rule(book_id, status="active")),
        Obstacle("book_not_started", lambda: shard.set_rule(book_id, starts_at_ms=now_ms - hour_ms)),
        Obstacle("book_expired", lambda: shard.set_rule(book_id, expires_at_ms=now_ms + hour_ms)),
    ]


def seen_before(shard: Shard, book_id: str, caller: Caller, *answer: str) -> list[Obstacle]:
    """Put up what is judged before the book: an epoch of its own, and an Idempotency-Key that was used."""
    shard.set_meta(epoch=EPOCH + 1)
    shard.remember(book_id, caller.idem, caller.fingerprint, *answer)
    return [
        Obstacle("suspect", lambda: shard.set_meta(epoch=EPOCH)),
        Obstacle("replayed", lambda: shard.remember(book_id, caller.idem, "another", *answer)),
        Obstacle("idempotency_key_reused", lambda: shard.redis.delete(shard.idem_key(book_id, caller.idem))),
    ]


def book_is_unknown(shard: Shard, book_id: str) -> list[Obstacle]:
    """Put up that the book is another tenant's, and that it is not here."""
    shard.set_rule(book_id, tenant_id=TENANT + 1)
    bring_back = shard.hide(shard.keys.book(book_id))
    return [
        Obstacle("book_not_loaded", bring_back),
        Obstacle("book_not_found", lambda: shard.set_rule(book_id, tenant_id=TENANT)),
    ]


def no_room(shard: Shard, *, ledger: bool = True) -> list[Obstacle]:
    """Put up a full backlog and a ledger that is away."""
    backlog_max = shard.meta()["backlog_max"]
    shard.set_meta(backlog_max=0)
    obstacles = [Obstacle("backlog_full", lambda: shard.set_meta(backlog_max=backlog_max))]
    if ledger:
        shard.set_meta(ledger_at_ms=0)
        obstacles.append(Obstacle("ledger_behind", shard.keep_ledger_at_hand))
    return obstacles


def assert_fenced(shard: Shard, ask: Callable[[Caller], Reply], caller: Caller = CALLER) -> None:
    """Another epoch, a seq behind what the caller has seen, and an empty shard are suspect, and nothing is written."""
    seq = int(shard.meta()["seq"])
    doubts: list[dict[str, Any]] = [{"epoch": EPOCH + 1}, {"epoch": EPOCH - 1}, {"seen_seq": seq + 1}]
    for doubt in doubts:
        with shard.writes_nothing():
            assert ask(caller._replace(**doubt)) == ["suspect"]
    bring_back = shard.hide(shard.keys.meta)
    with shard.writes_nothing():
        assert ask(caller) == ["suspect"]
    bring_back()
    assert ask(caller._replace(seen_seq=seq))[0] != "suspect"


def assert_owned(shard: Shard, ask: Callable[[Owner], Reply]) -> None:
    """Another epoch or generation, and an empty shard are suspect, and nothing is written."""
    for owner in (Owner(EPOCH + 1), Owner(EPOCH - 1), Owner(EPOCH, GENERATION - 1), Owner(EPOCH, GENERATION + 1)):
        with shard.writes_nothing():
            assert ask(owner) == ["suspect"]
    bring_back = shard.hide(shard.keys.meta)
    with shard.writes_nothing():
        assert ask(OWNER) == ["suspect"]
    bring_back()
    assert ask(OWNER)[0] != "suspect"


def assert_shut_by(shard: Shard, ask: Callable[[int], Reply]) -> None:
    """On a shard of OWNER's that decides, is in doubt, empty, or was shut in another generation: fenced, nothing written.

    At last the shard is shut, and the script goes through.
    """
    for epoch in (str(EPOCH), "doubt", ""):
        shard.set_meta(epoch=epoch)
        with shard.writes_nothing():
            assert ask(GENERATION) == ["fenced"]
    bring_back = shard.hide(shard.keys.meta)
    with shard.writes_nothing():
        assert ask(GENERATION) == ["fenced"]
    bring_back()
    assert shard.shut_shard() == ["ok"]
    for generation in (GENERATION - 1, GENERATION + 1):
        with shard.writes_nothing():
            assert ask(generation) == ["fenced"]
    assert ask(GENERATION) == ["ok"]


def wait_until_gone(shard: Shard, key: str) -> None:
    """Until a key has run out."""
    deadline = time.monotonic() + 5
    while shard.redis.exists(key):
        assert time.monotonic() < deadline, "the key should have run out"
