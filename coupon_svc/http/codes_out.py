"""How codes leave the service: lists of a book's codes. Each function parses one call, runs one use case and tells its
result."""

from __future__ import annotations

from msgspec import UNSET

from coupon_svc.domain.codes import normalise_prefix
from coupon_svc.domain.outcomes import Outcome
from coupon_svc.http import schemas
from coupon_svc.http.call import Answer, Call
from coupon_svc.http.coupons import code_answer
from coupon_svc.http.cursors import Cursors
from coupon_svc.http.inputs import invalid
from coupon_svc.http.operations import operation
from coupon_svc.service.listing import ListCodes, Listing


class CodesOut:
    """Refusals are raised as Refused."""

    def __init__(self, listing: Listing, cursors: Cursors) -> None:
        self._listing = listing
        self._cursors = cursors

    @operation(
        "GET",
        "/coupons/{book_id}/codes",
        summary="List a book's codes, each with its state",
        tag="Codes",
        scopes=("codes:read",),
        query=schemas.ListCodes,
        answers={200: schemas.CodesPage},
        refusals=(Outcome.BOOK_NOT_FOUND, Outcome.LEDGER_BEHIND),
    )
    async def list_codes(self, call: Call) -> Answer:
        """List a book's codes in their order. Which there are is read from Postgres, each of them from Redis; answered as
        `read_code`. It may be repeated at will."""
        query: schemas.ListCodes = call.query
        status = None if query.status is UNSET else query.status
        prefix = _prefix(query)
        book_id = call.path["book_id"]
        list_name = f"codes {call.key.tenant_id} {book_id} {status or ''} {prefix}"
        after = self._cursors.open(list_name, query.cursor)[1] if query.cursor else ""
        page = await self._listing.list_codes(
            ListCodes(call.key.tenant_id, book_id, query.limit, status, prefix, after)
        )
        next_cursor = self._cursors.seal(list_name, 0, page.next) if page.next else None
        return Answer(200, schemas.CodesPage([code_answer(read) for read in page.codes], next_cursor))


def _prefix(query: schemas.ListCodes) -> str:
    """Raises Refused(invalid_request) for what no code begins with."""
    prefix = normalise_prefix(query.prefix or "")
    if prefix is None:
        raise invalid(
            "/prefix", "give the beginning of a code: up to 64 of A-Z 0-9 . _ ~ + @ -, a letter or digit first"
        )
    return prefix
