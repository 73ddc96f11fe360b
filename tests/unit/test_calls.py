"""An operation is called by its parameters, and its keys follow from them."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from coupon_svc.domain.holding import Holding
from coupon_svc.domain.position import Epoch, Position, Seq
from coupon_svc.redis.calls import QUARANTINED, EntryId, KeyTable, Section, bind_operation, call_command
from coupon_svc.redis.keys import ShardKeys
from coupon_svc.redis.scripts import Scripts
from tests.sent import names_of

SCRIPTS = Scripts()
KEYS = ShardKeys(3, 16)
GIVEN = {
    "tenant_id": 7,
    "book_id": "bk_03x",
    "code": "A-1",
    "codes": ["A-1", "B-2"],
    "user_id": "ann {x}",
    "lock_token": "lk_old",
    "new_token": "lk_new",
    "ttl_ms": 1000,
    "reference": "order 1",
    "metadata": "{}",
    "holding": "1-1 0 1 ann",
    "low": "-",
    "high": "+",
    "limit": 10,
    "fingerprint": "f",
}
IDEMPOTENCY_KEY = "k:1 {2}"
SPELLED = {
    "book": KEYS.book("bk_03x"),
    "free": KEYS.free("bk_03x"),
    "holders": KEYS.holders("bk_03x"),
    "quarantine": KEYS.quarantine("bk_03x"),
    "coupons": KEYS.coupons(7, "ann {x}"),
    "lock": KEYS.lock("bk_03x", "A-1"),
    "idem": KEYS.idem(7, "bk_03x", IDEMPOTENCY_KEY),
    "list": KEYS.idem(7, "bk_03x", "key of a list"),
}


OPERATIONS = {name: bind_operation(one.contract) for name, one in SCRIPTS.operations.items()}


def parameters(name: str) -> set[str]:
    """What the operation's generated function takes, but for the call's table and the prefix of its keys."""
    code = OPERATIONS[name].pack.__code__
    return {*code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]} - {"keys", "prefix"}


@pytest.mark.parametrize("name", sorted(OPERATIONS))
@pytest.mark.parametrize("idempotency_key", [IDEMPOTENCY_KEY, ""])
def test_an_operation_is_sent_in_the_order_of_its_header(name: str, idempotency_key: str) -> None:
    contract, given = SCRIPTS.operations[name].contract, GIVEN | {"idempotency_key": idempotency_key}
    given["list_idempotency_key"] = idempotency_key and "key of a list"
    keys: KeyTable = {"one that was there before": 1}
    wanted = {one: given[one] for one in parameters(name)}
    sent_name, *sent = OPERATIONS[name].pack(keys, KEYS.prefix, **wanted)
    in_order = list(keys)

    def spelled(number: Any) -> Any:
        return [in_order[one - 1] for one in number] if isinstance(number, list) else number and in_order[number - 1]

    found = [spelled(number) for number in sent[: len(contract.keys)]]
    expected: dict[str, Any] = {key.name: SPELLED[key.name] for key in contract.keys}
    if "codes" in wanted:
        expected["lock"] = [KEYS.lock("bk_03x", code) for code in ("A-1", "B-2")]
    if not idempotency_key and "idem" in expected:
        expected["idem"] = 0
    if not idempotency_key and "list" in expected:
        expected["list"] = 0
    assert sent_name == name
    assert found == list(expected.values())
    given = {one: list(value) if isinstance(value, list) else str(value) for one, value in given.items()}
    assert sent[len(contract.keys) :] == [given[arg.name] for arg in contract.args]


def test_a_key_stands_in_a_call_once() -> None:
    keys: KeyTable = {}
    pack = OPERATIONS["assign_coupon"].pack
    first, second, other = (
        pack(keys, KEYS.prefix, tenant_id=7, book_id="bk_03x", user_id=user, idempotency_key="k")
        for user in ("ann", "ann", "bob")
    )
    assert first == second
    assert first[1:6] == [1, 2, 3, 4, 5]
    assert other[1:6] == [1, 2, 3, 6, 5]
    assert list(keys.values()) == [1, 2, 3, 4, 5, 6]


def test_a_call_is_the_keys_and_the_sections() -> None:
    keys: KeyTable = {}
    section = Section(keys, KEYS, 4, 17)
    section.add(["read_book", 3, "7"])
    keys["a book's"] = 3
    *command, packed = call_command("function", keys, [section])
    assert command == ["FCALL", "function", 3, KEYS.meta, KEYS.events, "a book's"]
    assert isinstance(packed, bytes)
    values = {"meta": 1, "events": 2, "epoch": "4", "seen_seq": "17", "tip": section.tip, "count": 1}
    head = [values[name] for name in names_of(SCRIPTS.section)]
    assert msgspec.msgpack.decode(packed) == [*head, "read_book", 3, "7"]


def test_no_two_sections_have_one_tip() -> None:
    assert len({Section({}, KEYS, 4, 17).tip for _ in range(100)}) == 100


@pytest.mark.parametrize(
    ("name", "parameters", "weight"),
    [
        ("assign_coupon", {}, 1),
        ("read_codes", {"codes": ["A"] * 7}, 1),
        ("read_codes", {"codes": ["A"] * 1000}, 126),
        ("list_coupons", {"limit": 1001}, 126),
        ("redeem_coupon", {}, 1),
        ("redeem_coupon", {"metadata": "x" * 4096}, 5),
    ],
)
def test_what_is_long_weighs_more(name: str, parameters: dict[str, Any], weight: int) -> None:
    weigh = OPERATIONS[name].weigh
    assert (weigh(parameters) if weigh else 1) == weight


def test_an_operation_that_made_an_event_is_told_its_entry() -> None:
    entry = EntryId(4, 21, "tip")
    answer = ["A-1", "5", "4-21", "redis", ""]
    assert OPERATIONS["assign_coupon"].reply(["ok", *answer], entry).entry == entry
    assert OPERATIONS["assign_coupon"].reply(["replayed", *answer], entry).entry is None
    assert OPERATIONS["assign_coupon"].reply(["refilling"], entry).entry is None
    assert OPERATIONS["assign_code"].reply(["confirmed", *answer], entry).entry == entry
    assert OPERATIONS["assign_code"].reply(["already_yours", *answer], entry).entry is None
    assert OPERATIONS["unlock_coupon"].reply(["ok"], entry).entry is None


def test_positions_and_holders_of_a_reply_are_types() -> None:
    first, second = Position(Epoch(4), Seq(1)), Position(Epoch(4), Seq(17))
    reply = OPERATIONS["assign_code"].reply(["already_yours", "A-1", "5", "4-1/4-17", "redis", ""])
    assert reply.position == (first, second)
    assert reply.code == "A-1"
    holders = ["", QUARANTINED, "4-1/4-17 2 5 ann"]
    reply = OPERATIONS["read_codes"].reply(["ok", "9", "redis", "", holders, [-2, -2, 0], "active"])
    assert reply.holders == ["", QUARANTINED, Holding(first, second, 2, 5, "ann")]
    assert OPERATIONS["assign_coupon"].reply(["refilling"]).outcome == "refilling"
