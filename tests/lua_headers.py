"""Compares the head of a Lua script with its body, `-- include:` lines replaced: what one names, the other does.

It reads no more Lua than our scripts are written in: literal command names, `return {"word", …}`, one XADD an event.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from coupon_svc.domain.outcomes import Outcome
from coupon_svc.redis.scripts import Script

INTERNAL_WORDS = {
    "suspect": "the shard is shut, and the caller answered `recovering`",
    "replayed": "the first answer again",
    "book_not_loaded": "the caller looks the book up in Postgres, and waits for it or answers `book_not_found`",
    "already_yours": "answered with 200",
    "not_lent": "the caller has the code lent, and comes again",
    "renewed": "answered with 200",
    "ok": "done",
}
"""Replies that a client is never shown, with what becomes of them. Every other word is an Outcome."""

OWNER_WORDS = {
    "suspect": "the owner has the shard recovered, or finds that it has lost it",
    "foreign": "the keys are another installation's: the owner says so and touches nothing",
    "fenced": "a newer owner is at work, or the shard is not shut: the owner begins anew",
    "clock": "the owner shuts the shard until the clocks agree again",
    "gone": "as suspect",
    "stale": "as good as done",
    "book_not_loaded": "as suspect",
    "ok": "done",
}
"""Replies to the shard's owner, with what becomes of them. There are no others."""

COMMANDS = {
    "HGET": ("hash", "read"),
    "HMGET": ("hash", "read"),
    "HLEN": ("hash", "read"),
    "HSET": ("hash", "write"),
    "HINCRBY": ("hash", "count"),
    "ZCARD": ("zset", "read"),
    "ZSCORE": ("zset", "read"),
    "ZRANGE": ("zset", "read"),
    "ZLEXCOUNT": ("zset", "read"),
    "ZADD": ("zset", "add"),
    "ZREM": ("zset", "remove"),
    "ZPOPMIN": ("zset", "pop"),
    "SISMEMBER": ("set", "read"),
    "SADD": ("set", "add"),
    "SREM": ("set", "remove"),
    "GET": ("string", "read"),
    "SET": ("string", "write"),
    "XADD": ("stream", "append"),
    "XTRIM": ("stream", "trim"),
    "XRANGE": ("stream", "read"),
    "EXISTS": ("", "read"),
    "PTTL": ("", "read"),
    "DEL": ("", "delete"),
    "UNLINK": ("", "delete"),
}
"""What a script may call on a key: the type it takes ("" is any), and the word for it in the head. Of a key that the
head calls `any` nothing else is known, so only such commands fit it.

None of them walks over a whole key, and none picks at random: SPOP is not fair, and two replicas would not agree.
"""
KEYLESS_COMMANDS = ("TIME", "PUBLISH", "INFO")
MANY_KEYS_COMMANDS = ("DEL", "EXISTS", "UNLINK")
FORBIDDEN_COMMANDS = ("EVAL", "EVALSHA", "KEYS", "SCAN")

_SCRIPT = re.compile(r"#!lua(?P<flags> flags=[a-z,-]+)?\n--\[\[\n(?P<head>.*?)\n\]\]\n(?P<body>.*)", re.DOTALL)
_KEY = re.compile(
    r"KEYS\[(?P<number>\d+)(?P<open>…)?\] +(?P<name>\w+) +(?P<type>hash|zset|set|string|stream|any) +"
    r"(?P<access>\w+(?:, \w+)*)(?:;.*)?"
)
_ARG = re.compile(r"ARGV\[(?P<number>\d+)(?P<open>…)?\] +(?P<name>\w+) +(?P<type>int|text)(?: .*)?")
_REPLY = re.compile(r"(?P<word>[a-z_]+)(?: {2,}(?P<note>.*))?")
_EVENT = re.compile(r"(?P<name>[a-z_]+) {2,}(?P<fields>\w+(?:, \w+)*)")
_SECTIONS = {"Keys": _KEY, "Args": _ARG, "Replies, the first that applies": _REPLY, "Event": _EVENT}

_STRING = r'"(?:[^"\\\n]|\\.)*"'
_COMMENT = re.compile(rf"({_STRING})|--[^\n]*")
_WORD = re.compile(rf"({_STRING})|[A-Za-z_]\w*")
_LOCAL = re.compile(r"^ *local ([\w, ]+) = (.+)$", re.MULTILINE)


class Slot(NamedTuple):
    """A line about KEYS[n] or ARGV[n]; `open`: the list goes on from there. An argument has no `access`."""

    number: int
    open: bool
    name: str
    type: str
    access: frozenset[str]


class Head(NamedTuple):
    """The contract in a script's first comment. `notes` are what stands behind each reply's word."""

    name: str
    keys: list[Slot]
    args: list[Slot]
    replies: list[str]
    notes: dict[str, str]
    events: dict[str, list[str]]


def complaints(script: Script) -> list[str]:
    """Where head and body of the script disagree; empty when they do not."""
    parts = _SCRIPT.fullmatch(script.source)
    if parts is None:
        return ["the file does not begin with #!lua and a --[[ comment ]]"]
    try:
        head = read_head(parts["head"])
        sender(head)
    except ValueError as error:
        return [str(error)]
    body = _without_dead_refusals(_COMMENT.sub(lambda match: match[1] or "", parts["body"]))
    found = [f"the head is about {head.name}"] if head.name != script.name else []
    if "-- include:" in parts["body"]:
        found.append("an include was not replaced: it must stand at the beginning of its line")
    resolved, idle = _resolve(body)
    found += [f"{name} is never used" for name in idle]
    found += _compare_slots("KEYS", head.keys, resolved)
    found += _compare_slots("ARGV", head.args, resolved)
    found += _compare_access(head.keys, resolved)
    found += _compare_replies(head, body)
    found += _compare_events(head.events, body)
    return found


def read_head(text: str) -> Head:
    """The sections of a head. Raises ValueError, naming the line, for what is not understood."""
    name, _, rest = text.partition(":")
    entries: dict[str, list[re.Match[str]]] = {title: [] for title in _SECTIONS}
    title = ""
    for line in rest.splitlines()[1:]:
        if line in _SECTIONS:
            title = line
        elif title and line.startswith("  "):
            match = _SECTIONS[title].fullmatch(line[2:])
            if match is None:
                raise ValueError(f"under {title}, this is not understood: {line.strip()}")
            entries[title].append(match)
        elif title and line:
            raise ValueError(f"no section has this title: {line}")
    keys, args, replies, events = entries.values()
    return Head(
        name,
        [_slot(match, frozenset(match["access"].split(", "))) for match in keys],
        [_slot(match, frozenset()) for match in args],
        [match["word"] for match in replies],
        {match["word"]: match["note"] or "" for match in replies},
        {match["name"]: match["fields"].split(", ") for match in events},
    )


def _slot(match: re.Match[str], access: frozenset[str]) -> Slot:
    return Slot(int(match["number"]), bool(match["open"]), match["name"], match["type"], access)


# --- keys and arguments


def _resolve(body: str) -> tuple[str, list[str]]:
    """The body with every local that only names a KEYS[n] or ARGV[n] replaced by it, and those locals nobody uses."""
    aliases: dict[str, str] = {}

    def take(match: re.Match[str]) -> str:
        names, values = match[1].split(", "), _split(match[2])
        if len(names) != len(values):
            return match[0]
        pairs = dict(zip(names, values, strict=True))
        taken = {name: value for name, value in pairs.items() if re.fullmatch(r"(KEYS|ARGV)\[\d+\]", value)}
        aliases.update(taken)
        left = {name: value for name, value in pairs.items() if name not in taken}
        return f"local {', '.join(left)} = {', '.join(left.values())}" if left else ""

    rest = _LOCAL.sub(take, body)
    used: set[str] = set()

    def replace(match: re.Match[str]) -> str:
        if match[1] or match[0] not in aliases:
            return match[0]
        used.add(match[0])
        return aliases[match[0]]

    resolved = _WORD.sub(replace, rest)
    return resolved, [f"{name} = {value}" for name, value in aliases.items() if name not in used]


def _compare_slots(table: str, slots: Sequence[Slot], body: str) -> Iterator[str]:
    """Every number in the head is used in the body, and the reverse; `n…` is used by a computed index."""
    numbers = [slot.number for slot in slots]
    if numbers != list(range(1, len(slots) + 1)):
        yield f"{table}: the numbers in the head are {numbers}"
    if any(slot.open for slot in slots[:-1]):
        yield f"{table}: only the last may be open-ended"
    indices = re.findall(rf"\b{table}\[([^\]]+)\]", body)
    literal = {int(index) for index in indices if index.isdigit()}
    computed = [index for index in indices if not index.isdigit()]
    closed = {slot.number for slot in slots if not slot.open}
    for number in sorted(closed - literal):
        yield f"{table}[{number}] stands in the head and is not used"
    for number in sorted(literal - closed):
        yield f"{table}[{number}] is used and does not stand in the head"
    is_open = bool(slots) and slots[-1].open
    if is_open and not computed:
        yield f"{table}[{slots[-1].number}…] stands in the head and is not used"
    if computed and not is_open:
        yield f"{table}[{computed[0]}] is used and the head has no open-ended list"


def _compare_access(keys: Sequence[Slot], body: str) -> Iterator[str]:
    """Each command is one we allow, fits the type of its key, and does what the head says of that key."""
    by_number = {str(slot.number): slot for slot in keys}
    done: dict[Slot, set[str]] = {slot: set() for slot in keys}
    for call in _calls(body):
        command = call[0].strip('"')
        if command in FORBIDDEN_COMMANDS:
            yield f"{command} must not be called"
        elif command not in KEYLESS_COMMANDS and command not in COMMANDS:
            yield f"{command} is not among the commands a script may call"
        if command not in COMMANDS:
            continue
        for name in call[1:] if command in MANY_KEYS_COMMANDS else call[1:2]:
            index = re.fullmatch(r"KEYS\[([^\]]+)\]", name)
            if index is None:
                yield f"{command} is called on {name}, which is not one of KEYS"
                continue
            slot = by_number.get(index[1]) if index[1].isdigit() else next((slot for slot in keys if slot.open), None)
            if slot is None:
                continue  # complained about above
            kind, access = COMMANDS[command]
            if kind not in ("", slot.type):
                yield f"{command} is called on {slot.name}, which the head calls a {slot.type}"
            done[slot].add(access)
    for slot, accesses in done.items():
        missing, idle = accesses - slot.access, slot.access - accesses
        if "pop" in slot.access:
            missing.discard("read")  # whoever pops may look first
        for word in sorted(missing):
            yield f"{slot.name}: the body does {word}, and the head does not say so"
        for word in sorted(idle):
            yield f"{slot.name}: the head says {word}, and the body does not"


# --- replies


def returned_words(body: str) -> list[str | None]:
    """The first word of every table the body returns, in their order; None where it cannot be read."""
    words: list[str | None] = []
    for match in re.finditer(r"\breturn +(\{|\w+)", body):
        if match[1] == "{":
            first = _split(_balanced(body, match.end() - 1))[0]
            words += re.findall(r'"([^"]*)"', first) or [None]
        else:
            assigned = re.search(rf'^ *{match[1]}\[1\] = "(\w+)"', body, re.MULTILINE)
            words.append(assigned[1] if assigned else None)
    return words


def _compare_replies(head: Head, body: str) -> Iterator[str]:
    """The same words in the same order; what a client is shown is an Outcome and stands in the order of Outcome."""
    words = returned_words(body)
    if None in words:
        yield "a return does not begin with a literal word"
    returned = list(dict.fromkeys(word for word in words if word))
    for word in head.replies:
        if word not in returned:
            yield f"{word} stands in the head and is never returned"
    for word in returned:
        if word not in head.replies:
            yield f"{word} is returned and does not stand in the head"
    if len(set(head.replies)) != len(head.replies):
        yield "a reply stands in the head twice"
    # A replay and its refusal exclude each other; the refusal is the shorter one and stands first in the body.
    in_head = [word for word in head.replies if word in returned and word != "replayed"]
    in_body = [word for word in returned if word in in_head]
    if in_head != in_body:
        yield f"the head has the replies in the order {', '.join(in_head)}; the body in {', '.join(in_body)}"
    known = [word.value for word in Outcome]
    shown = [word for word in head.replies if word in known]
    if shown != sorted(shown, key=known.index):
        yield f"Outcome has them in the order {', '.join(sorted(shown, key=known.index))}; the head in {', '.join(shown)}"
    for word in head.replies:
        if sender(head) == "api" and word not in known and word not in INTERNAL_WORDS:
            yield f"{word} is neither an Outcome nor an internal word"
        if sender(head) != "api" and word not in OWNER_WORDS:
            yield f"{word} is not among the words for an owner"
    yield from _compare_details(head, body)


def _compare_details(head: Head, body: str) -> Iterator[str]:
    """A literal word that a reply carries behind its first stands in backquotes in the head; of `suspect` the reverse."""
    details: dict[str, set[str]] = {word: set() for word in head.replies}
    for match in re.finditer(rf"\breturn \{{({_STRING}), ({_STRING}(?:, {_STRING})*)\}}", body):
        details.setdefault(match[1].strip('"'), set()).update(re.findall(r'"([^"]*)"', match[2]))
    for word, literals in details.items():
        told = set(re.findall(r"`(\w+)`", head.notes.get(word, "")))
        for literal in sorted(literals - told):
            yield f"{word} carries {literal}, and the head does not say so"
        if word == "suspect":
            for literal in sorted(told - literals):
                yield f"the head says that suspect carries {literal}, and it does not"


def sender(head: Head) -> Literal["api", "owner", "recoverer"]:
    """Who runs the script: the API, which has to tell a client what it replied; the owner of a certified shard; or an owner
    that recovers it, when there is no epoch. Raises ValueError when unclear."""
    first, second = [arg.name for arg in head.args[:2]] + [""] * (2 - len(head.args[:2]))
    if first == "epoch" and second == "seen_seq":
        return "api"
    if first == "epoch" and second == "generation":
        return "owner"
    if first in ("recovery", "generation"):
        return "recoverer"
    raise ValueError(
        f"{head.name}: the first arguments must be epoch, and seen_seq (API) or generation (owner);"
        " or recovery or generation (recoverer)"
    )


# --- events


def _compare_events(events: dict[str, list[str]], body: str) -> Iterator[str]:
    """Each XADD is an event of the head with its fields in their order, and the reverse."""
    added: dict[str, list[str]] = {}
    for call in _calls(body):
        if call[0] != '"XADD"':
            continue
        fields = call[3:]
        names = [field.strip('"') for field in fields[::2]]
        if (
            names[0] != "event"
            or len(fields) % 2
            or not all(field.startswith('"') for field in (*fields[::2], fields[1]))
        ):
            yield f"an XADD is not (key, position, event, name, field, value, …): {', '.join(call)}"
            continue
        added[fields[1].strip('"')] = names[1:]
    for name in events.keys() - added.keys():
        yield f"the event {name} stands in the head and is never added"
    for name in added.keys() - events.keys():
        yield f"the event {name} is added and does not stand in the head"
    for name in events.keys() & added.keys():
        if events[name] != added[name]:
            yield f"{name}: the head has the fields {', '.join(events[name])}; the body {', '.join(added[name])}"


# --- reading Lua


def _without_dead_refusals(body: str) -> str:
    """The body without the refusals that an include offers and this script turns off by a local that is `false`."""
    for names, values in _LOCAL.findall(body):
        for name, value in zip(names.split(", "), _split(values), strict=False):
            if value == "false":
                body = re.sub(rf"^if {name} and [^\n]+ then\n  return [^\n]+\nend$", "", body, flags=re.MULTILINE)
    return body


def _calls(body: str) -> Iterator[list[str]]:
    """The arguments of every redis.call, the command first."""
    for match in re.finditer(r"\bredis\.p?call\(", body):
        yield _split(_balanced(body, match.end() - 1))


def _balanced(text: str, start: int) -> str:
    """What stands between the bracket at `start` and the one that closes it."""
    depth = 0
    for match in re.compile(rf"{_STRING}|[(){{}}\[\]]").finditer(text, start):
        if match[0] in "({[":
            depth += 1
        elif match[0] in ")}]":
            depth -= 1
        if depth == 0:
            return text[start + 1 : match.start()]
    raise ValueError(f"a bracket is never closed: {text[start : start + 40]}")


def _split(text: str) -> list[str]:
    """The parts between the commas that no bracket and no string encloses."""
    parts, depth, last = [], 0, 0
    for match in re.finditer(rf"{_STRING}|[(){{}}\[\],]", text):
        if match[0] in "({[":
            depth += 1
        elif match[0] in ")}]":
            depth -= 1
        elif match[0] == "," and depth == 0:
            parts.append(text[last : match.start()].strip())
            last = match.end()
    return [*parts, text[last:].strip()]
