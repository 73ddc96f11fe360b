"""What can be done with books: Postgres first, and answered once Redis has it, too."""

from __future__ import annotations

import asyncio
import contextlib
from datetime import datetime
from typing import Any

import msgspec
from msgspec import UNSET

from coupon_svc.api.http import Answer, Call
from coupon_svc.api.inputs import decode_cursor, encode_cursor, encode_metadata, invalid
from coupon_svc.api.runner import BookRunner
from coupon_svc.api.schemas import (
    REJECTED_SHOWN_MAX,
    BookAnswer,
    BooksPage,
    CodeCounters,
    CreateBook,
    Page,
    RejectedCode,
    UpdateBook,
    UploadAnswer,
    UploadCodes,
)
from coupon_svc.domain.books import Book
from coupon_svc.domain.clock import now_ms, rfc3339, to_ms
from coupon_svc.domain.codes import CODE_LENGTH_MAX, check_capacity, normalise_code, parse_pattern
from coupon_svc.domain.outcomes import Outcome, Refused
from coupon_svc.domain.shards import book_shard, new_book_id
from coupon_svc.ledger import catalogue
from coupon_svc.ledger.database import Database, LedgerUnavailable
from coupon_svc.ledger.idempotency import recall, remember

IN_FORCE_WAIT_S = 5.0
MOMENT_MIN_MS, MOMENT_END_MS = 0, 253_402_300_800_000
BULK_S = 120.0
"""How long the largest upload may take in Postgres: a million generated codes need a fraction of it."""

_encode = msgspec.json.Encoder().encode


class Books:
    """The control plane. Every method answers one operation; refusals are raised as Refused."""

    def __init__(self, runner: BookRunner, database: Database, shards: int) -> None:
        self._runner = runner
        self._database = database
        self._shards = shards

    async def create_book(self, call: Call) -> Answer:
        body: CreateBook = call.body
        tenant_id = call.key.tenant_id
        pattern = parse_pattern(body.generate.pattern, body.generate.alphabet) if body.generate else None
        book_id = new_book_id(self._shards)
        shard = book_shard(book_id, self._shards)
        assert shard is not None
        new = catalogue.NewBook(
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
        async with self._database.connection(BULK_S) as connection, connection.transaction():
            if idempotent and (before := await recall(connection, idempotent)):
                made = msgspec.json.decode(before.answer)["book_id"]
                return Answer.again(before, f"/coupons/{made}")
            book = await catalogue.insert_book(connection, new)
            if pattern and body.generate:
                book = await catalogue.generate_codes(connection, tenant_id, book_id, pattern, body.generate.total)
            answer = _encode(book_answer(book, _untouched(book), 0))
            if idempotent:
                await remember(connection, idempotent, 201, answer)
        await self._in_force(book)
        return Answer(201, msgspec.Raw(answer), location=f"/coupons/{book_id}")

    async def upload_codes(self, call: Call) -> Answer:
        body: UploadCodes = call.body
        if (body.codes is None) == (body.generate is None):
            raise invalid("", "give either codes or generate")
        pattern = parse_pattern(body.generate.pattern, body.generate.alphabet) if body.generate else None
        if pattern and body.generate:
            check_capacity(pattern, body.generate.total, 0)  # what can never fit is no question of which book
        self._runner.place(body.book_id)
        idempotent = call.idempotent(body.book_id, "/coupons/codes")
        async with self._database.connection(BULK_S) as connection, connection.transaction():
            await catalogue.read_book(connection, call.key.tenant_id, body.book_id)
            if idempotent and (before := await recall(connection, idempotent)):
                return Answer.again(before)
            if body.codes is not None:
                book, answer = await _insert(connection, call.key.tenant_id, body.book_id, body.codes)
            else:
                assert pattern is not None
                assert body.generate is not None
                total = body.generate.total
                book = await catalogue.generate_codes(connection, call.key.tenant_id, body.book_id, pattern, total)
                answer = _upload_answer(body.book_id, total, total, [], 0)
            if idempotent:
                await remember(connection, idempotent, 200, _encode(answer))
        if not await self._in_force(book):
            raise Refused(Outcome.OUTCOME_UNKNOWN)
        return Answer(200, answer)

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
        return Answer(200, await self._live(call.key.tenant_id, book_id))

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


def _untouched(book: Book) -> CodeCounters:
    """The counters of a book that Redis has not seen yet: nobody can hold a code of it."""
    return CodeCounters(total=book.total, available=book.total, assigned=0, redeemed=0, quarantined=0)


async def _insert(connection: Any, tenant_id: int, book_id: str, codes: list[str]) -> tuple[Book, UploadAnswer]:
    """Add a list of codes, and say of each one that was not added why, by its row from 1."""
    first_rows: dict[str, int] = {}
    rejected: list[RejectedCode] = []
    invalid_count = 0
    for row, text in enumerate(codes, 1):
        code = normalise_code(text)
        if code is None:
            invalid_count += 1
            rejected.append(RejectedCode(row, text[:CODE_LENGTH_MAX], "invalid"))
        elif code in first_rows:
            rejected.append(RejectedCode(row, code, "duplicate"))
        else:
            first_rows[code] = row
    book, inserted = await catalogue.insert_codes(connection, tenant_id, book_id, list(first_rows))
    rejected += [RejectedCode(row, code, "duplicate") for code, row in first_rows.items() if code not in inserted]
    rejected.sort(key=lambda code: code.row)
    return book, _upload_answer(book_id, len(codes), len(inserted), rejected, invalid_count)


def _upload_answer(
    book_id: str, received: int, inserted: int, rejected: list[RejectedCode], invalid_count: int
) -> UploadAnswer:
    return UploadAnswer(
        book_id=book_id,
        received=received,
        inserted=inserted,
        duplicates=len(rejected) - invalid_count,
        invalid=invalid_count,
        rejected=rejected[:REJECTED_SHOWN_MAX],
        rejected_truncated=len(rejected) > REJECTED_SHOWN_MAX,
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
