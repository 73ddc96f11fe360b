"""Which API processes live, and what they have seen. Only a process that renews its row answers before the ledger
knows; so when records are lost it can be told whether anybody saw them."""

from __future__ import annotations

from collections.abc import Sequence

import asyncpg

from coupon_svc.domain.events import Entry
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
_SILENT = """
    SELECT process_id FROM api_processes p WHERE NOT EXISTS
        (SELECT FROM api_reports r WHERE r.process_id = p.process_id AND r.shard = $1 AND r.epoch = $2)
"""
_REPORTED_BEHIND = """
    SELECT epoch, seq, n, after, tip, at_ms, events AS body FROM reported_entries
    WHERE shard = $1 AND epoch = $2 AND seq > $3 ORDER BY seq LIMIT $4
"""
_CONTRADICTED = """
    SELECT min(seq) FROM reported_entries r WHERE shard = $1 AND epoch = $2 AND seq <= $3
        AND NOT EXISTS (SELECT FROM entries e
            WHERE (e.shard, e.epoch, e.seq, e.tip) = (r.shard, r.epoch, r.seq, r.tip))
        AND NOT EXISTS (SELECT FROM dead_letters d
            WHERE (d.shard, d.epoch, d.seq) = (r.shard, r.epoch, r.seq) AND d.code IS NULL)
"""
_HIGHEST_SEEN = "SELECT max(seen_seq) FROM api_reports WHERE shard = $1 AND epoch = $2"
_ANSWERS_EARLY = "SELECT EXISTS (SELECT FROM books WHERE shard = $1 AND ack = 'redis' AND lent > 0)"
_EPOCHS = """
    SELECT epoch, CASE WHEN certified_epoch > settled_epoch THEN certified_epoch ELSE 0 END AS live
    FROM shards ORDER BY shard
"""
_REPORT_SEEN = """
    INSERT INTO api_reports (process_id, shard, epoch, seen_seq) VALUES ($1, $2, $3, $4)
    ON CONFLICT (shard, epoch, process_id) DO UPDATE SET seen_seq = greatest(api_reports.seen_seq, $4)
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
    rows = await connection.fetch(_EPOCHS)
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
            _REPORT_SEEN, [(process_id, report.shard, report.epoch, report.seen_seq) for report in reports]
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


async def silent_processes(connection: asyncpg.Connection, shard: int, epoch: int) -> list[str]:
    """API processes that could have answered in an epoch and have not said what they saw of it."""
    return [row["process_id"] for row in await connection.fetch(_SILENT, shard, epoch)]


async def reported_entries(
    connection: asyncpg.Connection, shard: int, epoch: int, behind: int, count: int
) -> list[Entry]:
    """What API processes have reported and the ledger lacks: up to `count` entries of an epoch that end behind a seq."""
    return [Entry(*row) for row in await connection.fetch(_REPORTED_BEHIND, shard, epoch, behind, count)]


async def contradicted(connection: asyncpg.Connection, shard: int, epoch: int, accounted: int) -> int | None:
    """The seq of an entry that an API process has reported and that the ledger does not have, though it accounts for the
    epoch up to there; None when there is none. One that is noted as missing contradicts nothing."""
    seq: int | None = await connection.fetchval(_CONTRADICTED, shard, epoch, accounted)
    return seq


async def highest_seen(connection: asyncpg.Connection, shard: int, epoch: int) -> int:
    """The highest seq of an epoch that any API process has seen, of those that reported."""
    return await connection.fetchval(_HIGHEST_SEEN, shard, epoch) or 0


async def may_have_answered_early(connection: asyncpg.Connection, shard: int) -> bool:
    """Whether a book of the shard answers before the ledger knows, and has codes lent."""
    return bool(await connection.fetchval(_ANSWERS_EARLY, shard))
