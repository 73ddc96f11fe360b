"""How a shard's owner runs a script: EVALSHA, once more when the script was not loaded, and every refusal as an exception.

The API runs functions (coupon_svc/redis/dispatcher.py). Its only script is `doubt_shard`, whose reply it does not read."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from coupon_svc.redis.connection import Connection
from coupon_svc.redis.contract import Command, Reply
from coupon_svc.redis.errors import (
    Fenced,
    OutOfMemory,
    ReplyError,
    WrongKeyType,
    shard_not_usable,
)


class Runnable(Protocol):
    """A script, as far as it matters here: its name, and how its reply is read."""

    @property
    def name(self) -> str: ...

    @property
    def reply(self) -> Callable[[list[Any]], Reply]: ...


async def run_script(
    script: Runnable,
    prepare: Callable[[], tuple[Connection, Command]],
    load: Callable[[], Awaitable[None]],
) -> Reply:
    """Run a script and return its reply.

    `prepare` gives the connection and the command, anew for each attempt; what it raises is raised. There is a second
    attempt only after NOSCRIPT, which promises that nothing ran: before it, `load` makes the scripts known to the server.

    Raises NotSent and OutcomeUnknown; OutOfMemory, which did nothing; any other ReplyError, after which a script that writes
    may have done a part of its work; ShardNotUsable when the script found that the shard must not be used.
    """
    for last in (False, True):
        connection, command = prepare()
        raw = await connection.send(*command)
        if not isinstance(raw, ReplyError):
            reply = script.reply(raw)
            if reply.outcome == "suspect":
                raise shard_not_usable(script.name, reply.why)
            if reply.outcome == "fenced":
                raise Fenced(script.name)
            return reply
        if last or not raw.not_loaded:
            raise _error(script, raw)
        await load()
    raise AssertionError("the last attempt returns or raises")


def _error(script: Runnable, raw: ReplyError) -> Exception:
    """An error reply as an exception whose message holds no more than its first word: the rest may name a key."""
    if raw.word == "OOM":
        return OutOfMemory(f"{script.name}: OOM")
    if raw.word == "WRONGTYPE":
        return WrongKeyType(f"{script.name}: a key has another type")
    return ReplyError(f"{raw.word} in {script.name}")
