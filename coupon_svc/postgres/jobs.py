"""Jobs: upload files that have been received, or still are (`staging`), and are worked off in pieces.

Once a body is complete its job runs. Each piece takes the next staged rows, in the order of their codes, adds them to the
book, and moves the job's row by compare-and-set. So it does not matter how often, or by which process, a job is taken up
again.
"""

from __future__ import annotations

from collections.abc import Sequence

import asyncpg
import msgspec

from coupon_svc.domain.codes import why_taken
from coupon_svc.domain.outcomes import Outcome, Refused
from coupon_svc.postgres.codes import insert_codes
from coupon_svc.postgres.computed.ciphers import NO_CIPHERS, Ciphers
from coupon_svc.postgres.errors import LedgerUnavailable

SILENT_S = 120
"""A job whose receiver has not shown for so long that it lives will never be complete. Receivers show it much more often."""
KEPT_DAYS = 30
"""How long a finished job, with its rejected rows, can be read."""
EMPTIED_AT_ONCE = 10_000
PIECE_ROWS = 1_000
"""Rows that are added at once. They hold the row of their book, for which refills and changes wait, some 25 ms. With half
as many an upload took half as long again on a busy machine, and those who waited waited as long."""
TELL_EVERY = 100_000
"""Rows after which the book's owner hears of the codes, while the job still runs."""
COLUMNS = """
    job_no, job_id, tenant_id, book_id, state, received, inserted, duplicates, invalid, blank, header, warnings, error,
    done_rows, done_code, done_row, (extract(epoch FROM created_at) * 1000)::bigint AS created_at_ms,
    (extract(epoch FROM finished_at) * 1000)::bigint AS finished_at_ms
"""
_GIVE_UP_SILENT = f"""
    UPDATE jobs SET state = 'failed', error = 'broken_off', finished_at = now()
    WHERE tenant_id = $1 AND NOT emptied AND state = 'receiving'
      AND touched_at < now() - interval '{SILENT_S} seconds'
"""
_TENANTS_WITH_WORK = f"""
    SELECT DISTINCT tenant_id FROM jobs
    WHERE NOT emptied AND (state <> 'receiving' OR touched_at < now() - interval '{SILENT_S} seconds')
"""
_FIRST_WITH_WORK = f"""
    SELECT {COLUMNS} FROM jobs WHERE tenant_id = $1 AND NOT emptied AND state <> 'receiving' ORDER BY job_no LIMIT 1
"""
# Along the key. Postgres knows little of a table that is filled and emptied, and would sort all that is staged each time.
_READ_ALONG_KEY = "SET LOCAL enable_bitmapscan TO off; SET LOCAL enable_seqscan TO off; SET LOCAL enable_sort TO off"
_NEXT_ROWS = """
    SELECT code, row FROM staged_codes WHERE job_no = $1 AND (code, row) > ($2, $3) ORDER BY job_no, code, row LIMIT $4
"""
_FIRST_ROW_OF = "SELECT min(row) FROM staged_codes WHERE job_no = $1 AND code = $2"
_REJECT = """
    INSERT INTO rejected_codes (job_no, row, code, reason, detail)
    SELECT $1, * FROM unnest($2::bigint[], $3::text[], $4::text[], $5::text[])
"""
_MOVE = f"""
    UPDATE jobs SET inserted = inserted + $3, duplicates = duplicates + $4, done_rows = done_rows + $5, done_code = $6,
                    done_row = $7
    WHERE job_no = $1 AND state = 'running' AND done_rows = $2 RETURNING {COLUMNS}
"""
_FINISH = "UPDATE jobs SET state = $2, error = $3, finished_at = now() WHERE job_no = $1 AND state = 'running'"
_LAST_TO_EMPTY = """
    SELECT code, row FROM staged_codes WHERE job_no = $1 ORDER BY job_no, code, row OFFSET $2 LIMIT 1
"""
_EMPTY = "DELETE FROM staged_codes WHERE job_no = $1 AND (code, row) <= ($2, $3)"
_FORGET_REJECTED = f"""
    DELETE FROM rejected_codes WHERE (job_no, row) IN (
        SELECT r.job_no, r.row FROM rejected_codes r JOIN jobs USING (job_no)
        WHERE finished_at < now() - interval '{KEPT_DAYS} days' LIMIT {EMPTIED_AT_ONCE})
"""
_FORGET_JOBS = f"""
    DELETE FROM jobs WHERE finished_at < now() - interval '{KEPT_DAYS} days' AND emptied
                       AND NOT EXISTS (SELECT FROM rejected_codes r WHERE r.job_no = jobs.job_no)
"""
_OF_TENANT = f"SELECT {COLUMNS} FROM jobs WHERE job_id = $1 AND tenant_id = $2"
_REJECTED_AFTER = """
    SELECT row, code, reason, detail FROM rejected_codes WHERE job_no = $1 AND row > $2 ORDER BY row LIMIT $3
"""


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """A row of `jobs`. `error` is an outcome's word, or `broken_off`."""

    job_no: int
    job_id: str
    tenant_id: int
    book_id: str
    state: str
    received: int
    inserted: int
    duplicates: int
    invalid: int
    blank: int
    header: str | None
    warnings: list[str]
    error: str | None
    done_rows: int
    done_code: str
    done_row: int
    created_at_ms: int
    finished_at_ms: int | None

    @property
    def is_over(self) -> bool:
        return self.state in ("succeeded", "failed")

    @property
    def is_worked_off(self) -> bool:
        """Whether every staged row has had its turn."""
        return self.done_rows == self.received - self.invalid


class RejectedRow(msgspec.Struct, frozen=True):
    """A row of the file that was not added."""

    row: int
    code: str
    reason: str
    detail: str


async def tenants_with_work(connection: asyncpg.Connection) -> list[int]:
    """Tenants with a job to be worked off, or with staged rows to be removed."""
    return [row["tenant_id"] for row in await connection.fetch(_TENANTS_WITH_WORK)]


async def next_job(connection: asyncpg.Connection, tenant_id: int) -> Job | None:
    """The tenant's oldest job that something is to be done for. Uploads whose receiver has died are given up first."""
    await connection.execute(_GIVE_UP_SILENT, tenant_id)
    row = await connection.fetchrow(_FIRST_WITH_WORK, tenant_id)
    return job_from_row(row) if row else None


async def add_piece(connection: asyncpg.Connection, job: Job, ciphers: Ciphers = NO_CIPHERS) -> Job:
    """Add the next PIECE_ROWS rows of a running job to its book. Returns the job as it is then.

    Raises Refused(book_closed), TakeTurns; LedgerUnavailable when the job is not where it was thought to be.
    """
    async with connection.transaction(readonly=True):
        await connection.execute(_READ_ALONG_KEY)
        rows = await connection.fetch(_NEXT_ROWS, job.job_no, job.done_code, job.done_row, PIECE_ROWS)
    first_rows: dict[str, int] = {}
    if rows and rows[0]["code"] == job.done_code:
        first_rows[job.done_code] = await connection.fetchval(_FIRST_ROW_OF, job.job_no, job.done_code)
    rejected = []
    codes = []
    for code, row in rows:
        if code in first_rows:
            rejected.append(RejectedRow(row, code, "duplicate_in_upload", f"as in row {first_rows[code]}"))
        else:
            first_rows[code] = row
            codes.append(code)
    done_rows = job.done_rows + len(rows)
    tell = done_rows == job.received - job.invalid or done_rows // TELL_EVERY != job.done_rows // TELL_EVERY
    async with connection.transaction():
        # Lost with a crash of Postgres, it is done again; and whatever rests on it is behind it in the log, so is lost, too.
        await connection.execute("SET LOCAL synchronous_commit TO off")
        _, taken = await insert_codes(connection, job.tenant_id, job.book_id, codes, ciphers, tell=tell)
        rejected += [RejectedRow(first_rows[code], code, *why_taken(job.book_id, has)) for code, has in taken.items()]
        await reject(connection, job.job_no, rejected)
        done = (rows[-1]["code"], rows[-1]["row"]) if rows else (job.done_code, job.done_row)
        moved = await connection.fetchrow(
            _MOVE, job.job_no, job.done_rows, len(codes) - len(taken), len(rejected), len(rows), *done
        )
        if moved is None:
            raise LedgerUnavailable("the job was moved by somebody else")
    return job_from_row(moved)


async def finish(connection: asyncpg.Connection, job_no: int, error: str | None = None) -> None:
    """A running job has succeeded, or failed by this error."""
    await connection.execute(_FINISH, job_no, "failed" if error else "succeeded", error)


async def empty(connection: asyncpg.Connection, job_no: int) -> bool:
    """Remove up to EMPTIED_AT_ONCE staged rows of a job that is over. Returns whether none is left."""
    async with connection.transaction(readonly=True):
        await connection.execute(_READ_ALONG_KEY)
        last = await connection.fetchrow(_LAST_TO_EMPTY, job_no, EMPTIED_AT_ONCE - 1)
    if last is None:
        async with connection.transaction():
            await connection.execute("DELETE FROM staged_codes WHERE job_no = $1", job_no)
            await connection.execute("UPDATE jobs SET emptied = true WHERE job_no = $1", job_no)
        return True
    await connection.execute(_EMPTY, job_no, last["code"], last["row"])
    return False


async def forget_old(connection: asyncpg.Connection) -> None:
    """Drop jobs that ended KEPT_DAYS ago, after their rejected rows; some of these at a time."""
    await connection.execute(_FORGET_REJECTED)
    await connection.execute(_FORGET_JOBS)


async def read_job(connection: asyncpg.Connection, tenant_id: int, job_id: str) -> Job:
    """A job of the tenant. Raises Refused(job_not_found)."""
    row = await connection.fetchrow(_OF_TENANT, job_id, tenant_id)
    if row is None:
        raise Refused(Outcome.JOB_NOT_FOUND)
    return job_from_row(row)


async def rejected_after(connection: asyncpg.Connection, job_no: int, after: int, limit: int) -> list[RejectedRow]:
    """The next rejected rows of a job, in the order of the file."""
    rows = await connection.fetch(_REJECTED_AFTER, job_no, after, limit)
    return [RejectedRow(*row) for row in rows]


def job_from_row(row: asyncpg.Record) -> Job:
    return Job(**row)


async def reject(connection: asyncpg.Connection, job_no: int, rejected: Sequence[RejectedRow]) -> None:
    if rejected:
        columns = [[getattr(one, name) for one in rejected] for name in RejectedRow.__struct_fields__]
        await connection.execute(_REJECT, job_no, *columns)
