"""What callers can do with upload files and their jobs."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator

import msgspec
from msgspec import UNSET

from coupon_svc.domain.clock import rfc3339
from coupon_svc.domain.outcomes import Outcome
from coupon_svc.http import schemas
from coupon_svc.http.call import Answer, Call, StreamedAnswer
from coupon_svc.http.csv_text import CSV_TYPE, csv_line, wants_csv
from coupon_svc.http.cursors import Cursors
from coupon_svc.http.inputs import invalid
from coupon_svc.http.operations import CsvAnswer, operation
from coupon_svc.service.idempotency import KeptAnswer
from coupon_svc.service.jobs import JobReport, RejectedRow
from coupon_svc.service.jobs import Jobs as JobService

REJECTED_COLUMNS = ("row", "code", "reason", "detail")
PAGE_ROWS = 50
_encode = msgspec.json.Encoder().encode


class Jobs:
    """Refusals are raised as Refused."""

    def __init__(self, service: JobService, cursors: Cursors) -> None:
        self._service = service
        self._cursors = cursors

    @operation(
        "GET",
        "/coupons/jobs/{job_id}",
        summary="Read an upload's job: how far it is, and what became of its rows",
        tag="Codes",
        scopes=("codes:write",),
        answers={200: schemas.JobAnswer},
        refusals=(Outcome.JOB_NOT_FOUND,),
    )
    async def read_job(self, call: Call) -> Answer:
        """Show a job. Read from Postgres; answered at once. It may be repeated at will."""
        return Answer(200, _job_answer(await self._service.read_job(call.key.tenant_id, call.path["job_id"])))

    @operation(
        "GET",
        "/coupons/jobs/{job_id}/rejected",
        summary="List the rows of an upload that were not added",
        tag="Codes",
        scopes=("codes:write",),
        query=schemas.ListRejected,
        answers={200: schemas.RejectedPage},
        csv=CsvAnswer(
            csv_line(REJECTED_COLUMNS) + csv_line(map(str, schemas.JobAnswer.EXAMPLE["rejected"][0].values())), {}
        ),
        refusals=(Outcome.JOB_NOT_FOUND,),
    )
    async def list_rejected(self, call: Call) -> Answer | StreamedAnswer:
        """List rejected rows, in the order of the file; as CSV all of them. Read from Postgres; answered at once. It may be
        repeated at will."""
        query: schemas.ListRejected = call.query
        job_id = call.path["job_id"]
        if wants_csv(call.accept):
            for name, value in (("limit", query.limit), ("cursor", query.cursor)):
                if value is not UNSET:
                    raise invalid(f"/{name}", "CSV is all rows: leave this out, or ask for JSON")
            pages = await self._service.export_rejected(call.key.tenant_id, job_id)
            return StreamedAnswer(200, [(b"content-type", CSV_TYPE.encode())], _csv(pages))
        limit = query.limit or PAGE_ROWS
        list_name = f"rejected {call.key.tenant_id} {job_id}"
        after = self._cursors.open(list_name, query.cursor)[0] if query.cursor else 0
        rows = await self._service.list_rejected(call.key.tenant_id, job_id, after, limit + 1)
        page = rows[:limit]
        following = self._cursors.seal(list_name, page[-1].row, "") if len(rows) > limit else None
        return Answer(200, schemas.RejectedPage([_rejected(row) for row in page], following))


class JobAnswers:
    """The words in which answers about jobs are kept for their Idempotency-Keys (`service.jobs.JobAnswers`)."""

    def accepted(self, report: JobReport) -> KeptAnswer:
        return KeptAnswer(202, _encode(_job_answer(report)))


def _job_answer(report: JobReport) -> schemas.JobAnswer:
    job = report.job
    staged = job.received - job.invalid
    if job.state == "succeeded":
        progress = 1.0
    else:  # the last hundredth is for Redis
        progress = round(0.99 * job.done_rows / staged, 4) if staged else 0.0
    return schemas.JobAnswer(
        job_id=job.job_id,
        book_id=job.book_id,
        status="running" if not job.is_over else job.state,  # type: ignore[arg-type]
        progress=progress,
        received=job.received,
        inserted=job.inserted,
        duplicates=job.duplicates,
        invalid=job.invalid,
        blank=job.blank,
        header=job.header,
        warnings=job.warnings,
        rejected=[_rejected(row) for row in report.rejected[: schemas.REJECTED_SHOWN_MAX]],
        rejected_truncated=len(report.rejected) > schemas.REJECTED_SHOWN_MAX,
        error=job.error,
        created_at=rfc3339(job.created_at_ms),
        finished_at=rfc3339(job.finished_at_ms) if job.finished_at_ms is not None else None,
    )


async def _csv(pages: AsyncIterator[list[RejectedRow]]) -> AsyncGenerator[bytes]:
    yield csv_line(REJECTED_COLUMNS).encode()
    async for page in pages:
        yield "".join(csv_line((str(row.row), row.code, row.reason, row.detail)) for row in page).encode()


def _rejected(row: RejectedRow) -> schemas.RejectedCode:
    return schemas.RejectedCode(row.row, row.code, row.reason, row.detail)  # type: ignore[arg-type]
