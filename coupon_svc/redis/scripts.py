"""The Lua: scripts, one file each in `lua/` (`doubt_shard` is the API's, the others are the owner's), and the library of the
API's calls.

The library is `lua/call.lua` with all operations in it (`lua/operations/`, one file each). What several files share are
functions in `lua/include/`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from coupon_svc.domain import bounds
from coupon_svc.redis.contract import (
    CallClass,
    Command,
    Contract,
    Reply,
    ReplyReader,
    operation_preamble,
    packer,
    parse_contract,
    parse_operation,
    preamble,
    section_preamble,
    split_operation,
    split_source,
)
from coupon_svc.redis.meta import FORMAT
from coupon_svc.resources import resource_folder

CONSTANTS = {
    "IDEMPOTENCY_MS": bounds.IDEMPOTENCY_MS,
    "LEDGER_UNSEEN_MAX_MS": bounds.LEDGER_UNSEEN_MAX_MS,
    "CLOCKS_APART_MAX_MS": bounds.CLOCKS_APART_MAX_MS,
    "REDEEM_BACKLOG_SHARE": bounds.REDEEM_BACKLOG_SHARE,
    "FORMAT": f'"{FORMAT}"',
}
"""What a script may name without defining it. Only those that it names are put into it."""
FLAGS: Mapping[CallClass, str] = {
    CallClass.READ: '"no-writes"',
    CallClass.GROW: "",
    CallClass.KEEP: '"allow-oom"',
}
"""What Redis is told of a call of each class."""
LIBRARIES = "coupon_svc_"
"""What the name of every version's library begins with."""

_INCLUDE = re.compile(r"^-- include: (\w+)\n", re.MULTILINE)
_OPERATIONS_HERE = "-- operations\n"
_SECTION_HERE = "-- section\n"


class OperationSource(msgspec.Struct, frozen=True):
    """An operation of a call, as its file has it."""

    name: str
    contract: Contract
    own: str
    """The Lua of its file."""
    body: str
    """The same, with the functions that it includes in front."""


class Script(msgspec.Struct, frozen=True):
    """A script and its binding. `source` is what is sent to Redis; `sha` is what EVALSHA names it by."""

    name: str
    first_line: str
    contract: Contract
    body: str
    """The Lua as it was written, with the functions that it includes in front."""
    source: str
    sha: str
    pack: Callable[..., Command]
    """The EVALSHA command from one keyword argument for each key and argument (coupon_svc/redis/contract.py, `packer`)."""
    reply: Callable[[Sequence[Any]], Reply]
    """What Redis sent, with a name for each field. Raises UnexpectedReply."""


class Library(msgspec.Struct, frozen=True):
    """The functions of the calls, one for each class. The name is of the text: two versions can be loaded side by side."""

    name: str
    body: str
    """The Lua as it was written, with the functions that it includes in front."""
    source: str

    def function(self, call: CallClass) -> str:
        """What FCALL names the function of a class by."""
        return f"{self.name}_{call}"


class Includes:
    """The files of a folder that others include: each is put in once, behind those that it includes itself."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def before(self, *bodies: str) -> tuple[str, list[str]]:
        """(all that the bodies include, the bodies without their `-- include:` lines)."""
        placed: dict[str, str] = {}

        def place(body: str) -> str:
            for name in _INCLUDE.findall(body):
                if name not in placed:
                    placed[name] = ""  # its place is taken before it is read: two that include each other end
                    text = place((self._folder / f"{name}.lua").read_text())
                    del placed[name]
                    placed[name] = text
            return _INCLUDE.sub("", body)

        bare = [place(body) for body in bodies]
        return "".join(placed.values()), bare


def read_script(path: Path) -> Script:
    """The script in a file: its constants, the names of its keys and arguments, what it includes, and its body."""
    first_line, header, body = split_source(path.stem, path.read_text())
    included, (bare,) = Includes(path.parent / "include").before(body)
    return bind_script(path.stem, first_line, parse_contract(header), included + bare)


def read_operation(path: Path) -> OperationSource:
    """The operation in a file. Raises ContractError."""
    header, body = split_operation(path.stem, path.read_text())
    included, (bare,) = Includes(path.parents[1] / "include").before(body)
    return OperationSource(path.stem, parse_operation(header), body, included + bare)


def read_section(path: Path) -> Contract:
    """The contract of a section: the header of the file of the call. Raises ContractError."""
    header, _ = split_operation(path.stem, path.read_text())
    return parse_contract(header)


def read_library(path: Path, operations: Sequence[OperationSource]) -> Library:
    """The library that runs these operations: `path` is the file of the call."""
    _, loop = split_operation(path.stem, path.read_text())
    included, (loop, *bodies) = Includes(path.parent / "include").before(
        loop, *(operation.own for operation in operations)
    )
    functions = "".join(
        f"operations.{operation.contract.call_class}.{operation.name} = {{size = {operation.contract.size}}}\n"
        f"function operations.{operation.contract.call_class}.{operation.name}.decide(at)\n"
        f"{operation_preamble(operation.contract)}{body}end\n"
        for operation, body in zip(operations, bodies, strict=True)
    )
    for here, lua in ((_OPERATIONS_HERE, functions), (_SECTION_HERE, section_preamble(read_section(path)))):
        assert loop.count(here) == 1, f"call.lua says where this is to stand: {here}"
        loop = loop.replace(here, lua)
    return bind_library(included + loop)


def bind_library(body: str) -> Library:
    """The library of this body."""
    named = _with_constants(body)
    library = Library(LIBRARIES + hashlib.sha1(named.encode()).hexdigest()[:16], body, "")
    registered = "".join(
        f'register{{function_name = "{library.function(call)}", flags = {{{FLAGS[call]}}},'
        f" callback = function(keys, args) return run_call(operations.{call}, keys, args[1]) end}}\n"
        for call in CallClass
    )
    # The library has a `redis` of its own, which is there from its first call on (lua/include/names.lua).
    head = f"#!lua name={library.name}\nlocal register = redis.register_function\n"
    return msgspec.structs.replace(library, source=f"{head}{named}{registered}")


def bind_script(name: str, first_line: str, contract: Contract, body: str) -> Script:
    """The script of this body, and its binding."""
    source = f"{first_line}\n{_with_constants(preamble(contract) + body)}"
    sha = hashlib.sha1(source.encode()).hexdigest()
    return Script(name, first_line, contract, body, source, sha, packer(contract, sha), ReplyReader(contract))


def _with_constants(body: str) -> str:
    """The Lua with those constants in front that it names."""
    named = {constant: value for constant, value in CONSTANTS.items() if constant in body}
    return "".join(f"local {constant} = {value}\n" for constant, value in named.items()) + body


class Scripts:
    """All scripts by name: `scripts["load_codes"]` is `lua/load_codes.lua`. `operations` are those of the calls, by name;
    `library` runs them, and `section` is the contract of a shard's part of a call. Raises ContractError."""

    def __init__(self, folder: Path | None = None) -> None:
        folder = folder or resource_folder("lua")
        paths = sorted(folder.glob("*.lua"))
        self._by_name = {path.stem: read_script(path) for path in paths if path.stem != "call"}
        self.operations = {path.stem: read_operation(path) for path in sorted((folder / "operations").glob("*.lua"))}
        self.section = read_section(folder / "call.lua")
        self.library = read_library(folder / "call.lua", list(self.operations.values()))

    def __getitem__(self, name: str) -> Script:
        return self._by_name[name]

    def __iter__(self) -> Iterator[Script]:
        return iter(self._by_name.values())
