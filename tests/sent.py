"""Takes a call apart that was sent to Redis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from coupon_svc.redis.scripts import Scripts


class SentSection(NamedTuple):
    """One shard's part of a call: its head, as `Section`, and its operations, each with its name, keys and arguments."""

    meta: int
    events: int
    epoch: str
    seen_seq: str
    tip: str
    operations: list[list[Any]]


def sections_of(scripts: Scripts, command: Sequence[Any]) -> list[SentSection]:
    """The sections of the call, in their order."""
    values = iter(msgspec.msgpack.decode(command[-1]))
    sections = []
    for meta in values:
        events, epoch, seen_seq, tip, count = (next(values) for _ in range(5))
        operations = []
        for _ in range(count):
            name = next(values)
            operations.append([name, *(next(values) for _ in range(scripts.operations[name].contract.size - 1))])
        sections.append(SentSection(meta, events, epoch, seen_seq, tip, operations))
    return sections
