"""Recovery, split into its real steps: a writer may be killed or overtaken between any two.

In step with coupon_svc/writer/recover.py, the steps of it in coupon_svc/postgres/, and lua/.
"""

from __future__ import annotations

from collections.abc import Iterator

from tests.model.promises import ASSIGN, REDEEM, of_certified, of_reported
from tests.model.state import (
    GONE,
    NO_TIP,
    RECOVERING,
    Bounds,
    Event,
    Holder,
    Identity,
    Ledger,
    Node,
    Position,
    Recovery,
    State,
    Term,
    Wire,
    Writer,
    held,
    in_ledger,
    last_seq,
    live_epoch,
    quarantined,
    replaced,
    same_event,
    tip_at,
)

Step = tuple[str, State]


def begin(state: State, place: int, writer: Writer, who: str) -> Step:
    """Step 1: the next epoch. From now on no batch of an older one is committed."""
    ledger, node = state.ledger, state.nodes[writer.node]
    live = live_epoch(ledger)
    ledger = ledger._replace(epoch=ledger.epoch + 1, committed=0)
    work = Recovery("begun", (ledger.epoch, ledger.generation), live, node.identity, (0, 0, 0, 0))
    writer = writer._replace(recovery=work, opened_on=None)
    return f"{who} begins epoch {ledger.epoch}", _with(state._replace(ledger=ledger), place, writer)


def steps(state: State, bounds: Bounds, place: int, writer: Writer, who: str) -> Iterator[Step]:
    """The next step of a recovery; what refuses it ends it, and it is begun anew."""
    work, ledger, node = writer.recovery, state.ledger, state.nodes[writer.node]
    assert work is not None
    mine = (ledger.owner, ledger.epoch, ledger.generation) == (place, *work.term) and not ledger.stopped
    given_up = _with(state, place, writer._replace(recovery=None))
    if work.done in ("shut", "drained", "settling", "restore_idem") and not mine:
        yield f"{who}'s recovery has been overtaken", given_up
        return
    if work.done == "begun":
        meta = (node.epoch, node.was, node.seq, node.committed)
        yield (
            f"{who} reads meta of redis {node.run}",
            _next(state, place, writer, work._replace(done="read", meta=meta)),
        )
    elif work.done == "read":
        yield from _send(state, bounds, place, writer, work, "shut", who)
    elif work.done == "shut":
        ledger, reached, told = drain(state, bounds, node, work)
        if ledger.stopped:
            yield f"{who} stops the shard", given_up._replace(ledger=ledger)
            return
        dead = [seq for epoch, seq, _ in ledger.dead if epoch == work.live]
        stands = (work.live, reached) == (work.meta[0], work.meta[2]) and work.live > 0 and not dead
        done = work._replace(done="drained", reached=reached, stands=stands)
        drained = state._replace(ledger=ledger, told=told)
        yield f"{who} drains the stream of redis {node.run}", _next(drained, place, writer, done)
    elif work.done == "drained":
        rows = {n for n, process in enumerate(state.processes) if process.row and process.node >= 0}
        if bounds.reports and not rows <= {n for n, epoch, _ in ledger.reports if epoch == work.live}:
            return  # it waits for them
        entered = enter_records(ledger, bounds, work)
        if entered.stopped:
            yield f"{who} stops the shard", given_up._replace(ledger=entered)
            return
        if entered.events != ledger.events:
            work = work._replace(stands=False, reached=max(work.reached, last_seq(entered, work.live)))
        state = state._replace(ledger=entered)
        ledger, word = decide(state, bounds, work)
        over = not ledger.lent.difference(held(ledger)) and not bounds.reports
        done = work._replace(done="settled" if over else "settling")
        ledger = _finish(ledger) if over else ledger
        yield f"{who} settles epoch {work.live}: {word}", _next(state._replace(ledger=ledger), place, writer, done)
    elif work.done == "settling":
        yield _settle(state, bounds, place, writer, work, who)
    elif work.done == "settled":
        keep = work.stands and _agrees(ledger, node)
        if "rebuild" in bounds.off:
            keep = node.book
        word = "kept" if keep else "rebuilt"
        done = work._replace(done="wipe" if keep else "judged", keep=keep)
        yield f"{who} judges: redis {node.run} is to be {word}", _next(state, place, writer, done)
    elif work.done == "judged":
        yield from _send(state, bounds, place, writer, work, "wipe", who)
    elif work.done == "wipe":
        yield from _send(state, bounds, place, writer, work, "restore_book", who)
    elif work.done == "restore_book":
        if work.keep:
            yield from _mark(state, bounds, place, writer, work._replace(done="restore_idem"), who, mine=mine)
        else:
            yield from _send(state, bounds, place, writer, work, "restore_coupons", who)
    elif work.done == "restore_coupons":
        yield from _send(state, bounds, place, writer, work, "restore_idem", who)
    elif work.done == "restore_idem":
        yield from _mark(state, bounds, place, writer, work, who, mine=mine)
    elif work.done == "marked":
        yield from _send(state, bounds, place, writer, work, "certify", who)
    elif work.done == "certify":  # only where certification comes before its mark
        yield from _mark(state, bounds, place, writer, work, who, mine=mine)


def _mark(
    state: State, bounds: Bounds, place: int, writer: Writer, work: Recovery, who: str, *, mine: bool
) -> Iterator[Step]:
    """The ledger notes that Redis may decide in this epoch, before Redis does."""
    if not mine:
        yield f"{who}'s recovery has been overtaken", _with(state, place, writer._replace(recovery=None))
    elif "mark" in bounds.off and work.done != "certify":
        yield f"{who} leaves the mark for later", _next(state, place, writer, work._replace(done="marked"))
    else:
        marked = state._replace(ledger=state.ledger._replace(certified=work.term[0]))
        label = f"{who} marks epoch {work.term[0]} as certified"
        if work.done == "certify":
            yield label, _with(marked, place, _opened(writer, work))
        else:
            yield label, _next(marked, place, writer, work._replace(done="marked"))


def _opened(writer: Writer, work: Recovery) -> Writer:
    return writer._replace(recovery=None, term=work.term, committed=0, opened_on=work.identity, wants_recovery=False)


def _next(state: State, place: int, writer: Writer, work: Recovery) -> State:
    return _with(state, place, writer._replace(recovery=work))


def _with(state: State, place: int, writer: Writer) -> State:
    return state._replace(writers=replaced(state.writers, place, writer))


# --- in Redis


def _send(
    state: State, bounds: Bounds, place: int, writer: Writer, work: Recovery, step: str, who: str
) -> Iterator[Step]:
    """One script of the recoverer: it runs; or it is fenced; or it is delayed, and the recovery given up."""
    node = state.nodes[writer.node]
    identity = node.identity if "pinned" in bounds.off else work.identity
    after = script(state, bounds, step, node, work.term, identity)
    given_up = writer._replace(recovery=None)
    if after is None:
        yield f"{who}'s {step} is fenced", _with(state, place, given_up)
        return
    done = state._replace(nodes=replaced(state.nodes, writer.node, after))
    label = f"{who}: {step} on redis {node.run}"
    if step != "certify" or "mark" in bounds.off:
        yield label, _next(done, place, writer, work._replace(done=step))
    else:
        done = _with(done, place, _opened(writer, work))
        yield label, done._replace(broken=of_certified(done, writer.node))
    if bounds.delays and state.wire is None and state.faults < bounds.faults:
        wire = Wire(step, writer.node, work.term, identity)
        delayed = _with(state, place, given_up)._replace(wire=wire, faults=state.faults + 1)
        yield f"{who}'s {step} is delayed, and given up", delayed


def script(state: State, bounds: Bounds, step: str, node: Node, term: Term, identity: Identity) -> Node | None:
    """What a recoverer's script makes of a Redis; None when it is fenced."""
    ledger, (epoch, generation) = state.ledger, term
    if step == "shut":
        before = (node.generation, 0 if "attempt" in bounds.off else node.attempt)
        if before > (generation, epoch):
            return None
        was = node.epoch if node.epoch > 0 else node.was
        shut = node.epoch if "shut" in bounds.off else RECOVERING
        return node._replace(epoch=shut, was=was, generation=generation, attempt=epoch)
    if node.generation != generation or (node.epoch != RECOVERING and "shut" not in bounds.off):
        return None
    if node.attempt != epoch and "attempt" not in bounds.off:
        return None
    if step == "wipe":
        nobody: frozenset[Holder] = frozenset()
        nothing: frozenset[Event] = frozenset()
        return node._replace(
            book=False, lent=0, free=frozenset(), holders=nobody, quarantine=frozenset(), idem=nothing, stream=()
        )
    if step == "restore_book":
        coupons = held(ledger)
        free = node.free.difference(coupons) if "empty_pool" in bounds.off else frozenset()
        return node._replace(book=True, free=free, lent=len(coupons) + len(free), quarantine=quarantined(ledger))
    if step == "restore_coupons":
        return node._replace(holders=node.holders | in_ledger(ledger))
    if step == "restore_idem":
        return node._replace(idem=node.idem | {event for event in ledger.events if event.key})
    stream = tuple(event for event in node.stream if event.epoch >= epoch)
    return node._replace(epoch=epoch, certified=identity, seq=0, committed=0, stream=stream, tip=NO_TIP, format=2)


# --- in the ledger


def drain(state: State, bounds: Bounds, node: Node, work: Recovery) -> tuple[Ledger, int, tuple[int, ...]]:
    """Step 3: what the stream holds and the ledger does not. The shard is stopped where history contradicts itself.

    Returns the ledger, the seq up to which it accounts for the live epoch, and what those who wait are told.
    """
    ledger, live = state.ledger, work.live
    stopped = ledger._replace(stopped=True)
    if max(work.meta[0], work.meta[1], *(event.epoch for event in node.stream), 0) >= work.term[0]:
        return stopped, 0, state.told
    known = {event.position: event for event in ledger.events}
    late = [event for event in node.stream if event.epoch != live]
    if "late" in bounds.off:  # as if their codes had not been settled long ago
        ledger = ledger._replace(events=ledger.events | {event for event in late if event.position not in known})
        late = []
    for event in late:
        ledger = take_late(ledger, bounds, event)
    events = [event for event in node.stream if event.epoch == live]
    if any(not same_event(event, known.get(event.position, event)) for event in events):
        return stopped, 0, state.told
    last = last_seq(ledger, live)
    new = [event for event in events if event.seq > last]
    if "after" not in bounds.off and forked(ledger, new, (live, last)):
        return stopped, 0, state.told
    upto = max([last, *(event.seq for event in new)])
    missing = set(range(last + 1, upto + 1)) - {event.seq for event in new}
    dead = ledger.dead | {(live, seq, -1) for seq in missing}
    if any(epoch == live and code == -1 for epoch, _, code in dead):
        new, orphans = without_orphans(ledger, new)
        dead |= {(live, event.seq, event.code) for event in orphans}
    both = ledger.events | set(new)
    if len({(event.verb, event.code) for event in both}) < len(both):
        return stopped, 0, state.told
    ledger = ledger._replace(events=both, dead=dead)
    if "redemption_user" not in bounds.off and foreign_redemption(ledger):
        return stopped, 0, state.told
    told = min([upto, *(seq - 1 for epoch, seq, _ in dead if epoch == live)])
    if live:
        return ledger, upto, replaced(state.told, live, max(state.told[live], told))
    return ledger, upto, state.told


def forked(ledger: Ledger, events: list[Event], at: Position) -> bool:
    """Whether an entry follows another than the one before it. After a hole nobody can tell."""
    seq, tip = at[1], tip_at(ledger, at)
    for event in events:
        if event.seq == seq + 1 and tip not in (event.tip, event.after):
            return True
        seq, tip = event.seq, event.tip
    return False


def take_late(ledger: Ledger, bounds: Bounds, event: Event) -> Ledger:
    """An event of an epoch that is over gives its code to its user only out of the quarantine of that same epoch."""
    if event.verb != ASSIGN or event.position in {other.position for other in ledger.events}:
        return ledger
    if any((epoch, seq) == event.position for epoch, seq, _ in ledger.dead):
        return ledger
    out = {q for q in ledger.quarantine if q[0] == event.code and ("late_epoch" in bounds.off or q[1] == event.epoch)}
    if not out:
        return ledger
    return ledger._replace(
        quarantine=ledger.quarantine - out, lent=ledger.lent | {event.code}, events=ledger.events | {event}
    )


def enter_records(ledger: Ledger, bounds: Bounds, work: Recovery) -> Ledger:
    """What the reports carry, at its own positions. The shard is stopped where a report and the stream are of two
    histories."""
    if "reports" in bounds.off:
        return ledger
    known = {event.position: event for event in ledger.events}
    records = [event for event in ledger.records if event.epoch == work.live]
    if any(not same_event(event, known.get(event.position, event)) for event in records):
        return ledger._replace(stopped=True)
    new, _ = without_orphans(ledger, sorted(event for event in records if event.position not in known))
    both = ledger.events | set(new)
    if len({event.position for event in both}) < len(both) or len({event[2:4] for event in both}) < len(both):
        return ledger._replace(stopped=True)
    dead = frozenset(letter for letter in ledger.dead if letter[:2] not in {event.position for event in new})
    ledger = ledger._replace(events=both, dead=dead)
    return ledger._replace(stopped=True) if foreign_redemption(ledger) else ledger


def foreign_redemption(ledger: Ledger) -> bool:
    """Whether a redemption is of a coupon that is another user's."""
    coupons = held(ledger)
    return any(
        event.verb == REDEEM and (event.code not in coupons or coupons[event.code].user != event.user)
        for event in ledger.events
    )


def without_orphans(ledger: Ledger, events: list[Event]) -> tuple[list[Event], list[Event]]:
    """Events without the redemptions of codes whose assignment is lost, and those."""
    codes, good, orphans = set(held(ledger)), [], []
    for event in events:
        if event.verb == REDEEM and event.code not in codes:
            orphans.append(event)
        else:
            codes.add(event.code)
            good.append(event)
    return good, orphans


def decide(state: State, bounds: Bounds, work: Recovery) -> tuple[Ledger, str]:
    """Step 4 begins: the live epoch is over for the ledger, and the verdict is kept with it, before any book is settled.

    Otherwise a successor that is connected to another Redis would drain the epoch anew, into books that are settled.
    """
    ledger = state.ledger
    if "verdict" in bounds.off or work.live:
        ledger = ledger._replace(settling=work.live, nothing_lost=nothing_lost(state, bounds, work))
    if "verdict" not in bounds.off:
        ledger = ledger._replace(settled=ledger.certified)
    return ledger, "nothing was lost" if ledger.nothing_lost else "somebody may have been answered"


def _finish(ledger: Ledger) -> Ledger:
    """All books are settled."""
    reports = frozenset(report for report in ledger.reports if report[1] >= ledger.settling)
    ledger = ledger._replace(records=frozenset(event for event in ledger.records if event.epoch > ledger.settling))
    return ledger._replace(lone=frozenset(), settled=ledger.certified, settling=0, nothing_lost=False, reports=reports)


def _settle(state: State, bounds: Bounds, place: int, writer: Writer, work: Recovery, who: str) -> Step:
    """One book after the other (each code is as a book here): codes that were lent and have no record go back, or into
    quarantine when somebody may have been answered."""
    ledger = state.ledger
    lost = sorted(ledger.lent.difference(held(ledger)))
    if not lost:
        done = work._replace(done="settled")
        if bounds.reports and not bounds.lapses:
            state = state._replace(broken=of_reported(state, ledger.settling))
        return f"{who} has settled all books", _next(state._replace(ledger=_finish(ledger)), place, writer, done)
    code, epoch = lost[0], ledger.settling
    keep = any(code == other and ("dead_epoch" in bounds.off or of == epoch) for of, _, other in ledger.dead)
    if bounds.mode == "redis" and epoch and not ledger.nothing_lost and "quarantine" not in bounds.off:
        keep = True
    word = "is quarantined" if keep else "goes back"
    mine = any(code == other and of == epoch for of, _, other in ledger.dead)
    if keep and not mine and (bounds.mode == "ledger" or ledger.nothing_lost):
        state = state._replace(broken=f"P4: code {code} is quarantined, and nobody can have been answered it")
    ledger = ledger._replace(lent=ledger.lent - {code})
    if keep:
        ledger = ledger._replace(quarantine=ledger.quarantine | {(code, epoch)})
    return f"{who} settles: code {code} {word}", _next(state._replace(ledger=ledger), place, writer, work)


def nothing_lost(state: State, bounds: Bounds, work: Recovery) -> bool:
    """Whether every process that could have answered in the live epoch has said that the ledger has it all."""
    ledger, live = state.ledger, work.live
    if not live:
        return True
    reports = [(process, seq) for process, epoch, seq in ledger.reports if epoch == live]
    rows = {place for place, process in enumerate(state.processes) if process.row}
    if bounds.reports and "reports" not in bounds.off:
        return rows <= {process for process, _ in reports}
    if any(epoch == live and code == -1 for epoch, _, code in ledger.dead):
        return False
    return rows <= {process for process, _ in reports} and all(seq <= work.reached for _, seq in reports)


def _agrees(ledger: Ledger, node: Node) -> bool:
    """Whether the counts of Redis are the ledger's, and add up."""
    return (
        node.book
        and len(node.holders) == len(held(ledger))
        and len(node.free) + len(node.holders) == node.lent
        and node.epoch != GONE
    )
