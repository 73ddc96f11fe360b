"""What must never be: each promise as a check, of a state or of one answer. Each returns "", or what is broken and how."""

from __future__ import annotations

from tests.model.state import Bounds, Event, Position, State, held, in_ledger, quarantined

ASSIGN, REDEEM = "assign", "redeem"


def of_answer(state: State, bounds: Bounds, event: Event, user: int, *, durable: bool) -> str:
    """P1, P2, P3 and P5 of an answer that a caller is given now."""
    if durable and event not in state.ledger.events:
        return f"P2: {event.verb} of code {event.code} is answered as durable, and is not in the ledger"
    if event.user != user and not (bounds.anonymous and event.verb == REDEEM):
        return f"P5: user {user} is answered what is user {event.user}'s"
    for verb, code, other, key, position in state.answers:
        if verb == event.verb and code == event.code:
            if other != user and not _overruled(state, code, min(position, event.position)):
                return f"P1: code {code} is answered to users {other} and {user}"
            if verb == REDEEM and position != event.position:
                return f"P3: code {code} is redeemed at {position} and at {event.position}"
        if key and key == event.key and position != event.position and not _lost_may_be(bounds, state, verb):
            return f"P5: key {key} is answered {position} and {event.position}"
    return ""


def of_state(state: State, bounds: Bounds) -> str:
    """P3, P4 and P5 of the ledger, and that the pool of a Redis that decides holds nothing but what it was lent."""
    ledger = state.ledger
    put_back = state.faults and any(kind.startswith("put_back") for kind in (*bounds.kinds, *bounds.order))
    if ledger.stopped:
        if put_back:
            return ""  # the history may be forked by whoever did it
        return "the shard is stopped, and its history was not forked by anybody"
    coupons = held(ledger)
    if len(coupons) < sum(event.verb == ASSIGN for event in ledger.events):
        return "P4: the ledger gives a code to two"
    if not coupons.keys() <= ledger.lent or ledger.lent & quarantined(ledger):
        return "P4: the ledger has a code in two states, or in none"
    redeemed = [event.code for event in ledger.events if event.verb == REDEEM]
    if any(event.verb == REDEEM and coupons[event.code].user != event.user for event in ledger.events):
        return "P3: the ledger has a redemption of a coupon by another user than the coupon's"
    if len(redeemed) > len(set(redeemed)):
        return "P3: the ledger has more redemptions of a code than it may have"
    if bounds.limit and bounds.mode == "ledger":
        users = [event.user for event in coupons.values()]
        if len(users) > len(set(users)):
            return "P3: the ledger gives a user more codes than the limit"
    keys = [event.key for event in ledger.events if event.key and not _lost_may_be(bounds, state, event.verb)]
    if len(keys) > len(set(keys)):
        return "P5: a key has two effects in the ledger"
    for verb, code, user, _, position in state.answers:
        if verb != ASSIGN or _overruled(state, code, position):
            continue
        if code not in ledger.lent and code not in quarantined(ledger):
            return "P1: a code that was answered goes back to be dealt"
        if code in coupons and coupons[code].user != user:
            return f"P1: code {code} was answered to user {user}, and is user {coupons[code].user}'s in the ledger"
    if put_back:
        return ""  # a pool of a moment ago: it is the fence that keeps everybody from it
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
    quarantine = quarantined(ledger) | {coupon.code for coupon in coming}
    if node.free or node.quarantine != quarantine or (node.lent != len(node.holders) and not coming):
        return f"P4: redis {node.run} is certified, and its pool or its quarantine is not the ledger's"
    if not {event for event in ledger.events if event.key} <= node.idem:
        return f"P5: redis {node.run} is certified, and lacks an Idempotency-Key that the ledger has"
    return ""


def of_reported(state: State, epoch: int) -> str:
    """What API processes promise that all live: whatever they answered in an epoch is in the ledger when it is settled."""
    if any(of == epoch for _, of in state.ledger.quarantine):
        return "a code is quarantined, and every process has said what it answered"
    given = {(event.verb, event.code, event.user) for event in state.ledger.events}
    if any(answer[4][0] == epoch and answer[:3] not in given for answer in state.answers):
        return "an answer is lost, and whoever gave it has reported"
    return ""


def decides(state: State, epoch: int, certified: bool) -> bool:
    """Whether a Redis decides in the epoch in which the ledger is."""
    return certified and epoch == state.ledger.epoch == state.ledger.certified


def _overruled(state: State, code: int, position: Position) -> bool:
    """Whether an operator has dealt the code again since: then whoever was answered it before holds it no more."""
    return any(code == other and position[0] <= epoch for other, epoch in state.overruled)


def _lost_may_be(bounds: Bounds, state: State, verb: str) -> bool:
    """The documented exception: a disaster may lose early assigns, and their keys with them."""
    return bounds.mode == "redis" and verb == ASSIGN and state.faults > 0
