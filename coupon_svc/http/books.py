"""What callers can do with books: each function parses one call, runs one use case and tells its result."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime

import msgspec
from msgspec import UNSET

from coupon_svc.domain.books import BookRules, InvalidPeriod
from coupon_svc.domain.clock import rfc3339, to_ms
from coupon_svc.domain.codes import Generated, InvalidPattern, parse_pattern
from coupon_svc.domain.outcomes import Outcome, Refused
from coupon_svc.domain.upload_files import HEADER_WORDS, UnreadableFile
from coupon_svc.http import schemas
from coupon_svc.http.call import Answer, Call
from coupon_svc.http.cursors import Cursors
from coupon_svc.http.files import FileBody
from coupon_svc.http.inputs import encode_metadata, invalid
from coupon_svc.http.operations import operation
from coupon_svc.service.books import (
    BookChanges,
    CreateBook,
    Done,
    ListBooks,
    LiveBook,
    ReadBook,
    UpdateBook,
    Upload,
    UploadCodes,
)
from coupon_svc.service.books import (
    Books as BookService,
)
from coupon_svc.service.idempotency import KeptAnswer
from coupon_svc.service.jobs import Jobs, UploadFile

MOMENT_MIN_MS, MOMENT_END_MS = 0, 253_402_300_800_000
_HEADS_OF_LISTS = HEADER_WORDS - {"voucher"}
"""In a list of codes `voucher` may be one."""
"""What the head of a column says: a list that begins with one was taken from a file with its heading."""

_encode = msgspec.json.Encoder().encode


class Books:
    """The control plane. Refusals are raised as Refused."""

    def __init__(self, service: BookService, jobs: Jobs, cursors: Cursors) -> None:
        self._service = service
        self._jobs = jobs
        self._cursors = cursors

    @operation(
        "POST",
        "/coupons",
        summary="Create a coupon book, with generated codes if wanted",
        tag="Books",
        scopes=("books:write",),
        body=schemas.CreateBook,
        answers={201: schemas.BookAnswer},
        refusals=(Outcome.PATTERN_CAPACITY, Outcome.OUTCOME_UNKNOWN),
        location="/coupons/{book_id}",
    )
    async def create_book(self, call: Call) -> Answer:
        """Make a book, with generated codes if wanted. Made in Postgres; answered once Redis has it. Repeat it with the same
        Idempotency-Key; without one it makes another book."""
        body: schemas.CreateBook = call.body
        generate = _generated(body.generate) if body.generate is not None else None
        rules = BookRules(
            name=body.name,
            max_codes_per_user=body.max_codes_per_user,
            max_redemptions_per_code=body.max_redemptions_per_code,
            lock_ttl_seconds=body.lock_ttl_seconds,
            starts_at_ms=_moment_ms("/starts_at", body.starts_at),
            expires_at_ms=_moment_ms("/expires_at", body.expires_at),
            ack=body.ack,
            metadata=msgspec.Raw(encode_metadata(body.metadata).encode()),
        )
        wanted = CreateBook(call.key.tenant_id, rules, generate, call.idempotency())
        with _refused_as_invalid():
            done = await self._service.create_book(wanted)
        return _kept(done, f"/coupons/{done.book.book_id}")

    @operation(
        "POST",
        "/coupons/codes",
        summary="Add codes to a book: a list, a file, or more generated ones",
        tag="Codes",
        scopes=("codes:write",),
        body=schemas.UploadCodes,
        file_query=schemas.UploadFile,
        answers={200: schemas.UploadAnswer, 202: schemas.JobAnswer},
        refusals=(Outcome.BOOK_NOT_FOUND, Outcome.BOOK_CLOSED, Outcome.PATTERN_CAPACITY, Outcome.OUTCOME_UNKNOWN),
        location="/coupons/jobs/{job_id}",
    )
    async def upload_codes(self, call: Call) -> Answer:
        """Add codes to a book, from a list or by a pattern. Added in Postgres; answered once Redis knows of them. It may be
        repeated with a list; codes by a pattern are new ones each time, unless the Idempotency-Key is the same. A file is
        received as it comes, and then worked off as a job; it may be repeated."""
        if call.file is not None:
            return await self._upload_file(call, call.file)
        body: schemas.UploadCodes = call.body
        if (body.codes is None) == (body.generate is None):
            raise invalid("", "give either codes or generate")
        codes = _listed(body.codes or []) if body.generate is None else _generated(body.generate)
        idempotency = call.idempotency()
        with _refused_as_invalid():
            done = await self._service.upload_codes(UploadCodes(call.key.tenant_id, body.book_id, codes, idempotency))
        return _kept(done)

    async def _upload_file(self, call: Call, file: FileBody) -> Answer:
        query: schemas.UploadFile = call.query
        wanted = UploadFile(
            tenant_id=call.key.tenant_id,
            book_id=query.book_id,
            kind=file.kind,
            body=file.pieces,
            idempotency_key=call.idempotency_key,
            fingerprint=call.file_fingerprint(file),
        )
        with _refused_as_invalid():
            done = await self._jobs.upload_file(wanted)
        job_id = msgspec.json.decode(done.answer.body)["job_id"]
        return Answer(done.answer.status, msgspec.Raw(done.answer.body), done.replayed, f"/coupons/jobs/{job_id}")

    @operation(
        "GET",
        "/coupons/{book_id}",
        summary="Read a book with its live counters",
        tag="Books",
        scopes=("books:read", "books:write"),
        answers={200: schemas.BookAnswer},
        refusals=(Outcome.BOOK_NOT_FOUND,),
    )
    async def read_book(self, call: Call) -> Answer:
        """Show a book. Read from Redis, and so as it is in force; answered at once. It may be repeated at will."""
        live = await self._service.read_book(ReadBook(call.key.tenant_id, call.path["book_id"]))
        return Answer(200, book_answer(live))

    @operation(
        "GET",
        "/coupons",
        summary="List the books, newest first",
        tag="Books",
        scopes=("books:read", "books:write"),
        query=schemas.Page,
        answers={200: schemas.BooksPage},
    )
    async def list_books(self, call: Call) -> Answer:
        """List the books, newest first. Which there are is read from Postgres, each of them from Redis; answered at once. It
        may be repeated at will."""
        query: schemas.Page = call.query
        list_name = f"books {call.key.tenant_id}"
        before = self._cursors.open(list_name, query.cursor) if query.cursor else None
        page = await self._service.list_books(ListBooks(call.key.tenant_id, query.limit, before))
        books = [book_answer(live) for live in page.books]
        return Answer(200, schemas.BooksPage(books, self._cursors.seal(list_name, *page.next) if page.next else None))

    @operation(
        "PATCH",
        "/coupons/{book_id}",
        summary="Change a book; what was answered is in force",
        tag="Books",
        scopes=("books:write",),
        body=schemas.UpdateBook,
        answers={200: schemas.BookAnswer},
        refusals=(Outcome.BOOK_NOT_FOUND, Outcome.BOOK_CLOSED, Outcome.OUTCOME_UNKNOWN),
    )
    async def update_book(self, call: Call) -> Answer:
        """Change a book's rules. Changed in Postgres; answered once Redis has them. It may be repeated."""
        wanted = UpdateBook(call.key.tenant_id, call.path["book_id"], _changes(call.body))
        with _refused_as_invalid():
            live = await self._service.update_book(wanted)
        return Answer(200, book_answer(live))


class BookAnswers:
    """The words in which answers about books are kept for their Idempotency-Keys (`service.books.BookAnswers`)."""

    def created(self, made: LiveBook) -> KeptAnswer:
        return KeptAnswer(201, _encode(book_answer(made)))

    def uploaded(self, upload: Upload) -> KeptAnswer:
        return KeptAnswer(200, _encode(_upload_answer(upload)))

    def book_of(self, created: KeptAnswer) -> str:
        book_id: str = msgspec.json.decode(created.body)["book_id"]
        return book_id


def book_answer(live: LiveBook) -> schemas.BookAnswer:
    """A book as callers see it."""
    book = live.book
    return schemas.BookAnswer(
        book_id=book.book_id,
        name=book.name,
        max_codes_per_user=book.max_codes_per_user,
        max_redemptions_per_code=book.max_redemptions_per_code,
        lock_ttl_seconds=book.lock_ttl_seconds,
        starts_at=rfc3339(book.starts_at_ms) if book.starts_at_ms is not None else None,
        expires_at=rfc3339(book.expires_at_ms) if book.expires_at_ms is not None else None,
        ack=book.ack,
        metadata=book.metadata,
        status=book.status,
        created_at=rfc3339(book.created_at_ms),
        redemptions=live.redemptions,
        guess_probability=book.guess_probability,
        codes=schemas.CodeCounters(
            total=live.total,
            available=live.total - live.held - live.quarantined,
            assigned=live.held - live.redeemed,
            redeemed=live.redeemed,
            quarantined=live.quarantined,
        ),
    )


def _kept(done: Done, location: str | None = None) -> Answer:
    return Answer(done.answer.status, msgspec.Raw(done.answer.body), done.replayed, location)


def _upload_answer(upload: Upload) -> schemas.UploadAnswer:
    rejected = upload.rejected
    invalid_count = sum(1 for code in rejected if code.reason == "invalid")
    return schemas.UploadAnswer(
        book_id=upload.book_id,
        received=upload.inserted + len(rejected),
        inserted=upload.inserted,
        duplicates=len(rejected) - invalid_count,
        invalid=invalid_count,
        rejected=[schemas.RejectedCode(*code) for code in rejected[: schemas.REJECTED_SHOWN_MAX]],
        rejected_truncated=len(rejected) > schemas.REJECTED_SHOWN_MAX,
    )


def _listed(codes: list[str]) -> list[str]:
    """Raises Refused(invalid_request) for a list that begins with the heading of its column."""
    if codes and codes[0].strip().lower() in _HEADS_OF_LISTS:
        raise invalid("/codes/0", "this is the heading of a column; send the codes below it")
    return codes


def _generated(generate: schemas.Generate) -> Generated:
    """What is to be generated. Raises Refused(invalid_request)."""
    try:
        return Generated(parse_pattern(generate.pattern, generate.alphabet), generate.total)
    except InvalidPattern as error:
        raise invalid(f"/generate/{error.field}", error.reason) from None


@contextmanager
def _refused_as_invalid() -> Iterator[None]:
    """Raises Refused(invalid_request) for what only the use case can tell to be wrong."""
    try:
        yield
    except InvalidPeriod as error:
        raise invalid("/expires_at", error.reason) from None
    except InvalidPattern as error:
        raise invalid(f"/generate/{error.field}", error.reason) from None
    except UnreadableFile as error:
        errors = [{"pointer": "", "detail": str(error)}]
        text = "The file cannot be read. Nothing was added."
        raise Refused(Outcome.INVALID_REQUEST, text, errors=errors, line=error.line) from None


def _moment_ms(pointer: str, moment: datetime | None) -> int | None:
    """A moment in milliseconds. Raises Refused(invalid_request) for one that cannot be told as RFC 3339 in UTC."""
    if moment is None:
        return None
    at_ms = to_ms(moment)
    if not MOMENT_MIN_MS <= at_ms < MOMENT_END_MS:
        raise invalid(pointer, "give a time from 1970 to 9999")
    return at_ms


def _changes(body: schemas.UpdateBook) -> BookChanges:
    """Raises Refused(invalid_request) for metadata that is too large, and a time that cannot be told."""
    starts_at, expires_at, metadata = body.starts_at, body.expires_at, body.metadata
    return BookChanges(
        status=body.status,
        name=body.name,
        starts_at_ms=UNSET if starts_at is UNSET else _moment_ms("/starts_at", starts_at),
        expires_at_ms=UNSET if expires_at is UNSET else _moment_ms("/expires_at", expires_at),
        max_codes_per_user=body.max_codes_per_user,
        lock_ttl_seconds=body.lock_ttl_seconds,
        metadata=UNSET if metadata is UNSET else msgspec.Raw(encode_metadata(metadata).encode()),
    )
