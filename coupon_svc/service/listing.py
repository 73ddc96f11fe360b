"""Listing a book's codes: which there are, Postgres says; what has become of each, Redis does. What is shown is durable."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from time import monotonic
from typing import Literal, NamedTuple

import msgspec

from coupon_svc.domain.books import Ack
from coupon_svc.domain.codes import CodeStatus
from coupon_svc.domain.outcomes import Outcome
from coupon_svc.domain.position import Epoch, Position, Seq
from coupon_svc.postgres.computed.ciphers import Ciphers
from coupon_svc.postgres.database import Database
from coupon_svc.postgres.errors import LedgerUnavailable
from coupon_svc.postgres.listing import CodeAsOf, CodesRange, LookedAt, codes_as_of, ledger_position, look_at_codes
from coupon_svc.postgres.tenant_slots import TenantSlots
from coupon_svc.redis.data_plane import DataPlane
from coupon_svc.service.books import Books, ReadBook
from coupon_svc.service.durability import STATEMENTS_S, Durability
from coupon_svc.service.reading import LOOKED_AT_ONCE_MIN, CodeRead, Reading

SLOTS_PER_TENANT = 2
"""How many pages of a tenant's lists and exports are read from Postgres at a time."""
PAGE_PATIENCE_S = 30.0
"""How long an export under way waits for Postgres, once per page, before it breaks off."""
PAUSE_S = 0.5
ROUNDS_MAX = 10
"""How often a page that is not full yet looks at further codes, LOOKED_AT_MAX at most each time. All of them take about
200 ms."""

ExportedStatus = Literal["available", "assigned", "redeemed", "quarantined"]


class ListCodes(msgspec.Struct, frozen=True):
    """A page of a book's codes: of one status or of any, with this beginning, behind `after`; "" for all."""

    tenant_id: int
    book_id: str
    limit: int
    status: CodeStatus | None = None
    prefix: str = ""
    after: str = ""


class CodesPage(msgspec.Struct, frozen=True):
    """`next` is the `after` of the next page, None on the last one. Where few codes are of the status, or begin with the
    prefix, it may be short."""

    codes: list[CodeRead]
    next: str | None


class ExportCodes(msgspec.Struct, frozen=True):
    """All of a book's codes, or those of one status or with one beginning. A locked code is an assigned one here."""

    tenant_id: int
    book_id: str
    status: ExportedStatus | None = None
    prefix: str = ""


class ExportedCode(NamedTuple):
    """A code as it was at the export's position. None stands for nobody, and for no limit."""

    code: str
    status: ExportedStatus
    user_id: str | None
    assigned_at_ms: int | None
    redemptions_used: int
    redemptions_left: int | None


class Export(NamedTuple):
    """A book's codes as they were at a position of its shard; `pages` may be read once, at any speed."""

    shard: int
    position: Position
    pages: AsyncIterator[list[ExportedCode]]


class Listing:
    """The use cases. They raise Refused, and LedgerUnavailable; they may be repeated at will."""

    def __init__(
        self,
        plane: DataPlane,
        database: Database,
        books: Books,
        reading: Reading,
        durability: Durability,
        ciphers: Ciphers,
    ) -> None:
        self._plane = plane
        self._database = database
        self._books = books
        self._reading = reading
        self._durability = durability
        self._ciphers = ciphers
        self._slots = TenantSlots(SLOTS_PER_TENANT)

    async def list_codes(self, wanted: ListCodes) -> CodesPage:
        """A page costs the same in a book of any size: it is full, or ROUNDS_MAX times some codes were looked at.

        Raises Refused: book_not_found; ledger_behind.
        """
        begun = monotonic()
        live = await self._books.read_book(ReadBook(wanted.tenant_id, wanted.book_id))
        if live.book.ack is Ack.REDIS and wanted.status is not None:
            await self._ledger_has_caught_up(wanted.book_id, begun)
        codes = list[CodeRead]()
        of = CodesRange(wanted.book_id, wanted.prefix, wanted.after)
        for _ in range(ROUNDS_MAX):
            missing = wanted.limit - len(codes)
            looked_at = await self._look_at(wanted, of, live.book.max_redemptions_per_code, missing, begun)
            found, after = await self._read(wanted, looked_at, missing, begun)
            codes += found
            if after is None or len(codes) == wanted.limit:
                return CodesPage(codes, after)
            of = of._replace(after=after)
        return CodesPage(codes, of.after)

    async def _look_at(
        self, wanted: ListCodes, of: CodesRange, redemptions_max: int | None, limit: int, begun: float
    ) -> LookedAt:
        async with (
            self._slots.slot(wanted.tenant_id, self._durability.left_s(begun)),
            self._database.connection(self._durability.left_s(begun), only_reads=True) as connection,
        ):
            return await look_at_codes(connection, of, wanted.status, redemptions_max, limit, self._ciphers)

    async def _read(
        self, wanted: ListCodes, looked_at: LookedAt, limit: int, begun: float
    ) -> tuple[list[CodeRead], str | None]:
        """Up to `limit` of the candidates that are of the wanted status, and where to go on; None at the end."""
        codes, candidates = list[CodeRead](), list(looked_at.candidates)
        at_once = max(limit, LOOKED_AT_ONCE_MIN)
        for start in range(0, len(candidates), at_once):
            part = candidates[start : start + at_once]
            for read in await self._reading.read_codes(wanted.tenant_id, wanted.book_id, part, begun):
                if wanted.status is None or read.status == wanted.status:
                    codes.append(read)
                if len(codes) == limit:
                    there_is_more = read.code != candidates[-1] or looked_at.last is not None
                    return codes, looked_at.candidates[read.code] if there_is_more else None
        return codes, looked_at.last

    async def export_codes(self, wanted: ExportCodes) -> Export:
        """A book of any size, page by page, as the ledger has it at the position where it is now. Nothing is read ahead, and
        no connection is held between two pages. A page that Postgres cannot give is asked for again for PAGE_PATIENCE_S.

        Raises Refused: book_not_found; ledger_behind.
        """
        begun = monotonic()
        live = await self._books.read_book(ReadBook(wanted.tenant_id, wanted.book_id))
        if live.book.ack is Ack.REDIS:
            await self._ledger_has_caught_up(wanted.book_id, begun)
        shard = self._plane.view_of_book(wanted.book_id).shard
        async with self._database.connection(self._durability.left_s(begun), only_reads=True) as connection:
            position = await ledger_position(connection, shard)
        return Export(shard, position, self._pages(wanted, position, live.book.max_redemptions_per_code))

    async def _pages(
        self, wanted: ExportCodes, position: Position, redemptions_max: int | None
    ) -> AsyncIterator[list[ExportedCode]]:
        of = CodesRange(wanted.book_id, wanted.prefix)
        after: str | None = ""
        while after is not None:
            rows, after = await self._page(wanted, of._replace(after=after), position)
            page = [_exported(row, redemptions_max) for row in rows]
            yield [code for code in page if wanted.status is None or code.status == wanted.status]

    async def _page(self, wanted: ExportCodes, of: CodesRange, position: Position) -> tuple[list[CodeAsOf], str | None]:
        until = monotonic() + PAGE_PATIENCE_S
        while True:
            try:
                async with (
                    self._slots.slot(wanted.tenant_id, PAGE_PATIENCE_S),
                    self._database.connection(STATEMENTS_S, only_reads=True, wait_s=PAGE_PATIENCE_S) as connection,
                ):
                    return await codes_as_of(connection, of, position, wanted.status, self._ciphers)
            except LedgerUnavailable:
                if monotonic() > until:
                    raise
            await asyncio.sleep(PAUSE_S)

    async def _ledger_has_caught_up(self, book_id: str, begun: float) -> None:
        """Return once the ledger has what was answered before this request began. In an `ack = redis` book an assign may be
        answered before; a list by status begins with what the ledger has."""
        view = self._plane.view_of_book(book_id)  # its position is at least that of the book just read
        epoch, seq = view.seen
        await self._durability.wait(view, Position(Epoch(epoch), Seq(seq)), begun, Outcome.LEDGER_BEHIND)


def _exported(row: CodeAsOf, redemptions_max: int | None) -> ExportedCode:
    left = None if redemptions_max is None else redemptions_max - row.used
    status: ExportedStatus = "quarantined" if row.quarantined else "available"
    if row.user_id is not None:
        status = "redeemed" if left == 0 else "assigned"
    return ExportedCode(row.code, status, row.user_id, row.assigned_at_ms, row.used, left)
