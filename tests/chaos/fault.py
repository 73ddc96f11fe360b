"""What a fault of the suite is, and the stage that it is played on."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import NamedTuple

from coupon_svc.dev.servers import EmbeddedRedis
from tests.chaos.run import Run
from tests.harness import Stack, fresh_database

SHARDS = 4

Strike = Callable[[Run], Awaitable[None]]
"""Does harm to a run under load, and waits until it was seen to bite (AssertionError when it was not)."""

Stage = Callable[[str, Path], contextlib.AbstractAsyncContextManager[Stack]]
"""Servers for one run, from the URL of a Postgres and an empty folder; no part of the service runs yet."""


@contextlib.asynccontextmanager
async def plain_stage(postgres_url: str, folder: Path) -> AsyncIterator[Stack]:
    """A Redis and a database of its own."""
    with EmbeddedRedis(folder / "redis") as server:
        yield Stack(server, server.url, await fresh_database(postgres_url, SHARDS), folder, SHARDS)


def nothing() -> str:
    """What every machine has."""
    return ""


class Fault(NamedTuple):
    """A strike on a stage. `lacks` says in words what this machine has not got for it; such a fault is skipped by name."""

    strike: Strike
    stage: Stage = plain_stage
    lacks: Callable[[], str] = nothing

    @property
    def name(self) -> str:
        return self.strike.__name__
