"""One turn of a closed loop: so many connections, each with its next request as soon as the last is answered."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from bench.figures import BenchError
from bench.requests import NextRequest
from coupon_svc.load.client import Connections, Reply
from coupon_svc.load.processes import own_cpu_s
from coupon_svc.postgres.database import LedgerConnection, open_connection
from coupon_svc.redis.connection import Connection, connect
from coupon_svc.redis.keys import ShardKeys

CONNECTIONS = 256
DRAIN_TIMEOUT_S = 60.0
_POLL_S = 0.002


class Turn(msgspec.Struct, kw_only=True):
    """What came of a turn. Its `seconds` count until all was answered, and the ledger had everything that was decided."""

    good: int
    seconds: float
    cpu_s: float
    """of the serving process"""
    load_share: float
    """of a core, that the load took while it ran"""
    bad: Counter[str]
    """answers that were none, or not 2xx, by what they were"""

    @property
    def rate(self) -> float:
        return self.good / self.seconds


class Ledger:
    """Tells when the ledger has everything that Redis has decided. Close it after use."""

    def __init__(self, connection: LedgerConnection, redis: Connection, shards: int) -> None:
        self._connection = connection
        self._redis = redis
        self._keys = [ShardKeys(shard, shards) for shard in range(shards)]

    async def caught_up(self) -> None:
        """Return once the ledger has what Redis had decided when this was called. Raises BenchError."""
        made = [int(await self._redis.ask("HGET", keys.meta, "seq") or 0) for keys in self._keys]
        deadline = asyncio.get_running_loop().time() + DRAIN_TIMEOUT_S
        while any(at < seq for at, seq in zip(await self._committed(), made, strict=True)):
            if asyncio.get_running_loop().time() > deadline:
                raise BenchError(f"the ledger had not caught up after {DRAIN_TIMEOUT_S:.0f} s")
            await asyncio.sleep(_POLL_S)

    async def commits(self) -> int:
        """Transactions that Postgres has committed so far."""
        row = await self._connection.fetchrow(
            "SELECT pg_stat_clear_snapshot(), (SELECT sum(xact_commit) FROM pg_stat_database)::bigint AS commits"
        )
        assert row is not None
        return int(row["commits"])

    async def close(self) -> None:
        await self._connection.close()
        self._redis.abort()

    async def _committed(self) -> list[int]:
        rows = await self._connection.fetch("SELECT committed FROM shards ORDER BY shard")
        return [row["committed"] for row in rows]


async def open_ledger(database_url: str, redis_url: str, shards: int) -> Ledger:
    """Look at a service from outside. Raises LedgerUnavailable, NotSent."""
    connection = await open_connection(database_url, "coupon-bench")
    return Ledger(connection, await connect(redis_url, "coupon-bench"), shards)


async def take_turn(
    ports: int | Sequence[int],
    pid: int,
    next_request: NextRequest,
    seconds: float,
    ledger: Ledger | None,
    *,
    connections: int = CONNECTIONS,
    on_good: Callable[[bytes], None] | None = None,
) -> Turn:
    """Load a process for `seconds`, or several that share the connections; and wait for the ledger when there is one.

    The processor time is that of the process `pid`. `on_good` is given each good body.

    Raises BenchError when the ledger does not catch up.
    """
    ports = [ports] if isinstance(ports, int) else ports
    loop = asyncio.get_running_loop()
    bad: Counter[str] = Counter()
    good, left = 0, connections // len(ports) * len(ports)
    all_answered = asyncio.Event()
    clients = [Connections("127.0.0.1", port, connections // len(ports)) for port in ports]

    def keep_asking(client: Connections) -> None:
        def done(reply: Reply) -> None:
            nonlocal good, left
            if 200 <= reply.status < 300:
                good += 1
                if on_good is not None:
                    on_good(reply.body)
            else:
                bad[describe(reply)] += 1
            if loop.time() < end:
                client.submit(next_request(), done)
            else:
                left -= 1
                if not left:
                    all_answered.set()

        client.submit(next_request(), done)

    try:
        for client in clients:
            await client.open()
        cpu_before, own_before, began = cpu_seconds(pid), own_cpu_s(), loop.time()
        end = began + seconds
        for _ in range(connections // len(ports)):
            for client in clients:
                keep_asking(client)
        await all_answered.wait()  # every request ends, with a failure at the latest
        share = (own_cpu_s() - own_before) / (loop.time() - began)
        if ledger is not None:
            await ledger.caught_up()
        took, cpu = loop.time() - began, cpu_seconds(pid) - cpu_before
    finally:
        for client in clients:
            client.close()
    return Turn(good=good, seconds=took, cpu_s=cpu, load_share=share, bad=bad)


def describe(reply: Reply) -> str:
    """What an answer was that is not good: its outcome where it says one."""
    if reply.failure is not None:
        return reply.failure
    try:
        return f"{reply.status} {msgspec.json.decode(reply.body)['code']}"
    except (msgspec.MsgspecError, KeyError, TypeError):
        return str(reply.status)


def cpu_seconds(pid: int) -> float:
    """What a process has used of the processors so far, user and system (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
