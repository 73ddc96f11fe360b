"""Listing a book's codes: which there are, Postgres says; what has become of each, Redis does. What is shown is durable."""

from __future__ import annotations

from time import monotonic

import msgspec

from coupon_svc.domain.books import Ack
from coupon_svc.domain.codes import CodeStatus
from coupon_svc.domain.outcomes import Outcome
from coupon_svc.domain.position import Epoch, Position, Seq
from coupon_svc.postgres.database import Database
from coupon_svc.postgres.listing import CodesRange, look_at_codes
from coupon_svc.redis.data_plane import DataPlane
from coupon_svc.service.books import Books, ReadBook
from coupon_svc.service.durability import Durability
from coupon_svc.service.reading import LOOKED_AT_ONCE_MIN, CodeRead, Reading


class ListCodes(msgspec.Struct, frozen=True):
    """A page of a book's codes: of one status or of any, with this beginning, after the code `after`; "" for all."""

    tenant_id: int
    book_id: str
    limit: int
    status: CodeStatus | None = None
    prefix: str = ""
    after: str = ""


class CodesPage(msgspec.Struct, frozen=True):
    """`next` is the code after which the next page begins, None on the last one. A page of one status may be short."""

    codes: list[CodeRead]
    next: str | None


class Listing:
    """The use cases. They raise Refused, and LedgerUnavailable; they may be repeated at will."""

    def __init__(
        self, plane: DataPlane, database: Database, books: Books, reading: Reading, durability: Durability
    ) -> None:
        self._plane = plane
        self._database = database
        self._books = books
        self._reading = reading
        self._durability = durability

    async def list_codes(self, wanted: ListCodes) -> CodesPage:
        """A page costs the same in a book of any size: of one status, a bounded number of codes is looked at.

        Raises Refused: book_not_found; ledger_behind.
        """
        begun = monotonic()
        live = await self._books.read_book(ReadBook(wanted.tenant_id, wanted.book_id))
        if live.book.ack is Ack.REDIS and wanted.status is not None:
            await self._ledger_has_caught_up(wanted.book_id, begun)
        async with self._database.connection(self._durability.left_s(begun), only_reads=True) as connection:
            looked_at = await look_at_codes(
                connection,
                CodesRange(wanted.book_id, wanted.prefix, wanted.after),
                wanted.status,
                live.book.max_redemptions_per_code,
                wanted.limit,
            )
        codes, candidates = list[CodeRead](), looked_at.candidates
        at_once = max(wanted.limit, LOOKED_AT_ONCE_MIN)
        for start in range(0, len(candidates), at_once):
            part = candidates[start : start + at_once]
            for read in await self._reading.read_codes(wanted.tenant_id, wanted.book_id, part, begun):
                if wanted.status is None or read.status == wanted.status:
                    codes.append(read)
                if len(codes) == wanted.limit:
                    there_is_more = read.code != candidates[-1] or looked_at.last is not None
                    return CodesPage(codes, read.code if there_is_more else None)
        return CodesPage(codes, looked_at.last)

    async def _ledger_has_caught_up(self, book_id: str, begun: float) -> None:
        """Return once the ledger has what was answered before this request began. In an `ack = redis` book an assign may be
        answered before; a list by status begins with what the ledger has."""
        view = self._plane.view_of_book(book_id)  # its position is at least that of the book just read
        epoch, seq = view.seen
        await self._durability.wait(view, Position(Epoch(epoch), Seq(seq)), begun, Outcome.LEDGER_BEHIND)
