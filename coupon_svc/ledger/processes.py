"""Which API processes live, and what they have answered from. Only a process whose row is fresh answers before the ledger
knows; so when records are lost it can be told whether anybody saw them."""

from __future__ import annotations

import asyncpg

PROCESS_TTL_S = 5

_BEGIN = f"INSERT INTO api_processes VALUES ($1, now() + interval '{PROCESS_TTL_S} seconds')"
# A row that has expired stays so: its shards' owners may have reported for it already.
_RENEW = f"""
    UPDATE api_processes SET expires_at = now() + interval '{PROCESS_TTL_S} seconds'
    WHERE process_id = $1 AND expires_at > now()
"""
# A process that is gone and has a report in every epoch in which Redis may decide needs no row any more.
_FORGET = """
    DELETE FROM api_processes p WHERE expires_at < now() AND NOT EXISTS (
        SELECT FROM shards s WHERE certified_epoch > settled_epoch AND NOT EXISTS (
            SELECT FROM api_reports r
            WHERE r.shard = s.shard AND r.epoch = s.certified_epoch AND r.process_id = p.process_id))
"""


async def begin_process(connection: asyncpg.Connection, process_id: str) -> None:
    """Register a process, under an id that was never used before."""
    await connection.execute(_BEGIN, process_id)


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


async def report_seen(connection: asyncpg.Connection, process_id: str, reports: list[tuple[int, int, int]]) -> None:
    """Promise, as (shard, epoch, seen seq), never to answer from these epochs again; what was seen of them is all."""
    await connection.executemany(
        "INSERT INTO api_reports (process_id, shard, epoch, seen_seq) VALUES ($1, $2, $3, $4)"
        " ON CONFLICT (shard, epoch, process_id) DO UPDATE SET seen_seq = greatest(api_reports.seen_seq, $4)",
        [(process_id, *report) for report in reports],
    )


async def end_process(connection: asyncpg.Connection, process_id: str) -> None:
    """The process has reported all it saw, and ends."""
    await connection.execute("DELETE FROM api_processes WHERE process_id = $1", process_id)


async def expired_processes(connection: asyncpg.Connection) -> list[str]:
    """Processes whose row has not been renewed in time: they answer nothing before the ledger knows any more."""
    rows = await connection.fetch("SELECT process_id FROM api_processes WHERE expires_at < now()")
    return [row["process_id"] for row in rows]


async def forget_processes(connection: asyncpg.Connection) -> None:
    """Drop expired processes of which every shard knows enough."""
    await connection.execute(_FORGET)
