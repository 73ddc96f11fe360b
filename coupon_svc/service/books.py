"""Books and their codes: Postgres first, and answered once Redis has it, too.

The answer to an Idempotency-Key is kept in the same transaction as its effect. It is kept as the caller was told it, so
whoever speaks to callers brings the words (`BookAnswers`).
"""

from __future__ import annotations

import asyncio
import contextlib
from time import monotonic
from typing import Literal, NamedTuple, Protocol

import msgspec
from msgspec import UNSET, UnsetType

from coupon_svc.domain.books import Book, BookRules, BookStatus, check_period
from coupon_svc.domain.clock import now_ms
from coupon_svc.domain.codes import (
    CODE_LENGTH_MAX,
    Generated,
    InvalidPattern,
    check_capacity,
    normalise_code,
    why_invalid,
    why_taken,
)
from coupon_svc.domain.outcomes import Outcome, Refused
from coupon_svc.domain.shards import book_shard, new_book_id
from coupon_svc.postgres import books, codes, patterns
from coupon_svc.postgres.books import NewBook
from coupon_svc.postgres.codes import PIECE_CODES
from coupon_svc.postgres.computed.ciphers import NO_CIPHERS, Ciphers
from coupon_svc.postgres.computed.ranges import is_computed
from coupon_svc.postgres.database import Database, LedgerConnection
from coupon_svc.postgres.errors import LedgerUnavailable, TakeTurns
from coupon_svc.postgres.idempotency import IdempotentCall, recall, remember
from coupon_svc.postgres.tenant_slots import TenantSlots
from coupon_svc.postgres.uploads import Uploads
from coupon_svc.redis.codec import decode_stored_book
from coupon_svc.redis.contract import Reply
from coupon_svc.redis.data_plane import DataPlane
from coupon_svc.service.durability import IN_FORCE_WAIT_S, SLOT_WAIT_S
from coupon_svc.service.idempotency import NO_IDEMPOTENCY, Idempotency, KeptAnswer
from coupon_svc.service.waiting import DECIDED, Waiting

SLOTS_PER_TENANT = 4
"""How many connections the creations and small uploads of one tenant may take of those that all share."""
STORED_PER_CALL_MAX = 1_000_000
"""How many generated codes one call stores, where they cannot be computed."""


class CreateBook(msgspec.Struct, frozen=True):
    """Make a book, with generated codes if wanted."""

    tenant_id: int
    rules: BookRules
    generate: Generated | None
    idempotency: Idempotency = NO_IDEMPOTENCY


class UploadCodes(msgspec.Struct, frozen=True):
    """Add codes to a book: a list, as it was sent, or codes to be drawn."""

    tenant_id: int
    book_id: str
    codes: list[str] | Generated
    idempotency: Idempotency = NO_IDEMPOTENCY


class ReadBook(msgspec.Struct, frozen=True):
    tenant_id: int
    book_id: str


class ListBooks(msgspec.Struct, frozen=True):
    """The tenant's books, newest first; `before` is (created_at_ms, book_id) of the last one of the page before."""

    tenant_id: int
    limit: int
    before: tuple[int, str] | None = None


class BookChanges(msgspec.Struct, frozen=True, kw_only=True):
    """What of a book's rules is to change; UNSET stays as it is."""

    status: BookStatus | UnsetType = UNSET
    name: str | UnsetType = UNSET
    starts_at_ms: int | UnsetType | None = UNSET
    expires_at_ms: int | UnsetType | None = UNSET
    max_codes_per_user: int | UnsetType | None = UNSET
    lock_ttl_seconds: int | UnsetType = UNSET
    metadata: msgspec.Raw | UnsetType = UNSET

    def columns(self) -> dict[str, object]:
        """The columns that change, with their new values."""
        values = {name: getattr(self, name) for name in self.__struct_fields__}
        return {name: value for name, value in values.items() if value is not UNSET}


class UpdateBook(msgspec.Struct, frozen=True):
    tenant_id: int
    book_id: str
    changes: BookChanges


class LiveBook(msgspec.Struct, frozen=True):
    """A book's rules, and its counters of one moment: `held` codes are assigned, `redeemed` ones of them wholly
    spent; `redemptions` are all uses of any code."""

    book: Book
    total: int
    held: int = 0
    redeemed: int = 0
    quarantined: int = 0
    redemptions: int = 0


class BooksPage(msgspec.Struct, frozen=True):
    """`next` is the `before` of the next page, None on the last one."""

    books: list[LiveBook]
    next: tuple[int, str] | None


class RejectedCode(NamedTuple):
    """An entry of a list that was not added. `row` counts from 1; `detail` says why, or names the book that has the code."""

    row: int
    code: str
    reason: Literal["invalid", "duplicate_in_upload", "duplicate_in_book", "duplicate_in_other_book"]
    detail: str


class Upload(msgspec.Struct, frozen=True):
    """What became of the codes that were sent, or asked for. `rejected` is in the order of the list."""

    book_id: str
    inserted: int
    rejected: list[RejectedCode]


class BookAnswers(Protocol):
    """The words in which callers are told, and in which an answer is kept for its Idempotency-Key."""

    def created(self, made: LiveBook) -> KeptAnswer: ...

    def uploaded(self, upload: Upload) -> KeptAnswer: ...

    def book_of(self, created: KeptAnswer) -> str:
        """The id of the book that an earlier answer of `created` tells of."""
        ...


class Done(NamedTuple):
    """What a request has done, or was done the first time it came. `book` is as the ledger has it now: what is answered
    holds in Redis once that version is there."""

    book: Book
    answer: KeptAnswer
    replayed: bool = True


class _Listed(NamedTuple):
    """A list of codes as it came: those to be added, each with its row from 1, and those that cannot be."""

    codes: dict[str, int]
    rejected: list[RejectedCode]


class Books:
    """The use cases. All raise Refused, and LedgerUnavailable, whose `may_have_happened` tells what is known."""

    def __init__(
        self,
        plane: DataPlane,
        waiting: Waiting,
        database: Database,
        uploads: Uploads,
        shards: int,
        answers: BookAnswers,
        ciphers: Ciphers = NO_CIPHERS,
    ) -> None:
        self._plane = plane
        self._waiting = waiting
        self._database = database
        self._uploads = uploads
        self._slots = TenantSlots(SLOTS_PER_TENANT)
        self._shards = shards
        self._answers = answers
        self._ciphers = ciphers

    # --- making and filling

    async def create_book(self, wanted: CreateBook) -> Done:
        """Returns once Redis has the book. Raises InvalidPeriod, InvalidPattern; Refused: pattern_capacity,
        outcome_unknown."""
        check_period(wanted.rules.starts_at_ms, wanted.rules.expires_at_ms)
        if wanted.generate is not None:
            check_capacity(*wanted.generate, 0)
        book_id = new_book_id(self._shards)
        shard = book_shard(book_id, self._shards)
        assert shard is not None
        new = NewBook(book_id, shard, wanted.tenant_id, now_ms(), wanted.rules)
        idempotent = _idempotent(f"tenant:{wanted.tenant_id}", wanted.idempotency)
        try:
            done = await self._create_at_once(new, wanted.generate, idempotent)
        except TakeTurns:
            done = await self._create_in_pieces(new, wanted.generate, idempotent)
        in_force = await self.in_force(done.book)
        if wanted.generate and not in_force:  # a book without codes has nothing that could be found missing
            raise Refused(Outcome.OUTCOME_UNKNOWN)
        return done

    async def _create_at_once(
        self, new: NewBook, generated: Generated | None, idempotent: IdempotentCall | None
    ) -> Done:
        """Raises TakeTurns."""
        async with (
            self._slots.slot(new.tenant_id, SLOT_WAIT_S),
            self._database.connection() as connection,
            connection.transaction(),
        ):
            if idempotent and (before := await recall(connection, idempotent)):
                if before.unfinished:
                    raise TakeTurns
                kept = KeptAnswer(before.status, before.answer)
                book_id = self._answers.book_of(kept)
                return Done(await books.read_book(connection, new.tenant_id, book_id), kept)
            if generated and generated.total > PIECE_CODES and not self._may_compute(generated):
                raise TakeTurns
            book = await books.insert_book(connection, new)
            if generated:
                book = await self._generate(connection, new.tenant_id, new.book_id, generated)
            answer = self._answers.created(LiveBook(book, book.total))
            if idempotent:
                await remember(connection, idempotent, *answer)
            return Done(book, answer, replayed=False)

    async def _create_in_pieces(
        self, new: NewBook, generated: Generated | None, idempotent: IdempotentCall | None
    ) -> Done:
        """The book is made when its codes are there: what breaks off before leaves none."""
        assert generated is not None
        _check_stored(generated)

        async def decide(connection: LedgerConnection, upload_id: int, _: dict[str, str]) -> KeptAnswer:
            await books.insert_book(connection, new)
            book = await patterns.note_guessing(connection, upload_id, new.book_id, *generated)
            answer = self._answers.created(LiveBook(book, generated.total))
            if idempotent:
                await remember(connection, idempotent, *answer, upload_id)
            return answer

        async with self._uploads.turn(new.tenant_id) as turn:
            if idempotent and (before := await turn.recall(idempotent)):
                kept = KeptAnswer(before.status, before.answer)
                return Done(await turn.read_book(self._answers.book_of(kept)), kept)
            book, answer = await turn.add(new.book_id, generated, decide)
            return Done(book, answer, replayed=False)

    async def upload_codes(self, wanted: UploadCodes) -> Done:
        """Returns once Redis knows how many codes the book has. Raises InvalidPattern; Refused: pattern_capacity,
        book_not_found, book_closed, outcome_unknown."""
        if isinstance(wanted.codes, Generated):
            check_capacity(*wanted.codes, 0)
        codes = wanted.codes if isinstance(wanted.codes, Generated) else _listed(wanted.codes)
        self._plane.view_of_book(wanted.book_id)
        idempotent = _idempotent(wanted.book_id, wanted.idempotency)
        try:
            done = await self._upload_at_once(wanted.tenant_id, wanted.book_id, codes, idempotent)
        except TakeTurns:
            done = await self._upload_in_pieces(wanted.tenant_id, wanted.book_id, codes, idempotent)
        if not await self.in_force(done.book):
            raise Refused(Outcome.OUTCOME_UNKNOWN)
        return done

    async def _upload_at_once(
        self, tenant_id: int, book_id: str, wanted: Generated | _Listed, idempotent: IdempotentCall | None
    ) -> Done:
        """Raises TakeTurns."""
        async with (
            self._slots.slot(tenant_id, SLOT_WAIT_S),
            self._database.connection() as connection,
            connection.transaction(),
        ):
            book = await books.read_book(connection, tenant_id, book_id)
            if idempotent and (before := await recall(connection, idempotent)):
                if before.unfinished:
                    raise TakeTurns
                kept = KeptAnswer(before.status, before.answer)
                return Done(await books.read_book(connection, tenant_id, book_id), kept)
            if book.status is BookStatus.CLOSED:
                raise Refused(Outcome.BOOK_CLOSED)
            if isinstance(wanted, Generated):
                if wanted.total > PIECE_CODES and not self._may_compute(wanted):
                    raise TakeTurns
                book = await self._generate(connection, tenant_id, book_id, wanted)
                answer = self._answers.uploaded(Upload(book_id, wanted.total, []))
            else:
                if len(wanted.codes) > PIECE_CODES:
                    raise TakeTurns
                book, taken = await codes.insert_codes(connection, tenant_id, book_id, wanted.codes, self._ciphers)
                answer = self._answers.uploaded(_upload(book_id, wanted, taken))
            if idempotent:
                await remember(connection, idempotent, *answer)
            return Done(book, answer, replayed=False)

    async def _upload_in_pieces(
        self, tenant_id: int, book_id: str, wanted: Generated | _Listed, idempotent: IdempotentCall | None
    ) -> Done:
        if isinstance(wanted, Generated):
            _check_stored(wanted)

        async def decide(connection: LedgerConnection, upload_id: int, taken: dict[str, str]) -> KeptAnswer:
            if isinstance(wanted, Generated):  # first, since it locks the book's row for good
                await patterns.note_guessing(connection, upload_id, book_id, *wanted)
            await books.require_not_closed(connection, book_id)
            if isinstance(wanted, Generated):
                answer = self._answers.uploaded(Upload(book_id, wanted.total, []))
            else:
                answer = self._answers.uploaded(_upload(book_id, wanted, taken))
            if idempotent:
                await remember(connection, idempotent, *answer, upload_id)
            return answer

        async with self._uploads.turn(tenant_id) as turn:
            if idempotent and (before := await turn.recall(idempotent)):
                return Done(await turn.read_book(book_id), KeptAnswer(before.status, before.answer))
            codes = wanted if isinstance(wanted, Generated) else sorted(wanted.codes)
            book, answer = await turn.add(book_id, codes, decide)
            return Done(book, answer, replayed=False)

    def _may_compute(self, generated: Generated) -> bool:
        return bool(self._ciphers.keys) and is_computed(*generated)

    async def _generate(self, connection: LedgerConnection, tenant_id: int, book_id: str, generated: Generated) -> Book:
        """Add codes within the transaction: computed ones, or stored ones where these are few. Raises TakeTurns."""
        if not self._may_compute(generated):
            return await patterns.generate_codes(connection, tenant_id, book_id, *generated, self._ciphers)
        book = await patterns.compute_codes(connection, tenant_id, book_id, *generated, self._ciphers)
        if book is None:
            raise TakeTurns  # they are to be stored, and are too many for one transaction
        return book

    # --- reading and changing

    async def read_book(self, wanted: ReadBook) -> LiveBook:
        """A book as Redis has it: rules in force, counters of this moment. Raises Refused(book_not_found)."""
        reply = await self._ask(wanted.tenant_id, wanted.book_id)
        counters = (reply.total, reply.held, reply.redeemed, reply.quarantined, reply.redemptions)
        return LiveBook(decode_stored_book(reply.stored), *map(int, counters))

    async def list_books(self, wanted: ListBooks) -> BooksPage:
        """Which books there are, Postgres says, and of each what `read_book` does. May be repeated."""
        async with self._database.connection(only_reads=True) as connection:
            found = await books.list_books(connection, wanted.tenant_id, wanted.limit + 1, wanted.before)
        page = found[: wanted.limit]
        live = await asyncio.gather(*(self.read_book(ReadBook(book.tenant_id, book.book_id)) for book in page))
        more = len(found) > wanted.limit
        return BooksPage(list(live), (page[-1].created_at_ms, page[-1].book_id) if more else None)

    async def update_book(self, wanted: UpdateBook) -> LiveBook:
        """Change a book's rules, and show it once Redis has them. May be repeated. Raises InvalidPeriod; Refused:
        book_not_found, book_closed, outcome_unknown."""
        tenant_id, book_id = wanted.tenant_id, wanted.book_id
        self._plane.view_of_book(book_id)
        async with self._database.connection() as connection, connection.transaction():
            book = await books.update_book(connection, tenant_id, book_id, wanted.changes.columns())
        if not await self.in_force(book):
            raise Refused(Outcome.OUTCOME_UNKNOWN)
        try:
            return await self.read_book(ReadBook(tenant_id, book_id))
        except (Refused, LedgerUnavailable):  # which say that nothing was done
            raise Refused(Outcome.OUTCOME_UNKNOWN) from None

    # --- what all of them need

    async def _ask(self, tenant_id: int, book_id: str) -> Reply:
        """What Redis has of the book. Raises Refused."""
        begun = monotonic()
        view = self._plane.view_of_book(book_id)
        parameters = {"tenant_id": tenant_id, "book_id": book_id}
        reply = await self._plane.call("read_book", view, **parameters)
        if reply.outcome not in DECIDED:
            reply = await self._waiting.decide(reply, "read_book", view, parameters, begun)
        return reply

    async def in_force(self, book: Book) -> bool:
        """Wait until Redis has this version of the book, at most IN_FORCE_WAIT_S."""
        deadline, pause = monotonic() + IN_FORCE_WAIT_S, 0.002
        while monotonic() < deadline:
            with contextlib.suppress(Refused, LedgerUnavailable):
                reply = await self._ask(book.tenant_id, book.book_id)
                if int(reply.version) >= book.version:
                    return True
            await asyncio.sleep(pause)
            pause = min(1.5 * pause, 0.1)
        return False


def _idempotent(scope: str, idempotency: Idempotency) -> IdempotentCall | None:
    """What the ledger keeps an answer under; None without an Idempotency-Key."""
    if idempotency is NO_IDEMPOTENCY:
        return None
    return IdempotentCall(scope, idempotency.key, idempotency.fingerprint)


def _check_stored(generated: Generated) -> None:
    """Raises InvalidPattern for more codes than one call stores."""
    if generated.total > STORED_PER_CALL_MAX:
        raise InvalidPattern(
            "total",
            f"at most {STORED_PER_CALL_MAX} codes of this pattern can be generated at a time: it overlaps another one of"
            " yours, or codes of yours that were uploaded lie in it, or this service computes none",
        )


def _listed(codes: list[str]) -> _Listed:
    """The list in its one spelling, each code once."""
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


def _upload(book_id: str, listed: _Listed, taken: dict[str, str]) -> Upload:
    """`taken`: the codes that the tenant had already, with the books that have them."""
    rejected = [
        *listed.rejected,
        *(RejectedCode(listed.codes[code], code, *why_taken(book_id, has)) for code, has in taken.items()),
    ]
    rejected.sort(key=lambda code: code.row)
    return Upload(book_id, len(listed.codes) - len(taken), rejected)
