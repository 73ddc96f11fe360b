"""The Lua scripts: those of a shard's owner, one file each in `lua/`, and the three calls of the API.

A call is `lua/call.lua` with the operations of one class in it (`lua/operations/`, one file each). What several files share
are functions in `lua/include/`.
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
    CallClass.READ: " flags=no-writes",
    CallClass.GROW: "",
    CallClass.KEEP: " flags=allow-oom",
}
"""What Redis is told of a call of each class."""

_INCLUDE = re.compile(r"^-- include: (\w+)\n", re.MULTILINE)
_OPERATIONS_HERE = "-- operations\n"


class Operation(msgspec.Struct, frozen=True):
    """An operation of a call."""

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


def read_operation(path: Path) -> Operation:
    """The operation in a file. Raises ContractError."""
    header, body = split_operation(path.stem, path.read_text())
    included, (bare,) = Includes(path.parents[1] / "include").before(body)
    return Operation(path.stem, parse_operation(header), body, included + bare)


def read_call(path: Path, call: CallClass, operations: Sequence[Operation]) -> Script:
    """The script that runs operations of one class."""
    header, loop = split_operation(path.stem, path.read_text())
    included, (loop, *bodies) = Includes(path.parent / "include").before(
        loop, *(operation.own for operation in operations)
    )
    functions = "local operations = {}\n" + "".join(
        f"operations.{operation.name} = function(op)\n{operation_preamble(operation.contract)}{body}end\n"
        for operation, body in zip(operations, bodies, strict=True)
    )
    before, here, after = loop.partition(_OPERATIONS_HERE)
    assert here, "call.lua says where its operations are to stand"
    body = f'local sections, CLASS = ARGV[1], "{call}"\n{included}{before}{functions}{after}'
    return bind_script(f"call_{call}", f"#!lua{FLAGS[call]}", parse_contract(header), body, names="")


def bind_script(name: str, first_line: str, contract: Contract, body: str, names: str | None = None) -> Script:
    """The script of this body, and its binding. `names` is the Lua that names keys and arguments, where not the usual."""
    if names is None:
        names = preamble(contract)
    named = {constant: value for constant, value in CONSTANTS.items() if re.search(rf"\b{constant}\b", body)}
    constants = "".join(f"local {constant} = {value}\n" for constant, value in named.items())
    source = f"{first_line}\n{constants}{names}{body}"
    sha = hashlib.sha1(source.encode()).hexdigest()
    return Script(name, first_line, contract, body, source, sha, packer(contract, sha), ReplyReader(contract))


class Scripts:
    """All scripts by name: `scripts["load_codes"]` is `lua/load_codes.lua`, `scripts["call_grow"]` one of the calls.
    `operations` are those of the calls, by name. Raises ContractError."""

    def __init__(self, folder: Path | None = None) -> None:
        folder = folder or resource_folder("lua")
        paths = sorted(folder.glob("*.lua"))
        self._by_name = {path.stem: read_script(path) for path in paths if path.stem != "call"}
        self.operations = {path.stem: read_operation(path) for path in sorted((folder / "operations").glob("*.lua"))}
        for call in CallClass:
            some = [operation for operation in self.operations.values() if operation.contract.call_class is call]
            script = read_call(folder / "call.lua", call, some)
            self._by_name[script.name] = script

    def __getitem__(self, name: str) -> Script:
        return self._by_name[name]

    def __iter__(self) -> Iterator[Script]:
        return iter(self._by_name.values())
