"""The data plane: what API processes do, each with its own view of the shard, and the scripts that decide.

In step with coupon_svc/redis/data_plane.py, coupon_svc/redis/shard_view.py, coupon_svc/service/ and lua/.
"""

from __future__ import annotations

from collections.abc import Iterator

from tests.model import faults
from tests.model.promises import ASSIGN, REDEEM, of_answer
from tests.model.state import (
    DOUBT,
    NO_TIP,
    UNTIED,
    Ask,
    Bounds,
    Event,
    Holder,
    Node,
    Process,
    State,
    held,
    live_epoch,
    new_tip,
    quarantined,
    replaced,
)

Step = tuple[str, State]


def steps(state: State, bounds: Bounds) -> Iterator[Step]:
    """Everything that users and API processes may do next."""
    for place, process in enumerate(state.processes):
        if process.node >= 0:
            yield from _look(state, bounds, place, process)
        elif not process.row:
            told = state.told[state.ledger.epoch]
            new = Process(state.current, False, 0, 0, 0, True, True, deaf=told)
            yield f"process {place} starts", end_epochs(state, place, new)
    for user, ask in enumerate(state.asks):
        if not ask.verb or (user and state.asks[user - 1] == Ask(ASSIGN)):
            continue  # users are alike: they begin in their order
        if ask.phase == "shown":
            yield _release(state, bounds, user, ask)
        elif ask.tries < bounds.tries:
            for place, process in enumerate(state.processes):
                # Processes are alike: the first request is sent to the first.
                if process.open and (user or ask.tries or place == 0 or ask.verb == REDEEM or bounds.upgrade):
                    yield from _send(state, bounds, (user,), place)
                    for other in range(user + 1, bounds.users if bounds.calls else 0):
                        if _may_join(state, bounds, ask, other):
                            yield from _send(state, bounds, (user, other), place)
        if ask.phase in ("sent", "waiting") and state.processes[ask.process].node >= 0:
            yield from _reply(state, bounds, user, ask)


def _look(state: State, bounds: Bounds, place: int, process: Process) -> Iterator[Step]:
    """How a process learns whom it speaks to, and which epochs are over; and how it ends."""
    node = state.nodes[process.node]
    if process.node != state.current:
        new = process._replace(node=state.current, open=False)
        yield f"process {place} connects to redis {state.nodes[state.current].run}", _with(state, place, new)
    if bounds.messages and max(process.heard, process.deaf) < state.told[process.epoch]:
        heard = process._replace(heard=state.told[process.epoch])
        if "message_seen" not in bounds.off:
            heard = heard._replace(seen=max(heard.seen, heard.heard))
        yield f"process {place} hears of the position {process.epoch}-{heard.heard}", _with(state, place, heard)
    seen = seen_seq(state, process, bounds)
    same = process.open and node.epoch == process.epoch and node.certified == node.identity
    if same and node.seq < seen and "seen" not in bounds.off:
        yield f"process {place} finds that redis {node.run} went back, and the shard in doubt", _doubt(state, place)
    verified = verify(process, node, bounds, seen)
    if verified != process:
        yield f"process {place} verifies redis {node.run}", _with(state, place, verified)
    if state.ledger.epoch > process.epoch_min:
        yield f"process {place} learns that epoch {state.ledger.epoch} has begun", end_epochs(state, place, process)
    if state.lapses < bounds.lapses:
        lapsed = state._replace(lapses=state.lapses + 1)
        if process.early:
            yield f"process {place} loses its registration", _with(lapsed, place, process._replace(early=False))
        dead = process._replace(node=-1, open=False, early=False)
        asks = tuple(
            ask._replace(phase="unknown", event=None, until=None, made=False)
            if ask.process == place and ask.phase in ("sent", "waiting")
            else ask
            for ask in state.asks
        )
        yield f"process {place} is killed", _with(lapsed._replace(asks=asks), place, dead)


def seen_seq(state: State, process: Process, bounds: Bounds) -> int:
    """The highest seq that a process has seen of its epoch: what it was answered, and what it has heard is committed."""
    if bounds.messages or "message_seen" in bounds.off:
        return process.seen
    return max(process.seen, state.told[process.epoch])


def verify(process: Process, node: Node, bounds: Bounds, seen: int) -> Process:
    """`ShardView.certify`: open the shard where the server is the certified one, and has all that was seen; else shut it."""
    same_run = node.certified[0] == node.run or "certification" in bounds.off
    same_replid = node.certified[1] == node.replid or bool({"certification", "replid"} & bounds.off)
    newer = (node.epoch, node.seq) >= (process.epoch, 0 if "seen" in bounds.off else seen)
    readable = node.format == 1 + (not process.old) or ("run" if process.old else "format") in bounds.off
    if not (same_run and same_replid and node.epoch > 0 and node.epoch >= process.epoch_min and newer and readable):
        return process._replace(open=False)
    if process.open and node.epoch == process.epoch:
        return process  # it would raise what was seen: that only makes more suspect, and counts as seen at recovery
    if node.epoch > process.epoch:
        process = process._replace(epoch=node.epoch, seen=0, heard=0, deaf=process.deaf if not process.epoch else 0)
    heard = max(process.heard, node.committed) if bounds.messages else 0
    return process._replace(open=True, seen=max(process.seen, node.seq), heard=heard)


def end_epochs(state: State, place: int, process: Process) -> State:
    """`ShardView.epoch_began` and the report: nothing of an older epoch is answered early from now on.

    Only the epoch that is live yet over is reported. Older ones are settled: a process enters an epoch after that.
    """
    epoch, live = state.ledger.epoch, live_epoch(state.ledger)
    ledger = state.ledger
    if process.row and 0 < live < epoch:
        mine = {event for event in process.records if event.epoch == live} - ledger.events
        report = (place, live, process.seen if process.epoch == live else 0)
        ledger = ledger._replace(reports=ledger.reports | {report}, records=ledger.records | mine)
    process = process._replace(open=process.open and process.epoch >= epoch, epoch_min=epoch, records=frozenset())
    return _with(state._replace(ledger=ledger), place, process)


# --- a request


def _may_join(state: State, bounds: Bounds, ask: Ask, other: int) -> bool:
    """Whether the request of another user may be in the same call as this one: of its class, and not sent yet."""
    joins = state.asks[other]
    waits = joins.phase in ("idle", "unknown") and joins.tries < bounds.tries
    return waits and joins.verb == ask.verb and not bounds.named and ask.phase in ("idle", "unknown")


def _send(state: State, bounds: Bounds, users: tuple[int, ...], place: int) -> Iterator[Step]:
    """Requests are sent, for the first time or again: one call decides, logs and applies."""
    process = state.processes[place]
    node = state.nodes[process.node]
    if not fence(process, node, bounds, seen_seq(state, process, bounds)):
        who = f"user {users[0]} asks process {place}"
        yield f"{who}: suspect", _with(state, place, process._replace(open=False))
        return
    decided = [("", state)]
    for user in users:
        decided = [
            (f"{said}; {label}" if said else label, after)
            for said, before in decided
            for label, after in _decide_in_call(state, before, bounds, user, place)
        ]
    wanted = faults.kinds(state, bounds)
    for label, after in decided:
        made = after.nodes[process.node].seq > node.seq
        yield label, _logged(state, after, place)
        if made and faults.APPLY_FAILS in wanted:
            yield from _half_applied(state, _logged(state, after, place), bounds, users, place, label)
    if faults.RAISES in wanted:
        raised = state._replace(faults=state.faults + 1)
        first, others = users[0], users[1:]
        for label, after in _decide(raised, bounds, first, place) if "log_first" in bounds.off else [("", raised)]:
            left = _without_event(raised, after, first, place)
            for said, last in _decide_in_call(raised, left, bounds, others[0], place) if others else [("", left)]:
                yield f"user {first}'s operation raises {label}; {said}", _logged(raised, last, place)


def _decide_in_call(first: State, state: State, bounds: Bounds, user: int, place: int) -> list[Step]:
    """Decide an operation as if those before it in the call had come alone: through what they are about to write."""
    at = state.processes[place].node
    node, before = state.nodes[at], first.nodes[at]
    if not {"overlay_code", "overlay_user"} & bounds.off or node.seq == before.seq:
        return list(_decide(state, bounds, user, place))
    blind = node
    if "overlay_code" in bounds.off:
        blind = blind._replace(free=before.free)
    if "overlay_user" in bounds.off:
        blind = blind._replace(
            holders=before.holders, idem=before.idem, lent=node.lent - len(node.holders - before.holders)
        )
    steps = []
    for label, after in _decide(state._replace(nodes=replaced(state.nodes, at, blind)), bounds, user, place):
        both = after.nodes[at]
        both = both._replace(
            free=both.free & node.free, holders=both.holders | node.holders, idem=both.idem | node.idem
        )
        steps.append((label, after._replace(nodes=replaced(after.nodes, at, both))))
    return steps


def _logged(before: State, after: State, place: int) -> State:
    """The end of a call: what its operations made is one entry, which gets its tip and the tip of the entry before."""
    process = before.processes[place]
    old, node = before.nodes[process.node], after.nodes[process.node]
    if node.seq == old.seq:
        return after
    tip, behind = (NO_TIP, NO_TIP) if process.old else (new_tip(before, process.epoch, node.seq), old.tip)

    def tied(event: Event) -> Event:
        return event._replace(after=behind, tip=tip) if event.tip == UNTIED else event

    node = node._replace(
        tip=old.tip if process.old else tip,
        stream=tuple(tied(event) for event in node.stream),
        idem=frozenset(tied(event) for event in node.idem),
        holders=frozenset(
            holder._replace(assigned=tied(holder.assigned), last=tied(holder.last)) for holder in node.holders
        ),
    )
    asks = tuple(
        ask._replace(event=tied(ask.event), until=tied(ask.until)) if ask.event and ask.until else ask
        for ask in after.asks
    )
    return after._replace(nodes=replaced(after.nodes, process.node, node), asks=asks)


def _half_applied(
    before: State, after: State, bounds: Bounds, users: tuple[int, ...], place: int, label: str
) -> Iterator[Step]:
    """An error behind the entry: nothing was applied, or all but the Idempotency-Keys. The shard is in doubt, and whoever
    asked does not know what became of it."""
    at = before.processes[place].node
    old, node = before.nodes[at], after.nodes[at]
    after = after._replace(faults=before.faults + 1)
    for user in users:
        after = _raised(after, user, before.asks[user].tries + 1, place)
    if "apply_doubt" not in bounds.off:
        node = node._replace(epoch=DOUBT, was=before.processes[place].epoch)
    unapplied = node._replace(free=old.free, holders=old.holders, idem=old.idem)
    for word, left in (("nothing", unapplied), ("no Idempotency-Key", node._replace(idem=old.idem))):
        yield f"{label}; {word} is applied", after._replace(nodes=replaced(after.nodes, at, left))


def _without_event(before: State, after: State, user: int, place: int) -> State:
    """What an operation leaves that raised: nothing, unless it had written already."""
    at = before.processes[place].node
    node = after.nodes[at]._replace(seq=before.nodes[at].seq, stream=before.nodes[at].stream)
    after = after._replace(nodes=replaced(after.nodes, at, node))
    return _raised(after, user, before.asks[user].tries + 1, place)


def _raised(state: State, user: int, tries: int, place: int) -> State:
    ask = Ask(state.asks[user].verb, "unknown", tries, place)
    return state._replace(asks=replaced(state.asks, user, ask))


def _decide(state: State, bounds: Bounds, user: int, place: int) -> Iterator[Step]:
    """What an operation decides, and what that makes of its shard's keys."""
    ask, process = state.asks[user], state.processes[place]
    node = state.nodes[process.node]
    who = f"user {user} asks process {place}"
    key = _key(state, bounds, user, ask.verb)
    if key and "replay" not in bounds.off:
        for event in node.idem:
            if event.key == key:
                yield f"{who}: {event.verb} is replayed", _found(state, user, place, event, event)
                return
    if not node.book:
        yield f"{who}: the book is gone, and the shard in doubt", _doubt(state, place)
        return
    if ask.verb == REDEEM:
        yield from _redeem(state, bounds, user, place, key, who)
    elif bounds.named and user == bounds.users - 1:
        yield from _assign_code(state, bounds, user, place, key, f"{who} for code {bounds.codes - 1}")
    else:
        if _at_limit(node, bounds, user):
            if bounds.calls:
                yield f"{who}: at the limit", _ended(state, user)
            return
        if not node.free and bounds.calls:
            yield f"{who}: no code is left", _tried(state, user)
        if not node.free and "counts" not in bounds.off and len(node.holders) != node.lent:
            yield f"{who}: codes are missing, and the shard in doubt", _doubt(state, place)
        for code in node.free:
            event = _event(state, place, ASSIGN, code, person(bounds, user), key)
            yield f"{who}: code {code} is popped on redis {node.run}", _assigned(state, user, place, event)


def fence(process: Process, node: Node, bounds: Bounds, seen: int) -> bool:
    """lua/include/fence.lua: this Redis is in the caller's epoch, not behind it, and has had no other master since."""
    if node.epoch != process.epoch and not ("epoch" in bounds.off and node.epoch):
        return False
    if node.seq < seen and "seen" not in bounds.off:
        return False
    return node.certified[1] == node.replid or bool({"fence_replid", "replid", "certification"} & bounds.off)


def _fence(state: State, process: Process, bounds: Bounds) -> bool:
    return fence(process, state.nodes[process.node], bounds, seen_seq(state, process, bounds))


def _assign_code(state: State, bounds: Bounds, user: int, place: int, key: int, who: str) -> Iterator[Step]:
    """lua/operations/assign_code.lua, and `lease_code` when the code is not in Redis."""
    node, ledger, code = state.nodes[state.processes[place].node], state.ledger, bounds.codes - 1
    for holder in node.holders:
        if holder.code == code:
            if holder.assigned.user == person(bounds, user):
                yield f"{who}: already yours", _found(state, user, place, holder.assigned, holder.last)
            else:
                yield f"{who}: already assigned", _ended(state, user)
            return
    if code in node.quarantine:
        yield f"{who}: it is in quarantine", _ended(state, user)
    elif _at_limit(node, bounds, user):
        return
    elif code in node.free:
        event = _event(state, place, ASSIGN, code, person(bounds, user), key)
        yield f"{who}: it is taken from the pool of redis {node.run}", _assigned(state, user, place, event)
    elif "counts" not in bounds.off and len(node.free) + len(node.holders) != node.lent:
        yield f"{who}: codes are missing, and the shard in doubt", _doubt(state, place)
    elif code not in quarantined(ledger) and code not in ledger.lone:
        ledger = ledger._replace(lent=ledger.lent | {code}, lone=ledger.lone | {code})
        yield f"{who}: it is lent alone", state._replace(ledger=ledger)


def _redeem(state: State, bounds: Bounds, user: int, place: int, key: int, who: str) -> Iterator[Step]:
    """lua/operations/redeem_coupon.lua, for the code that the user was answered."""
    process = state.processes[place]
    node = state.nodes[process.node]
    code = next(code for verb, code, other, *_ in state.answers if verb == ASSIGN and other == user)
    for holder in node.holders:
        if holder.code != code:
            continue
        if (holder.assigned.user != user and not bounds.anonymous) or holder.last.verb == REDEEM:
            yield f"{who}: code {code} is redeemed, or another's", _ended(state, user)
            return
        event = _event(state, place, REDEEM, code, holder.assigned.user, key)
        holders = (node.holders - {holder}) | {holder._replace(last=event)}
        yield (
            f"{who}: code {code} is redeemed on redis {node.run}",
            _made(state, user, place, event, holders, node.free),
        )
        return
    if code in node.quarantine and bounds.receipts:
        yield _show_receipt(state, bounds, user, place, code, who)
    elif code in node.quarantine:
        yield f"{who}: code {code} is in quarantine", _ended(state, user)
    elif "counts" not in bounds.off and len(node.free) + len(node.holders) != node.lent:
        yield f"{who}: codes are missing, and the shard in doubt", _doubt(state, place)
    elif code in held(state.ledger) and not bounds.anonymous:
        broken = f"P6: code {code} is user {user}'s, as the ledger knows, and is answered as not assigned"
        yield f"{who}: not assigned", state._replace(broken=broken)
    else:
        yield f"{who}: not assigned", _ended(state, user)


def _show_receipt(state: State, bounds: Bounds, user: int, place: int, code: int, who: str) -> Step:
    """`redeem_receipt`: the ledger has the assignment at its own position, and the code leaves the quarantine there."""
    ledger, coupon = state.ledger, held(state.ledger).get(code)
    position = next(a[4] for a in state.answers if a[:3] == (ASSIGN, code, user))
    if code in quarantined(ledger) and ("release_epoch" in bounds.off or (code, position[0]) in ledger.quarantine):
        event = Event(*position, ASSIGN, code, user, 0)  # of no entry
        ledger = ledger._replace(
            quarantine=frozenset(q for q in ledger.quarantine if q[0] != code),
            lent=ledger.lent | {code},
            events=ledger.events | {event},
            dead=ledger.dead - {(*position, code), (*position, -1)},
        )
    elif coupon is None or coupon.user != user:
        return f"{who}: the receipt of code {code} is of no use", _ended(state, user)
    ask = Ask(REDEEM, "shown", state.asks[user].tries, place)
    return f"{who}: the receipt of code {code} is shown", state._replace(
        ledger=ledger, asks=replaced(state.asks, user, ask)
    )


def _release(state: State, bounds: Bounds, user: int, ask: Ask) -> Step:
    """lua/operations/release_coupon.lua."""
    process = state.processes[ask.process]
    asks = replaced(state.asks, user, ask._replace(phase="idle"))
    who = f"the record of user {user}'s receipt"
    if process.node < 0 or not process.open or not _fence(state, process, bounds):
        return f"{who} does not reach redis", state._replace(asks=asks)
    node = state.nodes[process.node]
    code = next(code for verb, code, other, *_ in state.answers if verb == ASSIGN and other == user)
    if code in node.quarantine:
        event = held(state.ledger)[code]
        node = node._replace(
            quarantine=node.quarantine - {code},
            holders=node.holders | {Holder(code, event, event)},
            lent=node.lent + 1,
        )
    nodes = replaced(state.nodes, process.node, node)
    return f"{who} is back in redis {node.run}", state._replace(asks=asks, nodes=nodes)


def _reply(state: State, bounds: Bounds, user: int, ask: Ask) -> Iterator[Step]:
    """The process reads the reply, answers at once or waits; and answers what has become durable."""
    process, until = state.processes[ask.process], ask.until
    assert until is not None
    if ask.phase == "waiting":
        if ask.made and "tip" not in bounds.off:
            told = until in state.ledger.events or (until.tip in state.lies)  # by a message, or by primary key
        elif bounds.messages:
            told = process.epoch == until.epoch and process.heard >= until.seq
        else:
            told = state.told[until.epoch] >= until.seq
        if "own_epoch" in bounds.off and ("tip" in bounds.off or not ask.made):
            told = any((epoch, seq) >= until.position for epoch, seq in enumerate(state.told) if seq)
        if told:
            yield f"user {user} is answered: durable", _answered(state, bounds, user, durable=True)
        return
    who = f"process {ask.process} reads user {user}'s reply"
    if process.epoch != ask.epoch:
        unknown = ask._replace(phase="unknown", event=None, until=None, made=False)
        yield f"{who}, too late", state._replace(asks=replaced(state.asks, user, unknown))
        return
    if until.epoch == process.epoch:
        process = process._replace(seen=max(process.seen, until.seq))
        if bounds.reports and until.epoch >= process.epoch_min:
            both = {event for event in (ask.event, until) if event and event.epoch == process.epoch}
            process = process._replace(records=(process.records | both) - state.ledger.events)
        state = _with(state, ask.process, process)
    elif not ask.made and until.epoch < process.epoch:
        yield f"{who}, and answers: durable", _answered(state, bounds, user, durable=True)
        return
    registered = (process.early and until.epoch >= process.epoch_min) or "registered" in bounds.off
    if bounds.mode == "redis" and ask.verb == ASSIGN and registered:
        yield f"{who}, and answers early", _answered(state, bounds, user, durable=False)
    else:
        asks = replaced(state.asks, user, ask._replace(phase="waiting"))
        yield f"{who}, and waits for {until.position}", state._replace(asks=asks)


# --- what a step leaves


def _key(state: State, bounds: Bounds, user: int, verb: str) -> int:
    if verb == REDEEM:
        return 10 * (user + 1) + sum(answer[0] == REDEEM and answer[2] == user for answer in state.answers)
    return 0 if bounds.limit else person(bounds, user) + 1


def _at_limit(node: Node, bounds: Bounds, user: int) -> bool:
    return (
        bounds.limit
        and "limit" not in bounds.off
        and any(holder.assigned.user == person(bounds, user) for holder in node.holders)
    )


def person(bounds: Bounds, user: int) -> int:
    """Who it is that asks."""
    return 0 if bounds.twins else user


def _event(state: State, place: int, verb: str, code: int, user: int, key: int) -> Event:
    process = state.processes[place]
    tip = NO_TIP if process.old else UNTIED
    return Event(process.epoch, state.nodes[process.node].seq + 1, verb, code, user, key, NO_TIP, tip)


def _assigned(state: State, user: int, place: int, event: Event) -> State:
    node = state.nodes[state.processes[place].node]
    holders = node.holders | {Holder(event.code, event, event)}
    return _made(state, user, place, event, holders, node.free - {event.code})


def _tried(state: State, user: int) -> State:
    ask = state.asks[user]
    return state._replace(asks=replaced(state.asks, user, ask._replace(phase="unknown", tries=ask.tries + 1)))


def _made(state: State, user: int, place: int, event: Event, holders: frozenset[Holder], free: frozenset[int]) -> State:
    """lua/include/assigned.lua: the event, what Redis keeps of it, and the key's record in one step."""
    at = state.processes[place].node
    node = state.nodes[at]
    idem = node.idem | {event} if event.key else node.idem
    node = node._replace(seq=event.seq, free=free, holders=holders, stream=(*node.stream, event), idem=idem)
    state = state._replace(nodes=replaced(state.nodes, at, node))
    return _sent(state, user, place, event, event, made=True)


def _found(state: State, user: int, place: int, event: Event, until: Event) -> State:
    return _sent(state, user, place, event, until, made=False)


def _sent(state: State, user: int, place: int, event: Event, until: Event, *, made: bool) -> State:
    ask = state.asks[user]
    epoch = state.processes[place].epoch
    ask = Ask(ask.verb, "sent", ask.tries + 1, place, epoch, event, until, made)
    return state._replace(asks=replaced(state.asks, user, ask))


def _ended(state: State, user: int) -> State:
    return state._replace(asks=replaced(state.asks, user, Ask("")))


def _answered(state: State, bounds: Bounds, user: int, *, durable: bool) -> State:
    """The caller has its answer, and goes on: with the next redemption it asks for, if any."""
    event = state.asks[user].event
    assert event is not None
    user_id = person(bounds, user)
    broken = of_answer(state, bounds, event, user_id, durable=durable)
    key = _key(state, bounds, user, event.verb)
    answers = state.answers | {(event.verb, event.code, user_id, key, event.position)}
    redeemed = sum(answer[0] == REDEEM and answer[2] == user_id for answer in answers)
    ask = Ask(REDEEM) if redeemed < bounds.redeems else Ask("")
    return state._replace(answers=answers, asks=replaced(state.asks, user, ask), broken=broken)


def _doubt(state: State, place: int) -> State:
    """lua/doubt_shard.lua: nobody decides anything here until the owner has recovered it."""
    process = state.processes[place]
    node = state.nodes[process.node]._replace(epoch=DOUBT, was=process.epoch)
    state = state._replace(nodes=replaced(state.nodes, process.node, node))
    return _with(state, place, process._replace(open=False))


def _with(state: State, place: int, process: Process) -> State:
    return state._replace(processes=replaced(state.processes, place, process))
