"""What befalls Redis, and the recovery that mends it."""

from __future__ import annotations

from collections.abc import Iterator

from tests.model.promises import decides
from tests.model.state import EMPTY, GONE, NO_TIP, Bounds, Node, State, replaced

Step = tuple[str, State]

RESTARTS = ("restart", "old", "empty")
FAILOVERS = ("promote", "failback", "swap")
TAMPERING = ("flush", "del_meta", "del_book", "del_free", "del_holders", "del_stream", "trim")
WISH = "wish"
"""An operator wants the shard recovered (`want_recovery`). No harm done, but everybody is connected when it is shut."""
PUT_BACK = ("put_back", "put_back_told", "put_back_committed", "put_back_any")
"""Redis's memory of a moment ago, under the same run_id and replid, on live connections: when every API process has heard
that what is lost by it was committed; when they have been told; when it was committed; at any moment."""
CUT = "cut"
"""A recovery loses its connection to Postgres or Redis between two steps, and is begun anew."""
DEAL_AGAIN = "deal_again"
"""An operator has a quarantined code dealt again, whoever may hold it."""
CLOCK = "clock"
"""Postgres's clock steps forward, by which the row of an API process that lives has ended."""
RAISES = "raises"
"""The first operation of a call raises while it decides."""
APPLY_FAILS = "apply_fails"
"""A call fails behind its entry."""
KINDS = frozenset((*RESTARTS, *FAILOVERS, *TAMPERING, *PUT_BACK, WISH, CUT, DEAL_AGAIN, CLOCK, RAISES, APPLY_FAILS))


def steps(state: State, bounds: Bounds) -> Iterator[Step]:
    """Every fault that is left to happen to the Redis that new connections lead to."""
    node, wanted = state.nodes[state.current], kinds(state, bounds)
    if not wanted:
        return
    if state.copy is None and wanted & {"old", "promote", "swap", *PUT_BACK}:
        yield f"redis {node.run} is copied", state._replace(copy=node)
    hit = state._replace(faults=state.faults + 1)
    new = state.faults + 1
    if "restart" in wanted:
        yield "redis restarts, with nothing lost", _restarted(hit, node._replace(run=new, replid=new))
    if "empty" in wanted:
        yield "redis comes back empty", _restarted(hit, EMPTY._replace(run=new, replid=new))
    if state.copy is not None:
        old = state.copy._replace(run=new, replid=new)
        gone = hit._replace(copy=None)
        if "old" in wanted:
            yield "redis comes back with the old copy", _restarted(gone, old)
        if "promote" in wanted and len(state.nodes) == 1 and (state.copy.seq < node.seq or not bounds.order):
            both = (*state.nodes, old)
            yield "a stale replica is promoted, and the old master lives on", gone._replace(nodes=both, current=1)
        if "swap" in wanted:
            yield "redis was a replica for a moment, and has an old copy", _changed(gone, old._replace(run=node.run))
        for kind in wanted.intersection(PUT_BACK):
            if state.copy.identity == node.identity and state.copy != node and _may_go_back(state, bounds, node, kind):
                yield "somebody puts the copy's keys back into the running redis", _changed(gone, state.copy)
    if "failback" in wanted and len(state.nodes) == 2:
        yield "clients are sent to the other master again", hit._replace(current=1 - state.current)
    if WISH in wanted and state.ledger.epoch < bounds.epochs - 1:
        ledger = state.ledger._replace(epoch=state.ledger.epoch + 1, committed=0)
        yield "an operator wants the shard recovered", hit._replace(ledger=ledger)
    if CUT in wanted:
        for place, writer in enumerate(state.writers):  # between other steps a script that is fenced does the same
            if writer.recovery is not None and writer.recovery.done in ("settling", "settled"):
                alone = replaced(state.writers, place, writer._replace(recovery=None))
                yield f"writer {place}'s recovery is cut off", hit._replace(writers=alone)
    if DEAL_AGAIN in wanted and state.ledger.epoch < bounds.epochs - 1:
        for code, epoch in state.ledger.quarantine:
            ledger = state.ledger._replace(epoch=state.ledger.epoch + 1, committed=0)
            ledger = ledger._replace(quarantine=ledger.quarantine - {(code, epoch)})
            overruled = state.overruled | {(code, epoch)}
            yield f"an operator has code {code} dealt again", hit._replace(ledger=ledger, overruled=overruled)
    for kind, harmed in _tampered(node):
        if kind in wanted and harmed != node:
            yield f"somebody's hand: {kind}", _changed(hit, harmed)


def kinds(state: State, bounds: Bounds) -> frozenset[str]:
    """The kinds of which one may be the next. In a given order, a disaster waits until Redis decides again, unless the
    recovery of the last one was cut off."""
    if bounds.order:
        node, wanted = state.nodes[state.current], bounds.order[state.faults : state.faults + 1]
        if CUT in bounds.order[: state.faults + 1] or decides(state, node.epoch, node.certified == node.identity):
            return frozenset(wanted)
        return frozenset()
    return bounds.kinds if state.faults < bounds.faults else frozenset()


def _may_go_back(state: State, bounds: Bounds, node: Node, kind: str) -> bool:
    """Whether what goes back with the keys is known widely enough for this kind of fault."""
    if kind == "put_back_any" or node.epoch <= 0:
        return kind == "put_back_any"
    upto = state.ledger.committed if kind == "put_back_committed" else state.told[node.epoch]
    there = [process for process in state.processes if process.node >= 0]
    if kind == "put_back" and bounds.messages and any(process.heard < node.seq for process in there):
        return False
    return upto >= node.seq and node.epoch == state.ledger.epoch


def _tampered(node: Node) -> Iterator[tuple[str, Node]]:
    yield "flush", EMPTY._replace(run=node.run, replid=node.replid)
    yield (
        "del_meta",
        node._replace(epoch=GONE, was=0, generation=0, attempt=0, seq=0, committed=0, certified=(-1, -1))._replace(
            tip=NO_TIP
        ),
    )
    yield "del_book", node._replace(book=False, lent=0)
    yield "del_free", node._replace(free=frozenset())
    yield "del_holders", node._replace(holders=frozenset())
    yield "del_stream", node._replace(stream=())
    yield "trim", node._replace(stream=node.stream[1:])


def _changed(state: State, node: Node) -> State:
    """Other data on live connections."""
    return state._replace(nodes=replaced(state.nodes, state.current, node))


def _restarted(state: State, node: Node) -> State:
    """Another life of the server: every connection to it breaks, and whoever connects anew verifies it first."""
    processes = tuple(
        process._replace(open=False) if process.node == state.current else process for process in state.processes
    )
    return _changed(state, node)._replace(processes=processes)
