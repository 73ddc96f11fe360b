"""Uploads that are too large for one short transaction: in pieces, one upload of a tenant at a time.

Codes come in without a place in their book: nobody sees, lends or counts them. Then the upload is decided, in one
transaction with what its Idempotency-Key answers; from then on it happens, whoever dies. Last, the codes get their places,
a piece at a time, each of which holds the book's row for some milliseconds.

Whose turn it is, an advisory lock of the session says. It ends with the connection, and only this connection writes: so
who has the turn may finish, or take back, whatever an upload of the tenant has left behind.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Concatenate, ParamSpec, TypeVar

import asyncpg

from coupon_svc.domain.books import Book
from coupon_svc.domain.codes import Generated
from coupon_svc.domain.outcomes import Outcome, Refused
from coupon_svc.loops import keep_running
from coupon_svc.postgres import books, patterns
from coupon_svc.postgres.codes import PIECE_CODES, books_of, insert_rows, place_codes
from coupon_svc.postgres.computed.ciphers import NO_CIPHERS, Ciphers
from coupon_svc.postgres.database import Database, one_row, within
from coupon_svc.postgres.errors import LedgerUnavailable
from coupon_svc.postgres.idempotency import IdempotentCall, Remembered, recall
from coupon_svc.postgres.lend_order import UNPLACED_FROM
from coupon_svc.postgres.tenant_slots import TenantSlots, busy

T = TypeVar("T")
P = ParamSpec("P")
TURN_WAIT_S = 10.0
PIECE_TIMEOUT_S = 10.0
COUNT_TIMEOUT_S = 60.0
"""For counting the codes of a large tenant that lie in a pattern."""
SWEEP_EVERY_S = 10.0
_TURN_LOCK = 0x7475726E  # "turn"; the advisory lock of a tenant's uploads in pieces
# A process that is stopped or cut off must not keep its turn until TCP gives it up.
_TRY_TURN = "SELECT set_config('idle_session_timeout', '30s', false), pg_try_advisory_lock($1, $2) AS mine"
Decide = Callable[[asyncpg.Connection, int, dict[str, str]], Awaitable[T]]
"""What is to happen in the transaction that decides an upload: given its id, and the codes that were left out with the
books that have them. Raises Refused when nothing of the upload is to stay."""
_REMOVE_PIECE = "DELETE FROM codes WHERE book_id = $1 AND place >= $2 AND place < $3"
_UNDER_WAY = "SELECT upload_id, book_id, decided FROM uploads WHERE tenant_id = $1 ORDER BY upload_id"
_BEGIN = "INSERT INTO uploads (tenant_id, book_id, codes, used) VALUES ($1, $2, $3, $4) RETURNING upload_id"
_NEXT_UNPLACED = "SELECT min(place) FROM codes WHERE book_id = $1 AND place >= $2 AND place < -1"


class Uploads:
    """The way to a tenant's turn; and a loop that finishes, or takes back, what a dead process has left."""

    def __init__(self, database: Database, ciphers: Ciphers = NO_CIPHERS) -> None:
        self._database = database
        self._ciphers = ciphers
        self._turns = TenantSlots(1)
        self._sweeper: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._sweeper = asyncio.create_task(keep_running(self._sweep))

    async def stop(self) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.gather(self._sweeper, return_exceptions=True)

    @asynccontextmanager
    async def turn(
        self, tenant_id: int, wait_s: float = TURN_WAIT_S, *, database: Database | None = None
    ) -> AsyncIterator[Turn]:
        """The tenant's turn, on a connection of `database` if one is given. Nothing that a dead upload has left is there any
        more.

        Raises Refused(store_unavailable) when it does not come in time; LedgerUnavailable.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + wait_s
        async with (
            self._turns.slot(tenant_id, wait_s),
            (database or self._database).connection(None, wait_s=max(0.0, deadline - loop.time())) as connection,
        ):
            turn = Turn(connection, tenant_id, self._ciphers)
            while not await turn.begin():
                if loop.time() >= deadline:
                    raise busy()
                await asyncio.sleep(0.1)
            try:
                await turn.clean_up()
                yield turn
            finally:
                await turn.end()

    async def _sweep(self) -> None:
        """Take the turn of every tenant with an upload under way: who gets it has found a dead one, and cleans up."""
        while True:
            await asyncio.sleep(SWEEP_EVERY_S)
            with contextlib.suppress(LedgerUnavailable):
                for row in await self._database.fetch("SELECT DISTINCT tenant_id FROM uploads"):
                    with contextlib.suppress(Refused):
                        async with self.turn(row["tenant_id"], wait_s=0):
                            pass


class Turn:
    """A tenant's turn, on a connection of its own. Every method is bounded in time, and raises LedgerUnavailable."""

    def __init__(self, connection: asyncpg.Connection, tenant_id: int, ciphers: Ciphers) -> None:
        self._connection = connection
        self._tenant_id = tenant_id
        self._ciphers = ciphers

    async def begin(self) -> bool:
        """Whether nobody else has it."""
        row = await self._step(one_row(self._connection, _TRY_TURN, _TURN_LOCK, self._tenant_id))
        return bool(row["mine"])

    async def end(self) -> None:
        """Give it back, and what Idempotency-Keys were held."""
        if not self._connection.is_closed():
            with contextlib.suppress(LedgerUnavailable):
                await self._step(self._connection.execute("SELECT pg_advisory_unlock_all()"))

    async def run(
        self, work: Callable[Concatenate[asyncpg.Connection, P], Awaitable[T]], *args: P.args, **kw: P.kwargs
    ) -> T:
        """What `work` does with the turn's connection and the arguments, within PIECE_TIMEOUT_S."""
        return await self._step(work(self._connection, *args, **kw))

    async def recall(self, call: IdempotentCall) -> Remembered | None:
        """As `idempotency.recall`; the key is this turn's until it ends."""
        return await self._step(recall(self._connection, call, for_session=True))

    async def read_book(self, book_id: str) -> Book:
        """As `books.read_book`."""
        return await self._step(books.read_book(self._connection, self._tenant_id, book_id))

    async def add(self, book_id: str, wanted: Sequence[str] | Generated, decide: Decide[T]) -> tuple[Book, T]:
        """Add codes to a book, which may be made by `decide` only. Returns it as it is then, and what `decide` returned.

        Raises Refused: pattern_capacity, what `decide` raises; then nothing was done.
        """
        upload_id = await self._step(self._open(book_id, wanted), COUNT_TIMEOUT_S)
        try:
            if isinstance(wanted, Generated):
                taken = await self._insert_drawn(book_id, wanted)
            else:
                taken = await self._insert(book_id, wanted)
            try:
                decided = await self._step(self._decide(upload_id, decide, taken))
            except LedgerUnavailable as error:
                error.may_have_happened = True
                raise
        except Refused:
            await self._take_back(upload_id, book_id)
            raise
        try:
            return await self._place(upload_id, book_id), decided
        except LedgerUnavailable as error:
            error.may_have_happened = True
            raise

    async def clean_up(self) -> None:
        """Finish what was decided, and take back what was not, of uploads that have died."""
        rows = await self._step(self._connection.fetch(_UNDER_WAY, self._tenant_id))
        for row in rows:
            if row["decided"]:
                await self._place(row["upload_id"], row["book_id"])
            else:
                await self._take_back(row["upload_id"], row["book_id"])

    async def _open(self, book_id: str, wanted: Sequence[str] | Generated) -> int:
        async with self._connection.transaction():
            used = None
            if isinstance(wanted, Generated):
                used = await patterns.require_capacity(self._connection, self._tenant_id, *wanted)
            upload_id: int = await self._connection.fetchval(
                _BEGIN,
                self._tenant_id,
                book_id,
                wanted.total if isinstance(wanted, Generated) else len(wanted),
                used,
            )
            return upload_id

    async def _insert(self, book_id: str, codes: Sequence[str]) -> dict[str, str]:
        """Bring codes in, without places. Returns those that the tenant had already, with the books that have them."""
        taken: dict[str, str] = {}
        for start in range(0, len(codes), PIECE_CODES):
            piece = codes[start : start + PIECE_CODES]
            inserted = await self._insert_piece(book_id, piece, start)
            left_out = [code for code in piece if code not in inserted]
            taken |= await self._step(books_of(self._connection, self._tenant_id, left_out, self._ciphers))
        return taken

    async def _insert_drawn(self, book_id: str, wanted: Generated) -> dict[str, str]:
        """Draw codes and bring them in, without places, until all are there. Returns nothing that was left out."""
        drawn = barren = 0
        missing = wanted.total
        while missing:
            piece = list(wanted.pattern.draw(min(missing, PIECE_CODES)))
            inserted = len(await self._insert_piece(book_id, piece, drawn))
            drawn += len(piece)
            missing -= inserted
            barren = 0 if inserted else barren + 1
            if barren == patterns.BARREN_DRAWS_MAX:  # half of the pattern was free; uploads have filled it since
                capacity = wanted.pattern.capacity
                raise Refused(
                    Outcome.PATTERN_CAPACITY, capacity=capacity, requested=wanted.total, already_used=capacity
                )
        return {}

    async def _insert_piece(self, book_id: str, codes: Sequence[str], turn: int) -> set[str]:
        """`turn` numbers an upload's codes in the order in which they get their places."""
        places = list(range(UNPLACED_FROM + turn, UNPLACED_FROM + turn + len(codes)))

        async def insert() -> set[str]:
            async with self._connection.transaction():
                return await insert_rows(self._connection, self._tenant_id, book_id, codes, places, self._ciphers)

        return await self._step(insert())

    async def _decide(self, upload_id: int, decide: Decide[T], taken: dict[str, str]) -> T:
        async with self._connection.transaction():
            await self._connection.execute("UPDATE uploads SET decided = true WHERE upload_id = $1", upload_id)
            return await decide(self._connection, upload_id, taken)

    async def _place(self, upload_id: int, book_id: str) -> Book:
        """Give every code of a decided upload its place. Returns the book as it is then."""
        begin = await self._next_unplaced(book_id, UNPLACED_FROM) or UNPLACED_FROM
        while True:
            following = await self._next_unplaced(book_id, begin + PIECE_CODES)
            book = await self._step(self._place_piece(upload_id, book_id, begin, last=following is None))
            if following is None:
                return book
            begin = following

    async def _place_piece(self, upload_id: int, book_id: str, begin: int, *, last: bool) -> Book:
        async with self._connection.transaction():
            book = await place_codes(self._connection, book_id, begin, tell=last)
            if last:
                await self._close(upload_id)
            return book

    async def _take_back(self, upload_id: int, book_id: str) -> None:
        """Remove every code of an upload that was not decided."""
        begin: int | None = UNPLACED_FROM
        while begin is not None:
            removed = self._connection.execute(_REMOVE_PIECE, book_id, begin, begin + PIECE_CODES)
            await self._step(removed)
            begin = await self._next_unplaced(book_id, begin + PIECE_CODES)
        await self._step(self._close(upload_id))

    async def _next_unplaced(self, book_id: str, begin: int) -> int | None:
        """The first of the places from `begin` on that is none yet. From where the last piece ended: what that left in the
        index may still have to be skipped over."""
        place: int | None = await self._step(self._connection.fetchval(_NEXT_UNPLACED, book_id, begin))
        return place

    async def _close(self, upload_id: int) -> None:
        await self._connection.execute("DELETE FROM uploads WHERE upload_id = $1", upload_id)

    async def _step(self, work: Awaitable[T], seconds: float = PIECE_TIMEOUT_S) -> T:
        async with within(self._connection, seconds):
            return await work
