"""A script of the data plane is called by its parameters, and its keys follow from them."""

from __future__ import annotations

import pytest

from coupon_svc.domain.holding import Holding
from coupon_svc.domain.position import Epoch, Position, Seq
from coupon_svc.redis.calls import QUARANTINED, bind_scripts, bind_to_shard
from coupon_svc.redis.keys import ShardKeys
from coupon_svc.redis.scripts import Scripts

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
    "meta": KEYS.meta,
    "events": KEYS.events,
    "book": KEYS.book("bk_03x"),
    "free": KEYS.free("bk_03x"),
    "holders": KEYS.holders("bk_03x"),
    "quarantine": KEYS.quarantine("bk_03x"),
    "coupons": KEYS.coupons(7, "ann {x}"),
    "lock": KEYS.lock("bk_03x", "A-1"),
    "idem": KEYS.idem(7, "bk_03x", IDEMPOTENCY_KEY),
}


def parameters(name: str) -> set[str]:
    """What the script's generated function takes, but for what the data plane fills in."""
    pack = bind_to_shard(SCRIPTS[name]).pack
    return {*pack.__code__.co_varnames[: pack.__code__.co_argcount + pack.__code__.co_kwonlyargcount]} - {
        "prefix",
        "epoch",
        "seen_seq",
    }


@pytest.mark.parametrize("name", sorted(bind_scripts(SCRIPTS)))
@pytest.mark.parametrize("idempotency_key", [IDEMPOTENCY_KEY, ""])
def test_the_command_is_the_one_that_its_keys_and_arguments_make(name: str, idempotency_key: str) -> None:
    script, given = SCRIPTS[name], GIVEN | {"idempotency_key": idempotency_key, "epoch": 4, "seen_seq": 17}
    wanted = parameters(name)
    sent = bind_to_shard(script).pack(
        KEYS.prefix, 4, 17, **{key: value for key, value in given.items() if key in wanted}
    )
    spelled: dict[str, object] = {key.name: SPELLED[key.name] for key in script.contract.keys}
    if "codes" in wanted:
        spelled["lock"] = [KEYS.lock("bk_03x", code) for code in ("A-1", "B-2")]
    if not idempotency_key and "idem" in spelled:
        spelled["idem"] = None
    assert sent == script.pack(**spelled, **{arg.name: given[arg.name] for arg in script.contract.args})


def test_only_scripts_that_are_fenced_by_what_was_seen_are_the_data_plane_s() -> None:
    assert "assign_coupon" in bind_scripts(SCRIPTS)
    assert "certify_shard" not in bind_scripts(SCRIPTS)


def test_positions_and_holders_of_a_reply_are_types() -> None:
    first, second = Position(Epoch(4), Seq(1)), Position(Epoch(4), Seq(17))
    bound = bind_scripts(SCRIPTS)
    reply = bound["assign_code"].reply(["already_yours", "A-1", "5", "4-1/4-17", "redis", ""])
    assert reply.position == (first, second)
    assert reply.code == "A-1"
    holders = ["", QUARANTINED, "4-1/4-17 2 5 ann"]
    reply = bound["read_codes"].reply(["ok", "9", "redis", "", holders, [-2, -2, 0], "active"])
    assert reply.holders == ["", QUARANTINED, Holding(first, second, 2, 5, "ann")]
    assert bound["assign_coupon"].reply(["refilling"]).outcome == "refilling"
