"""Which Redis is at the other end of a connection, and whether it is fit to be trusted with the service's keys."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from coupon_svc.redis.connection import Connection
from coupon_svc.redis.errors import ReplyError, ServerUnfit
from coupon_svc.redis.rights import missing_rights
from coupon_svc.redis.scripts import LIBRARIES, Library, Scripts

VERSION_MIN = (7, 0)


class Identity(msgspec.Struct, frozen=True):
    """What tells one Redis from another, and one life of it from the next.

    `run_id` changes with every start; `replid` with every change of master, even on a live connection.
    """

    run_id: str
    replid: str


async def read_identity(connection: Connection) -> Identity:
    """The identity of the server at the other end. Raises ServerUnfit for a replica or a setting that loses data."""
    return judge(await read_info(connection))


async def read_info(connection: Connection) -> dict[str, str]:
    """What the server says of itself."""
    text: str = await connection.ask("INFO")
    pairs = (line.partition(":") for line in text.splitlines() if ":" in line)
    return {name: value for name, _, value in pairs}


def refuses_writes(info: Mapping[str, str]) -> bool:
    """Whether the server could not write its file, and so takes no writes (MISCONF) until it can: its disk is full."""
    return info.get("aof_last_write_status", "ok") != "ok"


def judge(info: Mapping[str, str]) -> Identity:
    """The identity of a server by its own words. Raises ServerUnfit, as `read_identity`."""
    version = tuple(int(part) for part in info["redis_version"].split(".")[:2])
    if version < VERSION_MIN:
        raise ServerUnfit(f"Redis {info['redis_version']} is too old: 7.0 or newer, or Valkey, is needed.")
    if info.get("loading") == "1":
        raise ServerUnfit("Redis is still loading its file.")
    if info["role"] != "master":
        raise ServerUnfit("This Redis is a replica: point COUPON_REDIS_URL at the master.")
    if info.get("maxmemory_policy", "noeviction") != "noeviction":
        raise ServerUnfit("maxmemory-policy must be noeviction: any other policy deletes coupons when memory is short.")
    if info.get("aof_enabled") != "1":
        raise ServerUnfit("appendonly must be yes: without the append-only file a restart forgets every coupon.")
    return Identity(info["run_id"], info["master_replid"])


async def load_scripts(connection: Connection, scripts: Scripts) -> None:
    """Make every script known to the server. The connection must have been verified before.

    Raises ServerUnfit when our user may not run a command of theirs.
    """
    user, missing = await missing_rights(connection)
    if missing:
        raise ServerUnfit(
            f"The Redis user {user!r} may not run {', '.join(missing)} on the service's keys: docs/redis.md lists the"
            " rights that it needs."
        )
    for future in [connection.send("SCRIPT", "LOAD", script.source) for script in scripts]:
        reply = await future
        if isinstance(reply, Exception):
            raise reply


async def load_library(connection: Connection, library: Library) -> None:
    """Make the functions of the calls known to the server, which keeps them through restarts and fail-overs.

    Raises ServerUnfit when there is no room for them: loading is a write.
    """
    if await connection.ask("FUNCTION", "LIST", "LIBRARYNAME", library.name):
        return
    reply = await connection.send("FUNCTION", "LOAD", "REPLACE", library.source)
    if isinstance(reply, ReplyError):
        raise ServerUnfit(
            f"Redis did not take the functions of this version ({reply.word}). It keeps them on disk and in memory: there"
            " must be room in both."
        )


async def drop_other_libraries(connection: Connection, library: Library) -> None:
    """Drop the functions of other versions, which Redis would keep for ever. A process of such a version that still runs
    loads its own again."""
    for found in await connection.ask("FUNCTION", "LIST", "LIBRARYNAME", f"{LIBRARIES}*"):
        name = dict(zip(found[::2], found[1::2], strict=True))["library_name"]
        if name != library.name:
            await connection.send("FUNCTION", "DELETE", name)  # somebody may have been faster
