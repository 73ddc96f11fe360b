"""Takes a call apart that was sent to Redis, and makes the reply of a section: both as the header of lua/call.lua says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from coupon_svc.redis.contract import Contract
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
    values = msgspec.msgpack.decode(command[-1])
    names = names_of(scripts.section)
    sections = []
    while values:
        head = dict(zip(names, values, strict=False))
        del values[: len(names)]
        operations = []
        for _ in range(head.pop("count")):
            size = scripts.operations[values[0]].contract.size
            operations.append(values[:size])
            del values[:size]
        sections.append(SentSection(**head, operations=operations))
    return sections


def names_of(contract: Contract) -> list[str]:
    """The keys and arguments, in the order in which a call has their values."""
    return [key.name for key in contract.keys] + [arg.name for arg in contract.args]


def decided(scripts: Scripts, **fields: Any) -> list[Any]:
    """The reply `ok` of a section, with these fields."""
    (names,) = [line.fields for line in scripts.section.replies if line.word == "ok"]
    return ["ok", *(fields[name] for name in names if name in fields)]
