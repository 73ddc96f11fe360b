"""A check: something that must hold, the promise that it is part of, and the words for it when it does not."""

from __future__ import annotations

from enum import StrEnum


class Check(StrEnum):
    """Says what is wrong where it does not hold; `promise` is one of docs/guarantees.md, e.g. P1."""

    def __new__(cls, promise: str, what: str, *more: str) -> Check:
        member = str.__new__(cls, what)
        member._value_ = what
        return member

    def __init__(self, promise: str, *more: str) -> None:
        self.promise = promise
