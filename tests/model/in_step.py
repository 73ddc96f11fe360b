"""What in the service the model knows: each script, and each step after which the writer may die. A new one makes a test red
until it stands here, among what the model has or what it leaves out and why."""

from __future__ import annotations

MODELLED_CRASH_POINTS = frozenset(
    {
        "own.taken",
        "persist.read",
        "persist.committed",
        "persist.published",
        "lend.leased",
        "lend.brought",
        "lend.lone_brought",
        "recover.begun",
        "recover.shut",
        "recover.drained",
        "recover.judged",
        "recover.book_settled",
        "recover.settled",
        "recover.wiped",
        "recover.coupons_restored",
        "recover.restored",
        "recover.certified",
    }
)
OTHER_CRASH_POINTS = {
    "persist.written": "within a transaction: as if it had not begun",
    "lend.put": "the book is there from the first state on",
    "lend.marked": "the book is there from the first state on",
}

MODELLED_SCRIPTS = frozenset(
    {
        "assign_code",
        "assign_coupon",
        "certify_shard",
        "doubt_shard",
        "load_codes",
        "open_shard",
        "publish_positions",
        "redeem_coupon",
        "release_coupon",
        "restore_book",
        "restore_coupons",
        "restore_idem",
        "shut_shard",
        "wipe_keys",
    }
)
OTHER_SCRIPTS = {
    "list_coupons": "reads are not modelled",
    "read_book": "reads are not modelled",
    "read_codes": "reads are not modelled",
    "lock_coupon": "locks live in Redis alone; it is the redeem that counts",
    "unlock_coupon": "locks live in Redis alone; it is the redeem that counts",
    "put_book": "the book is there from the first state on",
}
