"""Runs a part of the service with one safeguard taken out: `python -m tests.unsafe SAFEGUARD PART …`.

Nothing in the service knows of this: methods are replaced and lines of Lua left out here, in a process of the test's own.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from coupon_svc.cli import main
from coupon_svc.resources import resource_folder
from coupon_svc.store import scripts as store_scripts
from coupon_svc.store.scripts import Script
from coupon_svc.writer import recover

_read_script = store_scripts.read_script


def _without_lines(name: str, lines: str) -> None:
    """Load scripts as if `lines` did not stand in the file of this name, or in what it includes."""

    def read_script(path: Path) -> Script:
        script = _read_script(path)
        if path.stem != name:
            return script
        assert lines in script.source, f"{name}.lua has changed: the safeguard is not where it was"
        source = script.source.replace(lines, "")
        return Script(script.name, source, hashlib.sha1(source.encode()).hexdigest())

    store_scripts.read_script = read_script


def quarantine() -> None:
    """Codes that somebody may hold go back to be dealt."""

    async def nothing_lost(*_: Any) -> bool:
        return True

    recover.Recoverer._nothing_lost = nothing_lost  # type: ignore[method-assign, assignment]


def rebuild() -> None:
    """Redis is kept whatever it holds, if it is not empty."""

    async def agrees(*_: Any) -> bool:
        return True

    async def drain(self: Any, *args: Any) -> tuple[int, bool]:
        reached, _ = await honest(self, *args)
        return reached, True

    honest = recover.Recoverer._drain
    recover.Recoverer._agrees = agrees  # type: ignore[method-assign, assignment]
    recover.Recoverer._drain = drain  # type: ignore[method-assign, assignment]


def replay() -> None:
    """An Idempotency-Key that was used before is not looked up."""
    included = (resource_folder("lua") / "include" / "replay.lua").read_text()
    _without_lines("assign_coupon", included)


def replid() -> None:
    """Scripts do not ask in which history the server is."""
    compared = (
        '\n  or not string.find(redis.call("INFO", "replication"), "master_replid:" .. tostring(meta[6]), 1, true)'
    )
    _without_lines("assign_coupon", compared)


def lock() -> None:
    """A redeem does not mind that somebody else has the code locked."""
    _without_lines("redeem_coupon", 'if held_token and shown_token == "" then\n  return {"locked", held_ms}\nend\n')


SAFEGUARDS: dict[str, Callable[[], None]] = {
    safeguard.__name__: safeguard for safeguard in (quarantine, rebuild, replay, replid, lock)
}

if __name__ == "__main__":
    SAFEGUARDS[sys.argv[1]]()
    sys.exit(main(sys.argv[2:]))
