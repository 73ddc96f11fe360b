"""What in the service is what in the model. A part of the service that does not stand here makes a test red, until the
model knows it; "" is what the model leaves out, with the reason beside it."""

from __future__ import annotations

CRASH_POINTS = {
    "own.taken": "takes the shard",
    "persist.read": "reads events",
    "persist.written": "",  # within a transaction: as if it had not begun
    "persist.committed": "commits",
    "persist.published": "tells the position",
    "lend.put": "",  # the book is there from the first state on
    "lend.leased": "lends code",
    "lend.brought": "brings codes",
    "lend.marked": "",  # as lend.put
    "lend.lone_brought": "brings codes",
    "recover.begun": "begins epoch",
    "recover.shut": "shut on redis",
    "recover.drained": "drains the stream",
    "recover.judged": "settles epoch",
    "recover.book_settled": "settles: code",  # each code stands for a book
    "recover.settled": "has settled all books",
    "recover.wiped": "wipe on redis",
    "recover.coupons_restored": "restore_coupons on redis",
    "recover.restored": "restore_idem on redis",
    "recover.certified": "certify on redis",
}
"""The points of coupon_svc/writer/crash.py, and a word of the step that ends there."""

METHODS = {
    "Recoverer": {
        "recover": "begins epoch",
        "_drain": "drains the stream",
        "_require_told": "",  # only a ledger that went back can break it, and here it does not
        "_nothing_lost": "settles",
        "_agrees": "judges",
        "_judge": "settles epoch",
        "_wait_for_reports": "settles",
        "_patience": "",  # how long to wait is free here
        "_walk_coupons": "restore_coupons on redis",
        "_settle": "settles",
        "_settle_book": "settles: code",
        "_restore_rules": "restore_book on redis",
        "_rebuild": "restore_book on redis",
        "_quarantine": "restore_book on redis",
        "_restore_coupons": "restore_coupons on redis",
        "_restore_idem": "restore_idem on redis",
        "_restore_records": "restore_idem on redis",
    },
    "Persister": {
        "run": "is thrown away",
        "turn": "reads events",
        "_waited_for": "",  # when to read is free here
        "_commit": "commits",
        "_commit_alone": "is thrown away",
        "_shut_unreadable": "",  # no key is of another type
        "_transact": "commits",
        "_rewritten": "commits",
        "_without_poison": "",  # no event is poisoned
        "_stop": "",  # nothing contradicts the ledger while every safeguard is in
        "_publish": "tells the position",
        "show_away": "",  # refusals for want of Postgres decide nothing
        "_connected": "",
    },
    "Lender": {
        "count_assigned": "",  # when to lend is free here
        "look_at": "",
        "run": "brings codes",
        "turn": "brings codes",
        "settle": "brings again what is outstanding",
        "_bring_again": "brings again what is outstanding",
        "_bring_outstanding": "brings again what is outstanding",
        "_guarded": "load is refused",
        "_kept_back": "",  # what Redis is told of codes on their way decides nothing but a refusal
        "_load_changed": "",
        "_load_book": "",  # the book is there from the first state on
        "_refill": "lends code",
        "_bring_lone": "has codes that were lent alone to bring",
        "_bring": "brings codes",
        "_shard_of": "",
        "_connected": "",
    },
}
"""The methods of the writer's parts, and a word of the step that stands for each."""

SCRIPTS = {
    "assign_code": "lent alone",
    "assign_coupon": "is popped",
    "certify_shard": "certify on redis",
    "doubt_shard": "the shard in doubt",
    "list_coupons": "",  # reads are not modelled
    "load_codes": "brings codes",
    "lock_coupon": "",  # locks live in Redis alone; it is the redeem that counts
    "open_shard": "opens the shard",
    "publish_position": "tells the position",
    "put_book": "",  # the book is there from the first state on
    "read_book": "",
    "read_codes": "",
    "redeem_coupon": "is redeemed on",
    "release_coupon": "is back in redis",
    "restore_book": "restore_book on redis",
    "restore_coupons": "restore_coupons on redis",
    "restore_idem": "restore_idem on redis",
    "shut_shard": "shut on redis",
    "unlock_coupon": "",
    "wipe_keys": "wipe on redis",
}
"""The scripts in lua/, and a word of the step in which each runs."""
