"""A shard that was rebuilt from what the ledger knows answers as it did before."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from coupon_svc.domain.books import Ack
from coupon_svc.domain.holding import Holding, parse_positions
from coupon_svc.domain.position import Epoch, Position, Seq
from coupon_svc.redis.codec import AssignRecord, RedeemRecord
from tests.scripts.runner import DAY_MS, EPOCH, OWNER, Caller, Owner, Reply, Shard

USES_MAX = 2
NEXT = Owner(EPOCH + 1)
BEFORE, AFTER = Caller(EPOCH), Caller(EPOCH + 1)
AFRESH = Position(Epoch(0), Seq(0))
"""Stands for the position of the last redemption, which a rebuilt shard does not know."""
CODES = ["A-1", "B-2", "C-3", "D-4", "E-5"]


def keyed(caller: Caller, idem: str) -> Caller:
    return caller._replace(idem=idem, fingerprint=f"f {idem}")


def live(shard: Shard) -> str:
    """A book with a coupon of each kind: untouched, used once, spent, two of one user; one code is left in the pool."""
    book = shard.new_book(*CODES, max_redemptions_per_code=str(USES_MAX), max_codes_per_user="2")
    shard.assign_coupon(book, "u", keyed(BEFORE, "a1"))
    shard.assign_code(book, "a user: {x}", "B-2", keyed(BEFORE, "a2"))
    shard.assign_coupon(book, "v")
    shard.assign_coupon(book, "u")
    shard.redeem_coupon(book, "B-2", keyed(BEFORE, "r1"), reference="r", metadata='{"a":1}')
    shard.redeem_coupon(book, "C-3", keyed(BEFORE, "r2"))
    shard.redeem_coupon(book, "C-3", keyed(BEFORE, "r3"))
    assert len(shard.events()) == 7
    return book


class Ledger:
    """What the ledger keeps of a shard's events, and a recovery restores."""

    def __init__(self, shard: Shard, rules: Mapping[str, str]) -> None:
        self.coupons: dict[str, str] = {}
        self.records: dict[str, tuple[str, int]] = {}
        self.spent = self.uses = 0
        self.rules = {
            name: value
            for name, value in rules.items()
            if name not in ("lent", "redeemed", "partly_redeemed", "quarantined")
        }
        for event in shard.events():
            position = str(event.position)
            if event.uses is None:
                self.coupons[event.code] = f"{position} 0 {event.at_ms} {event.user_id}"
                record: AssignRecord | RedeemRecord = AssignRecord(
                    str(event.fingerprint),
                    event.code,
                    event.at_ms,
                    event.position,
                    event.position,
                    Ack(rules["ack"]),
                    USES_MAX,
                )
            else:
                held = Holding.parse(self.coupons[event.code])
                self.coupons[event.code] = held._replace(uses=event.uses).format()
                self.spent += event.uses == USES_MAX
                self.uses += 1
                record = RedeemRecord(
                    str(event.fingerprint),
                    event.user_id,
                    event.at_ms,
                    event.position,
                    event.uses,
                    USES_MAX - event.uses,
                )
            if event.idem:
                self.records[event.idem] = (record.encode(), DAY_MS)

    def recover(self, shard: Shard, book: str) -> None:
        """All steps from shutting the shard to certifying it."""
        assert shard.shut_shard() == ["ok"]
        doomed = [shard.keys.prefix + name for name in shard.snapshot() if name != "meta"]
        assert shard.wipe_keys(doomed) == ["ok"]
        assert shard.snapshot().keys() == {"meta"}
        counters: dict[str, Any] = {
            "lent": len(self.coupons),
            "redeemed": self.spent,
            "partly_redeemed": self.uses - self.spent,
        }
        assert shard.restore_book(book, quarantined=["Q-1"], **{**self.rules, **counters}) == ["ok"]
        assert shard.restore_coupons(book, self.coupons) == ["ok"]
        assert shard.restore_idem(book, self.records) == ["ok"]
        assert shard.certify_shard(NEXT) == ["ok"]
        shard.keep_ledger_at_hand()
        assert shard.load_codes(book, ["E-5"], NEXT) == ["ok", 1, 1]


def answers(shard: Shard, book: str, caller: Caller) -> dict[str, Reply]:
    """What may be asked without changing anything; and of positions the first, the rest tells only what to wait for."""

    def assigned(user_id: str, code: str) -> Reply:
        reply = shard.assign_code(book, user_id, code, caller)
        if reply[0] not in ("ok", "already_yours", "replayed"):
            return reply
        outcome, code, at_ms, positions, *rest = reply
        return [outcome, code, at_ms, parse_positions(positions)[0], *rest]

    found: dict[str, Any] = {f"assign {user} {code}": assigned(user, code) for user in ("u", "v") for code in CODES[:4]}
    found["assign B-2"] = assigned("a user: {x}", "B-2")
    found["assign more"] = shard.assign_coupon(book, "u", caller)
    found["replay a1"] = shard.assign_coupon(book, "u", keyed(caller, "a1"))
    found["replay a2"] = shard.assign_code(book, "a user: {x}", "B-2", keyed(caller, "a2"))
    found["replay r1"] = shard.redeem_coupon(book, "B-2", keyed(caller, "r1"))
    found["replay r2"] = shard.redeem_coupon(book, "C-3", keyed(caller, "r2"))
    found["replay r3"] = shard.redeem_coupon(book, "C-3", keyed(caller, "r3"))
    found["reused"] = shard.redeem_coupon(book, "A-1", keyed(caller, "a1")._replace(fingerprint="another"))
    found["redeem C-3"] = shard.redeem_coupon(book, "C-3", caller)
    found["redeem E-5"] = shard.redeem_coupon(book, "E-5", caller)
    found["redeem A-1"] = shard.redeem_coupon(book, "A-1", caller, user_id="v")
    found["lock C-3"] = shard.lock_coupon(book, "C-3", caller)
    for user in ("u", "v", "a user: {x}", "nobody"):
        found[f"list {user}"] = shard.list_coupons(user, caller)
    *rules_and_counts, _, redemptions = shard.read_book(book, caller)
    found["book"] = [*rules_and_counts, redemptions]
    holders = shard.read_codes(book, CODES, caller)[4]
    found["codes"] = [
        text if text in ("", "quarantined") else Holding.parse(text)._replace(last=AFRESH) for text in holders
    ]
    return found


def test_a_rebuilt_shard_answers_as_it_did(shard: Shard) -> None:
    book = live(shard)
    before = answers(shard, book, BEFORE)
    assert {reply[0] for name, reply in before.items() if name.startswith("assign")} == {
        "already_yours",
        "already_assigned",
        "user_code_limit",
    }
    ledger = Ledger(shard, shard.book(book))
    ledger.recover(shard, book)
    assert answers(shard, book, AFTER) == before


def test_a_rebuilt_shard_holds_what_it_held(shard: Shard) -> None:
    book = live(shard)
    kept = {**shard.book(book), "quarantined": "1"}
    holders, free = shard.holders(book), shard.free(book)
    lists = {user: shard.coupons(user) for user in ("u", "v", "a user: {x}")}
    records = {idem: shard.redis.get(shard.idem_key(book, idem)) for idem in ("a1", "a2", "r1", "r2", "r3")}
    names = shard.snapshot().keys()
    Ledger(shard, shard.book(book)).recover(shard, book)
    assert shard.book(book) == kept
    assert shard.free(book) == free
    for code, holder in holders.items():
        held = Holding.parse(holder)
        assert Holding.parse(shard.holders(book)[code]) == held._replace(last=held.assigned)
    assert {user: shard.coupons(user) for user in lists} == lists
    assert {idem: shard.redis.get(shard.idem_key(book, idem)) for idem in records} == records
    assert shard.snapshot().keys() == (names - {"events"}) | {f"quarantine:{book}"}


def test_a_coupons_life_goes_on_after_a_recovery(shard: Shard) -> None:
    book = live(shard)
    Ledger(shard, shard.book(book)).recover(shard, book)
    reply = shard.redeem_coupon(book, "B-2", AFTER)
    assert (reply[0], reply[1], reply[3:]) == ("ok", "a user: {x}", ["5-1", "2", "0"])
    assert shard.holders(book)["B-2"].startswith("4-2/5-1 2 ")
    assert shard.book(book)["redeemed"] == "2"
    assert shard.redeem_coupon(book, "B-2", AFTER) == ["already_redeemed"]
    assert shard.lock_coupon(book, "A-1", AFTER, new_token="t1")[:3] == ["ok", "u", "t1"]
    assert shard.assign_coupon(book, "v", AFTER)[1:4:2] == ["E-5", "5-2"]
    assert shard.assign_coupon(book, "w", AFTER) == ["book_exhausted"]


def test_a_code_in_quarantine_is_refused_and_shown_until_it_is_released(shard: Shard) -> None:
    book = live(shard)
    Ledger(shard, shard.book(book)).recover(shard, book)
    for reply in (
        shard.assign_code(book, "w", "Q-1", AFTER),
        shard.lock_coupon(book, "Q-1", AFTER),
        shard.redeem_coupon(book, "Q-1", AFTER),
    ):
        assert reply == ["code_quarantined"]
    assert shard.read_codes(book, ["Q-1"], AFTER)[4] == ["quarantined"]
    assert shard.assign_coupon(book, "w", AFTER)[1] == "E-5"
    assert shard.assign_coupon(book, "x", AFTER) == ["book_exhausted"]
    assert shard.release_coupon(book, "Q-1", "4-8 0 1700000000000 w", AFTER) == ["ok"]
    assert shard.assign_code(book, "w", "Q-1", AFTER)[:4] == ["already_yours", "Q-1", "1700000000000", "4-8"]


def test_every_step_of_a_recovery_may_be_sent_twice(shard: Shard) -> None:
    """And a recovery that broke off is begun again from the start, by the same owner or the next one."""
    book = live(shard)
    ledger = Ledger(shard, shard.book(book))
    shard.shut_shard()
    shard.wipe_keys([shard.keys.holders(book)])
    shard.restore_book(book, quarantined=["Q-1", "Q-2"], lent=9)
    shard.restore_coupons(book, {"A-1": ledger.coupons["A-1"]})
    ledger.recover(shard, book)
    once = shard.snapshot()
    shard.shut_shard()
    ledger.recover(shard, book)
    assert shard.snapshot().keys() == once.keys()
    for name in (f"book:{book}", f"holders:{book}", f"free:{book}", f"quarantine:{book}", "coupons:1:u"):
        assert shard.snapshot()[name] == once[name], name
    with shard.writes_nothing():
        assert shard.open_shard(OWNER) == ["suspect", "epoch"]


def test_the_record_of_a_code_that_was_confirmed_is_the_one_that_the_script_keeps(shard: Shard) -> None:
    book = shard.assigned("A-1", max_redemptions_per_code="", ack="redis")
    shard.redeem_coupon(book, "A-1")
    assert shard.assign_code(book, "u", "A-1", keyed(BEFORE, "c1"))[0] == "confirmed"
    assigned, _, confirmed = shard.events()
    record = AssignRecord(
        "f c1", "A-1", assigned.at_ms, assigned.position, confirmed.position, Ack.REDIS, None, already_yours=True
    )
    # As JSON, since Redis escapes the slash.
    assert json.loads(shard.redis.get(shard.idem_key(book, "c1"))) == json.loads(record.encode())
