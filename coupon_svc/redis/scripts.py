"""The Lua scripts: one file per operation in `lua/`, with the functions that several share in `lua/include/`."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from coupon_svc.domain import bounds
from coupon_svc.redis.contract import (
    Command,
    Contract,
    Reply,
    ReplyReader,
    packer,
    parse_contract,
    preamble,
    split_source,
)
from coupon_svc.redis.inline import inline, number_fields
from coupon_svc.resources import resource_folder

_INCLUDE = re.compile(r"^-- include: (\w+)\n", re.MULTILINE)
CONSTANTS = {
    "IDEMPOTENCY_MS": bounds.IDEMPOTENCY_MS,
    "LEDGER_UNSEEN_MAX_MS": bounds.LEDGER_UNSEEN_MAX_MS,
    "CLOCKS_APART_MAX_MS": bounds.CLOCKS_APART_MAX_MS,
    "REDEEM_BACKLOG_SHARE": bounds.REDEEM_BACKLOG_SHARE,
}
"""What a script may name without defining it. Only those that it names are put into it."""


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


def read_script(path: Path) -> Script:
    """The script in a file: its constants, the names of its keys and arguments, what it includes, and its body."""

    def included(match: re.Match[str]) -> str:
        return (path.parent / "include" / f"{match[1]}.lua").read_text()

    first_line, header, body = split_source(path.stem, path.read_text())
    return bind_script(path.stem, first_line, parse_contract(header), _INCLUDE.sub(included, body))


def bind_script(name: str, first_line: str, contract: Contract, body: str) -> Script:
    """The script of this body, and its binding."""
    named = {constant: value for constant, value in CONSTANTS.items() if re.search(rf"\b{constant}\b", body)}
    constants = "".join(f"local {constant} = {value}\n" for constant, value in named.items())
    source = f"{first_line}\n{constants}{preamble(contract)}{inline(number_fields(body))}"
    sha = hashlib.sha1(source.encode()).hexdigest()
    return Script(name, first_line, contract, body, source, sha, packer(contract, sha), ReplyReader(contract))


class Scripts:
    """All scripts by name: `scripts["redeem_coupon"]` is `lua/redeem_coupon.lua`. Raises ContractError."""

    def __init__(self, folder: Path | None = None) -> None:
        paths = sorted((folder or resource_folder("lua")).glob("*.lua"))
        self._by_name = {path.stem: read_script(path) for path in paths}

    def __getitem__(self, name: str) -> Script:
        return self._by_name[name]

    def __iter__(self) -> Iterator[Script]:
        return iter(self._by_name.values())
