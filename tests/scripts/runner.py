"""Runs the real scripts as the service does: keys by ShardKeys, sent as the service's own Redis user.

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
from coupon_svc.domain.events import Event, events_of, parse_entry
from coupon_svc.domain.holding import Holding
from coupon_svc.domain.position import Position
from coupon_svc.domain.shards import new_book_id
from coupon_svc.redis.calls import KeyTable, Section, bind_operation, call_command, section_replies
from coupon_svc.redis.contract import ReplyReader
from coupon_svc.redis.keys import ShardKeys
from coupon_svc.redis.scripts import Script, Scripts

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


def _keyed(caller: Caller) -> dict[str, str]:
    return {"idempotency_key": caller.idem, "fingerprint": caller.fingerprint}


def recovery(generation: int, epoch: int = RECOVERED) -> str:
    """What the scripts of an owner's recovery show."""
    return f"{generation}-{epoch}"


class Owner(NamedTuple):
    """What the owner of a shard sends along with everything it writes."""

    epoch: int = EPOCH
    generation: int = GENERATION


CALLER, OWNER, STRANGER = Caller(), Owner(), Caller(tenant_id=TENANT + 1)


class Calls:
    """Runs operations, each as a call of its own."""

    def __init__(self, redis: Any, scripts: Scripts) -> None:
        self._redis = redis
        self._scripts = scripts
        self._operations = {name: bind_operation(one.contract) for name, one in scripts.operations.items()}
        self._section = ReplyReader(scripts.section)

    def run(self, shard: ShardKeys, name: str, *, epoch: int, seen_seq: int = 0, **parameters: Any) -> Reply:
        """The reply of the operation; that of the section where nothing was done for it, or nothing is known."""
        operation = self._operations[name]
        keys: KeyTable = {}
        section = Section(keys, shard, epoch, seen_seq)
        section.add(operation.pack(keys, shard.prefix, **parameters))
        function = self._scripts.library.function(operation.call_class)
        (reply,) = map(
            self._section, section_replies(self._redis.execute_command(*call_command(function, keys, [section])))
        )
        if reply.outcome != "ok":
            return list(reply)
        (raw,) = reply.replies
        if raw[0] != "error":
            operation.reply(list(raw))  # it has the fields that the operation's header names
        return [[] if part == {} else part for part in raw]  # an empty list, as Lua spells it


class Server:
    """A Redis with all scripts loaded. `run` is the service's user, `admin` may do anything, `raw` sees bytes."""

    def __init__(self, embedded: EmbeddedRedis, scripts: Scripts) -> None:
        self.scripts = scripts
        self.run: Any = Redis.from_url(embedded.url, decode_responses=True)
        self.calls = Calls(self.run, scripts)
        self.admin: Any = Redis.from_url(embedded.admin_url, decode_responses=True)
        self.raw: Any = Redis.from_url(embedded.admin_url)
        self.replid: str = self.run.info("replication")["master_replid"]

    def __enter__(self) -> Self:
        for script in self.scripts:
            assert self.run.script_load(script.source) == script.sha
        self.run.function_load(self.scripts.library.source, replace=True)
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
        tip: str | None = None,
        backlog_max: int = 1000,
        run_id: str = RUN_ID,
        replid: str = "",
        installation: str = INSTALLATION,
    ) -> Reply:
        return self._run(
            "open_shard", **owner._asdict(), run_id=run_id, replid=replid or self.server.replid,
            backlog_max=backlog_max, committed=committed,
            tip=self.tip() if tip is None else tip, installation=installation,
        )  # fmt: skip

    def publish_position(
        self,
        committed: int,
        owner: Owner = OWNER,
        *,
        ledger: str = "committed",
        trim_seq: int = 0,
        message: str = "",
        tip: str | None = None,
        ledger_ms: int | str = "",
        run_id: str = RUN_ID,
        installation: str = INSTALLATION,
    ) -> Reply:
        script = self.server.scripts["publish_positions"]
        reply = self._send(
            script, meta=[self.keys.meta], events=[self.keys.events], ledger=ledger, channel=CHANNEL, message=message,
            ledger_ms=ledger_ms, run_id=run_id, installation=installation, epochs=[owner.epoch],
            generations=[owner.generation], committed=[committed], tips=[self.tip() if tip is None else tip],
            trim_seqs=[trim_seq],
        )  # fmt: skip
        verdict: Reply = reply[1][0] if reply[0] == "ok" else reply
        return verdict

    def tip(self) -> str:
        """The tip of the last entry, as the ledger would have it."""
        tip: str = self.redis.hget(self.keys.meta, "tip") or ""
        return tip

    def put_book(self, book_id: str, version: int, owner: Owner = OWNER, *, known: bool = False, **rules: Any) -> Reply:
        """`rules` are those that differ from an active book's without limits; for a known book only those are sent."""
        sent = rules if known else {**new_rules(), **rules}
        return self._run(
            "put_book", **owner._asdict(), book=self.keys.book(book_id), version=version, known="known" if known else "",
            rules=_flat(sent),
        )  # fmt: skip

    def load_codes(
        self,
        book_id: str,
        codes: Sequence[str],
        owner: Owner = OWNER,
        *,
        kept_back: int = 0,
        scores: Sequence[int] = (),
    ) -> Reply:
        """Without `scores` the codes are dealt in the order in which they are given."""
        return self._run(
            "load_codes", **owner._asdict(), **self._pool(book_id), book=self.keys.book(book_id), kept_back=kept_back,
            scores=scores or range(len(codes)), codes=codes,
        )  # fmt: skip

    # --- the scripts of a recovery

    def shut_shard(
        self, generation: int = GENERATION, epoch: int = RECOVERED, installation: str = INSTALLATION
    ) -> Reply:
        return self._run(
            "shut_shard",
            generation=generation,
            epoch=epoch,
            recovery=recovery(generation, epoch),
            installation=installation,
        )

    def wipe_keys(self, doomed: Sequence[str], generation: int = GENERATION) -> Reply:
        return self._run("wipe_keys", doomed=doomed, recovery=recovery(generation))

    def restore_book(
        self, book_id: str, generation: int = GENERATION, *, quarantined: Sequence[str] = (), **fields: Any
    ) -> Reply:
        """`fields` are those that differ from an active book's without limits, coupons or codes."""
        counters = {"lent": 0, "redeemed": 0, "partly_redeemed": 0, "quarantined": len(quarantined)}
        return self._restore_book(book_id, generation, {**new_rules(), "version": 1, **counters, **fields}, quarantined)

    def restore_quarantine(self, book_id: str, codes: Sequence[str], generation: int = GENERATION) -> Reply:
        """More codes than restore_book could take with the book itself."""
        return self._restore_book(book_id, generation, {}, codes)

    def _restore_book(self, book_id: str, generation: int, fields: Mapping[str, Any], codes: Sequence[str]) -> Reply:
        return self._run(
            "restore_book", book=self.keys.book(book_id), free=self.keys.free(book_id),
            quarantine=self.keys.quarantine(book_id), recovery=recovery(generation), rules=_flat(fields),
            quarantined=codes,
        )  # fmt: skip

    def restore_coupons(
        self, book_id: str, coupons: Mapping[str, str], generation: int = GENERATION, tenant_id: int = TENANT
    ) -> Reply:
        """`coupons` are codes and the holdings of them."""
        return self._run(
            "restore_coupons", holders=self.keys.holders(book_id),
            coupons=[self.keys.coupons(tenant_id, Holding.parse(text).user_id) for text in coupons.values()],
            recovery=recovery(generation), book_id=book_id, codes=list(coupons), holdings=list(coupons.values()),
        )  # fmt: skip

    def restore_idem(self, book_id: str, records: Mapping[str, tuple[str, int]], generation: int = GENERATION) -> Reply:
        """`records` are Idempotency-Keys, each with its record and the milliseconds that it has left."""
        return self._run(
            "restore_idem", idem=[self.idem_key(book_id, idem) for idem in records], recovery=recovery(generation),
            records=[record for record, _ in records.values()], ttls_ms=[ttl_ms for _, ttl_ms in records.values()],
        )  # fmt: skip

    def certify_shard(
        self, owner: Owner = OWNER, *, run_id: str = RUN_ID, replid: str = "", backlog_max: int = 1000
    ) -> Reply:
        return self._run(
            "certify_shard", events=self.keys.events, recovery=recovery(owner.generation), epoch=owner.epoch,
            run_id=run_id, replid=replid or self.server.replid, backlog_max=backlog_max,
        )  # fmt: skip

    # --- the API's scripts

    def doubt_shard(self, caller: Caller = CALLER) -> Reply:
        return self._run("doubt_shard", epoch=caller.epoch, seen_seq=caller.seen_seq)

    def release_coupon(self, book_id: str, code: str, holding: str, caller: Caller = CALLER) -> Reply:
        user_id = Holding.parse(holding).user_id
        return self._call("release_coupon", caller, book_id=book_id, code=code, holding=holding, user_id=user_id)

    def assign_coupon(self, book_id: str, user_id: str, caller: Caller = CALLER) -> Reply:
        return self._call("assign_coupon", caller, book_id=book_id, user_id=user_id, **_keyed(caller))

    def assign_code(self, book_id: str, user_id: str, code: str, caller: Caller = CALLER) -> Reply:
        return self._call("assign_code", caller, book_id=book_id, user_id=user_id, code=code, **_keyed(caller))

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
        return self._call(
            "lock_coupon", caller, book_id=book_id, code=code, user_id=user_id, lock_token=token, new_token=new_token,
            ttl_ms=ttl_ms, **_keyed(caller),
        )  # fmt: skip

    def unlock_coupon(self, book_id: str, code: str, token: str, caller: Caller = CALLER) -> Reply:
        return self._call("unlock_coupon", caller, book_id=book_id, code=code, lock_token=token, **_keyed(caller))

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
        return self._call(
            "redeem_coupon", caller, book_id=book_id, code=code, user_id=user_id, lock_token=token, reference=reference,
            metadata=metadata, **_keyed(caller),
        )  # fmt: skip

    def read_book(self, book_id: str, caller: Caller = CALLER) -> Reply:
        return self._call("read_book", caller, book_id=book_id)

    def read_codes(self, book_id: str, codes: Sequence[str], caller: Caller = CALLER) -> Reply:
        return self._call("read_codes", caller, book_id=book_id, codes=codes)

    def list_coupons(
        self, user_id: str, caller: Caller = CALLER, *, low: str = "-", high: str = "+", limit: int = 100
    ) -> Reply:
        return self._call("list_coupons", caller, user_id=user_id, low=low, high=high, limit=limit)

    def _pool(self, book_id: str) -> dict[str, str]:
        return {"free": self.keys.free(book_id), "holders": self.keys.holders(book_id)}

    def _call(self, name: str, caller: Caller, **parameters: Any) -> Reply:
        named = {"tenant_id": caller.tenant_id, **parameters}
        return self.server.calls.run(self.keys, name, epoch=caller.epoch, seen_seq=caller.seen_seq, **named)

    def _run(self, name: str, **named: Any) -> Reply:
        """The reply as it came, once the binding has taken it: it has the fields that the script's header names."""
        return self._send(self.server.scripts[name], meta=self.keys.meta, **named)

    def _send(self, script: Script, **named: Any) -> Reply:
        reply: Reply = self.server.run.execute_command(*script.pack(**named))
        assert list(script.reply(reply))[: len(reply)] == reply
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
        assert self.load_codes(book_id, codes, kept_back=unlent) == ["ok", len(codes), len(codes)]
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
            flat = [part.encode() for pair in fields.items() for part in pair]
            parsed += events_of(parse_entry(Position.parse(entry_id), flat))
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


def _flat(fields: Mapping[str, Any]) -> list[Any]:
    return [part for pair in fields.items() for part in pair]


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
    doubts: list[tuple[str, dict[str, Any]]] = [
        ("epoch", {"epoch": EPOCH + 1}),
        ("epoch", {"epoch": EPOCH - 1}),
        ("position", {"seen_seq": seq + 1}),
    ]
    for why, doubt in doubts:
        with shard.writes_nothing():
            assert ask(caller._replace(**doubt)) == ["suspect", why]
    bring_back = shard.hide(shard.keys.meta)
    with shard.writes_nothing():
        assert ask(caller) == ["suspect", "epoch"]
    bring_back()
    assert ask(caller._replace(seen_seq=seq))[0] != "suspect"


def assert_owned(shard: Shard, ask: Callable[[Owner], Reply]) -> None:
    """Another epoch or generation, and an empty shard are suspect, and nothing is written."""
    for why, owner in (
        ("epoch", Owner(EPOCH + 1)),
        ("epoch", Owner(EPOCH - 1)),
        ("owner", Owner(EPOCH, GENERATION - 1)),
        ("owner", Owner(EPOCH, GENERATION + 1)),
    ):
        with shard.writes_nothing():
            assert ask(owner) == ["suspect", why]
    bring_back = shard.hide(shard.keys.meta)
    with shard.writes_nothing():
        assert ask(OWNER) == ["suspect", "epoch"]
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
