"""The data plane's scripts as its callers name their parameters: tenant, book, code and user, and never a key.

The keys of a script follow from its parameters: `holders` is `ShardKeys.holders(book_id)`. So each script gets one
function, generated at load, that spells its keys and packs the command. A key's parameter that the script itself does
not take (the book of a lock) becomes one more parameter of the function.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from coupon_svc.domain.holding import Holding, parse_positions
from coupon_svc.redis.contract import Command, Key, Reply
from coupon_svc.redis.keys import ShardKeys
from coupon_svc.redis.scripts import Script, Scripts

QUARANTINED = "quarantined"
"""Stands in a list of holders for a code in quarantine."""

_FILLED = ("epoch", "seen_seq")
"""Arguments that the data plane fills in itself."""


class ShardScript(NamedTuple):
    """A script of the data plane. `pack(prefix, epoch, seen_seq, **parameters)` is the command to be sent."""

    name: str
    pack: Callable[..., Command]
    read: Callable[[Sequence[Any]], Reply]
    position_at: dict[str, int]
    """Outcome -> where its reply has the positions of a coupon."""
    holders_at: dict[str, int]
    """Outcome -> where its reply has a list of holders."""

    def reply(self, raw: list[Any]) -> Reply:
        """What Redis sent, with a name for each field: `position` is (assigned, last), and `holders` holds for each code a
        Holding, "" for nobody, or QUARANTINED. Raises UnexpectedReply, ValueError."""
        outcome = raw[0]
        if outcome in self.position_at:
            at = self.position_at[outcome]
            raw[at] = parse_positions(raw[at])
        elif outcome in self.holders_at:
            at = self.holders_at[outcome]
            raw[at] = [text if text in ("", QUARANTINED) else Holding.parse(text) for text in raw[at]]
        return self.read(raw)


def bind_scripts(scripts: Scripts) -> dict[str, ShardScript]:
    """Every script that is fenced by `seen_seq`: those of the data plane, by name."""
    bound = (script for script in scripts if any(arg.name == "seen_seq" for arg in script.contract.args))
    return {script.name: bind_to_shard(script) for script in bound}


def bind_to_shard(script: Script) -> ShardScript:
    """Generate the function that packs a script's command."""
    contract = script.contract
    args = {arg.name: arg for arg in contract.args if arg.name not in _FILLED}
    keys = {key.name: _key_expression(key) for key in contract.keys}
    needed = {name for _, names in keys.values() for name in names}
    parameters = [name for name in sorted(needed) if name not in args]
    parameters += [f"{name}=''" if arg.mark == "?" else name for name, arg in args.items()]
    values = [f"{name}={expression}" for name, (expression, _) in keys.items()]
    values += [f"{arg.name}={arg.name}" for arg in contract.args]
    head = f"def pack(prefix, epoch, seen_seq{', *' if parameters else ''}{''.join(f', {p}' for p in parameters)}):"
    scope: dict[str, Any] = {"packed": script.pack}
    exec(compile(f"{head}\n    return packed({', '.join(values)})\n", f"<call {script.name}>", "exec"), scope)
    fields = {line.word: line.fields for line in contract.replies}
    return ShardScript(
        script.name,
        scope["pack"],
        script.reply,
        {word: names.index("position") + 1 for word, names in fields.items() if "position" in names},
        {word: names.index("holders") + 1 for word, names in fields.items() if "holders" in names},
    )


def _key_expression(key: Key) -> tuple[str, list[str]]:
    """(the expression for a key, the parameters in it). A list of keys has one for each item of a list of arguments: the
    locks of `codes` are `ShardKeys.lock(book_id, code)`."""
    keys = ShardKeys(0, 1, tag="any")
    spelled = getattr(keys, key.name)
    needed = list(inspect.signature(spelled).parameters) if callable(spelled) else []
    text = spelled(*(f"{{{name}}}" for name in needed)) if callable(spelled) else spelled
    text = text.replace(keys.prefix, "{prefix}")
    if key.mark == "…":
        listed = needed.pop()
        return f"[f{text!r} for {listed} in {listed}s]", needed
    if key.mark == "?":
        return f"f{text!r} if {needed[-1]} else None", needed
    return f"f{text!r}", needed
