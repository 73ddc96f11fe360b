"""Every script by its name, each as a request that goes through on the shard that `worn` prepares."""

from __future__ import annotations

from collections.abc import Callable

from tests.scripts.runner import DAY_MS, TENANT, Caller, Owner, Reply, Shard

KEYED = Caller(idem="key 1", fingerprint="f1")
LOST = "3-9 0 1700000000000 w"
"""What a receipt says of the code Q-1."""


def worn(shard: Shard) -> str:
    """A book that has lived: A-1 is assigned to u under KEYED, B-2 to v and locked with t1, C-3 is in the pool and Q-1 in
    quarantine."""
    book = shard.new_book("A-1", "B-2", "C-3", max_redemptions_per_code="3", ack="redis")
    assert shard.assign_coupon(book, "u", KEYED)[1] == "A-1"
    assert shard.assign_coupon(book, "v")[1] == "B-2"
    assert shard.lock_coupon(book, "B-2", new_token="t1")[0] == "ok"
    shard.quarantine(book, "Q-1")
    return book


def api_requests(shard: Shard, book: str) -> dict[str, Callable[[Caller], Reply]]:
    return {
        "assign_coupon": lambda caller: shard.assign_coupon(book, "u", caller),
        "assign_code": lambda caller: shard.assign_code(book, "u", "A-1", caller),
        "lock_coupon": lambda caller: shard.lock_coupon(book, "A-1", caller),
        "unlock_coupon": lambda caller: shard.unlock_coupon(book, "B-2", "t1", caller),
        "redeem_coupon": lambda caller: shard.redeem_coupon(book, "B-2", caller, token="t1"),
        "read_book": lambda caller: shard.read_book(book, caller),
        "read_codes": lambda caller: shard.read_codes(book, ["A-1", "Q-1"], caller),
        "list_coupons": lambda caller: shard.list_coupons("u", caller),
        "release_coupon": lambda caller: shard.release_coupon(book, "Q-1", LOST, caller),
        "doubt_shard": shard.doubt_shard,
    }


def owner_requests(shard: Shard, book: str) -> dict[str, Callable[[Owner], Reply]]:
    return {
        "open_shard": shard.open_shard,
        "publish_positions": lambda owner: shard.publish_position(2, owner, trim_seq=2, message="told"),
        "put_book": lambda owner: shard.put_book(book, 2, owner, known=True, status="closed"),
        "load_codes": lambda owner: shard.load_codes(book, ["D-4"], owner, kept_back=1),
    }


def recovery_requests(shard: Shard, book: str) -> dict[str, Callable[[int], Reply]]:
    """By the owner's generation."""
    return {
        "wipe_keys": lambda generation: shard.wipe_keys([shard.keys.book(book), shard.keys.events], generation),
        "restore_book": lambda generation: shard.restore_book(book, generation, quarantined=["A-1"], status="paused"),
        "restore_coupons": lambda generation: shard.restore_coupons(book, {"C-3": LOST}, generation, TENANT),
        "restore_idem": lambda generation: shard.restore_idem(book, {"key 2": ('["f2"]', DAY_MS)}, generation),
        "certify_shard": lambda generation: shard.certify_shard(Owner(9, generation)),
        "shut_shard": shard.shut_shard,
    }
