"""The keys the scripts leave behind, and what names may stand in them."""

from __future__ import annotations

import pytest
from redis.exceptions import ResponseError

from coupon_svc.domain.shards import key_slot
from tests.scripts.runner import Caller, Server, Shard

USER_IDS = [
    "auth0|7",
    "two words",
    " 4-1 0 17 x",
    "ends with a space ",
    "a:b:c;d",
    "{0}{07}",
    "}{",
    "a/b\\c",
    'quo"ted',
    "žluťoučký 🎟 kůň",
    "\u2028",
    "%d%s",
    "*?[a-z]",
    "-",
    "x" * 128,
]


@pytest.mark.parametrize("user_id", USER_IDS, ids=range(len(USER_IDS)))
def test_a_user_id_of_any_shape_goes_through_a_coupons_life(shard: Shard, user_id: str) -> None:
    code = "A.B_C~D+E@F-G"
    book = shard.new_book(code, max_redemptions_per_code="2", max_codes_per_user="1", stored=user_id)
    keyed = [Caller(idem=f"{user_id} {number}", fingerprint="f") for number in range(4)]
    first = shard.assign_coupon(book, user_id, keyed[0])
    assert shard.assign_coupon(book, user_id, keyed[0]) == ["replayed", *first[1:]]
    assert shard.assign_coupon(book, user_id)[0] == "user_code_limit"
    assert shard.assign_code(book, user_id, code) == ["already_yours", *first[1:]]
    assert shard.list_coupons(user_id) == ["ok", [f"{book}:{code}"]]
    lock = shard.lock_coupon(book, code, keyed[1], user_id=user_id, new_token="t1")
    assert lock[:3] == ["ok", user_id, "t1"]
    assert shard.lock_coupon(book, code, keyed[1], user_id=user_id) == ["replayed", *lock[1:]]
    assert shard.lock_coupon(book, code, user_id=user_id + "x", token="t1") == ["not_holder"]
    redeemed = shard.redeem_coupon(book, code, keyed[2], token="t1", reference=user_id, metadata=user_id)
    assert redeemed[:2] == ["ok", user_id]
    assert shard.redeem_coupon(book, code, keyed[2]) == ["replayed", *redeemed[1:]]
    assert shard.unlock_coupon(book, code, "t1", keyed[3]) == ["ok"]
    assert shard.unlock_coupon(book, code, "t1", keyed[3]) == ["replayed"]
    assert shard.read_codes(book, [code])[4][0] == f"4-1/4-2 1 {first[2]} {user_id}"
    assigned, spent = shard.events()
    assert (assigned.user_id, assigned.idem) == (user_id, keyed[0].idem)
    assert (spent.user_id, spent.reference, spent.metadata, spent.idem) == (user_id, user_id, user_id, keyed[2].idem)


def test_every_key_has_the_shards_tag_and_only_locks_and_idempotency_keys_end(shard: Shard) -> None:
    book = shard.new_book("A-1", "B-2", "C-3")
    shard.assign_coupon(book, "{x}", Caller(idem="{1}", fingerprint="f"))
    shard.assign_code(book, "u", "B-2", Caller(idem="2", fingerprint="f"))
    shard.lock_coupon(book, "A-1", Caller(idem="3", fingerprint="f"), new_token="t1")
    shard.lock_coupon(book, "B-2", new_token="t2")
    shard.redeem_coupon(book, "B-2", Caller(idem="4", fingerprint="f"), token="t2")
    shard.unlock_coupon(book, "B-2", "t2", Caller(idem="5", fingerprint="f"))
    shard.publish_position(1, trim_seq=1)
    kept = {"meta", "events", f"book:{book}", f"free:{book}", f"holders:{book}", "coupons:1:{x}", "coupons:1:u"}
    ending = {f"lock:{book}:A-1", *(f"idem:1:{book}:{key}" for key in ("{1}", "2", "3", "4", "5"))}
    found = shard.snapshot()
    assert {name for name, (_, ends_at) in found.items() if ends_at == -1} == kept
    assert {name for name, (_, ends_at) in found.items() if ends_at != -1} == ending
    slots = {shard.redis.execute_command("CLUSTER KEYSLOT", shard.keys.prefix + name) for name in found}
    assert slots == {key_slot(shard.keys.prefix[4:-2])}


def test_the_cluster_refuses_a_script_that_touches_two_slots(server: Server) -> None:
    """Else all the tests here that ran on it would have shown nothing."""
    if not server.admin.info("cluster")["cluster_enabled"]:
        assert server.admin.eval("return redis.call('GET', KEYS[2])", 2, "cb:{a}", "cb:{b}") is None
        return
    with pytest.raises(ResponseError, match="same slot"):
        server.admin.eval("return 1", 2, "cb:{a}", "cb:{b}")
    with pytest.raises(ResponseError, match="slot"):
        server.admin.eval("#!lua\nreturn redis.call('GET', 'cb:{b}')", 1, "cb:{a}")
