"""What befalls Redis."""

from __future__ import annotations

from collections.abc import Iterator

from tests.model.state import EMPTY, GONE, Bounds, Node, State, replaced

Step = tuple[str, State]

RESTARTS = ("restart", "old", "empty")
FAILOVERS = ("promote", "failback", "swap")
TAMPERING = ("flush", "del_meta", "del_book", "del_free", "del_holders", "del_stream", "trim")
WISH = "wish"
"""An operator wants the shard recovered (`want_recovery`). No harm done, but everybody is connected when it is shut."""
KINDS = frozenset((*RESTARTS, *FAILOVERS, *TAMPERING, WISH))


def steps(state: State, bounds: Bounds) -> Iterator[Step]:
    """Every fault that is left to happen to the Redis that new connections lead to."""
    node, wanted = state.nodes[state.current], bounds.kinds
    if state.faults >= bounds.faults:
        return
    if state.copy is None and wanted & {"old", "promote", "swap"}:
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
        if "promote" in wanted and len(state.nodes) == 1:
            both = (*state.nodes, old)
            yield "a stale replica is promoted, and the old master lives on", gone._replace(nodes=both, current=1)
        if "swap" in wanted:
            yield "redis was a replica for a moment, and has an old copy", _changed(gone, old._replace(run=node.run))
    if "failback" in wanted and len(state.nodes) == 2:
        yield "clients are sent to the other master again", hit._replace(current=1 - state.current)
    if WISH in wanted and state.ledger.epoch < bounds.epochs - 1:
        ledger = state.ledger._replace(epoch=state.ledger.epoch + 1, committed=0)
        yield "an operator wants the shard recovered", hit._replace(ledger=ledger)
    for kind, harmed in _tampered(node):
        if kind in wanted and harmed != node:
            yield f"somebody's hand: {kind}", _changed(hit, harmed)


def _tampered(node: Node) -> Iterator[tuple[str, Node]]:
    yield "flush", EMPTY._replace(run=node.run, replid=node.replid)
    yield "del_meta", node._replace(epoch=GONE, was=0, generation=0, attempt=0, seq=0, committed=0, certified=(-1, -1))
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
