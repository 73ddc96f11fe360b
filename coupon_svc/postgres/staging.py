"""The bodies of uploads as they are received: staged in blocks, each in a transaction that also shows that the receiver
lives. Once a body is complete, its job runs (`jobs`)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import asyncpg
import msgspec

from coupon_svc.domain.outcomes import Outcome, Refused
from coupon_svc.domain.upload_files import Batch
from coupon_svc.postgres.database import one_row
from coupon_svc.postgres.errors import LedgerUnavailable
from coupon_svc.postgres.jobs import COLUMNS, SILENT_S, Job, RejectedRow, job_from_row, reject

LINES_AT_ONCE = 2_000
"""Lines for COPY that are made before others have their turn."""
_OPEN = f"""
    INSERT INTO jobs (job_id, tenant_id, book_id, idempotency_key) VALUES ($1, $2, $3, $4) RETURNING {COLUMNS}
"""
_IS_RECEIVED = f"""
    SELECT EXISTS (SELECT FROM jobs
                   WHERE tenant_id = $1 AND book_id = $2 AND idempotency_key = $3 AND state = 'receiving' AND NOT emptied
                     AND touched_at > now() - interval '{SILENT_S} seconds')
"""
_TOUCH = "UPDATE jobs SET touched_at = now() WHERE job_no = $1 AND state = 'receiving'"
_COMPLETE = f"""
    UPDATE jobs SET state = 'running', received = $2, invalid = $3, blank = $4, header = $5, warnings = $6
    WHERE job_no = $1 AND state = 'receiving' RETURNING {COLUMNS}
"""
_GIVE_UP = "UPDATE jobs SET state = 'failed', error = $2, finished_at = now() WHERE job_no = $1 AND state = 'receiving'"


class Received(msgspec.Struct, frozen=True):
    """What a body was found to hold, once it is complete."""

    received: int
    invalid: int
    blank: int
    header: str | None
    warnings: list[str]


async def open_job(
    connection: asyncpg.Connection, tenant_id: int, book_id: str, job_id: str, idempotency_key: str | None
) -> Job:
    """A job whose body is about to be received. Raises Refused(idempotency_in_progress) while another one with the same
    key is being received."""
    if idempotency_key is not None:
        taken = await connection.fetchval(_IS_RECEIVED, tenant_id, book_id, idempotency_key)
        if taken:
            raise Refused(Outcome.IDEMPOTENCY_IN_PROGRESS)
    return job_from_row(await one_row(connection, _OPEN, job_id, tenant_id, book_id, idempotency_key))


async def stage(connection: asyncpg.Connection, job_no: int, batch: Batch) -> None:
    """Keep what a part of the body has brought, and show that its receiver lives; at most some 20,000 rows.

    Raises LedgerUnavailable when the job was given up meanwhile.
    """
    async with connection.transaction():
        if await connection.execute(_TOUCH, job_no) != "UPDATE 1":
            raise LedgerUnavailable("the upload was taken for dead")
        if batch.codes:
            await connection.copy_to_table(
                "staged_codes",
                source=_lines(job_no, batch),
                columns=("job_no", "code", "row"),
                format="text",
                timeout=None,
            )
        if batch.invalid:
            rejected = [RejectedRow(row.row, row.text, "invalid", row.detail) for row in batch.invalid]
            await reject(connection, job_no, rejected)


async def _lines(job_no: int, batch: Batch) -> AsyncIterator[bytes]:
    """For COPY, sorted, so that neighbours come to the same page of the index. A code has no sign that COPY would escape."""
    lines: list[str] = []
    for start in range(0, len(batch.codes), LINES_AT_ONCE):
        part = slice(start, start + LINES_AT_ONCE)
        lines += [f"{job_no}\t{code}\t{row}\n" for code, row in zip(batch.codes[part], batch.rows[part], strict=True)]
        await asyncio.sleep(0)
    lines.sort()
    await asyncio.sleep(0)
    yield "".join(lines).encode("ascii")


async def complete(connection: asyncpg.Connection, job_no: int, received: Received) -> Job:
    """The whole body is there: the job runs from now on, if the transaction commits."""
    row = await connection.fetchrow(_COMPLETE, job_no, *msgspec.structs.astuple(received))
    if row is None:
        raise LedgerUnavailable("the upload was taken for dead")
    return job_from_row(row)


async def give_up(connection: asyncpg.Connection, job_no: int, error: str) -> None:
    """Nothing of an upload that is being received is to be added."""
    await connection.execute(_GIVE_UP, job_no, error)
