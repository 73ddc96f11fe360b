"""Puts the functions that a script includes where they are called.

Redis runs the whole script with each call, so every `local function` makes a new closure with each call: eleven of them
cost an assign an eighth of its processor time. In place they cost nothing. What a function may be is restricted, so that
this is simple: it begins at the left margin, has no loop, reads nothing but its parameters, constants and other functions,
and is called as a statement of its own:

    local refusal, book = read_book(book_key, tenant_id)
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import count
from typing import NamedTuple

from coupon_svc.redis.contract import ContractError

_STRING = r'"(?:[^"\\\n]|\\.)*"'
_RECORD = re.compile(r"^-- record: (\w+) = (\w+(?:, \w+)*)$", re.MULTILINE)
_COMMENT = re.compile(rf"({_STRING})|--[^\n]*")
_FUNCTION = re.compile(
    r"^local function (?P<name>\w+)\((?P<params>[^)]*)\)\n(?P<text>.*?)^end$", re.MULTILINE | re.DOTALL
)
_RETURN = re.compile(r"\breturn\b(?P<values>.*?)(?=\n\s*(?:end|else|elseif)\b|\s*\Z)", re.DOTALL)
# What stands before a call that is a statement: nothing, names that take its results, or `return`.
_BEFORE = re.compile(r"(?:^|(?<=\n))[ ]*(?:(?P<local>local )?(?P<targets>\w+(?:, \w+)*) = |(?P<tail>return ))?\Z")


class InlineError(ContractError):
    """A function, or a call of one, that cannot be put in place. The message names it."""


class Function(NamedTuple):
    """A function of an included file."""

    params: list[str]
    text: str


def number_fields(lua: str) -> str:
    """The Lua with the names of a record's fields as numbers. The line

        -- record: book = tenant_id, status, lent

    makes `book.lent` of every variable `book` the third thing in it, and BOOK_FIELDS the list of the names: so a reply to
    HMGET is read by names without a table of its own. Raises InlineError.
    """
    for name, names in _RECORD.findall(lua):
        fields = {field: number for number, field in enumerate(names.split(", "), 1)}

        def numbered(match: re.Match[str], name: str = name, fields: dict[str, int] = fields) -> str:
            if match[1] not in fields:
                raise InlineError(f"{name} has no field {match[1]}")
            return f"{name}[{fields[match[1]]}]"

        lua = re.sub(rf"(?<![\w.]){name}\.(\w+)", numbered, lua)
        lua = re.sub(rf"\b{name.upper()}_FIELDS\b", ", ".join(f'"{field}"' for field in fields), lua)
    return lua


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


def inline(lua: str) -> str:
    """The Lua with every call of one of its own functions replaced by what that function does. Raises InlineError."""
    functions, main = functions_of(without_comments(lua))
    for name, function in functions.items():
        if re.search(r"\b(?:for|while|repeat|function)\b", function.text):
            raise InlineError(f"{name} holds a loop or a function")
    lines = _expand(main, functions, count(1), ())
    return "\n".join(line.strip() for line in lines.splitlines() if line.strip()) + "\n"


def _expand(text: str, functions: dict[str, Function], numbers: Iterator[int], inside: tuple[str, ...]) -> str:
    """The text with each call in it replaced. `numbers` name the results, and `inside` are the functions around it."""
    if not functions:
        return text
    call = re.compile(rf"(?<![\w.])({'|'.join(functions)})\(")
    done, position = [], 0
    while match := call.search(text, position):
        name = match[1]
        before, inner = text[position : match.start()], inside_brackets(text, match.end() - 1)
        end = match.end() + len(inner)
        statement = _BEFORE.search(before)
        if statement is None or not re.match(r"[ ]*(?:\n|\Z)", text[end + 1 :]):
            raise InlineError(f"{name} is called within an expression")
        if name in inside:
            raise InlineError(f"{name} calls itself")
        args = [arg for arg in split_list(inner) if arg]
        done += [before[: statement.start()], _place(name, functions, args, statement, numbers, inside)]
        position = end + 1
    return "".join([*done, text[position:]])


def _place(
    name: str,
    functions: dict[str, Function],
    args: list[str],
    statement: re.Match[str],
    numbers: Iterator[int],
    inside: tuple[str, ...],
) -> str:
    """What stands in place of one call."""
    params, text = functions[name]
    if params[-1:] == ["..."]:
        params, more = params[:-1], ", ".join(args[len(params) - 1 :])
        text = re.sub(r"(?<!\.)\.\.\.(?!\.)", lambda _: more, text)
        args = args[: len(params)]
    if len(args) != len(params):
        raise InlineError(f"{name} is called with {len(args)} arguments, and takes {len(params)}")
    pairs = [(param, arg) for param, arg in zip(params, args, strict=True) if param != arg or _assigned(param, text)]
    bound = f"local {', '.join(p for p, _ in pairs)} = {', '.join(a for _, a in pairs)}\n" if pairs else ""
    if statement["tail"]:
        return f"do\n{bound}{_expand(text, functions, numbers, (*inside, name))}\nend\n"
    targets = statement["targets"].split(", ") if statement["targets"] else []
    results = [f"_{next(numbers)}" for _ in targets]
    left = ", ".join(results)

    # `repeat … until true` runs once, and `break` leaves it: what `return` does in a function.
    def leave(match: re.Match[str]) -> str:
        return f"{left} = {match['values'].strip() or 'nil'}\nbreak" if results else "break"

    if _RETURN.search(text):
        text = "repeat\n" + _RETURN.sub(leave, text) + "\nuntil true\n"
    text = _expand(text, functions, numbers, (*inside, name))
    declared = f"local {left}\n" if results else ""
    assigned = f"{statement['local'] or ''}{statement['targets']} = {left}\n" if results else ""
    return f"{declared}do\n{bound}{text}\nend\n{assigned}"


def _assigned(name: str, text: str) -> bool:
    """Whether the text gives this name another value: then the parameter must not be the caller's own variable."""
    return re.search(rf"(?<![\w.]){name}\s*(?:,[\w, ]*)?=(?!=)", text) is not None


def inside_brackets(text: str, start: int) -> str:
    """What stands between the bracket at `start` and the one that closes it. Raises InlineError."""
    depth = 0
    for match in re.compile(rf"{_STRING}|[(){{}}\[\]]").finditer(text, start):
        if match[0] in "({[":
            depth += 1
        elif match[0] in ")}]":
            depth -= 1
        if depth == 0:
            return text[start + 1 : match.start()]
    raise InlineError(f"a bracket is never closed: {text[start : start + 40]}")


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
