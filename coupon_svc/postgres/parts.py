"""The parts of `entries`: one for each month of commit, made before it begins."""

from __future__ import annotations

from datetime import UTC, datetime

import asyncpg

MONTHS_AHEAD = 2
_LOCK_WAIT = "SET LOCAL lock_timeout = '200ms'"


def month_names(now: datetime) -> list[tuple[str, str, str]]:
    """(part, its first day, the day after its last) of the months to come, next month first."""
    months = []
    year, month = now.year, now.month
    for _ in range(MONTHS_AHEAD):
        year, month = (year, month + 1) if month < 12 else (year + 1, 1)
        after_year, after_month = (year, month + 1) if month < 12 else (year + 1, 1)
        months.append((f"entries_{year}_{month:02d}", f"{year}-{month:02d}-01", f"{after_year}-{after_month:02d}-01"))
    return months


async def make_parts(connection: asyncpg.Connection) -> list[str]:
    """Make the parts of the next months that are not there yet. Returns their names.

    Of this month no part is made: what it has by now stands in `entries_else`, and would have to be moved. Nobody waits long
    for the lock that this takes: where it cannot be had, it is tried again with the next sweep.
    """
    made = []
    for name, begin, end in month_names(datetime.now(UTC)):
        if await connection.fetchval("SELECT to_regclass($1)", name) is not None:
            continue
        try:
            async with connection.transaction():
                await connection.execute(_LOCK_WAIT)
                await connection.execute(
                    f"CREATE TABLE {name} PARTITION OF entries FOR VALUES FROM ('{begin} 00:00+00') TO ('{end} 00:00+00')"
                )
        except (asyncpg.LockNotAvailableError, asyncpg.DuplicateTableError):
            continue
        made.append(name)
    return made
