"""The contract of a Lua script: what its header says of keys, arguments, replies and events.

The header is the first comment of the file, and the only list of them. From it come the names that the body uses
(`preamble`) and the Python binding that sends the script and reads its reply (`packer`, `ReplyReader`):

    --[[
    take_code: what the script does, in prose.

    Keys
      meta       hash    read, count
      idem?      string  read, write; a key that may be left out
      locks…     string  read; any number of keys

    Args
      epoch      int
      user_id?   text   "" when it is left out
      codes…     text   any number of arguments

    Replies, the first that applies
      suspect(why)       `epoch`, `behind`: texts that stand for themselves, in backquotes
      ok(code, note?)    a field with ? may be missing, and is then ""

    Event
      coupon_assigned(code, user)
    ]]

The body finds a key as `<name>_key`, a list of keys as `<name>_keys`, and an argument by its name; a key that was left out
is nil. Only the last key may be left out or a list, unless all of them are lists, of the same length; in an operation,
several at the end may be left out. Arguments that are lists come last; each but the last one is sent with its length in
front.

An operation is a part of a function of the library: many of them run in one call (lua/call.lua). Its file begins with the
comment, which names its class between the prose and the keys:

    Class: grow

Meta, the events, the epoch and what was seen are the section's, so an operation does not list them: the header of the call
does, which is that of a section. In the call an operation is its name, its keys and its arguments, in the order of the
header: a key is its number in KEYS, 0 when it is left out, and a list is a list. Beside the names in its header, a body uses
those of the call and the section (lua/call.lua): `meta`, `now_ms`, `at_ms` and `pool_look`.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import StrEnum
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

from coupon_svc.domain.errors import CouponError

Command = tuple[str | int | bytes, ...]
"""A command as it is sent to Redis, its name first."""

_SCRIPT = re.compile(r"#!lua(?P<flags> flags=[a-z,-]+)?\n--\[\[\n(?P<header>.*?)\n\]\]\n(?P<body>.*)", re.DOTALL)
_OPERATION = re.compile(r"--\[\[\n(?P<header>.*?)\n\]\]\n(?P<body>.*)", re.DOTALL)
_KEY = re.compile(
    r"(?P<name>[a-z]\w*)(?P<mark>[?…])? +(?P<type>hash|zset|set|string|stream|any) +(?P<access>\w+(?:, \w+)*)(?:;.*)?"
)
_ARG = re.compile(r"(?P<name>[a-z]\w*)(?P<mark>[?…])? +(?P<type>int|text)(?: .*)?")
_REPLY = re.compile(r"(?P<word>[a-z_]+)(?:\((?P<fields>\w+\??(?:, \w+\??)*)\))?(?: {2,}(?P<note>.*))?")
_EVENT = re.compile(r"(?P<word>[a-z_]+)\((?P<fields>\w+(?:, \w+)*)\)")
_CLASS = re.compile(r"Class: (?P<word>\w+)")
_SECTIONS = {"Keys": _KEY, "Args": _ARG, "Replies, the first that applies": _REPLY, "Event": _EVENT}


class ContractError(CouponError):
    """A header that is not understood. The message names the script and the line."""


class UnexpectedReply(CouponError):
    """A script replied what its header does not list. The message names the script and holds no value of the reply."""


class CallClass(StrEnum):
    """What Redis lets a whole call do, since it judges memory, disk and role once for each function, by its flags."""

    READ = "read"
    """It writes nothing."""
    GROW = "grow"
    """It may take memory, and is refused where there is none."""
    KEEP = "keep"
    """It keeps a promise, and so runs without memory, too."""


_OF_THE_SECTION = ("meta", "events", "epoch", "seen_seq")
"""What a section has for all its operations."""


class Key(NamedTuple):
    """A line under Keys. `access` is what the body does with the key, in words such as `read` and `append`."""

    name: str
    mark: str
    type: str
    access: frozenset[str]

    @property
    def lua_name(self) -> str:
        return f"{self.name}_keys" if self.mark == "…" else f"{self.name}_key"


class Arg(NamedTuple):
    """A line under Args. `mark` is `?` for one that may be left out, and `…` for a list."""

    name: str
    mark: str
    type: str


class ReplyLine(NamedTuple):
    """A line under Replies: the outcome, the names of what follows it, and how many of these may be missing."""

    word: str
    fields: tuple[str, ...]
    optional: int
    note: str


class Contract(NamedTuple):
    """All that a header says, but for its prose."""

    name: str
    keys: tuple[Key, ...]
    args: tuple[Arg, ...]
    replies: tuple[ReplyLine, ...]
    events: Mapping[str, tuple[str, ...]]
    call_class: CallClass | None = None
    """The class of an operation; None for a script."""

    @property
    def size(self) -> int:
        """How many values an operation has in a call."""
        return 1 + len(self.keys) + len(self.args)


def split_source(name: str, text: str) -> tuple[str, str, str]:
    """(first line, header, body) of a Lua file. Raises ContractError."""
    parts = _SCRIPT.fullmatch(text)
    if parts is None:
        raise ContractError(f"{name}: the file does not begin with #!lua and a --[[ comment ]]")
    return f"#!lua{parts['flags'] or ''}", parts["header"], parts["body"]


def split_operation(name: str, text: str) -> tuple[str, str]:
    """(header, body) of the file of an operation. Raises ContractError."""
    parts = _OPERATION.fullmatch(text)
    if parts is None:
        raise ContractError(f"{name}: the file does not begin with a --[[ comment ]]")
    return parts["header"], parts["body"]


def parse_operation(header: str) -> Contract:
    """The contract in the header of an operation, with its class. Raises ContractError."""
    contract = parse_contract(header)
    if contract.call_class is None:
        raise ContractError(f"{contract.name}: the header of an operation names its class")
    listed = {key.name for key in contract.keys} | {arg.name for arg in contract.args}
    for name in _OF_THE_SECTION:
        if name in listed:
            raise ContractError(f"{contract.name}: {name} is the call's")
    return contract


def parse_contract(header: str) -> Contract:
    """The contract in a header. Raises ContractError."""
    name, _, rest = header.partition(":")
    lines: dict[str, list[re.Match[str]]] = {title: [] for title in _SECTIONS}
    title, call_class = "", None
    for line in rest.splitlines()[1:]:
        if line in _SECTIONS:
            title = line
        elif not title and (match := _CLASS.fullmatch(line)):
            if call_class or match["word"] not in set(CallClass):
                raise ContractError(f"{name}: this is not understood: {line}")
            call_class = CallClass(match["word"])
        elif title and line.startswith("  "):
            match = _SECTIONS[title].fullmatch(line[2:])
            if match is None:
                raise ContractError(f"{name}: under {title}, this is not understood: {line.strip()}")
            lines[title].append(match)
        elif title and line:
            raise ContractError(f"{name}: no section has this title: {line}")
    keys, args, replies, events = lines.values()
    contract = Contract(
        name,
        tuple(Key(m["name"], m["mark"] or "", m["type"], frozenset(m["access"].split(", "))) for m in keys),
        tuple(Arg(m["name"], m["mark"] or "", m["type"]) for m in args),
        tuple(_reply_line(m) for m in replies),
        {m["word"]: tuple(m["fields"].split(", ")) for m in events},
        call_class,
    )
    for complaint in _complaints(contract):
        raise ContractError(f"{name}: {complaint}")
    return contract


def _reply_line(match: re.Match[str]) -> ReplyLine:
    fields = match["fields"].split(", ") if match["fields"] else []
    names = tuple(field.rstrip("?") for field in fields)
    return ReplyLine(match["word"], names, sum(field.endswith("?") for field in fields), match["note"] or "")


def _complaints(contract: Contract) -> Iterator[str]:
    names = [key.name for key in contract.keys] + [arg.name for arg in contract.args]
    yield from (f"{name} is no name for a parameter" for name in names if keyword.iskeyword(name))
    yield from (f"{name} stands in the header twice" for name in sorted({n for n in names if names.count(n) > 1}))
    marks = "".join(key.mark or "-" for key in contract.keys)
    several = contract.call_class is not None and re.fullmatch(r"-*\?*", marks)
    if not several and not _all_lists(contract):
        yield from (
            f"{key.name}: only the last key may be left out or a list" for key in contract.keys[:-1] if key.mark
        )
    marks = "".join("…" if arg.mark == "…" else "-" for arg in contract.args)
    if "…-" in marks:
        yield "an argument that is a list must not stand before one that is none"
    words = [line.word for line in contract.replies]
    yield from (f"{word} stands in the header twice" for word in sorted({w for w in words if words.count(w) > 1}))


def _all_lists(contract: Contract) -> bool:
    """Whether the keys are several lists, of the same length."""
    return len(contract.keys) > 1 and all(key.mark == "…" for key in contract.keys)


def preamble(contract: Contract) -> str:
    """The Lua that gives keys and arguments their names; one line without lists, and a loop for each list."""
    lines = []
    if _all_lists(contract):
        for number, key in enumerate(contract.keys):
            lines.append(f"local {key.lua_name}, each = {{}}, #KEYS / {len(contract.keys)}")
            lines.append(f"for i = 1, each do {key.lua_name}[i] = KEYS[{number} * each + i] end")
    for table, slots in (
        ("KEYS", [] if _all_lists(contract) else [(key.lua_name, key.mark) for key in contract.keys]),
        ("ARGV", [(arg.name, arg.mark) for arg in contract.args]),
    ):
        single = [name for name, mark in slots if mark != "…"]
        lists = [name for name, mark in slots if mark == "…"]
        if single:
            values = ", ".join(f"{table}[{number}]" for number in range(1, len(single) + 1))
            lines.append(f"local {', '.join(single)} = {values}")
        start = str(len(single) + 1)
        for name in lists[:-1]:
            count, after = f"{name}_count", f"after_{name}"
            lines.append(f"local {name}, {count} = {{}}, tonumber({table}[{start}])")
            lines.append(f"for i = 1, {count} do {name}[i] = {table}[{start} + i] end")
            lines.append(f"local {after} = {start} + {count} + 1")
            start = after
        for name in lists[-1:]:
            lines.append(f"local {name} = {{}}")
            lines.append(f"for i = {start}, #{table} do {name}[i - {start} + 1] = {table}[i] end")
    return "".join(line + "\n" for line in lines)


def operation_preamble(contract: Contract) -> str:
    """The Lua that gives the keys and arguments of an operation, whose values begin at `at` in `sent`, their names."""
    return _names_of_values(contract, 1)  # behind its own name


def section_preamble(contract: Contract) -> str:
    """The same for a section, whose values have no name in front; `at` is its first operation then."""
    return f"{_names_of_values(contract, 0)}at = at + {contract.size - 1}\n"


def _names_of_values(contract: Contract, first: int) -> str:
    keys, args, loops = [], [], []
    for place, key in enumerate(contract.keys, first):
        if key.mark == "…":
            loops.append(f"local {key.lua_name} = {{}}")
            loops.append(f"for i, k in ipairs(sent[at + {place}]) do {key.lua_name}[i] = KEYS[k] end")
        else:
            keys.append((key.lua_name, f"KEYS[sent[at + {place}]]"))
    for place, arg in enumerate(contract.args, first + len(contract.keys)):
        args.append((arg.name, f"sent[at + {place}]"))
    lines = [
        f"local {', '.join(name for name, _ in slots)} = {', '.join(value for _, value in slots)}"
        for slots in (keys, args)
        if slots
    ]
    return "".join(line + "\n" for line in (*lines, *loops))


def packer(contract: Contract, sha: str) -> Callable[..., Command]:
    """A function that makes the whole EVALSHA command from keyword arguments: one for each key and argument, by its name in
    the header. What is marked `?` may be left out, and a key may also be None; what is marked `…` takes a sequence."""
    parameters, body = [], []
    for key in contract.keys:
        parameters.append(f"{key.name}=None" if key.mark == "?" else key.name)
    for arg in contract.args:
        parameters.append(f"{arg.name}=''" if arg.mark == "?" else arg.name)
    args = []
    lists = [arg.name for arg in contract.args if arg.mark == "…"]
    for arg in contract.args:
        args.append(f"*{arg.name}" if arg.mark == "…" else arg.name)
        if arg.name in lists[:-1]:
            args[-1:] = [f"len({arg.name})", args[-1]]

    def command(number: str, keys: Sequence[str]) -> str:
        return f"return ({', '.join([repr('EVALSHA'), repr(sha), number, *keys, *args])},)"

    names = [key.name for key in contract.keys]
    if _all_lists(contract):
        body.append(command(" + ".join(f"len({name})" for name in names), [f"*{name}" for name in names]))
    elif contract.keys and contract.keys[-1].mark == "…":
        body.append(command(f"{len(names) - 1} + len({names[-1]})", [*names[:-1], "*" + names[-1]]))
    else:
        if contract.keys and contract.keys[-1].mark == "?":
            body.append(f"if {names[-1]} is None: {command(str(len(names) - 1), names[:-1])}")
        body.append(command(str(len(names)), names))
    star = "*, " if parameters else ""
    source = f"def pack({star}{', '.join(parameters)}):\n" + "".join(f"    {line}\n" for line in body)
    scope: dict[str, Any] = {}
    exec(compile(source, f"<pack {contract.name}>", "exec"), scope)
    pack: Callable[..., Command] = scope["pack"]
    pack.__qualname__ = f"{contract.name}.pack"
    return pack


class Reply(tuple[Any, ...]):
    """A reply: its outcome, and what follows it under the names that the header gives."""

    __slots__ = ()

    outcome: str
    entry: Any = None
    """The entry of the stream with the event that an operation made; None where it made none."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


class ReplyReader:
    """Turns what Redis sent into a Reply. One for each script."""

    def __init__(self, contract: Contract, parse: Mapping[str, Callable[[Any], Any]] | None = None) -> None:
        """`parse` is what becomes of a field, by its name; of the others Redis's text or number stays."""
        self._name = contract.name
        self._types = {line.word: _reply_type(contract.name, line, parse or {}) for line in contract.replies}

    def __call__(self, raw: Sequence[Any]) -> Reply:
        """Raises UnexpectedReply for an outcome, or a number of fields, that the header does not list; and what the parser
        of a field raises."""
        try:
            return self._types[raw[0]](*raw)
        except (KeyError, TypeError, IndexError):
            raise UnexpectedReply(f"{self._name} replied what its header does not list") from None


def _reply_type(script: str, line: ReplyLine, parse: Mapping[str, Callable[[Any], Any]]) -> Callable[..., Reply]:
    """A class with a property for each field, made by a function that knows how many of them there may be."""
    names = ("outcome", *line.fields)
    members = {name: property(itemgetter(index)) for index, name in enumerate(names)}
    cls = type(line.word, (Reply,), {"__slots__": (), **members})
    parameters = [f"{name}=''" if index >= len(names) - line.optional else name for index, name in enumerate(names)]
    values = [f"parse_{name}({name})" if name in parse else name for name in names]
    source = f"def make({', '.join(parameters)}): return new(cls, ({', '.join(values)},))\n"
    scope: dict[str, Any] = {"new": tuple.__new__, "cls": cls, **{f"parse_{name}": one for name, one in parse.items()}}
    exec(compile(source, f"<reply {script} {line.word}>", "exec"), scope)
    make: Callable[..., Reply] = scope["make"]
    return make
