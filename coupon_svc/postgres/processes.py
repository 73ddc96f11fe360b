"""Which API processes live, and what they have answered from. Only a process that renews its row answers before the ledger
knows; so when records are lost it can be told whether anybody saw them."""

from __future__ import annotations

from collections.abc import Sequence

import asyncpg

from coupon_svc.domain.reports import Report

ENTRIES_REPORTED_MAX = 10_000
"""Of one shard, in one report: what a statement can take in time."""
PROCESS_TTL_S = 5
"""For so long an observer must have seen a row unchanged before it counts the process as gone; a process stops to answer
early before that (coupon_svc/service/registration.py)."""

# A row that somebody has counted as gone stays so: its shards' owners may have reported for it already.
_RENEW = "UPDATE api_processes SET beat = nextval('beats') WHERE process_id = $1 AND NOT gone"
_REPORT_ENTRIES = """
    INSERT INTO reported_entries (shard, epoch, seq, n, after, tip, at_ms, events)
    SELECT * FROM unnest($1::int[], $2::bigint[], $3::bigint[], $4::int[], $5::text[], $6::text[], $7::bigint[], $8::bytea[])
    ON CONFLICT DO NOTHING
"""
_COUNT_AS_GONE = "UPDATE api_processes SET gone = true WHERE process_id = $1 AND beat = $2 AND NOT gone"
# A process that is gone and has a report in every epoch in which Redis may decide needs no row any more.
_FORGET = """
    DELETE FROM api_processes p WHERE gone AND NOT EXISTS (
        SELECT FROM shards s WHERE certified_epoch > settled_epoch AND NOT EXISTS (
            SELECT FROM api_reports r
            WHERE r.shard = s.shard AND r.epoch = s.certified_epoch AND r.process_id = p.process_id))
"""


async def begin_process(connection: asyncpg.Connection, process_id: str) -> None:
    """Register a process, under an id that was never used before."""
    await connection.execute("INSERT INTO api_processes (process_id) VALUES ($1)", process_id)


async def renew_process(connection: asyncpg.Connection, process_id: str) -> bool:
    """Say that the process lives. False when that comes too late: it must register anew."""
    return bool(await connection.execute(_RENEW, process_id) == "UPDATE 1")


async def epochs_of_shards(connection: asyncpg.Connection) -> list[tuple[int, int]]:
    """The epoch of each shard, and the one in which Redis decided last when that is not settled yet, otherwise 0.

    A process answers from no older epoch than the first any more, and reports what it has seen of the second.
    """
    rows = await connection.fetch(
        "SELECT epoch, CASE WHEN certified_epoch > settled_epoch THEN certified_epoch ELSE 0 END AS live"
        " FROM shards ORDER BY shard"
    )
    return [(row["epoch"], row["live"]) for row in rows]


async def receipt_secret(connection: asyncpg.Connection) -> bytes:
    """What receipts are signed with; every process has the same."""
    secret: bytes = await connection.fetchval("SELECT receipt_secret FROM settings")
    return secret


async def report_seen(connection: asyncpg.Connection, process_id: str, reports: Sequence[Report]) -> None:
    """Keep reports. Of their entries the first ENTRIES_REPORTED_MAX of each: what lies above is as lost as if the process
    were silent, since it says how far it has seen."""
    entries = [(report.shard, *entry) for report in reports for entry in report.entries[:ENTRIES_REPORTED_MAX]]
    async with connection.transaction():
        if entries:
            await connection.execute(_REPORT_ENTRIES, *zip(*entries, strict=True))
        await connection.executemany(
            "INSERT INTO api_reports (process_id, shard, epoch, seen_seq) VALUES ($1, $2, $3, $4)"
            " ON CONFLICT (shard, epoch, process_id) DO UPDATE SET seen_seq = greatest(api_reports.seen_seq, $4)",
            [(process_id, *report[:3]) for report in reports],
        )


async def end_process(connection: asyncpg.Connection, process_id: str) -> None:
    """The process has reported all it saw, and ends."""
    await connection.execute("DELETE FROM api_processes WHERE process_id = $1", process_id)


async def process_beats(connection: asyncpg.Connection) -> dict[str, int]:
    """The beat of every process that is not known to be gone, to be watched."""
    rows = await connection.fetch("SELECT process_id, beat FROM api_processes WHERE NOT gone")
    return {row["process_id"]: row["beat"] for row in rows}


async def count_as_gone(connection: asyncpg.Connection, process_id: str, beat: int) -> bool:
    """Count a process as gone, unless it has been renewed since it was seen with this beat. It can register anew, but not
    renew its row any more."""
    return bool(await connection.execute(_COUNT_AS_GONE, process_id, beat) == "UPDATE 1")


async def gone_processes(connection: asyncpg.Connection) -> list[str]:
    """Processes that were counted as gone: they answer nothing before the ledger knows any more."""
    rows = await connection.fetch("SELECT process_id FROM api_processes WHERE gone")
    return [row["process_id"] for row in rows]


async def forget_processes(connection: asyncpg.Connection) -> None:
    """Drop processes that are gone and of which every shard knows enough."""
    await connection.execute(_FORGET)
