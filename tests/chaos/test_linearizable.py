"""The checker accepts what one coupon after the other could have lived through, and nothing else."""

from __future__ import annotations

import math
import random

import pytest

from tests.chaos.run import Attempt, lost_before_it_was_told
from tests.linearizable import CodeModel, CodeState, LimitModel, Operation, linearizable

CODE = CodeModel(2)
LOCKS_LOST = CodeModel(2, loses_locks=True)
RECORDS_LOST = CodeModel(2, loses_locks=True, loses_records=True)


def ok(verb: str, at: tuple[float, float], user: str = "ann", **seen: object) -> Operation:
    return Operation(verb, "ok", *at, user=user, **seen)  # type: ignore[arg-type]


def refused(verb: str, at: tuple[float, float], why: str, user: str = "ann", shown: str = "") -> Operation:
    return Operation(verb, "refused", *at, user=user, why=why, shown=shown)


def unknown(verb: str, invoked_s: float, user: str = "ann", shown: str = "") -> Operation:
    return Operation(verb, "unknown", invoked_s, math.inf, user=user, shown=shown)


ASSIGNED = ok("assign", (0, 1))
LOCKED = ok("lock", (2, 3), token="t1", ttl_s=100)

GOOD = {
    "nothing": [],
    "a life": [
        refused("redeem", (-2, -1), "not_assigned"),
        ASSIGNED,
        LOCKED,
        refused("redeem", (4, 5), "locked"),
        ok("redeem", (6, 7), shown="t1", uses=1),
        ok("lock", (8, 9), token="t2", ttl_s=100),
        ok("lock", (10, 11), shown="t2", token="t2", ttl_s=100, found=True),
        ok("unlock", (12, 13), shown="t2"),
        ok("redeem", (14, 15), uses=2),
        refused("redeem", (16, 17), "already_redeemed"),
        refused("assign_code", (18, 19), "already_assigned", user="bob"),
        ok("assign_code", (20, 21), found=True),
    ],
    "two at once, in one order or the other": [
        ASSIGNED,
        ok("redeem", (2, 9), uses=2),
        ok("redeem", (3, 8), uses=1),
    ],
    "refused because of what was not answered yet": [
        ok("assign_code", (0, 9), user="bob"),
        refused("assign_code", (1, 2), "already_assigned"),
    ],
    "refused because of what was never answered": [
        unknown("assign_code", 0, user="bob"),
        refused("assign_code", (1, 2), "already_assigned"),
    ],
    "what is unknown need not have happened": [unknown("assign_code", 0, user="bob"), ok("assign_code", (1, 2))],
    "what is unknown may happen late": [
        ASSIGNED,
        unknown("redeem", 2),
        ok("redeem", (3, 4), uses=1),
        refused("redeem", (5, 6), "already_redeemed"),
    ],
    "a lock that has run out": [
        ASSIGNED,
        ok("lock", (2, 3), token="t1", ttl_s=1),
        ok("lock", (3.5, 4), token="t2", ttl_s=1),
        refused("unlock", (5, 6), "lock_not_held", shown="t1"),
    ],
    "a lock of which nobody knows the token": [
        ASSIGNED,
        unknown("lock", 2),
        refused("redeem", (3, 4), "locked"),
    ],
    "an unlock of what is not locked": [ASSIGNED, ok("unlock", (2, 3), shown="t1")],
}

BAD = {
    "assigned twice": [ASSIGNED, ok("assign", (2, 3), user="bob")],
    "assigned twice at once": [ASSIGNED, ok("assign_code", (0, 1), user="bob")],
    "given anew to the same user": [ASSIGNED, ok("assign_code", (2, 3))],
    "found where it was not": [ok("assign_code", (0, 1), found=True)],
    "redeemed before it was assigned": [ok("redeem", (-2, -1), uses=1), ASSIGNED],
    "redeemed by another": [ASSIGNED, ok("redeem", (2, 3), user="bob", uses=1)],
    "redeemed too often": [ASSIGNED, *(ok("redeem", (2 * n, 2 * n + 1), uses=n) for n in (1, 2, 3))],
    "one use spent twice": [ASSIGNED, ok("redeem", (2, 3), uses=1), ok("redeem", (4, 5), uses=1)],
    "a redemption that is forgotten": [ASSIGNED, ok("redeem", (2, 3), uses=2), unknown("redeem", 4)],
    "refused as spent while a use was left": [
        ASSIGNED,
        ok("redeem", (2, 3), uses=1),
        refused("redeem", (4, 5), "already_redeemed"),
    ],
    "an assignment that is forgotten": [ASSIGNED, refused("redeem", (2, 3), "not_assigned")],
    "forgotten after it was redeemed": [
        ASSIGNED,
        ok("redeem", (2, 3), uses=1),
        refused("redeem", (4, 5), "not_assigned"),
    ],
    "a holder who is taken for another": [ASSIGNED, refused("redeem", (2, 3), "not_holder")],
    "refused as assigned to somebody while nobody had it": [
        refused("assign_code", (-2, -1), "already_assigned"),
        ok("assign", (0, 1), user="bob"),
    ],
    "locked by two": [ASSIGNED, LOCKED, ok("lock", (4, 5), token="t2", ttl_s=100)],
    "locked by two at once": [ASSIGNED, LOCKED, ok("lock", (2, 3), token="t2", ttl_s=100)],
    "locked by two, one of them nobody knows": [
        ASSIGNED,
        LOCKED,
        ok("lock", (4, 5), shown="t3", token="t3", ttl_s=100, found=True),
    ],
    "redeemed past somebody's lock": [ASSIGNED, LOCKED, ok("redeem", (4, 5), uses=1)],
    "redeemed with a lock that was given up": [
        ASSIGNED,
        LOCKED,
        ok("unlock", (4, 5), shown="t1"),
        ok("redeem", (6, 7), shown="t1", uses=1),
    ],
    "redeemed twice with one lock": [
        ASSIGNED,
        LOCKED,
        ok("redeem", (4, 5), shown="t1", uses=1),
        ok("redeem", (6, 7), shown="t1", uses=2),
    ],
    "refused for a lock that nobody has": [ASSIGNED, refused("redeem", (2, 3), "locked")],
    "a lock that is denied to its holder": [
        ASSIGNED,
        LOCKED,
        refused("redeem", (4, 5), "lock_not_held", shown="t1"),
    ],
    "somebody else's lock given up": [ASSIGNED, LOCKED, ok("unlock", (4, 5), shown="t2")],
    "locked when all is spent": [
        ASSIGNED,
        ok("redeem", (2, 3), uses=1),
        ok("redeem", (4, 5), uses=2),
        ok("lock", (6, 7), token="t1", ttl_s=100),
    ],
}


@pytest.mark.parametrize("history", GOOD.values(), ids=GOOD)
def test_a_history_that_one_order_explains_is_accepted(history: list[Operation]) -> None:
    assert linearizable(history, CODE)


@pytest.mark.parametrize("history", BAD.values(), ids=BAD)
def test_a_history_that_no_order_explains_is_rejected(history: list[Operation]) -> None:
    assert not linearizable(history, CODE)


def test_a_lock_may_be_lost_only_where_locks_are_lost() -> None:
    history = [ASSIGNED, LOCKED, ok("lock", (4, 5), token="t2", ttl_s=100)]
    assert linearizable(history, LOCKS_LOST)
    back = [*history, ok("redeem", (6, 7), shown="t1", uses=1)]
    assert not linearizable(back, LOCKS_LOST), "what was lost does not come back"


def test_a_refusal_may_rest_on_what_was_lost_only_where_records_are_lost() -> None:
    history = [refused("assign_code", (0, 1), "already_assigned"), ok("assign_code", (2, 3))]
    assert linearizable(history, RECORDS_LOST)
    assert not linearizable(history, LOCKS_LOST)


def test_a_code_whose_record_is_lost_is_nobody_elses() -> None:
    assert not linearizable([ASSIGNED, ok("assign", (2, 3), user="bob")], RECORDS_LOST)
    assert not linearizable([ASSIGNED, *(ok("redeem", (2 * n, 2 * n + 1), uses=n) for n in (1, 2, 3))], RECORDS_LOST)


def test_a_user_gets_no_more_than_the_limit() -> None:
    limit = LimitModel(2)
    two = [ok("assign", (0, 9)), ok("assign_code", (1, 2)), ok("assign_code", (10, 11), found=True)]
    assert linearizable([*two, refused("assign", (3, 4), "user_code_limit")], limit)
    assert not linearizable([*two, ok("assign", (3, 4))], limit)
    assert not linearizable([ok("assign", (0, 1)), refused("assign", (3, 4), "user_code_limit")], limit)
    assert linearizable(
        [ok("assign", (0, 1)), unknown("assign", 2), refused("assign", (3, 4), "user_code_limit")], limit
    )


@pytest.mark.parametrize("seed", range(30))
def test_what_one_after_the_other_did_is_accepted_however_the_times_overlap(seed: int) -> None:
    """Run the model itself, blur the times, forget some answers: still good. Then a use too many: never good."""
    draw = random.Random(seed)
    history: list[Operation] = []
    state, now = CodeState(), 0.0
    while len(history) < 40 and state.uses < 2:
        now += 1.0
        shown = draw.choice(("", state.token))
        tried = Operation(
            verb=draw.choice(
                ("assign_code", "lock", "unlock", "redeem") if shown else ("assign_code", "lock", "redeem")
            ),
            outcome="ok",
            invoked_s=now - draw.uniform(0, 3),
            returned_s=now + draw.uniform(0, 3),
            user=draw.choice(("ann", "bob")),
            shown=shown,
            token=shown or f"t{now}",
            ttl_s=1000.0,
            uses=state.uses + 1,
        )
        following = list(CODE.step(state, tried))
        if following:
            state = following[0]
            forgotten = draw.random() < 0.2 and (shown or tried.verb != "lock")  # nobody shows a token he was not told
            history.append(tried._replace(outcome="unknown", returned_s=math.inf) if forgotten else tried)
    assert linearizable(history, CODE)
    last = max(operation.invoked_s for operation in history) + 100
    assert not linearizable([*history, ok("redeem", (last, last + 1), state.user, uses=4)], CODE), "a use too many"


def doubted(book_id: str, code: str, invoked_s: float, *, in_doubt: bool = True) -> Attempt:
    answer = {"code": code}
    return Attempt(
        "assign",
        "/coupons/assign",
        {},
        "k",
        book_id,
        "redis",
        "ann",
        "ok",
        answer,
        in_doubt=in_doubt,
        invoked_s=invoked_s,
    )


def test_a_request_in_doubt_that_got_another_code_may_have_held_this_one() -> None:
    history = [doubted("b1", "A", 3.0), doubted("b1", "B", 1.0, in_doubt=False), doubted("b2", "B", 2.0)]
    assert lost_before_it_was_told(history, "b1", "C") == 3.0
    assert lost_before_it_was_told(history, "b1", "A") == math.inf
    assert lost_before_it_was_told(history, "b3", "C") == math.inf
