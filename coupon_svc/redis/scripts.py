"""The Lua scripts: one file per operation in `lua/`, with the lines that several share in `lua/include/`."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec

from coupon_svc.resources import resource_folder

_INCLUDE = re.compile(r"^-- include: (\w+)\n", re.MULTILINE)


class Script(msgspec.Struct, frozen=True):
    """A script as it is sent to Redis. `sha` is what EVALSHA names it by."""

    name: str
    source: str
    sha: str


def read_script(path: Path) -> Script:
    """The script in a file, with every `-- include: name` line replaced by `include/name.lua`."""

    def included(match: re.Match[str]) -> str:
        return (path.parent / "include" / f"{match[1]}.lua").read_text()

    source = _INCLUDE.sub(included, path.read_text())
    return Script(path.stem, source, hashlib.sha1(source.encode()).hexdigest())


class Scripts:
    """All scripts by name: `scripts["redeem_coupon"]` is `lua/redeem_coupon.lua`."""

    def __init__(self, folder: Path | None = None) -> None:
        paths = sorted((folder or resource_folder("lua")).glob("*.lua"))
        self._by_name = {path.stem: read_script(path) for path in paths}

    def __getitem__(self, name: str) -> Script:
        return self._by_name[name]

    def __iter__(self) -> Iterator[Script]:
        return iter(self._by_name.values())
