"""The writer, emptying a full stream, against COPY of the same rows into the same tables."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import uvloop

from coupon_svc.ops.bench.assigning import assign_many
from coupon_svc.ops.bench.figures import BenchError, Figure, rate_text, ratios
from coupon_svc.ops.bench.stand import Process, Stand
from coupon_svc.ops.bench.turns import cpu_seconds
from coupon_svc.postgres.database import LedgerConnection, open_connection
from coupon_svc.redis.connection import Connection, connect
from coupon_svc.redis.control import ShardControl
from coupon_svc.redis.keys import ShardKeys
from coupon_svc.redis.scripts import Scripts

_POLL_S = 0.002
_WAIT_S = 60.0
_EVENTS = "shard, epoch, seq, event, book_id, code, user_id, at_ms, uses, reference, metadata, idem, fingerprint"
_COUPONS = "book_id, code, user_id, assigned_at_ms, epoch, seq"


class Drained(msgspec.Struct):
    """One emptying: events a second, and how they were cut into commits."""

    rate: float
    batch: int
    """events a commit, on average"""
    cpu_us: float
    """of the writer per event, from its start on"""
    rows: tuple[list[Any], list[Any]]
    """of events and coupons"""


def bench_drain(rounds: int, events: int, say: Callable[[str], None]) -> Figure:
    """Events a second from the first commit to the last, each round beside COPY in batches as large. Raises BenchError."""
    figure = Figure(
        id="writer",
        what="writer: events drained a second, with Idempotency-Keys, against COPY of the same rows into both tables",
        goal=0.7,
    )
    # A block that holds a whole round: while the writer is away nobody lends any.
    with Stand(shards=1, COUPON_LEASE_CODES_MIN="100000", COUPON_LEASE_CODES_MAX="1000000") as stand:
        copies_url = stand.other_database("copies")
        writer, api = stand.writer(), stand.api()
        stand.await_ready(api)
        book_id = stand.make_book(api, "redis", rounds * events + 200_000)
        drained: list[Drained] = []
        copied: list[float] = []
        for number in range(rounds):
            uvloop.run(_await_pool(stand, book_id, events))
            writer.stop()
            uvloop.run(_fill(stand, book_id, range(number * events, (number + 1) * events)))
            writer = stand.writer()
            turn = uvloop.run(_drain(stand, writer, events))
            drained.append(turn)
            copied.append(uvloop.run(_copy(copies_url, turn.rows, turn.batch)))
            turn.rows = ([], [])
            say(
                f"writer {turn.rate:,.0f} events/s in commits of {turn.batch}, {turn.cpu_us:.0f} µs each; "
                f"COPY {copied[-1]:,.0f}/s"
            )
    figure.samples = ratios([turn.rate for turn in drained], copied)
    figure.note = (
        f"{rate_text([turn.rate for turn in drained])} against {rate_text(copied)}, {drained[-1].batch} a commit"
    )
    return figure


async def _await_pool(stand: Stand, book_id: str, codes: int) -> None:
    """Wait until so many codes of the book are in Redis, and the ledger is where Redis is."""
    owner = ShardControl(stand.redis.url, 1, Scripts())
    deadline = asyncio.get_running_loop().time() + _WAIT_S
    while (await owner.pool_counts(0, book_id))[0] < codes:
        if asyncio.get_running_loop().time() > deadline:
            raise BenchError("the writer did not lend enough codes")
        await asyncio.sleep(0.05)
    owner.close()


async def _fill(stand: Stand, book_id: str, numbers: Sequence[int]) -> None:
    redis = await connect(stand.redis.admin_url, "coupon-bench")
    keys = ShardKeys(0, 1)
    try:
        epoch = int(await redis.ask("HGET", keys.meta, "epoch"))
        tenant_id = int(await redis.ask("HGET", keys.book(book_id), "tenant_id"))
        await redis.ask("SCRIPT", "LOAD", Scripts()["assign_coupon"].source)
        await assign_many(redis, keys, epoch, tenant_id, book_id, numbers, with_key=True)
    finally:
        redis.abort()


async def _drain(stand: Stand, writer: Process, events: int) -> Drained:
    """Watch the ledger's position while the writer, just started, empties the stream. Raises BenchError."""
    loop = asyncio.get_running_loop()
    redis = await connect(stand.redis.admin_url, "coupon-bench")
    connection = await open_connection(stand.postgres.url, "coupon-bench")
    try:
        before, upto = await _position(connection), await _seq(redis)
        if upto - before != events:
            raise BenchError(f"the stream holds {upto - before} events, not {events}")
        await connection.execute("CHECKPOINT")  # what the writer is to be charged with begins here
        watch = await connection.prepare("SELECT committed FROM shards")
        deadline, first = loop.time() + _WAIT_S, None
        while (at := int(await watch.fetchval())) < upto:
            if at > before and first is None:
                first = (loop.time(), at)
            if loop.time() > deadline:
                raise BenchError(f"the writer had not emptied the stream after {_WAIT_S:.0f} s")
            await asyncio.sleep(_POLL_S)
        if first is None:
            raise BenchError("the writer emptied the stream in one commit: there is nothing to time")
        rate = (upto - first[1]) / (loop.time() - first[0])
        cpu_us = cpu_seconds(writer.pid) / events * 1e6
        where = f"WHERE epoch = (SELECT epoch FROM shards) AND seq > {before}"
        commits = await connection.fetchval(f"SELECT count(DISTINCT xmin::text) FROM events {where}")
        rows = [
            [tuple(row) for row in await connection.fetch(f"SELECT {columns} FROM {table} {where} ORDER BY seq")]
            for table, columns in (("events", _EVENTS), ("coupons", _COUPONS))
        ]
        return Drained(rate, math.ceil(events / commits), cpu_us, (rows[0], rows[1]))
    finally:
        redis.abort()
        await connection.close()


async def _position(connection: LedgerConnection) -> int:
    return int(await connection.fetchval("SELECT committed FROM shards"))


async def _seq(redis: Connection) -> int:
    return int(await redis.ask("HGET", ShardKeys(0, 1).meta, "seq"))


async def _copy(url: str, rows: tuple[list[Any], list[Any]], batch: int) -> float:
    """Rows a second from the first commit to the last; each commit holds `batch` rows of either table."""
    loop = asyncio.get_running_loop()
    connection = await open_connection(url, "coupon-bench")
    first, events = 0.0, len(rows[0])
    try:
        await connection.execute("CHECKPOINT")
        for begin in range(0, events, batch):
            async with connection.transaction():
                for table, columns, all_rows in zip(("events", "coupons"), (_EVENTS, _COUPONS), rows, strict=True):
                    await connection.copy_records_to_table(
                        table, records=all_rows[begin : begin + batch], columns=columns.split(", ")
                    )
            first = first or loop.time()
        return (events - batch) / (loop.time() - first)
    finally:
        await connection.close()
