"""Is there an order of requests, true to when each was asked and answered, in which one after the other gives these answers?

The search is Wing and Gong's with Lowe's memory of what was tried. It looks at one code at a time, or at one user of one
book for the limit: a history is linearizable when each of these is. A request whose outcome is unknown may take effect at
any time after it was asked, or never. A model may forbid less than the service does, never more: a finding is an error.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol, TypeVar

State = TypeVar("State")

STEPS_MAX = 300_000
CLOCKS_APART_S = 0.05
"""What Redis's wall clock and our monotonic one may drift apart while a lock is held."""


class Operation(NamedTuple):
    """One request: what was asked, when, and what was answered."""

    verb: str
    """assign, assign_code, lock, unlock, redeem"""
    outcome: str
    """ok, refused, unknown"""
    invoked_s: float
    returned_s: float = math.inf
    user: str = ""
    why: str = ""
    """The code of the problem when refused."""
    shown: str = ""
    """The lock token that the caller showed."""
    token: str = ""
    """The lock token that was answered."""
    ttl_s: float = 0
    uses: int = 0
    """Of a redeem: how many uses of the code are spent with this one."""
    found: bool = False
    """Answered that it was so before: nothing was done."""


class Model(Protocol[State]):
    """What one request after the other does."""

    first: State

    def says_something(self, operation: Operation) -> bool:
        """Whether the operation may change the state, or its answer tells of it."""
        ...

    def step(self, state: State, operation: Operation) -> Iterable[State]:
        """The states that the operation may lead to; none when it cannot have been answered like this."""
        ...


class CodeState(NamedTuple):
    """One code: whose it is, how often it was redeemed, and who has it locked."""

    user: str = ""
    uses: int = 0
    token: str = ""
    locked_until_s: float = 0.0
    """The lock cannot end by itself before."""


class CodeModel:
    """The life of one code: unassigned, assigned for good, redeemed up to `uses_max` times, locked now and then.

    With `loses_locks` a lock may be gone at any time. With `loses_records` what a refusal was based on may have been lost
    later: refusals say nothing then. What was answered as assigned is nobody else's in any case.
    """

    first = CodeState()

    def __init__(self, uses_max: int, *, loses_locks: bool = False, loses_records: bool = False) -> None:
        self._uses_max = uses_max
        self._loses_locks = loses_locks
        self._loses_records = loses_records

    def says_something(self, operation: Operation) -> bool:
        if operation.outcome != "refused":
            return True
        if self._loses_records:
            return False
        if operation.why in ("locked", "lock_not_held"):
            return not self._loses_locks
        return operation.why in ("not_assigned", "already_assigned", "not_holder", "already_redeemed")

    def step(self, state: CodeState, operation: Operation) -> Iterable[CodeState]:
        if operation.outcome == "refused":
            return self._refused(state, operation)
        return getattr(self, f"_{operation.verb}")(state, operation)  # type: ignore[no-any-return]

    def _assign(self, state: CodeState, operation: Operation) -> Iterable[CodeState]:
        if operation.found:
            return [state] if state.user == operation.user else []
        return [] if state.user else [CodeState(operation.user)]

    _assign_code = _assign

    def _lock(self, state: CodeState, operation: Operation) -> Iterable[CodeState]:
        if state.user != operation.user or state.uses >= self._uses_max:
            return []
        if operation.shown and state.token != operation.shown:
            return []
        if not operation.shown and not self._is_free(state, operation):
            return []
        token = operation.shown or operation.token or f"nobody knows, of {operation.invoked_s}"
        return [state._replace(token=token, locked_until_s=operation.invoked_s + operation.ttl_s)]

    def _unlock(self, state: CodeState, operation: Operation) -> Iterable[CodeState]:
        if state.token == operation.shown or self._is_free(state, operation):
            return [state._replace(token="")]
        return []

    def _redeem(self, state: CodeState, operation: Operation) -> Iterable[CodeState]:
        if state.user != operation.user or state.uses >= self._uses_max:
            return []
        if operation.outcome == "ok" and operation.uses != state.uses + 1:
            return []
        if operation.shown:
            held = state.token == operation.shown
        else:
            held = self._is_free(state, operation)
        return [CodeState(state.user, state.uses + 1)] if held else []

    def _is_free(self, state: CodeState, operation: Operation) -> bool:
        """Whether no lock stood in the operation's way: it may have ended by itself meanwhile."""
        ended = operation.returned_s >= state.locked_until_s - CLOCKS_APART_S
        return not state.token or self._loses_locks or ended

    def _refused(self, state: CodeState, operation: Operation) -> Iterable[CodeState]:
        if operation.why == "lock_not_held":
            if state.token != operation.shown:
                return [state]
            return [state._replace(token="")] if self._is_free(state, operation) else []
        fits = {
            "not_assigned": not state.user,
            "already_assigned": state.user not in ("", operation.user),
            "not_holder": state.user not in ("", operation.user),
            "already_redeemed": state.uses >= self._uses_max,
            "locked": bool(state.token),
        }
        return [state] if fits[operation.why] else []


class LimitModel:
    """How many codes of one book one user was given."""

    first = 0

    def __init__(self, limit: int, *, loses_records: bool = False) -> None:
        self._limit = limit
        self._loses_records = loses_records

    def says_something(self, operation: Operation) -> bool:
        if operation.outcome == "refused":
            return operation.why == "user_code_limit" and not self._loses_records
        return not operation.found

    def step(self, state: int, operation: Operation) -> Iterable[int]:
        if operation.outcome == "refused":
            return [state] if state >= self._limit else []
        return [state + 1] if state < self._limit else []


def linearizable(history: Sequence[Operation], model: Model[State]) -> bool:
    """Whether some order explains the history. Raises AssertionError when that takes more than STEPS_MAX steps to tell."""
    operations = sorted((op for op in history if model.says_something(op)), key=lambda op: op.invoked_s)
    known = sum(1 << number for number, op in enumerate(operations) if op.outcome != "unknown")
    tried = {(0, model.first)}
    to_try = [(0, model.first)]
    while to_try:
        done, state = to_try.pop()
        if done & known == known:
            return True
        assert len(tried) < STEPS_MAX, "this history is too tangled to be judged"
        waiting = [number for number in range(len(operations)) if not done >> number & 1]
        # Who was asked after another was answered comes after it.
        horizon = min(operations[number].returned_s for number in waiting if known >> number & 1)
        for number in waiting:
            if operations[number].invoked_s > horizon:
                break
            for following in model.step(state, operations[number]):
                place = (done | 1 << number, following)
                if place not in tried:
                    tried.add(place)
                    to_try.append(place)
    return False


def require_linearizable(history: Sequence[Operation], model: Model[State], of: str) -> None:
    """Raises AssertionError with the history when no order explains it."""
    assert linearizable(history, model), f"no order of its requests explains the answers about {of}: " + "; ".join(
        str(op) for op in sorted(history, key=lambda op: op.invoked_s)
    )
