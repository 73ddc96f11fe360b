"""Calls of many operations: each is decided as if it had come alone, and one that fails takes no other with it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from coupon_svc.redis.calls import section_replies
from coupon_svc.redis.contract import CallClass, ReplyReader
from coupon_svc.redis.scripts import Library, bind_library
from tests.scripts.runner import CALLER, EPOCH, TENANT, Caller, Server, Shard
from tests.sent import names_of

Op = tuple[str, dict[str, Any]]
"""An operation: its name, and its parameters by the names of its header; a key by what ShardKeys makes it of."""

HOLDING = "3-9 0 1700000000000 w"
"""What a receipt says of the code Q-1."""


def assign(book: str, user: str, key: str = "", list_key: str = "") -> Op:
    keys = {"idempotency_key": key, "list_idempotency_key": list_key if key else ""}
    return "assign_coupon", {"book_id": book, "user_id": user, **keys}


def assign_code(book: str, user: str, code: str, key: str = "") -> Op:
    return "assign_code", {"book_id": book, "user_id": user, "code": code, "idempotency_key": key}


def lock(book: str, code: str, token: str = "", new_token: str = "t", key: str = "") -> Op:
    named = {"lock_token": token, "new_token": new_token, "ttl_ms": "60000", "user_id": ""}
    return "lock_coupon", {"book_id": book, "code": code, "idempotency_key": key, **named}


def redeem(book: str, code: str, token: str = "", key: str = "") -> Op:
    named = {"lock_token": token, "user_id": "", "reference": "r", "metadata": ""}
    return "redeem_coupon", {"book_id": book, "code": code, "idempotency_key": key, **named}


def unlock(book: str, code: str, token: str, key: str = "") -> Op:
    return "unlock_coupon", {"book_id": book, "code": code, "lock_token": token, "idempotency_key": key}


def release(book: str, code: str) -> Op:
    return "release_coupon", {"book_id": book, "code": code, "holding": HOLDING, "user_id": "w"}


def read_book(book: str) -> Op:
    return "read_book", {"book_id": book}


def read_codes(book: str, codes: list[str]) -> Op:
    return "read_codes", {"book_id": book, "codes": codes}


def list_coupons(book: str, user: str) -> Op:
    return "list_coupons", {"book_id": book, "user_id": user, "low": "-", "high": "+", "limit": "100"}


class Calls:
    """Sends calls as they are told by lua/call.lua, word by word."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self.server: Server = shard.server

    def send(self, ops: list[Op], caller: Caller = CALLER, *, library: Library | None = None, tip: str = "tip") -> Any:
        """The reply of the one section, by the names of the header."""
        keys: list[str] = []
        section = self.section(keys, ops, caller, tip)
        call_class = self.server.scripts.operations[ops[0][0]].contract.call_class
        assert call_class
        return self.run((library or self.server.scripts.library).function(call_class), keys, [section])[0]

    def run(self, function: str, keys: list[str], sections: list[Any]) -> Any:
        packed = msgspec.msgpack.encode([value for section in sections for value in section])
        read = ReplyReader(self.server.scripts.section)
        return [
            read(raw)
            for raw in section_replies(self.server.run.execute_command("FCALL", function, len(keys), *keys, packed))
        ]

    def section(self, keys: list[str], ops: list[Op], caller: Caller = CALLER, tip: str = "tip") -> list[Any]:
        def place(key: str) -> int:
            if key not in keys:
                keys.append(key)
            return keys.index(key) + 1

        given = {
            "meta": place(self.shard.keys.meta), "events": place(self.shard.keys.events), "epoch": str(caller.epoch),
            "seen_seq": str(caller.seen_seq), "tip": tip, "count": len(ops),
        }  # fmt: skip
        head = [given[name] for name in names_of(self.server.scripts.section)]
        return [*head, *(value for op in ops for value in self.wire(place, *op))]

    def wire(self, place: Callable[[str], int], name: str, named: Mapping[str, Any]) -> list[Any]:
        key, spelled = named.get("idempotency_key", ""), self.spelled(named)
        given = {"tenant_id": str(TENANT), "fingerprint": "f-" + name if key else "", **named}
        contract = self.server.scripts.operations[name].contract
        locks = [place(self.shard.keys.lock(named["book_id"], code)) for code in named.get("codes", ())]
        places = [locks if k.mark == "…" else place(spelled[k.name]) if spelled[k.name] else 0 for k in contract.keys]
        return [name, *places, *(given[arg.name] for arg in contract.args)]

    def spelled(self, named: Mapping[str, Any]) -> dict[str, str]:
        """The keys of an operation with these parameters; "" for one that it leaves out."""
        mine, book = self.shard.keys, named["book_id"]
        key, list_key = named.get("idempotency_key", ""), named.get("list_idempotency_key", "")
        return {
            "book": mine.book(book),
            "free": mine.free(book),
            "holders": mine.holders(book),
            "quarantine": mine.quarantine(book),
            "coupons": mine.coupons(TENANT, named.get("user_id", "")),
            "lock": mine.lock(book, named.get("code", "")),
            "idem": mine.idem(TENANT, book, key) if key else "",
            "list": mine.list(TENANT, book, list_key) if list_key else "",
        }

    def replies(self, ops: list[Op]) -> list[Any]:
        """The replies of a call of all these operations, which must go through."""
        section = self.send(ops)
        assert section.outcome == "ok"
        return list(section.replies)

    def words(self, ops: list[Op]) -> list[str]:
        return [reply[0] for reply in self.replies(ops)]


@pytest.fixture
def calls(shard: Shard) -> Calls:
    return Calls(shard)


# --- one call is as good as many


def dump(shard: Shard) -> dict[str, Any]:
    """All that is stored of the shard, but for times and tips; events one by one, however many an entry has."""
    found: dict[str, Any] = {}
    read: Any = {"string": "get", "hash": "hgetall", "set": "smembers"}
    for key in shard.redis.scan_iter(shard.keys.prefix + "*", count=1000):
        kind, name = shard.redis.type(key), key.removeprefix(shard.keys.prefix)
        if kind == "stream":
            found[name] = [event for entry in shard.redis.xrange(key) for event in events_of(entry)]
        elif kind == "zset":
            found[name] = shard.redis.zrange(key, 0, -1, withscores=True)
        else:
            found[name] = getattr(shard.redis, read[kind])(key)
    found["meta"] = {field: text for field, text in found["meta"].items() if not field.endswith(("at_ms", "tip"))}
    timeless = json.loads(re.sub(r"\b1[78]\d{11}\b", "TIME", json.dumps(found, default=sorted, sort_keys=True)))
    assert isinstance(timeless, dict)
    return timeless


def events_of(entry: tuple[str, dict[str, str]]) -> list[list[str]]:
    fields = entry[1]
    if "events" in fields:
        return list(json.loads(fields["events"]))
    return [[text for name, text in fields.items() if name != "at_ms"]]


def timeless(replies: list[Any]) -> list[Any]:
    """Without the times, and without what is left of locks."""
    told = [["locked"] if reply[0] == "locked" else reply for reply in replies]
    told = [
        [
            part if not isinstance(part, list) else [one if isinstance(one, str) else one > 0 for one in part]
            for part in reply
        ]
        for reply in told
    ]
    return list(json.loads(re.sub(r"\b1[78]\d{11}\b", "TIME", json.dumps(told))))


CODES = [f"C-{number}" for number in range(6)]
books = st.sampled_from([0, 0, 1])
users = st.sampled_from(["u", "v", "w x"])
codes = st.sampled_from([*CODES, "Q-1", "NONE"])
idems = st.sampled_from(["", "", "k1", "k2"])
tokens = st.sampled_from(["", "t", "t2"])
grows = st.lists(
    st.one_of(
        st.builds(lambda b, u, k, of: (assign, (b, u, k, of)), books, users, idems, st.sampled_from(["", "k2"])),
        st.builds(lambda b, u, c, k: (assign_code, (b, u, c, k)), books, users, codes, idems),
        st.builds(
            lambda b, c, t, n, k: (lock, (b, c, t, n, k)), books, codes, tokens, st.sampled_from(["t", "t2"]), idems
        ),
    ),
    min_size=1,
    max_size=9,
)
keeps = st.lists(
    st.one_of(
        st.builds(lambda b, c, t, k: (redeem, (b, c, t, k)), books, codes, tokens, idems),
        st.builds(lambda b, c, t, k: (unlock, (b, c, t, k)), books, codes, tokens, idems),
        st.builds(lambda b: (release, (b, "Q-1")), books),
    ),
    min_size=1,
    max_size=9,
)
reads = st.lists(
    st.one_of(
        st.builds(lambda b: (read_book, (b,)), books),
        st.builds(lambda b, some: (read_codes, (b, some)), books, st.lists(codes, min_size=1, max_size=3)),
        st.builds(lambda b, u: (list_coupons, (b, u)), books, users),
    ),
    max_size=4,
)
walks = st.lists(st.tuples(grows, keeps, reads), min_size=1, max_size=3)
rules = st.fixed_dictionaries(
    {
        "max_codes_per_user": st.sampled_from(["", "1", "2"]),
        "max_redemptions_per_code": st.sampled_from(["", "1", "2"]),
        "ack": st.sampled_from(["ledger", "redis"]),
        "status": st.sampled_from(["active", "active", "active", "paused"]),
    }
)


PLAIN_RULES = {"max_codes_per_user": "", "max_redemptions_per_code": "", "ack": "redis", "status": "active"}
ONE_KEY_FOR_A_USER_AND_A_LIST: list[Any] = [
    ([(assign, (1, "u", "k2", "")), (assign, (1, "v", "k1", "k2"))], [(release, (1, "Q-1"))], [])
]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(walk=ONE_KEY_FOR_A_USER_AND_A_LIST, first=PLAIN_RULES, second=PLAIN_RULES, backlog_max=1000)
@given(walk=walks, first=rules, second=rules, backlog_max=st.sampled_from([5, 1000]))
def test_a_call_of_many_is_as_good_as_many_calls(
    server: Server, walk: list[Any], first: dict[str, Any], second: dict[str, Any], backlog_max: int
) -> None:
    """Reply by reply and key by key: the order in which they are decided is the order in which they stand in the call."""
    together, apart = Calls(Shard(server)), Calls(Shard(server))
    ids = [f"bk_00{number:016d}" for number in range(2)]
    for calls in (together, apart):
        calls.shard.certify(backlog_max=backlog_max)
        for book, its_rules in zip(ids, (first, second), strict=True):
            calls.shard.put_book(book, 1, total=len(CODES), unlent=0, **its_rules)
            calls.shard.load_codes(book, CODES)
            calls.shard.quarantine(book, "Q-1")
    for parts in walk:
        for part in filter(None, parts):
            ops = [make(ids[args[0]], *args[1:]) for make, args in part]
            one_by_one = [reply for op in ops for reply in apart.replies([op])]
            assert timeless(together.replies(ops)) == timeless(one_by_one)
            assert dump(together.shard) == dump(apart.shard)


def test_two_that_want_the_last_code_do_not_both_get_it(calls: Calls) -> None:
    book = calls.shard.new_book("A-1")
    assert calls.words([assign(book, "u"), assign(book, "v")]) == ["ok", "book_exhausted"]


def test_a_code_that_is_named_is_not_dealt_in_the_same_call(calls: Calls) -> None:
    book = calls.shard.new_book("A-1", "B-2")
    replies = calls.replies([assign_code(book, "u", "A-1"), assign(book, "v"), assign_code(book, "w", "B-2")])
    assert [reply[:2] for reply in replies] == [["ok", "A-1"], ["ok", "B-2"], ["already_assigned"]]


def test_what_is_dealt_last_is_found_behind_all_that_the_others_took(calls: Calls) -> None:
    """As many codes are looked at as there are operations, and not one fewer."""
    codes = [f"A-{number}" for number in range(9)]
    book = calls.shard.new_book(*codes)
    replies = calls.replies([*(assign_code(book, "u", code) for code in codes[:7]), assign(book, "v")])
    assert [reply[1] for reply in replies] == codes[:8]


def test_a_users_limit_counts_what_the_call_gives(calls: Calls) -> None:
    book = calls.shard.new_book("A-1", "B-2", "C-3", max_codes_per_user="2")
    assert calls.words([assign(book, "u")] * 3) == ["ok", "ok", "user_code_limit"]


def test_an_idempotency_key_has_one_effect_within_a_call(calls: Calls) -> None:
    book = calls.shard.new_book("A-1", "B-2")
    first, second = calls.replies([assign(book, "u", "k1"), assign(book, "u", "k1")])
    assert (first[0], second[0], second[1]) == ("ok", "replayed", first[1])


def test_the_last_use_is_spent_once_within_a_call(calls: Calls) -> None:
    book = calls.shard.assigned("A-1", max_redemptions_per_code="1")
    assert calls.words([redeem(book, "A-1"), redeem(book, "A-1")]) == ["ok", "already_redeemed"]


def test_a_lock_that_the_call_sets_holds_in_the_call(calls: Calls) -> None:
    book = calls.shard.assigned("A-1")
    replies = calls.replies(
        [lock(book, "A-1", new_token="t"), lock(book, "A-1", new_token="t2"), lock(book, "A-1", token="t")]
    )
    assert [reply[0] for reply in replies] == ["ok", "locked", "renewed"]
    assert replies[1] == ["locked", 60_000], "with all of its time"


def test_each_use_within_a_call_is_counted(calls: Calls) -> None:
    book = calls.shard.assigned("A-1", max_redemptions_per_code="")
    assert calls.words([redeem(book, "A-1")] * 3) == ["ok"] * 3
    assert calls.shard.book(book)["partly_redeemed"] == "3"


def test_the_key_of_a_list_is_taken_within_the_call(calls: Calls) -> None:
    book = calls.shard.new_book("A-1", "B-2")
    other = assign(book, "v", "k/1", "k")
    other[1]["fingerprint"] = "another request's"
    assert calls.words([assign(book, "u", "k/0", "k"), other]) == ["ok", "idempotency_key_reused"]


def test_room_counts_what_the_call_makes(server: Server) -> None:
    calls = Calls(Shard(server))
    calls.shard.certify(backlog_max=2)
    book = calls.shard.new_book("A-1", "B-2", "C-3")
    assert calls.words([assign(book, user) for user in "uvw"]) == ["ok", "ok", "backlog_full"]


# --- what fails


NEEDED = [
    (assign("", "bad", "bad/0", "bad"), "book free holders coupons idem list"),
    (assign_code("", "bad", "B-2", "bad"), "book free holders coupons quarantine idem"),
    (lock("", "A-1", key="bad"), "book holders lock idem"),
    (lock("", "NONE"), "free quarantine"),
    (redeem("", "A-1", key="bad"), "book holders lock idem"),
    (redeem("", "NONE"), "free quarantine"),
    (unlock("", "A-1", "t", "bad"), "book lock idem"),
    (release("", "Q-1"), "book quarantine holders coupons"),
    (read_book(""), "book free holders"),
    (read_codes("", ["NONE"]), "book free holders quarantine"),
    (list_coupons("", "bad"), "coupons"),
]
"""Operations, each with the keys of which it needs the type; the book is filled in. Together they have every key but the
locks that are read: of these only the time counts."""


def test_every_key_is_tried_with_another_type(server: Server) -> None:
    tried = {(name, key) for (name, _), keys in NEEDED for key in keys.split()}
    operations = server.scripts.operations
    assert tried == {(name, key.name) for name, one in operations.items() for key in one.contract.keys} - {
        ("read_codes", "lock")
    }


@pytest.mark.parametrize(
    ("op", "name"),
    [pytest.param(op, name, id=f"{op[0]}-{name}") for op, names in NEEDED for name in names.split()],
)
def test_a_key_of_another_type_fails_its_operation_alone(calls: Calls, op: Op, name: str) -> None:
    """And the shard is put in doubt, behind what the others did; for what only reads, the API does so."""
    shard = calls.shard
    whole, broken = shard.assigned("W-1", max_redemptions_per_code=""), shard.assigned("A-1")
    shard.load_codes(whole, ["W-2", "W-3"])
    shard.load_codes(broken, ["B-2"])
    shard.quarantine(broken, "Q-1")
    operation = (op[0], {**op[1], "book_id": broken})
    key = calls.spelled(operation[1])[name]
    shard.redis.delete(key)
    shard.redis.set(key, "x") if name not in ("idem", "list", "lock") else shard.redis.sadd(key, "x")
    before = shard.redis.dump(key)
    call_class = calls.server.scripts.operations[op[0]].contract.call_class
    other = {
        CallClass.GROW: assign(whole, "u"),
        CallClass.KEEP: redeem(whole, "W-1"),
        CallClass.READ: read_book(whole),
    }[call_class or CallClass.READ]
    replies = calls.replies([other, operation, other])
    assert [reply[0] for reply in replies] == ["ok", "error", "ok"]
    assert replies[1] == ["error", "WRONGTYPE"]
    assert shard.redis.dump(key) == before
    told = shard.redis.hmget(shard.keys.meta, "epoch", "was", "seq")
    assert told == ([str(EPOCH), None, "2"] if call_class is CallClass.READ else ["doubt", str(EPOCH), "4"])


@pytest.mark.parametrize("field", ["redeemed", "partly_redeemed"])
@pytest.mark.parametrize("count", ["many", "", "07", "-0", "1.5", "9" * 19])
def test_a_count_that_cannot_be_raised_fails_before_the_entry(calls: Calls, field: str, count: str) -> None:
    book = calls.shard.assigned("A-1", max_redemptions_per_code="2" if field == "partly_redeemed" else "1")
    calls.shard.redis.hset(calls.shard.keys.book(book), field, count)
    assert calls.replies([redeem(book, "A-1")]) == [["error", "WRONGTYPE"]]
    assert calls.shard.redis.hget(calls.shard.keys.meta, "seq") == "1"


def test_damage_is_not_forgotten_over_another_error(calls: Calls) -> None:
    book = calls.shard.assigned("A-1")
    odd = lock(book, "A-1")
    odd[1]["ttl_ms"] = "soon"
    calls.shard.redis.set(calls.shard.keys.coupons(TENANT, "bad"), "x")
    assert calls.replies([assign(book, "bad"), odd]) == [["error", "WRONGTYPE"], ["error", "ERR"]]
    assert calls.shard.redis.hget(calls.shard.keys.meta, "epoch") == "doubt"


@pytest.mark.parametrize("ttl_ms", ["soon", "0", "-5", "1.5", "9" * 19])
def test_an_odd_request_does_not_shut_the_shard(calls: Calls, ttl_ms: str) -> None:
    book = calls.shard.assigned("A-1")
    odd = lock(book, "A-1")
    odd[1]["ttl_ms"] = ttl_ms
    assert calls.replies([odd, assign_code(book, "u", "A-1")])[0] == ["error", "ERR"]
    assert calls.shard.redis.hget(calls.shard.keys.meta, "epoch") == str(EPOCH)


def test_a_holding_that_is_none_leaves_nothing_done(calls: Calls) -> None:
    book = calls.shard.assigned("A-1")
    calls.shard.lock_coupon(book, "A-1", new_token="t")
    calls.shard.redis.hset(calls.shard.keys.holders(book), "A-1", "junk")
    with calls.shard.writes("meta"):
        assert calls.replies([redeem(book, "A-1", token="t")]) == [["error", "WRONGTYPE"]]
    assert calls.shard.redis.hget(calls.shard.keys.meta, "epoch") == "doubt"


def test_a_book_that_lacks_a_count_is_damage(calls: Calls) -> None:
    book = calls.shard.assigned("A-1")
    calls.shard.redis.hdel(calls.shard.keys.book(book), "quarantined")
    assert calls.replies([("read_book", {"book_id": book})]) == [["error", "WRONGTYPE"]]


def test_what_json_cannot_say_is_answered_all_the_same(calls: Calls) -> None:
    """Somebody's hand made a limit infinite: nobody else of the call must miss an answer for it."""
    hit, other = calls.shard.assigned("A-1", max_codes_per_user=1), calls.shard.new_book("B-2")
    calls.shard.redis.hset(calls.shard.keys.book(hit), "max_codes_per_user", "-inf")
    assert calls.words([assign(hit, "u"), assign(other, "u")]) == ["user_code_limit", "ok"]


def test_a_stream_that_takes_no_entry_leaves_nothing_done(calls: Calls) -> None:
    book = calls.shard.new_book("A-1")
    calls.shard.redis.xadd(calls.shard.keys.events, {"event": "by hand"}, id=f"{EPOCH}-99")
    before = dump(calls.shard)
    assert calls.send([assign(book, "u", "k1")]) == ("suspect", "events")
    after = dump(calls.shard)
    assert after.pop("meta") == {**before.pop("meta"), "epoch": "doubt", "was": str(EPOCH)}
    assert after == before


WRITES = [
    '("HSET", meta_key, "seq"',
    '{"ZREM"',
    '{"HSET", holders_key',
    '{"ZADD"',
    '{"SET", key',
    '{"SET", lock_key',
    '{"DEL"',
    '{"HINCRBY"',
    '{"SREM"',
]
"""How each begins in the Lua."""


def library_that_cannot(calls: Calls, write: str) -> Library:
    """The library in which Redis refuses these writes; delete it from the server after use."""
    body = calls.server.scripts.library.body
    assert write in body
    broken = bind_library(body.replace(write, write.replace('"', '"HGET", "no key", "', 1)))
    calls.server.run.function_load(broken.source)
    return broken


@pytest.mark.parametrize("write", WRITES)
def test_a_write_that_fails_behind_the_entry_is_unknown(calls: Calls, write: str) -> None:
    """The ledger gets the entry; the shard is in doubt, so nobody decides by what was left undone."""
    shard = calls.shard
    book = shard.assigned("A-1")
    shard.load_codes(book, ["B-2"])
    shard.quarantine(book, "Q-1")
    shard.lock_coupon(book, "A-1", new_token="t")
    grow = [assign(book, "v", "k1"), lock(book, "A-1", token="t")]
    keep = [redeem(book, "A-1", token="t", key="k2"), release(book, "Q-1")]
    ops = keep if write in ('{"DEL"', '{"HINCRBY"', '{"SREM"') else grow
    broken = library_that_cannot(calls, write)
    assert calls.send(ops, library=broken) == ("unknown",)
    calls.server.run.function_delete(broken.name)
    seq = "1" if "meta_key" in write else "2"
    assert shard.redis.hmget(shard.keys.meta, "epoch", "was", "seq") == ["doubt", str(EPOCH), seq]
    assert [event[0] for entry in shard.redis.xrange(shard.keys.events) for event in events_of(entry)][1:] == [
        "coupon_redeemed" if ops is keep else "coupon_assigned"
    ]


def test_a_shard_that_cannot_be_put_in_doubt_is_unknown_all_the_same(calls: Calls) -> None:
    """As when the rights to write its meta were taken away: the reply of the section must not be lost with it."""
    book = calls.shard.new_book("A-1")
    broken = library_that_cannot(calls, '"HSET", meta_key')
    assert calls.send([assign(book, "u")], library=broken) == ("unknown",)
    calls.server.run.function_delete(broken.name)


# --- sections


def test_each_shard_has_a_verdict_of_its_own(server: Server, request: pytest.FixtureRequest) -> None:
    """On one server a call goes to several shards; in a cluster a section is a call."""
    if "cluster" in request.node.name:
        pytest.skip("a call has one section there")
    first, second = Calls(Shard(server)), Calls(Shard(server))
    for calls in (first, second):
        calls.shard.certify()
    books = [calls.shard.new_book("A-1") for calls in (first, second)]
    keys: list[str] = []
    sections = [
        first.section(keys, [assign(books[0], "u")], CALLER._replace(epoch=EPOCH + 1)),
        second.section(keys, [assign(books[1], "u")]),
    ]
    refused, decided = first.run(server.scripts.library.function(CallClass.GROW), keys, sections)
    assert refused == ("suspect", "epoch")
    assert decided.outcome == "ok"
    assert decided.replies[0][:2] == ["ok", "A-1"]
    assert first.shard.redis.exists(first.shard.keys.events) == 0


def test_a_section_tells_where_the_shard_is(calls: Calls) -> None:
    book = calls.shard.new_book("A-1", "B-2")
    section = calls.send([assign(book, "u"), assign(book, "v")], tip="mine")
    assert (section.outcome, section.seq, section.tip) == ("ok", "2", "mine")
    ((entry_id, fields),) = calls.shard.redis.xrange(calls.shard.keys.events)
    told = dict(zip(("n", "after", "at_ms", "events"), section.entry, strict=True), tip=section.tip)
    assert (entry_id, fields) == (f"{CALLER.epoch}-2", told)
    section = calls.send([assign(book, "u")])
    assert (section.outcome, section.seq, section.tip, section.entry) == ("ok", "2", "mine", "")
