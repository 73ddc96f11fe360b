"""Whether the user that we are in Redis may run the scripts and functions, and what they run.

Redis does not roll a script back: one that may pop a code but not write its event would lose a code with each assign. So a
missing right is found before the first script runs, by asking the server (ACL DRYRUN).
"""

from __future__ import annotations

from coupon_svc.redis.connection import Connection
from coupon_svc.redis.errors import ReplyError

_ONE_KEY: dict[str, tuple[str, ...]] = {
    "DEL": (),
    "GET": (),
    "HDEL": ("field",),
    "HGET": ("field",),
    "HINCRBY": ("field", "1"),
    "HLEN": (),
    "HMGET": ("field",),
    "HSET": ("field", "value"),
    "PTTL": (),
    "SADD": ("member",),
    "SET": ("value",),
    "SISMEMBER": ("member",),
    "SREM": ("member",),
    "TYPE": (),
    "UNLINK": (),
    "XADD": ("*", "field", "value"),
    "XTRIM": ("MINID", "1"),
    "ZADD": ("0", "member"),
    "ZCARD": (),
    "ZLEXCOUNT": ("-", "+"),
    "ZRANGE": ("0", "0"),
    "ZREM": ("member",),
    "ZSCORE": ("member",),
}
"""What the scripts do with a key, with arguments that make a whole command."""


_KEY, _CHANNEL = "cb:{00}:any", "cb:positions:any"


def commands_of_scripts() -> dict[str, tuple[str, ...]]:
    """A whole sample of every command that a script or a function runs, by its name."""
    return {
        **{name: (name, _KEY, *arguments) for name, arguments in _ONE_KEY.items()},
        "INFO": ("INFO", "replication"),
        "PUBLISH": ("PUBLISH", _CHANNEL, "message"),
        "TIME": ("TIME",),
    }


_RUNNING = {
    "EVALSHA": ("EVALSHA", "sha", "1", _KEY),
    "FCALL": ("FCALL", "function", "1", _KEY),
    "FUNCTION DELETE": ("FUNCTION", "DELETE", "library"),
    "FUNCTION LIST": ("FUNCTION", "LIST"),
    "FUNCTION LOAD": ("FUNCTION", "LOAD", "library"),
    "SCRIPT LOAD": ("SCRIPT", "LOAD", "script"),
}
"""What the service itself does with scripts and functions."""


async def missing_rights(connection: Connection) -> tuple[str, list[str]]:
    """(user, the commands above that it may not run on the service's keys).

    A user that may not ask (ACL WHOAMI, ACL DRYRUN) is not checked, and lacks nothing.
    """
    user = await connection.send("ACL", "WHOAMI")
    if isinstance(user, ReplyError):
        return "", []
    commands = _RUNNING | commands_of_scripts()
    asked = [connection.send("ACL", "DRYRUN", user, *command) for command in commands.values()]
    replies = [await one for one in asked]
    if any(isinstance(reply, ReplyError) for reply in replies):
        return user, []
    return user, [name for name, reply in zip(commands, replies, strict=True) if reply != "OK"]
