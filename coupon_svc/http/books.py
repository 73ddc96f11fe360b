"""What can be done with books: Postgres first, and answered once Redis has it, too."""

from __future__ import annotations

import asyncio
import contextlib
from datetime import datetime
from typing import Any, NamedTuple

import msgspec
from msgspec import UNSET

from coupon_svc.domain.books import Book, BookStatus
from coupon_svc.domain.clock import now_ms, rfc3339, to_ms
from coupon_svc.domain.codes import (
    CODE_LENGTH_MAX,
    check_capacity,
    normalise_code,
    parse_pattern,
    why_invalid,
)
from coupon_svc.domain.outcomes import Outcome, Refused
from coupon_svc.domain.shards import book_shard, new_book_id
from coupon_svc.http.call import Answer, Call
from coupon_svc.http.inputs import decode_cursor, encode_cursor, encode_metadata, invalid
from coupon_svc.http.runner import BookRunner
from coupon_svc.http.schemas import (
    REJECTED_SHOWN_MAX,
    BookAnswer,
    BooksPage,
    CodeCounters,
    CreateBook,
    Generate,
    Page,
    RejectedCode,
    UpdateBook,
    UploadAnswer,
    UploadCodes,
)
from coupon_svc.postgres import catalogue
from coupon_svc.postgres.catalogue import PIECE_CODES, NewBook
from coupon_svc.postgres.database import Database
from coupon_svc.postgres.errors import LedgerUnavailable, TakeTurns
from coupon_svc.postgres.idempotency import IdempotentCall, Remembered, recall, remember
from coupon_svc.postgres.uploads import Generated, TenantSlots, Uploads

IN_FORCE_WAIT_S = 5.0
MOMENT_MIN_MS, MOMENT_END_MS = 0, 253_402_300_800_000
SLOTS_PER_TENANT, SLOT_WAIT_S = 4, 10.0
"""How many connections the creations and small uploads of one tenant may take of those that all share."""
HEADER_WORDS = frozenset({"code", "codes", "coupon_code"})
"""What the head of a column says: a list that begins with one was taken from a file with its heading."""

_encode = msgspec.json.Encoder().encode


class Books:
    """The control plane. Every method answers one operation; refusals are raised as Refused."""

    def __init__(self, runner: BookRunner, database: Database, uploads: Uploads, shards: int) -> None:
        self._runner = runner
        self._database = database
        self._uploads = uploads
        self._slots = TenantSlots(SLOTS_PER_TENANT)
        self._shards = shards

    async def create_book(self, call: Call) -> Answer:
        body: CreateBook = call.body
        tenant_id = call.key.tenant_id
        generated = _generated(body.generate)
        book_id = new_book_id(self._shards)
        shard = book_shard(book_id, self._shards)
        assert shard is not None
        new = NewBook(
            book_id=book_id,
            shard=shard,
            tenant_id=tenant_id,
            name=body.name,
            max_codes_per_user=body.max_codes_per_user,
            max_redemptions_per_code=body.max_redemptions_per_code,
            lock_ttl_seconds=body.lock_ttl_seconds,
            starts_at_ms=_moment_ms("/starts_at", body.starts_at),
            expires_at_ms=_moment_ms("/expires_at", body.expires_at),
            ack=body.ack,
            metadata=encode_metadata(body.metadata),
            created_at_ms=now_ms(),
        )
        catalogue.check_period(new.starts_at_ms, new.expires_at_ms)
        idempotent = call.idempotent(f"tenant:{tenant_id}", "/coupons")
        try:
            done = await self._create_at_once(new, generated, idempotent)
        except TakeTurns:
            done = await self._create_in_pieces(new, generated, idempotent)
        in_force = await self._in_force(done.book)
        if generated and not in_force:  # a book without codes has nothing that could be found missing
            raise Refused(Outcome.OUTCOME_UNKNOWN)
        return done.answered(f"/coupons/{done.book.book_id}")

    async def _create_at_once(
        self, new: NewBook, generated: Generated | None, idempotent: IdempotentCall | None
    ) -> _Done:
        """Raises TakeTurns."""
        async with (
            self._slots.slot(new.tenant_id, SLOT_WAIT_S),
            self._database.connection() as connection,
            connection.transaction(),
        ):
            if idempotent and (before := await recall(connection, idempotent)):
                if before.unfinished:
                    raise TakeTurns
                return _Done(await catalogue.read_book(connection, new.tenant_id, _made(before)), before)
            if generated and generated.total > PIECE_CODES:
                raise TakeTurns
            book = await catalogue.insert_book(connection, new)
            if generated:
                book = await catalogue.generate_codes(connection, new.tenant_id, new.book_id, *generated)
            answer = _encode(book_answer(book, _untouched(book.total), 0))
            if idempotent:
                await remember(connection, idempotent, 201, answer)
            return _Done(book, Remembered(201, answer), replayed=False)

    async def _create_in_pieces(
        self, new: NewBook, generated: Generated | None, idempotent: IdempotentCall | None
    ) -> _Done:
        """The book is made when its codes are there: what breaks off before leaves none."""
        assert generated is not None

        async def decide(connection: Any, upload_id: int, _: dict[str, str]) -> bytes:
            book = await catalogue.insert_book(connection, new)
            answer = _encode(book_answer(book, _untouched(generated.total), 0))
            if idempotent:
                await remember(connection, idempotent, 201, answer, upload_id)
            return answer

        async with self._uploads.turn(new.tenant_id) as turn:
            if idempotent and (before := await turn.recall(idempotent)):
                return _Done(await turn.read_book(_made(before)), before)
            book, answer = await turn.add(new.book_id, generated, decide)
            return _Done(book, Remembered(201, answer), replayed=False)

    async def upload_codes(self, call: Call) -> Answer:
        body: UploadCodes = call.body
        if (body.codes is None) == (body.generate is None):
            raise invalid("", "give either codes or generate")
        wanted = _generated(body.generate) or _listed(body.codes or [])
        self._runner.place(body.book_id)
        idempotent = call.idempotent(body.book_id, "/coupons/codes")
        try:
            done = await self._upload_at_once(call.key.tenant_id, body.book_id, wanted, idempotent)
        except TakeTurns:
            done = await self._upload_in_pieces(call.key.tenant_id, body.book_id, wanted, idempotent)
        if not await self._in_force(done.book):
            raise Refused(Outcome.OUTCOME_UNKNOWN)
        return done.answered()

    async def _upload_at_once(
        self, tenant_id: int, book_id: str, wanted: Generated | _Listed, idempotent: IdempotentCall | None
    ) -> _Done:
        """Raises TakeTurns."""
        async with (
            self._slots.slot(tenant_id, SLOT_WAIT_S),
            self._database.connection() as connection,
            connection.transaction(),
        ):
            book = await catalogue.read_book(connection, tenant_id, book_id)
            if idempotent and (before := await recall(connection, idempotent)):
                if before.unfinished:
                    raise TakeTurns
                return _Done(await catalogue.read_book(connection, tenant_id, book_id), before)
            if book.status is BookStatus.CLOSED:
                raise Refused(Outcome.BOOK_CLOSED)
            if isinstance(wanted, Generated):
                if wanted.total > PIECE_CODES:
                    raise TakeTurns
                book = await catalogue.generate_codes(connection, tenant_id, book_id, *wanted)
                answer = _encode(_generated_answer(book_id, wanted.total))
            else:
                if len(wanted.codes) > PIECE_CODES:
                    raise TakeTurns
                book, taken = await catalogue.insert_codes(connection, tenant_id, book_id, wanted.codes)
                answer = _encode(_upload_answer(book_id, wanted, taken))
            if idempotent:
                await remember(connection, idempotent, 200, answer)
            return _Done(book, Remembered(200, answer), replayed=False)

    async def _upload_in_pieces(
        self, tenant_id: int, book_id: str, wanted: Generated | _Listed, idempotent: IdempotentCall | None
    ) -> _Done:
        async def decide(connection: Any, upload_id: int, taken: dict[str, str]) -> bytes:
            await catalogue.require_not_closed(connection, book_id)
            if isinstance(wanted, Generated):
                answer = _encode(_generated_answer(book_id, wanted.total))
            else:
                answer = _encode(_upload_answer(book_id, wanted, taken))
            if idempotent:
                await remember(connection, idempotent, 200, answer, upload_id)
            return answer

        async with self._uploads.turn(tenant_id) as turn:
            if idempotent and (before := await turn.recall(idempotent)):
                return _Done(await turn.read_book(book_id), before)
            codes = wanted if isinstance(wanted, Generated) else sorted(wanted.codes)
            book, answer = await turn.add(book_id, codes, decide)
            return _Done(book, Remembered(200, answer), replayed=False)

    async def read_book(self, call: Call) -> Answer:
        return Answer(200, await self._live(call.key.tenant_id, call.path["book_id"]))

    async def list_books(self, call: Call) -> Answer:
        query: Page = call.query
        limit = query.limit
        before = decode_cursor(query.cursor) if query.cursor else None
        async with self._database.connection(only_reads=True) as connection:
            books = await catalogue.list_books(connection, call.key.tenant_id, limit + 1, before)
        page = books[:limit]
        answers = await asyncio.gather(*(self._live(book.tenant_id, book.book_id) for book in page))
        more = len(books) > limit
        return Answer(
            200, BooksPage(list(answers), encode_cursor(page[-1].created_at_ms, page[-1].book_id) if more else None)
        )

    async def update_book(self, call: Call) -> Answer:
        book_id, changes = call.path["book_id"], _changes(call.body)
        self._runner.place(book_id)
        async with self._database.connection() as connection, connection.transaction():
            book = await catalogue.update_book(connection, call.key.tenant_id, book_id, changes)
        if not await self._in_force(book):
            raise Refused(Outcome.OUTCOME_UNKNOWN)
        try:
            return Answer(200, await self._live(call.key.tenant_id, book_id))
        except (Refused, LedgerUnavailable):  # which say that nothing was done
            raise Refused(Outcome.OUTCOME_UNKNOWN) from None

    # --- what all of them need

    async def _ask(self, tenant_id: int, book_id: str) -> list[Any]:
        """What Redis has of the book. Raises Refused."""
        place = self._runner.place(book_id)
        of_shard = place.view.keys
        keys = [of_shard.book(book_id), of_shard.holders(book_id), of_shard.free(book_id)]
        reply: list[Any] = await self._runner.run("read_book", place, tenant_id, keys, [tenant_id], sure=True)
        if reply[0] != "ok":
            raise Refused(Outcome(reply[0]))
        return reply

    async def _in_force(self, book: Book) -> bool:
        """Wait until Redis has this version of the book, at most IN_FORCE_WAIT_S."""
        loop = asyncio.get_running_loop()
        deadline, pause = loop.time() + IN_FORCE_WAIT_S, 0.002
        while loop.time() < deadline:
            with contextlib.suppress(Refused, LedgerUnavailable):
                reply = await self._ask(book.tenant_id, book.book_id)
                if int(reply[1]) >= book.version:
                    return True
            await asyncio.sleep(pause)
            pause = min(1.5 * pause, 0.1)
        return False

    async def _live(self, tenant_id: int, book_id: str) -> BookAnswer:
        """A book as Redis has it: rules in force, counters of this moment."""
        _, _, stored, *numbers = await self._ask(tenant_id, book_id)
        total, held, redeemed, quarantined, redemptions = map(int, numbers)
        counters = CodeCounters(
            total=total,
            available=total - held - quarantined,
            assigned=held - redeemed,
            redeemed=redeemed,
            quarantined=quarantined,
        )
        return book_answer(msgspec.json.decode(stored, type=Book), counters, redemptions)


def book_answer(book: Book, codes: CodeCounters, redemptions: int) -> BookAnswer:
    """A book as callers see it."""
    return BookAnswer(
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
        redemptions=redemptions,
        codes=codes,
    )


def _untouched(total: int) -> CodeCounters:
    """The counters of a book that nobody has seen yet: nobody can hold a code of it."""
    return CodeCounters(total=total, available=total, assigned=0, redeemed=0, quarantined=0)


class _Done(NamedTuple):
    """What a request has done, or was done the first time it came. `book` is as the ledger has it now: what is answered
    holds in Redis once that version is there."""

    book: Book
    answer: Remembered
    replayed: bool = True

    def answered(self, location: str | None = None) -> Answer:
        return Answer(self.answer.status, msgspec.Raw(self.answer.answer), self.replayed, location)


def _made(before: Remembered) -> str:
    """The book that an earlier answer tells of."""
    book_id: str = msgspec.json.decode(before.answer)["book_id"]
    return book_id


class _Listed(NamedTuple):
    """A list of codes as it came: those to be added, each with its row from 1, and those that cannot be."""

    codes: dict[str, int]
    rejected: list[RejectedCode]


def _listed(codes: list[str]) -> _Listed:
    """Raises Refused(invalid_request) for a list that begins with the heading of its column."""
    if codes and codes[0].strip().lower() in HEADER_WORDS:
        raise invalid("/codes/0", "this is the heading of a column; send the codes below it")
    first_rows: dict[str, int] = {}
    rejected: list[RejectedCode] = []
    for row, text in enumerate(codes, 1):
        code = normalise_code(text)
        if code is None:
            rejected.append(RejectedCode(row, text[:CODE_LENGTH_MAX], "invalid", why_invalid(text)))
        elif code in first_rows:
            rejected.append(RejectedCode(row, code, "duplicate_in_upload", f"as in row {first_rows[code]}"))
        else:
            first_rows[code] = row
    return _Listed(first_rows, rejected)


def _generated(generate: Generate | None) -> Generated | None:
    """What is to be generated. Raises Refused: invalid_request; pattern_capacity for what can never fit."""
    if generate is None:
        return None
    pattern = parse_pattern(generate.pattern, generate.alphabet)
    check_capacity(pattern, generate.total, 0)
    return Generated(pattern, generate.total)


def _upload_answer(book_id: str, listed: _Listed, taken: dict[str, str]) -> UploadAnswer:
    """`taken`: the codes that the tenant had already, with the books that have them."""
    rejected = [*listed.rejected, *(_taken(book_id, listed.codes[code], code, has) for code, has in taken.items())]
    rejected.sort(key=lambda code: code.row)
    invalid_count = sum(1 for code in rejected if code.reason == "invalid")
    inserted = len(listed.codes) - len(taken)
    return UploadAnswer(
        book_id=book_id,
        received=inserted + len(rejected),
        inserted=inserted,
        duplicates=len(rejected) - invalid_count,
        invalid=invalid_count,
        rejected=rejected[:REJECTED_SHOWN_MAX],
        rejected_truncated=len(rejected) > REJECTED_SHOWN_MAX,
    )


def _taken(book_id: str, row: int, code: str, has_it: str) -> RejectedCode:
    if has_it == book_id:
        return RejectedCode(row, code, "duplicate_in_book", "the book has it already")
    return RejectedCode(row, code, "duplicate_in_other_book", has_it)


def _generated_answer(book_id: str, total: int) -> UploadAnswer:
    return UploadAnswer(
        book_id=book_id,
        received=total,
        inserted=total,
        duplicates=0,
        invalid=0,
        rejected=[],
        rejected_truncated=False,
    )


def _moment_ms(pointer: str, moment: datetime | None) -> int | None:
    """A moment in milliseconds. Raises Refused(invalid_request) for one that cannot be told as RFC 3339 in UTC."""
    if moment is None:
        return None
    at_ms = to_ms(moment)
    if not MOMENT_MIN_MS <= at_ms < MOMENT_END_MS:
        raise invalid(pointer, "give a time from 1970 to 9999")
    return at_ms


def _changes(body: UpdateBook) -> dict[str, object]:
    """The columns that a PATCH changes. Raises Refused(invalid_request) for metadata that is too large."""
    changes: dict[str, object] = {}
    for name in ("status", "name", "max_codes_per_user", "lock_ttl_seconds"):
        if getattr(body, name) is not UNSET:
            changes[name] = getattr(body, name)
    for name in ("starts_at", "expires_at"):
        moment = getattr(body, name)
        if moment is not UNSET:
            changes[f"{name}_ms"] = _moment_ms(f"/{name}", moment)
    if body.metadata is not UNSET:
        changes["metadata"] = msgspec.Raw(encode_metadata(body.metadata).encode())
    return changes
