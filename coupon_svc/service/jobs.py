"""Upload files: received as a stream, then worked off as a job by any process.

The body is staged while it arrives; nothing of it is in the book before it is complete. Every process works off jobs of
tenants whose turn is free, a slice of time each. So other large uploads of the tenant get their turn in between.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from time import monotonic
from typing import NamedTuple, Protocol

import msgspec

from coupon_svc.domain.books import Book, BookStatus
from coupon_svc.domain.errors import error_location
from coupon_svc.domain.outcomes import Outcome, Refused
from coupon_svc.domain.upload_files import Batch, FileKind, FileReader, UnreadableFile
from coupon_svc.loops import keep_running
from coupon_svc.postgres import books, jobs, staging
from coupon_svc.postgres.computed.ciphers import Ciphers
from coupon_svc.postgres.database import Database, LedgerConnection
from coupon_svc.postgres.errors import LedgerUnavailable, TakeTurns
from coupon_svc.postgres.idempotency import IdempotentCall, is_remembered, recall, remember
from coupon_svc.postgres.jobs import Job
from coupon_svc.postgres.jobs import RejectedRow as RejectedRow
from coupon_svc.postgres.staging import Received
from coupon_svc.postgres.tenant_slots import TenantSlots
from coupon_svc.postgres.uploads import Turn, Uploads
from coupon_svc.service.durability import SLOT_WAIT_S
from coupon_svc.service.idempotency import KeptAnswer

log = logging.getLogger(__name__)

RECEIVED_PER_TENANT_MAX = 4
"""Bodies of one tenant that a process receives at a time."""
BLOCK_ROWS = 10_000
"""Rows that are staged at once."""
BLOCK_S = 10.0
"""How long rows of a slow body wait to be staged: so its job is seen to live."""
STAGE_WAIT_S = 30.0
"""For a connection to stage a block: the caller is not read from meanwhile."""
STAGE_S = 20.0
"""For staging it: well below `jobs.SILENT_S`, together with the wait."""
WORKERS = 2
"""Jobs that a process works off at a time."""
SLICE_S = 2.0
"""How long a job has its tenant's turn."""
PAUSE_S = 0.15
"""Between two slices; longer than those who wait for the turn take to ask for it."""
EXPORT_ROWS = 1_000
LOOK_EVERY_S = 2.0
"""How often a process looks for jobs that another one has left."""


class FileDigest(Protocol):
    """The fingerprint of a request, in the making."""

    def update(self, data: bytes, /) -> None: ...

    def hexdigest(self) -> str: ...


class UploadFile(msgspec.Struct, frozen=True):
    """Add the codes of a file to a book. `body` comes in pieces of at most 64 KiB, and raises what breaks it off."""

    tenant_id: int
    book_id: str
    kind: FileKind
    body: AsyncIterator[bytes]
    idempotency_key: str | None
    fingerprint: FileDigest
    """Of the request, without its body."""


class JobReport(msgspec.Struct, frozen=True):
    """A job, and its first rejected rows: one more than are asked for when there are more."""

    job: Job
    rejected: list[RejectedRow]


class JobAnswers(Protocol):
    """The words in which callers are told, and in which an answer is kept for its Idempotency-Key."""

    def accepted(self, report: JobReport) -> KeptAnswer: ...


class Accepted(NamedTuple):
    """What a body that was received whole is answered."""

    answer: KeptAnswer
    replayed: bool


class Jobs:
    """The use cases, and the loops that work jobs off. All raise Refused, and LedgerUnavailable.

    `bodies` are connections for what receives, `work` for what works off. `in_force`: whether Redis has this version of a
    book; waits for it.
    """

    def __init__(
        self,
        uploads: Uploads,
        bodies: Database,
        work: Database,
        lookups: Database,
        in_force: Callable[[Book], Awaitable[bool]],
        answers: JobAnswers,
        shown_max: int,
        ciphers: Ciphers,
    ) -> None:
        self._uploads = uploads
        self._bodies = bodies
        self._work = work
        self._lookups = lookups
        self._in_force = in_force
        self._answers = answers
        self._shown_max = shown_max
        self._ciphers = ciphers
        self._receiving = TenantSlots(RECEIVED_PER_TENANT_MAX)
        self._staging = TenantSlots(1)
        self._wanted = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._waiting: dict[int, asyncio.Task[None]] = {}
        """Of each job that is worked off here: waits until Redis knows of its codes. That may take long."""

    async def start(self) -> None:
        self._tasks = [asyncio.create_task(keep_running(self._work_off)) for _ in range(WORKERS)]

    async def stop(self) -> None:
        tasks = [*self._tasks, *self._waiting.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- receiving

    async def upload_file(self, wanted: UploadFile) -> Accepted:
        """Receive a body. Returns once it is there, and its job will be worked off whoever dies. What breaks off before adds
        nothing.

        Raises Refused: book_not_found, book_closed, idempotency_in_progress, idempotency_key_reused; UnreadableFile; and
        what `wanted.body` raises.
        """
        async with self._receiving.slot(wanted.tenant_id, SLOT_WAIT_S):
            job = await self._open(wanted)
            if job is None:
                return await self._compare(wanted)
            try:
                received = await self._receive(wanted, job)
                return await self._complete(wanted, job, received)
            except Exception as error:
                await self._give_up(job, error)
                raise

    async def _open(self, wanted: UploadFile) -> Job | None:
        """The job; None when the Idempotency-Key was answered before, and only the body can tell whether it is the same."""
        tenant_id, book_id, key = wanted.tenant_id, wanted.book_id, wanted.idempotency_key
        async with self._nothing_happens() as connection, connection.transaction():
            if "\0" in book_id:
                raise Refused(Outcome.BOOK_NOT_FOUND)
            book = await books.read_book(connection, tenant_id, book_id)
            if key is not None and await is_remembered(connection, book_id, key):
                return None
            if book.status is BookStatus.CLOSED:
                raise Refused(Outcome.BOOK_CLOSED)
            return await staging.open_job(connection, tenant_id, book_id, _new_job_id(), key)

    async def _receive(self, wanted: UploadFile, job: Job) -> Received:
        reader = FileReader(wanted.kind)
        block = Batch()
        staged_at = monotonic()
        async for piece in wanted.body:
            wanted.fingerprint.update(piece)
            block = _joined(block, reader.feed(piece))
            if len(block.codes) + len(block.invalid) >= BLOCK_ROWS or monotonic() - staged_at >= BLOCK_S:
                await self._stage(job, block)
                block, staged_at = Batch(), monotonic()
        await self._stage(job, _joined(block, reader.finish()))
        return Received(reader.received, reader.invalid, reader.blank, reader.header, reader.warnings)

    async def _stage(self, job: Job, block: Batch) -> None:
        async with self._staging.slot(job.tenant_id, STAGE_WAIT_S), self._nothing_happens() as connection:
            await staging.stage(connection, job.job_no, block)

    def _nothing_happens(self) -> AbstractAsyncContextManager[LedgerConnection]:
        """A connection for what adds nothing yet: when it fails, nothing was done."""
        return self._bodies.connection(STAGE_S, only_reads=True, wait_s=STAGE_WAIT_S)

    async def _complete(self, wanted: UploadFile, job: Job, received: Received) -> Accepted:
        async with self._bodies.connection(wait_s=STAGE_WAIT_S) as connection, connection.transaction():
            call = _idempotent(wanted)
            if call and (before := await recall(connection, call)):
                await staging.give_up(connection, job.job_no, Outcome.IDEMPOTENCY_KEY_REUSED)
                return Accepted(KeptAnswer(before.status, before.answer), replayed=True)
            running = await staging.complete(connection, job.job_no, received)
            rejected = await jobs.rejected_after(connection, job.job_no, 0, self._shown_max + 1)
            answer = self._answers.accepted(JobReport(running, rejected))
            if call:
                await remember(connection, call, *answer)
        self._wanted.set()
        return Accepted(answer, replayed=False)

    async def _compare(self, wanted: UploadFile) -> Accepted:
        """Read a body only to tell whether it is the one that its Idempotency-Key was answered for."""
        async for piece in wanted.body:
            wanted.fingerprint.update(piece)
        call = _idempotent(wanted)
        assert call is not None
        async with self._nothing_happens() as connection, connection.transaction():
            before = await recall(connection, call)
        if before is None:  # its 24 hours have just ended
            raise Refused(Outcome.STORE_UNAVAILABLE)
        return Accepted(KeptAnswer(before.status, before.answer), replayed=True)

    async def _give_up(self, job: Job, error: Exception) -> None:
        """Nothing of the body is to be added. Where this fails, its silence tells the others so."""
        word = error.outcome if isinstance(error, Refused) else "broken_off"
        word = Outcome.INVALID_REQUEST if isinstance(error, UnreadableFile) else word
        with contextlib.suppress(LedgerUnavailable):
            async with self._bodies.connection() as connection:
                await staging.give_up(connection, job.job_no, word)
        self._wanted.set()

    # --- reading

    async def read_job(self, tenant_id: int, job_id: str) -> JobReport:
        """A job as it is now. Raises Refused(job_not_found)."""
        async with self._lookups.connection(only_reads=True) as connection:
            job = await self._find(connection, tenant_id, job_id)
            return JobReport(job, await jobs.rejected_after(connection, job.job_no, 0, self._shown_max + 1))

    async def list_rejected(self, tenant_id: int, job_id: str, after: int, limit: int) -> list[RejectedRow]:
        """Up to `limit` of the rejected rows behind the row `after`. Raises Refused(job_not_found)."""
        async with self._lookups.connection(only_reads=True) as connection:
            job = await self._find(connection, tenant_id, job_id)
            return await jobs.rejected_after(connection, job.job_no, after, limit)

    async def export_rejected(self, tenant_id: int, job_id: str) -> AsyncIterator[list[RejectedRow]]:
        """All of the rejected rows, EXPORT_ROWS at a time, each read when it is asked for. Raises Refused(job_not_found) at
        once."""
        async with self._lookups.connection(only_reads=True) as connection:
            job = await self._find(connection, tenant_id, job_id)
        return self._pages(job)

    async def _pages(self, job: Job) -> AsyncIterator[list[RejectedRow]]:
        after = 0
        while True:
            async with self._lookups.connection(only_reads=True) as connection:
                rows = await jobs.rejected_after(connection, job.job_no, after, EXPORT_ROWS)
            if not rows:
                return
            yield rows
            after = rows[-1].row

    async def _find(self, connection: LedgerConnection, tenant_id: int, job_id: str) -> Job:
        if not job_id.isprintable() or len(job_id) > 100:
            raise Refused(Outcome.JOB_NOT_FOUND)
        return await jobs.read_job(connection, tenant_id, job_id)

    # --- working off

    async def _work_off(self) -> None:
        forgotten_at = 0.0
        while True:
            self._wanted.clear()
            with contextlib.suppress(LedgerUnavailable):
                if monotonic() - forgotten_at > 60:
                    async with self._work.connection() as connection:
                        await jobs.forget_old(connection)
                    forgotten_at = monotonic()
                if await self._work_for_all():
                    await asyncio.sleep(PAUSE_S)
                    continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_EVERY_S):
                    await self._wanted.wait()

    async def _work_for_all(self) -> bool:
        """A slice for each tenant with work. Returns whether there is more to do at once."""
        async with self._work.connection(only_reads=True) as connection:
            tenants = await jobs.tenants_with_work(connection)
        random.shuffle(tenants)
        more = False
        for tenant_id in tenants:
            try:
                job = await self._take_turn(tenant_id)
            except (Refused, TakeTurns):  # the turn is somebody else's
                continue
            except LedgerUnavailable:
                raise
            except Exception as error:
                # A job that can never go on must not keep those of others from it.
                log.error("a job failed: %s at %s", type(error).__name__, error_location(error))
                continue
            more = more or job is not None
            if job is not None and not job.is_over and job.is_worked_off and job.job_no not in self._waiting:
                self._waiting[job.job_no] = asyncio.create_task(self._succeed(job))
        return more

    async def _take_turn(self, tenant_id: int) -> Job | None:
        async with self._uploads.turn(tenant_id, wait_s=0, database=self._work) as turn:
            return await self._slice(turn, tenant_id)

    async def _slice(self, turn: Turn, tenant_id: int) -> Job | None:
        """Work for SLICE_S on the tenant's oldest job. Returns it, or None when there is nothing to do."""
        job = await turn.run(jobs.next_job, tenant_id)
        until = monotonic() + SLICE_S
        while job is not None and monotonic() < until:
            if job.is_over:
                if await turn.run(jobs.empty, job.job_no):
                    return job
            elif job.is_worked_off:
                return job
            else:
                job = await self._add_piece(turn, job)
        return job

    async def _add_piece(self, turn: Turn, job: Job) -> Job | None:
        try:
            return await turn.run(jobs.add_piece, job, self._ciphers)
        except Refused as refused:
            await turn.run(jobs.finish, job.job_no, refused.outcome)
            return await turn.run(jobs.next_job, job.tenant_id)

    async def _succeed(self, job: Job) -> None:
        """Once Redis knows of the codes, the job has succeeded."""
        try:
            with contextlib.suppress(LedgerUnavailable):
                async with self._work.connection(only_reads=True) as connection:
                    book = await books.read_book(connection, job.tenant_id, job.book_id)
                if await self._in_force(book):
                    async with self._work.connection() as connection:
                        await jobs.finish(connection, job.job_no)
        finally:
            del self._waiting[job.job_no]


def _joined(block: Batch, batch: Batch) -> Batch:
    block.codes += batch.codes
    block.rows += batch.rows
    block.invalid += batch.invalid
    return block


def _new_job_id() -> str:
    return "job_" + secrets.token_hex(12)


def _idempotent(wanted: UploadFile) -> IdempotentCall | None:
    """What the ledger keeps the answer under, once the whole body has been read; None without an Idempotency-Key."""
    if wanted.idempotency_key is None:
        return None
    return IdempotentCall(wanted.book_id, wanted.idempotency_key, wanted.fingerprint.hexdigest())
