"""What must never be: each promise as a check, of a state or of one answer. Each returns "", or what is broken and how."""

from __future__ import annotations

from tests.model.state import Bounds, Event, State, held, in_ledger

ASSIGN, REDEEM = "assign", "redeem"


def of_answer(state: State, bounds: Bounds, event: Event, user: int, *, durable: bool) -> str:
    """P1, P2, P3 and P5 of an answer that a caller is given now."""
    if durable and event not in state.ledger.events:
        return f"P2: {event.verb} of code {event.code} is answered as durable, and is not in the ledger"
    if event.user != user:
        return f"P5: user {user} is answered what is user {event.user}'s"
    for verb, code, other, key, position in state.answers:
        if verb == event.verb and code == event.code:
            if other != user:
                return f"P1: code {code} is answered to users {other} and {user}"
            if verb == REDEEM and position != event.position:
                return f"P3: code {code} is redeemed at {position} and at {event.position}"
        if key and key == event.key and position != event.position and not _lost_may_be(bounds, state, verb):
            return f"P5: key {key} is answered {position} and {event.position}"
    return ""


def of_state(state: State, bounds: Bounds) -> str:
    """P3, P4 and P5 of the ledger, and that the pool of a Redis that decides holds nothing but what it was lent."""
    ledger = state.ledger
    if ledger.stopped:
        return "the shard is stopped, and its history was not forked by anybody"
    coupons = held(ledger)
    if len(coupons) < sum(event.verb == ASSIGN for event in ledger.events):
        return "P4: the ledger gives a code to two"
    if not coupons.keys() <= ledger.lent or ledger.lent & ledger.quarantine:
        return "P4: the ledger has a code in two states, or in none"
    redeemed = [event.code for event in ledger.events if event.verb == REDEEM]
    if len(redeemed) > len(set(redeemed)):
        return "P3: the ledger has more redemptions of a code than it may have"
    if bounds.limit and bounds.mode == "ledger":
        users = [event.user for event in coupons.values()]
        if len(users) > len(set(users)):
            return "P3: the ledger gives a user more codes than the limit"
    keys = [event.key for event in ledger.events if event.key and not _lost_may_be(bounds, state, event.verb)]
    if len(keys) > len(set(keys)):
        return "P5: a key has two effects in the ledger"
    answered = {code for verb, code, *_ in state.answers if verb == ASSIGN}
    if not answered <= ledger.lent | ledger.quarantine:
        return "P1: a code that was answered goes back to be dealt"
    for node in state.nodes:
        if decides(state, node.epoch, node.certified == node.identity) and node.free - ledger.lent.difference(coupons):
            return f"P4: the pool of redis {node.run} has a code that it is not lent"
    return ""


def of_certified(state: State, place: int) -> str:
    """P2 and P5: a Redis that was certified just now agrees with the ledger."""
    node, ledger = state.nodes[place], state.ledger
    if not decides(state, node.epoch, node.certified == node.identity):
        return ""
    coupons = in_ledger(ledger)
    coming = {coupon for coupon in coupons if coupon.code in node.quarantine}  # by a receipt, and not in Redis yet
    if not node.book or not coupons - coming <= node.holders <= coupons:
        return f"P2: redis {node.run} is certified, and its holders are not the ledger's"
    quarantine = ledger.quarantine | {coupon.code for coupon in coming}
    if node.free or node.quarantine != quarantine or (node.lent != len(node.holders) and not coming):
        return f"P4: redis {node.run} is certified, and its pool or its quarantine is not the ledger's"
    if not {event for event in ledger.events if event.key} <= node.idem:
        return f"P5: redis {node.run} is certified, and lacks an Idempotency-Key that the ledger has"
    return ""


def decides(state: State, epoch: int, certified: bool) -> bool:
    """Whether a Redis decides in the epoch in which the ledger is."""
    return certified and epoch == state.ledger.epoch == state.ledger.certified


def _lost_may_be(bounds: Bounds, state: State, verb: str) -> bool:
    """The documented exception: a disaster may lose early assigns, and their keys with them."""
    return bounds.mode == "redis" and verb == ASSIGN and state.faults > 0
