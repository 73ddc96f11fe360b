"""The walk: breadth first, so that the first history found is a shortest one."""

from __future__ import annotations

import contextlib
import gc
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

from tests.model import api, faults, writer
from tests.model.promises import decides, of_state
from tests.model.state import Bounds, State, first_state

STATES_MAX = 20_000_000


class Walked(NamedTuple):
    """What a walk found: how many states, which promise was broken ("" for none), and the shortest way there."""

    states: int
    broken: str
    history: list[str]


def steps(state: State, bounds: Bounds) -> Iterator[tuple[str, State]]:
    """Everything that may happen next."""
    yield from api.steps(state, bounds)
    yield from writer.steps(state, bounds)
    yield from faults.steps(state, bounds)


def walk(bounds: Bounds, states_max: int = STATES_MAX) -> Walked:
    """Walk through every state within the bounds, until one breaks a promise. Raises MemoryError beyond `states_max`."""
    first = first_state(bounds)
    came: dict[State, tuple[State, str] | None] = {first: None}
    queue = deque([first])
    with _without_collector():
        while queue:
            state = queue.popleft()
            for label, after in steps(state, bounds):
                before = len(came)
                came.setdefault(after, (state, label))
                if len(came) == before:
                    continue
                broken = after.broken
                if (
                    after.ledger is not state.ledger
                    or after.nodes is not state.nodes
                    or after.answers is not state.answers
                ):
                    broken = broken or of_state(after, bounds)
                if broken:
                    return Walked(len(came), broken, _history(came, after))
                queue.append(after)
            if len(came) > states_max:
                raise MemoryError(f"more than {states_max} states")
    return Walked(len(came), "", [])


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """States hold no cycles, and there are so many that looking for some takes most of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _history(came: dict[State, tuple[State, str] | None], state: State) -> list[str]:
    labels = []
    while (step := came[state]) is not None:
        state, label = step
        labels.append(label)
    return labels[::-1]


def stuck(bounds: Bounds) -> Walked:
    """Whether there is a state from which no way leads to a Redis that decides, though an epoch and an owner are left.

    `broken` says so; `history` leads to the first such state.
    """
    first = first_state(bounds)
    came: dict[State, tuple[State, str] | None] = {first: None}
    before: dict[State, list[State]] = {first: []}
    queue = deque([first])
    while queue:
        state = queue.popleft()
        for label, after in steps(state, bounds):
            before.setdefault(after, []).append(state)
            if after not in came:
                came[after] = (state, label)
                queue.append(after)
    fine = deque(state for state in came if in_service(state))
    reached = set(fine)
    while fine:
        for state in before[fine.popleft()]:
            if state not in reached:
                reached.add(state)
                fine.append(state)
    for state in came:
        if state not in reached and state.ledger.epoch < bounds.epochs:
            return Walked(len(came), "no recovery can finish any more", _history(came, state))
    return Walked(len(came), "", [])


def in_service(state: State) -> bool:
    """The Redis that new connections lead to decides, and its owner has opened it."""
    node, owner = state.nodes[state.current], state.writers[state.ledger.owner]
    return (
        decides(state, node.epoch, node.certified == node.identity)
        and owner.node == state.current
        and owner.opened_on == node.identity
        and owner.term == (state.ledger.epoch, state.ledger.generation)
    )
