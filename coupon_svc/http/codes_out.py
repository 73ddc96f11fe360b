"""How codes leave the service: lists of a book's codes, and samples of a pattern. Each function parses one call, runs one
use case and tells its result."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator

import msgspec
from msgspec import UNSET

from coupon_svc.domain.clock import rfc3339
from coupon_svc.domain.codes import Generated, InvalidPattern, normalise_prefix, parse_pattern
from coupon_svc.domain.outcomes import Outcome
from coupon_svc.http import schemas
from coupon_svc.http.call import Answer, Call, StreamedAnswer
from coupon_svc.http.coupons import code_answer
from coupon_svc.http.csv_text import CSV_TYPE, csv_line, wants_csv
from coupon_svc.http.cursors import Cursors
from coupon_svc.http.inputs import invalid
from coupon_svc.http.operations import CsvAnswer, operation
from coupon_svc.service.listing import ExportCodes, ExportedCode, ListCodes, Listing
from coupon_svc.service.patterns import Patterns

EXPORT_COLUMNS = ("code", "status", "user_id", "assigned_at", "redemptions_used", "redemptions_left")
PAGE_SIZE = 50


class CodesOut:
    """Refusals are raised as Refused."""

    def __init__(self, listing: Listing, patterns: Patterns, cursors: Cursors) -> None:
        self._listing = listing
        self._patterns = patterns
        self._cursors = cursors

    @operation(
        "GET",
        "/coupons/{book_id}/codes",
        summary="List a book's codes, each with its state",
        tag="Codes",
        scopes=("codes:read",),
        query=schemas.ListCodes,
        answers={200: schemas.CodesPage},
        csv=CsvAnswer(
            csv_line(EXPORT_COLUMNS) + csv_line(("SUMMER-9SJG-2HF7", "available", "", "", "0", "1")),
            {"Coupon-Position": "the position as of which the codes are shown"},
        ),
        refusals=(Outcome.BOOK_NOT_FOUND, Outcome.LEDGER_BEHIND),
    )
    async def list_codes(self, call: Call) -> Answer | StreamedAnswer:
        """List a book's codes in their order. Which there are is read from Postgres, each of them from Redis; answered as
        `read_code`. As CSV all of it is read from Postgres, as of one position. It may be repeated at will."""
        if wants_csv(call.accept):
            return await self._export(call)
        query: schemas.ListCodes = call.query
        status = None if query.status is UNSET else query.status
        prefix = _prefix(query)
        book_id = call.path["book_id"]
        list_name = f"codes {call.key.tenant_id} {book_id} {status or ''} {prefix}"
        after = self._cursors.open(list_name, query.cursor)[1] if query.cursor else ""
        page = await self._listing.list_codes(
            ListCodes(call.key.tenant_id, book_id, query.limit or PAGE_SIZE, status, prefix, after)
        )
        next_cursor = self._cursors.seal(list_name, 0, page.next) if page.next else None
        return Answer(200, schemas.CodesPage([code_answer(read) for read in page.codes], next_cursor))

    @operation(
        "POST",
        "/coupons/patterns/preview",
        summary="Show what a pattern is good for, before anything is generated",
        tag="Codes",
        scopes=("books:write",),
        body=schemas.PreviewPattern,
        answers={200: schemas.PatternAnswer},
    )
    async def preview_pattern(self, call: Call) -> Answer:
        """Show what a pattern can name and what of it is used. Counted in Postgres; answered at once. It makes nothing, and
        may be repeated at will."""
        body: schemas.PreviewPattern = call.body
        try:
            wanted = Generated(parse_pattern(body.pattern, body.alphabet), body.total)
        except InvalidPattern as error:
            raise invalid(f"/{error.field}", error.reason) from None
        preview = await self._patterns.preview_pattern(call.key.tenant_id, wanted)
        answer = schemas.PatternAnswer(
            capacity=msgspec.Raw(b"%d" % preview.capacity),  # it may have a hundred digits
            already_used=preview.already_used,
            guess_probability=preview.guess_probability,
            samples=preview.samples,
            fits=preview.fits,
        )
        return Answer(200, answer)

    async def _export(self, call: Call) -> StreamedAnswer:
        query: schemas.ListCodes = call.query
        if query.status == "locked":
            raise invalid("/status", "in CSV a locked code is an assigned one")
        for name, value in (("limit", query.limit), ("cursor", query.cursor)):
            if value is not UNSET:
                raise invalid(f"/{name}", "CSV is the whole book: leave this out, or ask for JSON")
        status = None if query.status is UNSET else query.status
        book_id = call.path["book_id"]
        export = await self._listing.export_codes(ExportCodes(call.key.tenant_id, book_id, status, _prefix(query)))
        headers = [
            (b"content-type", CSV_TYPE.encode()),
            (b"content-disposition", f'attachment; filename="{book_id}.csv"'.encode()),
            (b"coupon-position", export.position.in_shard(export.shard).encode()),
        ]
        # What goes wrong with the first page is still a problem of its own, and no answer that breaks off.
        first = await anext(export.pages, None)
        return StreamedAnswer(200, headers, _csv(first, export.pages))


async def _csv(first: list[ExportedCode] | None, others: AsyncIterator[list[ExportedCode]]) -> AsyncGenerator[bytes]:
    yield csv_line(EXPORT_COLUMNS).encode()
    page = first
    while page is not None:
        if page:
            yield "".join(map(_line, page)).encode()
        page = await anext(others, None)


def _line(code: ExportedCode) -> str:
    return csv_line(
        (
            code.code,
            code.status,
            code.user_id or "",
            rfc3339(code.assigned_at_ms) if code.assigned_at_ms is not None else "",
            str(code.redemptions_used),
            str(code.redemptions_left) if code.redemptions_left is not None else "",
        )
    )


def _prefix(query: schemas.ListCodes) -> str:
    """Raises Refused(invalid_request) for what no code begins with."""
    prefix = normalise_prefix(query.prefix or "")
    if prefix is None:
        raise invalid(
            "/prefix", "give the beginning of a code: up to 64 of A-Z 0-9 . _ ~ + @ -, a letter or digit first"
        )
    return prefix
