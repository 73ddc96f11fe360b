"""Compares the header of a Lua script with its body, `-- include:` lines replaced: what one names, the other does.

The names of keys and arguments are generated from the header, so they need no comparing; what is done to a key, the
replies and the events do. It reads no more Lua than our scripts are written in: functions at the left margin whose key
parameters are called like the keys, literal command names, `return {"word", …}`, and events by make_event.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal, NamedTuple

from coupon_svc.domain.outcomes import Outcome
from coupon_svc.redis.contract import Contract
from coupon_svc.redis.scripts import OperationSource, Script

INTERNAL_WORDS = {
    "suspect": "the shard is shut, and the caller answered `recovering`",
    "replayed": "the first answer again",
    "book_not_loaded": "the caller looks the book up in Postgres, and waits for it or answers `book_not_found`",
    "already_yours": "answered with 200",
    "confirmed": "answered with 200",
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
    "HDEL": ("hash", "write"),
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
    "TYPE": ("", "read"),
    "PTTL": ("", "read"),
    "DEL": ("", "delete"),
    "UNLINK": ("", "delete"),
}
"""What a script may call on a key: the type it takes ("" is any), and the word for it in the header. Of a key that the
header calls `any` nothing else is known, so only such commands fit it.

None of them walks over a whole key, and none picks at random: SPOP is not fair, and two replicas would not agree.
"""
OVERLAY = {
    "take": ("zset", "remove"),
    "hold": ("hash", "write"),
    "add_to_users_coupons": ("zset", "add"),
    "remember": ("string", "write"),
    "remember_list": ("string", "write"),
    "set_lock": ("string", "write"),
    "drop_lock": ("string", "delete"),
    "count": ("hash", "count"),
    "release": ("set", "remove"),
}
"""What an operation has written when all of its call are decided (lua/include/apply.lua): the functions that tell of it take
the key first."""
KEYLESS_COMMANDS = ("TIME", "PUBLISH", "INFO")
MANY_KEYS_COMMANDS = ("DEL", "EXISTS", "UNLINK")
FORBIDDEN_COMMANDS = ("EVAL", "EVALSHA", "KEYS", "SCAN")

EVENT_FIELDS = {
    "book_id": "book",
    "user_id": "user",
    "holding.user_id": "user",
    "idempotency_key": "idem",
}
"""What an operation calls a field of an event, and what the header does; others have one name."""

_STRING = r'"(?:[^"\\\n]|\\.)*"'
_COMMENT = re.compile(rf"({_STRING})|--[^\n]*")
_FUNCTION = re.compile(
    r"^local function (?P<name>\w+)\((?P<params>[^)]*)\)\n(?P<text>.*?)^end$", re.MULTILINE | re.DOTALL
)
_REPLAYED = r'\b\w+\[1\] = "(?P<replayed>\w+)"'


class Function(NamedTuple):
    """A function of an included file."""

    params: list[str]
    text: str


class Body(NamedTuple):
    """A script's Lua without comments: its functions, and what stands outside of them."""

    functions: dict[str, Function]
    main: str

    @property
    def texts(self) -> list[str]:
        return [*(function.text for function in self.functions.values()), self.main]


def body_of(script: Script | OperationSource) -> Body:
    """The script, or the operation, as it was written, taken apart."""
    return Body(*functions_of(without_comments(script.body)))


def complaints(script: Script | OperationSource) -> list[str]:
    """Where header and body disagree; empty when they do not."""
    contract = script.contract
    try:
        sender(contract)
    except ValueError as error:
        return [str(error)]
    body = body_of(script)
    found = [f"the header is about {contract.name}"] if contract.name != script.name else []
    if "-- include:" in script.body:
        found.append("an include was not replaced: it must stand at the beginning of its line")
    found += _compare_names(contract, body)
    found += _compare_calls(body)
    found += _compare_access(contract, body)
    found += _compare_replies(contract, body)
    found += _compare_events(contract, body)
    return found


# --- names


def _compare_names(contract: Contract, body: Body) -> Iterator[str]:
    """Every key and argument is used, and by its name only."""
    for name in [key.lua_name for key in contract.keys] + [arg.name for arg in contract.args]:
        if not re.search(rf"\b{name}\b", body.main):
            yield f"{name} stands in the header and is not used"
    for text in body.texts:
        for found in re.findall(r"\b(?:KEYS|ARGV)\b|\b(?:book|meta|holding)\[[^\]]*\]", text):
            yield f"{found} has a name"


def _compare_calls(body: Body) -> Iterator[str]:
    """Every function gets under a key's name that very key."""
    for name, (params, _) in body.functions.items():
        for args in (args for text in body.texts for args in _calls(text, name)):
            for param, arg in zip(params, args, strict=False):
                if param == "key":  # whatever it is
                    continue
                if param.endswith("_key") != arg.endswith("_key") or (param.endswith("_key") and param != arg):
                    yield f"{name} is called with {arg} as its {param}"


def _compare_access(contract: Contract, body: Body) -> Iterator[str]:
    """Each command is one we allow, fits the type of its key, and does what the header says of that key."""
    keys = {f"{key.name}_key": key for key in contract.keys}
    done: dict[str, set[str]] = {name: set() for name in keys}
    for call in (call for text in body.texts for call in _calls(text, "redis.call", "redis.pcall")):
        command = call[0].strip('"')
        if command in FORBIDDEN_COMMANDS:
            yield f"{command} must not be called"
        elif command not in KEYLESS_COMMANDS and command not in COMMANDS:
            yield f"{command} is not among the commands a script may call"
        if command not in COMMANDS:
            continue
        for name in call[1:] if command in MANY_KEYS_COMMANDS else call[1:2]:
            key = keys.get(name)
            if key is None:
                yield f"{command} is called on {name}, which is not one of the keys"
                continue
            kind, access = COMMANDS[command]
            if kind not in ("", key.type):
                yield f"{command} is called on {key.name}, which the header calls a {key.type}"
            done[name].add(access)
    if contract.call_class is not None:
        for function, (kind, access) in OVERLAY.items():
            for call in (call for text in body.texts for call in _calls(text, function)):
                key = keys.get(call[0])
                if key is None or key.type != kind:
                    yield f"{function} is called on {call[0]}, which is not one of the keys, or of another type"
                else:
                    done[call[0]].add(access)
    for name, accesses in done.items():
        key = keys[name]
        missing, idle = accesses - key.access, key.access - accesses
        if "pop" in key.access:
            missing.discard("read")  # whoever pops may look first
        for word in sorted(missing):
            yield f"{key.name}: the body does {word}, and the header does not say so"
        for word in sorted(idle):
            yield f"{key.name}: the header says {word}, and the body does not"


# --- replies


def returned_words(body: Body) -> list[str | None]:
    """The outcome of every reply that the script may return, in the order in which they are judged: what a function returns
    stands where it is called. None where the outcome cannot be read."""
    return list(_words(body, body.main))


def _words(body: Body, text: str) -> Iterator[str | None]:
    names = "|".join(body.functions) or "-"
    for match in re.finditer(rf"{_REPLAYED}|\b(?P<name>{names})\(|\b(?:return|or)\s+(?P<table>\{{)", text):
        if match["replayed"]:
            yield match["replayed"]
        elif match["name"]:
            yield from _words(body, body.functions[match["name"]].text)
        else:
            first = split_list(inside_brackets(text, match.end() - 1))[0]
            if not re.match(r"\w+ = ", first):  # else it is a table with names, and no reply
                yield from re.findall(r'"([^"]*)"', first) or [None]


def _replies(body: Body) -> Iterator[tuple[list[str], list[str]]]:
    """Every reply that stands in the text as a table: its possible outcomes, and the expressions behind them."""
    for text in body.texts:
        for match in re.finditer(r"\b(?:return|or)\s+(?=\{)", text):
            first, *rest = split_list(inside_brackets(text, match.end()))
            yield re.findall(r'"([^"]*)"', first), rest


def _compare_replies(contract: Contract, body: Body) -> Iterator[str]:
    """The same words in the same order; what a client is shown is an Outcome and stands in the order of Outcome."""
    words = returned_words(body)
    if None in words:
        yield "a return does not begin with a literal word"
    for value in re.findall(r"\breturn\s+(\w+)(?![\w(.])", body.main):
        if value not in ("refusal", "answer"):
            yield f"{value} is returned, which is neither a refusal nor an earlier answer"
    lines = {line.word: line for line in contract.replies}
    # A refusal that two ways share stands where the last of them judges it.
    named, refusals = [word for word in words if word], {word.value for word in Outcome}
    returned = [
        word for at, word in enumerate(named) if word not in (named[at + 1 :] if word in refusals else named[:at])
    ]
    for word in lines:
        if word not in returned:
            yield f"{word} stands in the header and is never returned"
    for word in returned:
        if word not in lines:
            yield f"{word} is returned and does not stand in the header"
    # A replay and its refusal exclude each other; the refusal is the shorter one and stands first in the body.
    in_header = [word for word in lines if word in returned and word != "replayed"]
    in_body = [word for word in returned if word in in_header]
    if in_header != in_body:
        yield f"the header has the replies in the order {', '.join(in_header)}; the body in {', '.join(in_body)}"
    known = [word.value for word in Outcome]
    shown = [word for word in lines if word in known]
    if shown != sorted(shown, key=known.index):
        yield f"Outcome has them in the order {', '.join(sorted(shown, key=known.index))}; the header in {', '.join(shown)}"
    for word in lines:
        if sender(contract) == "api" and word not in known and word not in INTERNAL_WORDS:
            yield f"{word} is neither an Outcome nor an internal word"
        if sender(contract) != "api" and word not in OWNER_WORDS:
            yield f"{word} is not among the words for an owner"
    yield from _compare_fields(contract, body)


def _compare_fields(contract: Contract, body: Body) -> Iterator[str]:
    """A reply has as many fields as the header names; one that is a literal word stands in backquotes in the header, and of
    `suspect` the reverse."""
    lines = {line.word: line for line in contract.replies}
    literals: dict[str, set[str]] = {word: set() for word in lines}
    for words, rest in _replies(body):
        for word in words:
            if word not in lines:
                continue  # complained about above
            most = len(lines[word].fields)
            if not most - lines[word].optional <= len(rest) <= most:
                yield f"{word} is returned with {len(rest)} fields, and the header names {most}"
            literals[word] |= {part.strip('"') for part in rest if re.fullmatch(_STRING, part)}
    for word, line in lines.items():
        told = set(re.findall(r"`(\w+)`", line.note))
        for literal in sorted(literals[word] - told):
            yield f"{word} carries {literal}, and the header does not say so"
        if word == "suspect":
            for literal in sorted(told - literals[word]):
                yield f"the header says that suspect carries {literal}, and it does not"


def sender(contract: Contract) -> Literal["api", "owner", "recoverer"]:
    """Who runs the script: the API, which has to tell a client what it replied; the owner of a certified shard; or an owner
    that recovers it, when there is no epoch. Raises ValueError when unclear."""
    if contract.call_class is not None:
        return "api"
    if contract.name == "publish_positions":  # its epochs and generations are lists
        return "owner"
    first, second = [arg.name for arg in contract.args[:2]] + [""] * (2 - len(contract.args[:2]))
    if first == "epoch" and second == "seen_seq":
        return "api"
    if first == "epoch" and second == "generation":
        return "owner"
    if first in ("recovery", "generation"):
        return "recoverer"
    raise ValueError(
        f"{contract.name}: the first arguments must be epoch, and seen_seq (API) or generation (owner);"
        " or recovery or generation (recoverer)"
    )


# --- events


def _compare_events(contract: Contract, body: Body) -> Iterator[str]:
    """Each event that is made stands in the header with its fields in their order, and the reverse."""
    made: dict[str, tuple[str, ...]] = {}
    for text in body.texts:
        if any(call[0] == '"XADD"' for call in _calls(text, "redis.call", "redis.pcall")):
            yield "an event is added without make_event"
        for call in _calls(text, "make_event"):
            _, kind, *values = call
            if not re.fullmatch(_STRING, kind):
                yield f"an event is not (meta, kind, value, …): {', '.join(call)}"
                continue
            made[kind.strip('"')] = tuple(EVENT_FIELDS.get(value, value) for value in values)
    for name in contract.events.keys() - made.keys():
        yield f"the event {name} stands in the header and is never made"
    for name in made.keys() - contract.events.keys():
        yield f"the event {name} is made and does not stand in the header"
    for name in contract.events.keys() & made.keys():
        if contract.events[name] != made[name]:
            yield f"{name}: the header has the fields {', '.join(contract.events[name])}; the body {', '.join(made[name])}"


# --- reading Lua


def without_comments(lua: str) -> str:
    """The Lua without its comments."""
    return _COMMENT.sub(lambda match: match[1] or "", lua)


def functions_of(lua: str) -> tuple[dict[str, Function], str]:
    """The functions in a Lua without comments, by their names; and what stands outside of them."""
    found = {
        match["name"]: Function([param for param in re.split(r",\s*", match["params"]) if param], match["text"])
        for match in _FUNCTION.finditer(lua)
    }
    return found, _FUNCTION.sub("", lua)


def inside_brackets(text: str, start: int) -> str:
    """What stands between the bracket at `start` and the one that closes it. Raises ValueError."""
    depth = 0
    for match in re.compile(rf"{_STRING}|[(){{}}\[\]]").finditer(text, start):
        if match[0] in "({[":
            depth += 1
        elif match[0] in ")}]":
            depth -= 1
        if depth == 0:
            return text[start + 1 : match.start()]
    raise ValueError(f"a bracket is never closed: {text[start : start + 40]}")


def split_list(text: str) -> list[str]:
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


def _calls(text: str, *names: str) -> Iterator[list[str]]:
    """The arguments of every call of these functions."""
    pattern = "|".join(map(re.escape, names))
    for match in re.finditer(rf"(?<![\w.])(?:{pattern})\(", text):
        yield split_list(inside_brackets(text, match.end() - 1))
