"""A random walk over the real scripts beside a plain Python model that foretells each reply, to the word."""

from __future__ import annotations

import json
import secrets
import zlib
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from redis import Redis

from coupon_svc.dev.servers import EmbeddedRedis
from coupon_svc.domain.holding import Holding, parse_positions
from coupon_svc.redis.keys import ShardKeys
from coupon_svc.redis.scripts import Scripts
from tests.scripts.runner import Calls

EPOCH, GENERATION, TENANT = 1, 1, 7
RUN_ID, INSTALLATION = "run", "walk"
BACKLOG_MAX = 4
HOUR_MS = 3_600_000
FAR_MS = {"past": "1000", "future": "9999999999999", "never": ""}

numbers = st.integers(0, 7)
users = st.sampled_from(["ann", "bob", "eve x"])
maybe_users = st.sampled_from(["", "ann", "bob"])
keys_or_none = st.sampled_from([None, None, None, "k1", "k2"])
tokens = st.sampled_from(["none", "right", "right", "wrong"])
limits = st.sampled_from([None, None, 1, 2])


def score(code: str) -> int:
    """A code's place in the pool: scattered, but the same in every run, so that a failure can be repeated."""
    return zlib.crc32(code.encode())


class Held:
    """A coupon as the model knows it."""

    def __init__(self, user: str, position: str) -> None:
        self.user = user
        self.assigned = self.position = position
        self.uses = 0
        self.token = ""


class Book:
    """A book as the model knows it."""

    def __init__(self, number: int, ack: str, uses_max: int | None, limit: int | None, total: int) -> None:
        self.book_id = f"bk_00{number:016d}"
        self.ack = ack
        self.uses_max = uses_max
        self.limit = limit
        self.codes = [f"C{number}-{i}" for i in range(total)]
        self.lent = 0
        self.status = "active"
        self.starts = self.expires = "never"
        self.version = 1
        self.free: set[str] = set()
        self.held: dict[str, Held] = {}
        self.idem: dict[str, tuple[str, list[Any]]] = {}

    def shut(self) -> str | None:
        """Why the book deals nothing, if it does not."""
        if self.status != "active":
            return f"book_{self.status}"
        if self.starts == "future":
            return "book_not_started"
        return "book_expired" if self.expires == "past" else None

    def left(self, uses: int) -> str:
        return "" if self.uses_max is None else str(self.uses_max - uses)

    def held_by(self, user: str) -> int:
        return sum(held.user == user for held in self.held.values())


class Walk(RuleBasedStateMachine):
    """One shard in a Redis that others use, too: its tag keeps it apart."""

    server: EmbeddedRedis
    scripts = Scripts()

    def __init__(self) -> None:
        super().__init__()
        self.redis: Any = Redis.from_url(self.server.url, decode_responses=True)
        self.calls = Calls(self.redis, self.scripts)
        self.keys = ShardKeys(0, 1, tag="walk" + secrets.token_hex(8))
        self.books: list[Book] = []
        self.seq = self.committed = 0
        self.away = False

    def teardown(self) -> None:
        mine = list(self.redis.scan_iter(self.keys.prefix + "*", count=10_000))
        if mine:
            self.redis.unlink(*mine)
        self.redis.close()

    # --- calls

    def run(self, name: str, **named: Any) -> list[Any]:
        """Run a script of the shard."""
        reply: list[Any] = self.redis.execute_command(*self.scripts[name].pack(meta=self.keys.meta, **named))
        return reply

    def own(self, name: str, *, generation: int = GENERATION, **named: Any) -> list[Any]:
        """Run a script as the shard's owner does."""
        return self.run(name, epoch=EPOCH, generation=generation, **named)

    def ask(
        self, name: str, *, epoch: int = EPOCH, seen_seq: int = 0, tenant_id: int = TENANT, **named: Any
    ) -> list[Any]:
        """Run an operation as the API does."""
        return self.calls.run(self.keys, name, epoch=epoch, seen_seq=seen_seq, tenant_id=tenant_id, **named)

    def keys_of(self, book_id: str, *names: str) -> dict[str, Any]:
        """Keys of a book by their names in the headers of scripts."""
        return {name: getattr(self.keys, name)(book_id) for name in ("book", *names)}

    def publish(self) -> None:
        """The ledger is seen, or known to be away, at this moment."""
        told = "away" if self.away else "committed"
        assert self.tell(self.committed, told) == ["ok", self.seq]

    def tell(self, committed: int, told: str = "committed", generation: int = GENERATION) -> list[Any]:
        """Publish a position as the shard's owner does."""
        reply: list[Any] = self.redis.execute_command(
            *self.scripts["publish_positions"].pack(
                meta=[self.keys.meta], events=[self.keys.events], ledger=told, channel="cb:walk", run_id=RUN_ID,
                installation=INSTALLATION, epochs=[EPOCH], generations=[generation], committed=[committed],
                tips=[self.redis.hget(self.keys.meta, "tip")], trim_seqs=[0],
            )
        )  # fmt: skip
        verdict: list[Any] = reply[1][0]
        return verdict

    def fields_of(self, book: Book) -> list[str]:
        fields = {
            "tenant_id": str(TENANT),
            "status": book.status,
            "starts_at_ms": FAR_MS[book.starts],
            "expires_at_ms": FAR_MS[book.expires],
            "ack": book.ack,
            "max_redemptions_per_code": str(book.uses_max or ""),
            "max_codes_per_user": str(book.limit or ""),
            "lock_ttl_ms": str(HOUR_MS),
            "total": str(len(book.codes)),
            "unlent": str(len(book.codes) - book.lent),
            "stored": "{}",
        }
        return [part for pair in fields.items() for part in pair]

    def put(self, book: Book, known: str = "known") -> list[Any]:
        rules = self.fields_of(book)
        return self.own("put_book", **self.keys_of(book.book_id), version=book.version, known=known, rules=rules)

    def book(self, number: int) -> Book:
        return self.books[number % len(self.books)]

    def code(self, book: Book, number: int) -> str:
        """A code of the book, one that somebody holds more often than not."""
        held = sorted(book.held)
        return held[number % len(held)] if held and number % 4 else book.codes[number % len(book.codes)]

    def keyed(self, book: Book, key: str | None, fingerprint: str) -> dict[str, Any]:
        """What a request for something of the book shows, with an Idempotency-Key or without."""
        return {"book_id": book.book_id, "idempotency_key": key or "", "fingerprint": fingerprint if key else ""}

    def seen_before(self, book: Book, key: str | None, fingerprint: str) -> list[Any] | None:
        if key is None or key not in book.idem:
            return None
        known, answer = book.idem[key]
        return ["replayed", *answer] if known == fingerprint else ["idempotency_key_reused"]

    def remember(self, book: Book, key: str | None, fingerprint: str, answer: list[Any]) -> None:
        if key is not None:
            book.idem[key] = fingerprint, answer

    def room(self, share: float, waits: bool) -> str | None:
        if self.seq - self.committed >= BACKLOG_MAX * share:
            return "backlog_full"
        return "ledger_behind" if waits and self.away else None

    def next_position(self) -> str:
        self.seq += 1
        return f"{EPOCH}-{self.seq}"

    # --- the owner's side

    @initialize()
    def open_shard(self) -> None:
        assert self.own("shut_shard", recovery=f"{GENERATION}-{EPOCH}", installation=INSTALLATION) == ["ok"]
        certified = self.run(
            "certify_shard", events=self.keys.events, recovery=f"{GENERATION}-{EPOCH}", epoch=EPOCH, run_id=RUN_ID,
            replid=self.redis.info("replication")["master_replid"], backlog_max=BACKLOG_MAX,
        )  # fmt: skip
        assert certified == ["ok"]

    @rule(ack=st.sampled_from(["ledger", "redis"]), uses_max=limits, limit=limits, total=st.integers(1, 6))
    @precondition(lambda self: len(self.books) < 3)
    def new_book(self, ack: str, uses_max: int | None, limit: int | None, total: int) -> None:
        book = Book(len(self.books), ack, uses_max, limit, total)
        assert self.put(book) == ["gone"], "a book that was loaded before and is not here is lost, not new"
        assert self.put(book, "") == ["ok"]
        self.books.append(book)
        self.lend(number=len(self.books) - 1, count=2, resend=0)

    @rule(number=numbers, count=st.integers(1, 3), resend=st.integers(0, 3))
    @precondition(lambda self: self.books)
    def lend(self, number: int, count: int, resend: int) -> None:
        """The next codes, and some of those before again, as after a reply that was lost."""
        book = self.book(number)
        fresh = book.codes[book.lent : book.lent + count]
        again = book.codes[max(0, book.lent - resend) : book.lent]
        book.lent += len(fresh)
        book.free |= set(fresh)
        codes = again + fresh
        load: dict[str, Any] = {
            **self.keys_of(book.book_id, "free", "holders"),
            "kept_back": len(book.codes) - book.lent,
            "scores": [score(code) for code in codes],
            "codes": codes,
        }
        assert self.own("load_codes", generation=GENERATION + 1, **load) == ["suspect", "owner"]
        assert self.own("load_codes", **load) == ["ok", len(fresh), len(book.free)]

    @rule(
        number=numbers, change=st.sampled_from(["active", "active", "active", "paused", "closed", "starts", "expires"])
    )
    @precondition(lambda self: self.books)
    def update_book(self, number: int, change: str) -> None:
        book = self.book(number)
        if book.status == "closed":
            return
        if change == "starts":
            book.starts = {"never": "future", "future": "past", "past": "never"}[book.starts]
        elif change == "expires":
            book.expires = {"never": "past", "past": "future", "future": "never"}[book.expires]
        elif change != "closed" or number == 7:  # seldom: nothing happens in a closed book
            book.status = change
        book.version += 1
        assert self.put(book) == ["ok"]
        assert self.put(book) == ["stale"]

    @rule(most=st.integers(0, 6))
    @precondition(lambda self: self.seq - self.committed >= BACKLOG_MAX - 1)
    def commit(self, most: int) -> None:
        self.committed = min(self.seq, self.committed + most)
        self.publish()

    @rule(away=st.sampled_from([False, False, False, True]))
    def postgres(self, away: bool) -> None:
        self.away = away

    # --- the callers' side

    @rule(number=numbers, user=users, key=keys_or_none)
    @precondition(lambda self: self.books)
    def assign_coupon(self, number: int, user: str, key: str | None) -> None:
        self.publish()
        book, fingerprint = self.book(number), f"assign {user}"
        told = self.seen_before(book, key, fingerprint) or self.refuse_assign(book, user)
        held = book.held_by(user)
        if told is None and book.limit is not None and held >= book.limit:
            told = ["user_code_limit", book.limit, held]
        if told is None and not book.free:
            told = ["refilling" if book.lent < len(book.codes) else "book_exhausted"]
        if told is None and (reason := self.room(1, book.ack == "ledger")):
            told = [reason]
        reply = self.ask("assign_coupon", user_id=user, **self.keyed(book, key, fingerprint))
        if told is not None:
            assert reply == told
            return
        assert reply[1] == min(book.free, key=score), "the lowest score is dealt"
        self.assigned(book, user, reply, key, fingerprint)

    @rule(number=numbers, which=numbers, user=users, key=keys_or_none)
    @precondition(lambda self: self.books)
    def assign_code(self, number: int, which: int, user: str, key: str | None) -> None:
        self.publish()
        book = self.book(number)
        code = self.code(book, which)
        fingerprint = f"assign {code} {user}"
        told = self.seen_before(book, key, fingerprint)
        holder, held = book.held.get(code), book.held_by(user)
        reply = self.ask("assign_code", user_id=user, code=code, **self.keyed(book, key, fingerprint))
        if told is None and holder is not None and holder.user == user:
            left = book.left(holder.uses)
            if key is None:
                assert reply == ["already_yours", code, reply[2], holder.position, book.ack, left]
            elif reason := self.room(1, book.ack == "ledger"):
                assert reply == [reason]
            else:
                position = self.next_position()
                answer = [code, reply[2], f"{holder.position.partition('/')[0]}/{position}", book.ack, left]
                assert reply == ["confirmed", *answer]
                self.remember(book, key, fingerprint, [*answer, "already_yours"])
                self.told_event(
                    position, event="coupon_confirmed", code=code, user=user, idem=key, uses=str(holder.uses)
                )
            return
        told = told or self.refuse_assign(book, user)
        if told is None and holder is not None:
            told = ["already_assigned"]
        if told is None and book.limit is not None and held >= book.limit:
            told = ["user_code_limit", book.limit, held]
        if told is None and code not in book.free:
            told = ["not_lent"]
        if told is None and (reason := self.room(1, book.ack == "ledger")):
            told = [reason]
        if told is not None:
            assert reply == told
            return
        assert reply[1] == code
        self.assigned(book, user, reply, key, fingerprint)

    def refuse_assign(self, book: Book, user: str) -> list[Any] | None:
        reason = book.shut()
        return [reason] if reason else None

    def assigned(self, book: Book, user: str, reply: list[Any], key: str | None, fingerprint: str) -> None:
        position = self.next_position()
        code = reply[1]
        assert reply == ["ok", code, reply[2], position, book.ack, book.left(0)]
        book.free.remove(code)
        book.held[code] = Held(user, position)
        self.remember(book, key, fingerprint, reply[1:])
        self.told_event(position, event="coupon_assigned", book=book.book_id, code=code, user=user, idem=key or "")

    def told_event(self, position: str, **expected: str) -> None:
        ((entry_id, fields),) = self.redis.xrevrange(self.keys.events, count=1)
        assert entry_id == position
        ((kind, book, code, user, idem, _, *more),) = json.loads(fields["events"])
        told = {
            "event": kind,
            "book": book,
            "code": code,
            "user": user,
            "idem": idem,
            **dict(zip(("uses", "reference", "metadata"), more, strict=False)),
        }
        assert {name: told[name] for name in expected} == expected

    def refuse_holder(self, book: Book, code: str, user: str, shown: str) -> list[Any] | None:
        """What lock and redeem refuse alike, but for the room."""
        if reason := book.shut():
            return [reason]
        held = book.held.get(code)
        if held is None:
            return ["not_assigned"]
        if user and user != held.user:
            return ["not_holder"]
        if book.uses_max is not None and held.uses >= book.uses_max:
            return ["already_redeemed"]
        if shown and shown != held.token:
            return ["lock_not_held"]
        return ["locked"] if held.token and not shown else None

    def shown(self, book: Book, code: str, token: str) -> str:
        held = book.held.get(code)
        return {"none": "", "wrong": "lk_wrong", "right": held.token if held else ""}[token]

    @rule(number=numbers, which=numbers, user=maybe_users, token=tokens, key=keys_or_none)
    @precondition(lambda self: self.books)
    def lock_coupon(self, number: int, which: int, user: str, token: str, key: str | None) -> None:
        self.publish()
        book = self.book(number)
        code = self.code(book, which)
        shown, new_token = self.shown(book, code, token), "lk_" + secrets.token_hex(4)
        fingerprint = f"lock {code} {user} {shown}"
        told = self.seen_before(book, key, fingerprint) or self.refuse_holder(book, code, user, shown)
        if told is None and (reason := self.room(1, False)):
            told = [reason]
        reply = self.ask(
            "lock_coupon", **self.keyed(book, key, fingerprint), code=code, user_id=user, lock_token=shown,
            new_token=new_token,
        )  # fmt: skip
        if told is not None:
            assert reply[: len(told)] == told
            assert told != ["locked"] or 0 < reply[1] <= HOUR_MS
            return
        held = book.held[code]
        answer = [held.user, held.token or new_token, reply[3], str(HOUR_MS), held.position, book.ack]
        assert reply == ["renewed" if held.token else "ok", *answer]
        held.token = held.token or new_token
        self.remember(book, key, fingerprint, answer)

    @rule(number=numbers, which=numbers, token=tokens, key=keys_or_none)
    @precondition(lambda self: self.books)
    def unlock_coupon(self, number: int, which: int, token: str, key: str | None) -> None:
        book = self.book(number)
        code = self.code(book, which)
        shown = self.shown(book, code, token) or "lk_none"
        fingerprint = f"unlock {code} {shown}"
        held = book.held.get(code)
        told = self.seen_before(book, key, fingerprint)
        if told is None and held is not None and held.token and held.token != shown:
            told = ["lock_not_held"]
        reply = self.ask("unlock_coupon", code=code, lock_token=shown, **self.keyed(book, key, fingerprint))
        assert reply == (told or ["ok"])
        if told is None:
            self.remember(book, key, fingerprint, [])
            if held is not None:
                held.token = ""

    @rule(number=numbers, which=numbers, user=maybe_users, token=tokens, key=keys_or_none)
    @precondition(lambda self: self.books)
    def redeem_coupon(self, number: int, which: int, user: str, token: str, key: str | None) -> None:
        self.publish()
        book = self.book(number)
        code = self.code(book, which)
        shown = self.shown(book, code, token)
        fingerprint = f"redeem {code} {user} {shown}"
        told = self.seen_before(book, key, fingerprint) or self.refuse_holder(book, code, user, shown)
        if told is None and (reason := self.room(1.25, True)):
            told = [reason]
        reply = self.ask(
            "redeem_coupon", **self.keyed(book, key, fingerprint), code=code, user_id=user, lock_token=shown,
            reference="ref",
        )  # fmt: skip
        if told is not None:
            assert reply[: len(told)] == told
            return
        held = book.held[code]
        held.uses += 1
        position, held.token = self.next_position(), ""
        held.position = f"{held.assigned}/{position}"
        uses = str(held.uses)
        assert reply == ["ok", held.user, reply[2], position, uses, book.left(held.uses)]
        self.remember(book, key, fingerprint, reply[1:])
        expected = {"event": "coupon_redeemed", "book": book.book_id, "code": code, "user": held.user, "uses": uses}
        self.told_event(position, reference="ref", **expected)

    @rule(number=numbers, which=numbers)
    @precondition(lambda self: any(held.token for book in self.books for held in book.held.values()))
    def a_lock_runs_out(self, number: int, which: int) -> None:
        locked = [(book, code) for book in self.books for code, held in book.held.items() if held.token]
        book, code = locked[(number + which) % len(locked)]
        self.redis.pexpire(self.keys.lock(book.book_id, code), 1)
        while self.redis.exists(self.keys.lock(book.book_id, code)):
            pass
        book.held[code].token = ""

    # --- callers and Redis that are not what they seem

    @rule(number=numbers)
    @precondition(lambda self: self.books)
    def strangers_learn_nothing(self, number: int) -> None:
        book = self.book(number)
        assert self.ask("read_book", book_id=book.book_id, seen_seq=self.seq + 1) == ["suspect", "position"]
        assert self.ask("read_book", book_id=book.book_id, epoch=EPOCH + 1) == ["suspect", "epoch"]
        assert self.ask("read_book", book_id=book.book_id, tenant_id=TENANT + 1) == ["book_not_found"]
        assert self.ask("read_book", book_id="none") == ["book_not_loaded"]
        if self.committed:
            assert self.tell(self.committed - 1) == ["suspect", "position"]
        assert self.tell(self.seq + 1) == ["suspect", "position"]
        assert self.tell(self.committed, generation=0) == ["suspect", "owner"]

    @rule(number=numbers, which=numbers, user=users)
    @precondition(lambda self: any(book.free and book.shut() is None for book in self.books))
    def a_code_that_is_gone_is_noticed(self, number: int, which: int, user: str) -> None:
        open_books = [book for book in self.books if book.free and book.shut() is None]
        book = open_books[number % len(open_books)]
        code = sorted(book.free)[which % len(book.free)]
        of, book_id = self.keys, book.book_id
        pool = self.redis.zrange(of.free(book_id), 0, -1, withscores=True)
        self.redis.zrem(of.free(book_id), code)
        keyed = self.keyed(book, None, "")
        assert self.ask("lock_coupon", **keyed, code=code, new_token="lk_new") == ["suspect", "counts"]
        assert self.ask("redeem_coupon", **keyed, code=code) == ["suspect", "counts"]
        if book.limit is None:
            assert self.ask("assign_code", **keyed, user_id=user, code=code) == ["suspect", "counts"]
            self.redis.delete(of.free(book_id))
            assert self.ask("assign_coupon", **keyed, user_id=user) == ["suspect", "counts"]
        self.redis.zadd(of.free(book_id), dict(pool))

    # --- after every step

    @invariant()
    def redis_is_as_the_model_has_it(self) -> None:
        of, users_known = self.keys, ("ann", "bob", "eve x")
        asked: Any = self.redis.pipeline(transaction=False)
        asked.hget(of.meta, "seq")
        asked.xlen(of.events)
        for user in users_known:
            asked.zrange(of.coupons(TENANT, user), 0, -1)
        for book in self.books:
            asked.zrange(of.free(book.book_id), 0, -1)
            asked.hgetall(of.holders(book.book_id))
            asked.hmget(of.book(book.book_id), "version", "lent", "redeemed", "partly_redeemed")
            asked.mget([of.meta, *(of.lock(book.book_id, code) for code in book.held)])
        seq, length, *rest = asked.execute()
        assert int(seq or 0) == self.seq == length
        for user in users_known:
            mine = {
                f"{book.book_id}:{code}" for book in self.books for code in book.held if book.held[code].user == user
            }
            assert set(rest.pop(0)) == mine
        for book in self.books:
            free, holders, counters, locks = (rest.pop(0) for _ in range(4))
            assert set(free) == book.free
            expected = {
                code: (*parse_positions(held.position), held.uses, held.user) for code, held in book.held.items()
            }
            found = {code: Holding.parse(text) for code, text in holders.items()}
            assert {code: (one.assigned, one.last, one.uses, one.user_id) for code, one in found.items()} == expected
            assert [lock or "" for lock in locks[1:]] == [held.token for held in book.held.values()]
            spent = sum(held.uses == book.uses_max for held in book.held.values())
            partly = sum(held.uses for held in book.held.values()) - spent
            assert [int(counter) for counter in counters] == [book.version, len(free) + len(holders), spent, partly]


@pytest.mark.parametrize("walks", [30, pytest.param(300, marks=pytest.mark.chaos)])
def test_the_scripts_do_what_a_plain_model_of_them_foretells(plain_redis: EmbeddedRedis, walks: int) -> None:
    class OnThisServer(Walk):
        server = plain_redis

    with Redis.from_url(plain_redis.admin_url) as redis:
        for script in Walk.scripts:
            redis.script_load(script.source)
        redis.function_load(Walk.scripts.library.source, replace=True)
    run_state_machine_as_test(
        OnThisServer,
        settings=settings(max_examples=walks, stateful_step_count=60, deadline=None, print_blob=True),
    )
