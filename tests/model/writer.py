"""What writers do with a shard that is in order: take it over, persist its events, lend it codes.

In step with coupon_svc/writer/{writer,persist,lend}.py, coupon_svc/postgres/{shards,events,lending}.py and lua/. A step here
is what happens between two points at which a writer may be killed or paused; tests/model/in_step.py lists those points.
"""

from __future__ import annotations

from collections.abc import Iterator

from tests.model import faults, recovery
from tests.model.state import (
    Batch,
    Bounds,
    Event,
    Ledger,
    Load,
    Node,
    Position,
    State,
    Term,
    Tip,
    Wire,
    Writer,
    held,
    quarantined,
    replaced,
    tip_at,
)

Step = tuple[str, State]


def steps(state: State, bounds: Bounds) -> Iterator[Step]:
    """Everything that writers may do next, and the late script."""
    for place, writer in enumerate(state.writers):
        who = f"writer {place}"
        if writer.node != state.current:
            moved = writer._replace(node=state.current)
            yield f"{who} connects to redis {state.nodes[state.current].run}", with_writer(state, place, moved)
        yield from _own(state, bounds, place, writer, who)
        if writer.recovery is not None:
            yield from recovery.steps(state, bounds, place, writer, who)
        elif writer.opened_on is None:
            yield from _open(state, bounds, place, writer, who)
        else:
            yield from _look(state, bounds, place, writer, who)
        yield from _persist(state, bounds, place, writer, who)
        yield from _lend(state, bounds, place, writer, who)
    if state.wire is not None:
        yield from _arrive(state, bounds, state.wire)


def _own(state: State, bounds: Bounds, place: int, writer: Writer, who: str) -> Iterator[Step]:
    ledger = state.ledger
    mine = ledger.owner == place and ledger.generation == writer.term[1]
    if not mine and ledger.generation <= bounds.takeovers:
        taken = ledger._replace(owner=place, generation=ledger.generation + 1)
        fresh = writer._replace(
            term=(ledger.epoch, taken.generation), committed=ledger.committed, opened_on=None, wants_recovery=False
        )
        yield f"{who} takes the shard", with_writer(state._replace(ledger=taken), place, fresh)
    if mine and ledger.generation <= bounds.takeovers and (writer.batch or writer.load or writer.recovery):
        yield f"{who} is killed", with_writer(state, place, Writer(state.current, (0, 0), 0, None))


# --- opening


def _open(state: State, bounds: Bounds, place: int, writer: Writer, who: str) -> Iterator[Step]:
    """`Writer._open`: take over what is in order, recover what is not."""
    ledger, node = state.ledger, state.nodes[writer.node]
    if ledger.owner != place or ledger.generation != writer.term[1] or ledger.stopped:
        return
    writer = writer._replace(term=(ledger.epoch, ledger.generation), committed=ledger.committed)
    if not writer.wants_recovery and _in_order(ledger, node, bounds):
        opened = node._replace(generation=ledger.generation, committed=ledger.committed)
        writer = writer._replace(opened_on=node.identity)
        told = replaced(state.told, ledger.epoch, max(state.told[ledger.epoch], ledger.committed))
        yield (
            f"{who} opens the shard on redis {node.run}",
            with_node(state._replace(told=told), place, writer, opened),
        )
    elif ledger.epoch < bounds.epochs:
        yield recovery.begin(state, place, writer, who)


def _in_order(ledger: Ledger, node: Node, bounds: Bounds) -> bool:
    """lua/open_shard.lua, no dead letter, and the first event that the ledger lacks is in the stream."""
    if node.generation > ledger.generation or node.epoch != ledger.epoch or not _same(node, node.certified, bounds):
        return False
    if node.format < 2 and "format" not in bounds.off:
        return False
    if any(epoch == ledger.epoch for epoch, _, _ in ledger.dead):
        return False
    if "entry" not in bounds.off and not agrees_at(ledger, node, (ledger.epoch, ledger.committed)):
        return False
    return node.seq >= ledger.committed >= node.committed and follows(
        ledger, node, (ledger.epoch, ledger.committed), bounds
    )


def _same(node: Node, identity: tuple[int, int], bounds: Bounds) -> bool:
    if "certification" in bounds.off:
        return True
    return node.identity == identity or (node.run == identity[0] and "replid" in bounds.off)


def follows(ledger: Ledger, node: Node, at: Position, bounds: Bounds) -> bool:
    """Whether the entry after the ledger's last is in the stream, if there is one, and was made after that very one."""
    epoch, committed = at
    return node.seq <= committed or any(
        event.position == (epoch, committed + 1) and ("after" in bounds.off or event.after == tip_at(ledger, at))
        for event in node.stream
    )


def agrees_at(ledger: Ledger, node: Node, position: Position) -> bool:
    """Whether a Redis that stands at a position has the very entry that the ledger has there: two histories may count
    alike. One that is further says with its next entry what it follows."""
    return node.seq != position[1] or node.tip == tip_at(ledger, position)


def _look(state: State, bounds: Bounds, place: int, writer: Writer, who: str) -> Iterator[Step]:
    """Once a second: whether Redis and the ledger are what they were; and reports for processes that are gone."""
    ledger, node = state.ledger, state.nodes[writer.node]
    mine = ledger.owner == place and (ledger.epoch, ledger.generation) == writer.term
    assert writer.opened_on is not None
    fit = _same(node, writer.opened_on, bounds) and owner_fence(node, writer.term, bounds)
    if not mine or not fit or not follows(ledger, node, (writer.term[0], writer.committed), bounds):
        yield f"{who} finds the shard amiss", with_writer(state, place, writer._replace(opened_on=None))
        return
    if node.seq == writer.committed == ledger.committed:
        for process, row in enumerate(state.processes):
            report = (process, ledger.epoch, node.seq)
            if not row.row or any(r[:2] == report[:2] for r in ledger.reports):
                continue
            reported = state._replace(ledger=ledger._replace(reports=ledger.reports | {report}))
            if not row.early:
                yield f"{who} reports for process {process}, which is gone", reported
            elif faults.CLOCK in faults.kinds(state, bounds) and "observed" in bounds.off:
                hit = reported._replace(faults=state.faults + 1)
                yield f"{who} reports for process {process}, whose row has ended by a clock that stepped", hit


def owner_fence(node: Node, term: Term, bounds: Bounds) -> bool:
    """lua/include/owner.lua: the term is the shard's present one, and Redis has had no other master since."""
    if (node.epoch, node.generation) != term:
        return False
    return node.certified[1] == node.replid or bool({"fence_replid", "replid", "certification"} & bounds.off)


# --- persisting


def _persist(state: State, bounds: Bounds, place: int, writer: Writer, who: str) -> Iterator[Step]:
    ledger, node, batch = state.ledger, state.nodes[writer.node], writer.batch
    if batch is None:
        if writer.opened_on is None:
            return
        at = (writer.term[0], writer.committed)
        events = tuple(event for event in node.stream if event.position > at)
        if not events:
            return
        if "after" not in bounds.off:
            events = in_one_chain(events, tip_at(ledger, at))
        if not events:
            amiss = with_writer(state, place, writer._replace(opened_on=None))
            yield f"{who} finds an entry that does not follow the ledger's last", amiss
            return
        upto = writer.committed + len(events)
        wanted = [(writer.term[0], seq) for seq in range(writer.committed + 1, upto + 1)]
        if [event.position for event in events] != wanted:
            yield f"{who} finds a hole in the stream", with_writer(state, place, writer._replace(opened_on=None))
            return
        batch = Batch(writer.term, writer.committed, upto, events, False)
        label = f"{who} reads events up to {wanted[-1]} of redis {node.run}"
        yield label, with_writer(state, place, writer._replace(batch=batch))
    elif not batch.done:
        dropped = writer._replace(batch=None, opened_on=None)
        if not may_commit(ledger, place, batch, bounds):
            # Other shards of the same commit have passed.
            if "shard_result" in bounds.off:
                dropped = writer._replace(batch=batch._replace(done=True))
            yield f"{who}'s batch is thrown away", with_writer(state, place, dropped)
            return
        written = write(ledger, batch.events, bounds)
        if written.stopped:
            yield f"{who}'s batch contradicts the ledger", with_writer(state._replace(ledger=written), place, dropped)
            return
        written = written._replace(committed=batch.upto)
        done = writer._replace(batch=batch._replace(done=True))
        yield (
            f"{who} commits up to {batch.events[-1].position}",
            with_writer(state._replace(ledger=written), place, done),
        )
        again = with_writer(state._replace(ledger=written), place, writer._replace(batch=None))
        yield f"{who} commits, and the reply is lost", again
    else:
        yield _publish(state, bounds, place, writer, batch, who)


def in_one_chain(events: tuple[Event, ...], tip: Tip) -> tuple[Event, ...]:
    """The events up to the first entry that was made after another than the one before it."""
    for number, event in enumerate(events):
        if tip not in (event.tip, event.after):
            return events[:number]
        tip = event.tip
    return events


def may_commit(ledger: Ledger, place: int, batch: Batch, bounds: Bounds) -> bool:
    """The compare-and-set of `write_batches`."""
    epoch, generation = batch.term
    return (
        not ledger.stopped
        and ((ledger.owner, ledger.generation) == (place, generation) or "commit_owner" in bounds.off)
        and (ledger.epoch == epoch or "commit_epoch" in bounds.off)
        and (ledger.committed == batch.committed or "commit_position" in bounds.off)
    )


def write(ledger: Ledger, events: tuple[Event, ...], bounds: Bounds) -> Ledger:
    """The rows of a batch. Stopped when a key of the ledger is violated: position, code assigned, or use spent."""
    both = ledger.events | set(events)
    unique: list[set[object]] = [{event.position for event in both}, {(event.verb, event.code) for event in both}]
    if any(len(keys) < len(both) for keys in unique) or ledger.events & set(events):
        return ledger._replace(stopped=True)
    written = ledger._replace(events=both)
    if "redemption_user" not in bounds.off and recovery.foreign_redemption(written):
        return ledger._replace(stopped=True)
    return written


def _publish(state: State, bounds: Bounds, place: int, writer: Writer, batch: Batch, who: str) -> Step:
    """lua/publish_positions.lua: with the term in which the batch was read, whatever the writer's is by now."""
    node = state.nodes[writer.node]
    term = writer.term if "publish_term" in bounds.off else batch.term
    if writer.term == term:
        writer = writer._replace(committed=batch.upto)
    writer = writer._replace(batch=None)
    # The message says what the ledger holds, and is sent whatever Redis holds.
    state = state._replace(told=replaced(state.told, term[0], max(state.told[term[0]], batch.upto)))
    if lies := {event.tip for event in batch.events} - {event.tip for event in state.ledger.events}:
        state = state._replace(lies=state.lies | lies)
    forked = "entry" not in bounds.off and not agrees_at(state.ledger, node, (term[0], batch.upto))
    if not owner_fence(node, term, bounds) or not node.committed <= batch.upto <= node.seq or forked:
        amiss = writer._replace(opened_on=None) if writer.term == term else writer
        return f"{who} tells the position, and finds the shard amiss", with_writer(state, place, amiss)
    node = node._replace(committed=batch.upto)
    return f"{who} tells the position {term[0]}-{batch.upto}", with_node(state, place, writer, node)


# --- lending


def _lend(state: State, bounds: Bounds, place: int, writer: Writer, who: str) -> Iterator[Step]:
    ledger, node, load = state.ledger, state.nodes[writer.node], writer.load
    if load is not None:
        if load.kind == "follows":
            lent = ledger._replace(lent=ledger.lent | load.codes)
            yield (
                f"{who} lends what it has brought",
                with_writer(state._replace(ledger=lent), place, writer._replace(load=None)),
            )
            return
        if writer.opened_on is None:
            yield f"{who} gives its load up", with_writer(state, place, writer._replace(load=None))
        yield from _bring(state, bounds, place, writer, load, who)
        return
    if writer.opened_on is None or (ledger.owner, ledger.epoch, ledger.generation) != (place, *writer.term):
        return
    unlent = set(range(bounds.codes)) - ledger.lent - quarantined(ledger)
    if ledger.lone:
        lone = writer._replace(load=Load(writer.term, ledger.lone, "lone"))
        yield f"{who} has codes that were lent alone to bring", with_writer(state, place, lone)
    elif node.lent != len(ledger.lent) and (outstanding := ledger.lent.difference(held(ledger))):
        again = writer._replace(load=Load(writer.term, outstanding, "outstanding"))
        yield f"{who} brings again what is outstanding", with_writer(state, place, again)
    elif unlent and not node.free:
        codes = frozenset(unlent if bounds.calls else {min(unlent)})  # codes are alike
        if "lease_first" in bounds.off:
            yield (
                f"{who} is to bring codes {sorted(codes)}",
                with_writer(state, place, writer._replace(load=Load(writer.term, codes, "unlent"))),
            )
            return
        lent = ledger._replace(lent=ledger.lent | codes)
        yield (
            f"{who} lends codes {sorted(codes)}",
            with_writer(state._replace(ledger=lent), place, writer._replace(load=Load(writer.term, codes, "block"))),
        )


def _bring(state: State, bounds: Bounds, place: int, writer: Writer, load: Load, who: str) -> Iterator[Step]:
    node = state.nodes[writer.node]
    term = writer.term if "load_term" in bounds.off else load.term
    load = load._replace(term=term)
    brought = load_codes(node, load, bounds)
    if brought is None:
        amiss = writer._replace(load=None)
        if term == writer.term:
            amiss = amiss._replace(opened_on=None, wants_recovery=writer.opened_on is not None)
        yield f"{who}'s load is refused", with_writer(state, place, amiss)
        return
    ledger, after = state.ledger, None
    if load.kind == "lone":
        ledger = ledger._replace(lone=ledger.lone - load.codes)
    elif load.kind == "unlent":
        after = load._replace(kind="follows")
    codes = ", ".join(map(str, sorted(load.codes)))
    done = with_node(state._replace(ledger=ledger), place, writer._replace(load=after), brought)
    yield f"{who} brings codes {codes} to redis {node.run}", done
    if brought != node:
        yield f"{who} brings codes {codes}, and the reply is lost", with_node(state, place, writer, brought)
    if bounds.delays and state.wire is None and state.faults < bounds.faults:
        wire = Wire("load", writer.node, term, node.identity, load)
        yield f"{who} sends codes {codes}, which are delayed", state._replace(wire=wire, faults=state.faults + 1)


def load_codes(node: Node, load: Load, bounds: Bounds) -> Node | None:
    """lua/load_codes.lua; None when it refuses."""
    if not owner_fence(node, load.term, bounds) and "load_epoch" not in bounds.off:
        return None
    if not node.book or (len(node.free) + len(node.holders) != node.lent and "counts" not in bounds.off):
        return None
    holding = set() if "load_held" in bounds.off else {holder.code for holder in node.holders}
    added = load.codes - holding - node.free
    return node._replace(free=node.free | added, lent=node.lent + len(added))


def _arrive(state: State, bounds: Bounds, wire: Wire) -> Iterator[Step]:
    """A script that its sender has given up reaches Redis after all."""
    state = state._replace(wire=None)
    if wire.node >= len(state.nodes):
        return
    node = state.nodes[wire.node]
    if wire.load is not None:
        after = load_codes(node, wire.load, bounds)
    else:
        after = recovery.script(state, bounds, wire.step, node, wire.term, wire.identity)
    late = state if after is None else state._replace(nodes=replaced(state.nodes, wire.node, after))
    yield f"the delayed {wire.step} reaches redis {node.run}", late


def with_writer(state: State, place: int, writer: Writer) -> State:
    """The state with another writer in that place."""
    return state._replace(writers=replaced(state.writers, place, writer))


def with_node(state: State, place: int, writer: Writer, node: Node) -> State:
    """The state with another writer, and another node where that writer is connected."""
    return with_writer(state, place, writer)._replace(nodes=replaced(state.nodes, writer.node, node))
