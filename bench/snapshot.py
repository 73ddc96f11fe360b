"""What a long snapshot does to commits: an `ack = ledger` book is given at an even rate before, while and after somebody
keeps a snapshot open, as a backup does. Postgres then removes no old row version."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import NamedTuple

from bench.requests import NextRequest, Requests
from bench.stand import Stand
from bench.tail import open_loop, percentile_ms
from coupon_svc.load.processes import cpu_s
from coupon_svc.postgres.database import LedgerConnection, open_connection

RATE = 300
"""Assigns a second."""
WINDOW_S = 60.0

_SEEN = """
    SELECT pg_stat_clear_snapshot(), (SELECT sum(xact_commit) FROM pg_stat_database)::bigint AS commits,
           (SELECT sum(fsyncs) FROM pg_stat_io WHERE object = 'wal')::bigint AS fsyncs,
           (SELECT sum(fsync_time) FROM pg_stat_io WHERE object = 'wal') AS fsync_ms
"""


class Window(NamedTuple):
    """WINDOW_S of the load."""

    name: str
    p50_ms: float
    p99_ms: float
    commits: float
    """A second."""
    fsync_ms: float
    """Each, on average."""
    postgres_us: float
    """Processor time of an assign."""
    writer_us: float


def bench_snapshot(minutes: int, say: Callable[[str], None]) -> list[Window]:
    """A window without a snapshot after one to warm up, `minutes` with one, and two after it. Raises BenchError."""
    with Stand() as stand:
        writer, api = stand.writer(), stand.api()
        stand.await_ready(api)
        book = stand.make_book(api, "ledger", int((minutes + 5) * WINDOW_S * RATE))
        make = Requests(stand.key).assign(book, with_key=True)
        pids = {"writer": [writer.pid], "Postgres": [stand.postgres.pid]}
        return asyncio.run(_measure(stand.postgres.url, api.port, make, pids, minutes, say))


def show_snapshot(windows: list[Window]) -> None:
    """Print the windows."""
    print(f"{'':22}{'p50 ms':>8}{'p99 ms':>8}{'commits/s':>11}{'fsync ms':>10}{'Postgres µs':>13}{'writer µs':>11}")
    for one in windows:
        print(
            f"{one.name:22}{one.p50_ms:>8.1f}{one.p99_ms:>8.1f}{one.commits:>11.0f}{one.fsync_ms:>10.2f}"
            f"{one.postgres_us:>13.0f}{one.writer_us:>11.0f}"
        )


async def _measure(
    url: str, port: int, make: NextRequest, pids: Mapping[str, list[int]], minutes: int, say: Callable[[str], None]
) -> list[Window]:
    looking, keeping = await open_connection(url, "coupon-bench"), await open_connection(url, "coupon-bench")
    await looking.execute("ALTER SYSTEM SET track_wal_io_timing = on")
    await looking.execute("SELECT pg_reload_conf()")
    windows = []

    async def take(name: str) -> None:
        say(name)
        windows.append(await _window(name, looking, port, make, pids))

    await take("to warm up")
    await take("before")
    await keeping.execute("SET idle_in_transaction_session_timeout = 0")
    async with keeping.transaction(isolation="repeatable_read", readonly=True):
        await keeping.execute("SELECT count(*) FROM books")
        for minute in range(1, minutes + 1):
            await take(f"snapshot, minute {minute}")
    await take("after, minute 1")
    await take("after, minute 2")
    await looking.close()
    await keeping.close()
    return windows


async def _window(
    name: str, looking: LedgerConnection, port: int, make: NextRequest, pids: Mapping[str, list[int]]
) -> Window:
    async def seen() -> tuple[int, int, float, dict[str, float]]:
        row = await looking.fetchrow(_SEEN)
        assert row is not None
        return row["commits"], row["fsyncs"], row["fsync_ms"], cpu_s(pids)

    commits, fsyncs, fsync_ms, cpu = await seen()
    latencies, bad = await open_loop(port, make, RATE, WINDOW_S)
    commits_now, fsyncs_now, fsync_ms_now, cpu_now = await seen()
    assert not bad, bad
    return Window(
        name,
        percentile_ms(latencies, 0.5),
        percentile_ms(latencies, 0.99),
        (commits_now - commits) / WINDOW_S,
        (fsync_ms_now - fsync_ms) / max(1, fsyncs_now - fsyncs),
        1e6 * (cpu_now["Postgres"] - cpu["Postgres"]) / len(latencies),
        1e6 * (cpu_now["writer"] - cpu["writer"]) / len(latencies),
    )
