"""A call: operations on shards of one server, sent together and run as one function (lua/call.lua).

Callers name the parameters of an operation: tenant, book, code and user, and never a key. Its keys follow from these:
`holders` is `ShardKeys.holders(book_id)`. So each operation gets one function, generated at load, that spells its keys and
gives the operation as it is sent. A key's parameter that the operation itself does not take (the book of a lock) becomes
one more parameter of the function.
"""

from __future__ import annotations

import inspect
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import count
from typing import Any, NamedTuple

import msgspec

from coupon_svc.domain.holding import Holding, parse_positions
from coupon_svc.redis.contract import Arg, CallClass, Command, Contract, Key, Reply, ReplyLine, ReplyReader
from coupon_svc.redis.keys import ShardKeys

QUARANTINED = "quarantined"
"""Stands in a list of holders for a code in quarantine."""

KeyTable = dict[str, int]
"""The keys of a call in their order, each with its number in KEYS, from 1."""
ITEMS_PER_WEIGHT, BYTES_PER_WEIGHT = 8, 1024
"""What an operation may have beside itself for a weight of 1: items of a list (a lock is read in an eighth of the time of an
assign), and bytes of metadata."""

_pack_sections = msgspec.msgpack.Encoder().encode
_parse_replies = msgspec.json.Decoder().decode

# A tip tells an event from any other that stands, or ever stood, at its position. A counter makes it different within the
# process, and the prefix everywhere else: who puts keys back or makes an entry by hand cannot know it.
_tip_prefix = secrets.token_hex(8)
_tips = count(1)


def new_tip() -> str:
    """A text that no other section of a call ever had."""
    return f"{_tip_prefix}{next(_tips):x}"


MADE_EVENT = frozenset({"ok", "confirmed"})
"""Replies of an operation that makes events which say that it made one."""


class EntryId(NamedTuple):
    """Which entry of a shard's stream holds an event: the position of its last event, and its tip."""

    epoch: int
    seq: int
    tip: str


class BoundOperation(NamedTuple):
    """An operation as it is sent and read.

    `pack(keys, prefix, **parameters)` gives `[name, key, …, argument, …]`, and enters its keys in `keys`.
    """

    name: str
    call_class: CallClass
    pack: Callable[..., list[Any]]
    read: Callable[[Sequence[Any]], Reply]
    with_position: frozenset[str]
    """Outcomes whose reply has positions of events that this call did not make: its own are at or below its section's."""
    with_holders: frozenset[str]
    """Outcomes whose reply has a list of holders."""
    makes_event: bool
    """A reply of MADE_EVENT says that it made one."""
    weigh: Callable[[Mapping[str, Any]], int] | None
    """The weight that its parameters give it; None for one that always weighs 1."""

    def reply(self, raw: Sequence[Any], entry: EntryId | None = None) -> Reply:
        """What Redis sent, with a name for each field: `position` is (assigned, last), and `holders` holds for each code a
        Holding, "" for nobody, or QUARANTINED. `entry` is that of the section, and becomes the reply's where the operation
        made an event. Raises UnexpectedReply, ValueError."""
        return self.read((*raw, entry) if self.makes_event and raw[0] in MADE_EVENT else raw)


def _parse_holders(texts: Sequence[str]) -> list[Holding | str]:
    return [text if text in ("", QUARANTINED) else Holding.parse(text) for text in texts]


_PARSERS: dict[str, Callable[[Any], Any]] = {
    "position": parse_positions,
    "holders": _parse_holders,
    "members": list,  # Lua has one table for lists and objects: an empty one came as an object
}


def bind_operation(contract: Contract) -> BoundOperation:
    """Generate the function that packs an operation."""
    assert contract.call_class is not None
    keys = [_key_expression(key) for key in contract.keys]
    args = {arg.name: arg for arg in contract.args}
    needed = {name for _, names in keys for name in names}
    optional = {_key_expression(key)[1][-1] for key in contract.keys if key.mark == "?"}
    parameters = [f"{name}=''" if name in optional else name for name in sorted(needed) if name not in args]
    parameters += [f"{name}=''" if arg.mark == "?" else name for name, arg in args.items()]
    values = [repr(contract.name), *(expression for expression, _ in keys), *map(_arg_expression, contract.args)]
    head = f"def pack(keys, prefix, *, {', '.join(parameters)}):"
    scope: dict[str, Any] = {}
    source = f"{head}\n    number = keys.setdefault\n    return [{', '.join(values)}]\n"
    exec(compile(source, f"<pack {contract.name}>", "exec"), scope)
    fields = {line.word: line.fields for line in contract.replies}
    return BoundOperation(
        contract.name,
        contract.call_class,
        scope["pack"],
        ReplyReader(
            contract._replace(replies=tuple(_with_entry(contract, line) for line in contract.replies)), _PARSERS
        ),
        frozenset(
            word
            for word, names in fields.items()
            if "position" in names and not (contract.events and word in MADE_EVENT)
        ),
        frozenset(word for word, names in fields.items() if "holders" in names),
        bool(contract.events),
        _weigher(contract),
    )


def _arg_expression(arg: Arg) -> str:
    if arg.mark == "…":
        return arg.name if arg.type == "text" else f"[str(one) for one in {arg.name}]"
    return arg.name if arg.type == "text" else f"str({arg.name})"


def _key_expression(key: Key) -> tuple[str, list[str]]:
    """(the expression for a key's number, the parameters in it). A list of keys has one for each item of a list of
    arguments: the locks of `codes` are `ShardKeys.lock(book_id, code)`."""
    keys = ShardKeys(0, 1, tag="any")
    spelled = getattr(keys, key.name)
    needed = list(inspect.signature(spelled).parameters)
    text = spelled(*(f"{{{name}}}" for name in needed)).replace(keys.prefix, "{prefix}")
    number = f"number(f{text!r}, len(keys) + 1)"
    if key.mark == "…":
        listed = needed.pop()
        return f"[{number} for {listed} in {listed}s]", needed
    if key.mark == "?":
        return f"{number} if {needed[-1]} else 0", needed
    return number, needed


def _with_entry(contract: Contract, line: ReplyLine) -> ReplyLine:
    made = contract.events and line.word in MADE_EVENT
    return line._replace(fields=(*line.fields, "entry")) if made else line


def _weigher(contract: Contract) -> Callable[[Mapping[str, Any]], int] | None:
    lists = [arg.name for arg in contract.args if arg.mark == "…"]
    if lists:
        return lambda parameters: 1 + sum(len(parameters[name]) for name in lists) // ITEMS_PER_WEIGHT
    names = {arg.name for arg in contract.args}
    if "limit" in names:
        return lambda parameters: 1 + int(parameters["limit"]) // ITEMS_PER_WEIGHT
    if "metadata" in names:
        return lambda parameters: 1 + len(parameters.get("metadata", "")) // BYTES_PER_WEIGHT
    return None


_COUNT = 5
"""The place of `count` among the values of a section."""


class Section:
    """One shard's part of a call, as the values that are sent, in the order of the header of lua/call.lua. It enters its
    keys in `keys`, which are the call's."""

    __slots__ = ("tip", "values")

    def __init__(self, keys: KeyTable, shard: ShardKeys, epoch: int, seen_seq: int) -> None:
        meta = keys.setdefault(shard.meta, len(keys) + 1)
        events = keys.setdefault(shard.events, len(keys) + 1)
        self.tip = new_tip()
        self.values: list[Any] = [meta, events, str(epoch), str(seen_seq), self.tip, 0]

    def add(self, operation: list[Any]) -> None:
        """Have it run one more operation, as `BoundOperation.pack` made it of the same keys."""
        self.values[_COUNT] += 1
        self.values += operation


def call_command(function: str, keys: KeyTable, sections: Iterable[Section]) -> Command:
    """The command that runs a call: `function` is the library's, for the class of its operations."""
    values: list[Any] = []
    for section in sections:
        values += section.values
    return ("FCALL", function, len(keys), *keys, _pack_sections(values))


def section_replies(raw: str | list[Any]) -> list[Any]:
    """The replies of a call's sections, in their order, from what Redis sent; each as the header of lua/call.lua says."""
    replies: list[Any] = _parse_replies(raw) if isinstance(raw, str) else raw
    return replies
