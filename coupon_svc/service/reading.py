"""Reading codes and coupons: one code, or what a user holds. What is shown is durable."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from time import monotonic
from typing import Literal, NamedTuple

import msgspec

from coupon_svc.domain.codes import CodeStatus
from coupon_svc.domain.holding import Holding, ListedCoupon
from coupon_svc.domain.outcomes import Outcome, Refused
from coupon_svc.redis.calls import QUARANTINED
from coupon_svc.redis.data_plane import DataPlane
from coupon_svc.redis.shard_view import ShardView
from coupon_svc.service.code_directory import CodeDirectory
from coupon_svc.service.durability import Durability
from coupon_svc.service.waiting import DECIDED, Waiting

LOOKED_AT_ONCE_MIN = 200
"""How many coupons of a user are looked at in one go at least: of many, few may be of the wanted status."""

CouponStatus = Literal["assigned", "locked", "redeemed"]
BookPhase = Literal["active", "paused", "closed", "not_started", "expired"]


class ReadCode(msgspec.Struct, frozen=True):
    """Show this code, in its one spelling."""

    tenant_id: int
    code: str


class ListPlace(NamedTuple):
    """Where a list of coupons stands: a shard, and the last member of it that was listed."""

    shard: int = 0
    member: str = ""


class ListCoupons(msgspec.Struct, frozen=True):
    """A page of what the user holds: of one book or of all, of one status or of any, from `after` on."""

    tenant_id: int
    user_id: str
    limit: int
    book_id: str | None = None
    status: CouponStatus | None = None
    after: ListPlace = ListPlace()


class Coupon(msgspec.Struct, frozen=True):
    """A code that somebody holds. Times are Unix milliseconds; None stands for no limit, and for no lock."""

    code: str
    book_id: str
    user_id: str
    status: CouponStatus
    assigned_at_ms: int
    redemptions_used: int
    redemptions_left: int | None
    locked_until_ms: int | None


class CodeRead(msgspec.Struct, frozen=True):
    """A code: `coupon` is None when nobody holds it, or when it is quarantined and it is not known whether anybody does."""

    code: str
    book_id: str
    book_phase: BookPhase
    redemptions_max: int | None
    coupon: Coupon | None
    quarantined: bool

    @property
    def status(self) -> CodeStatus:
        if self.coupon is not None:
            return self.coupon.status
        return "quarantined" if self.quarantined else "available"


class CouponsPage(msgspec.Struct, frozen=True):
    """`next` is where the next page begins, None on the last one."""

    coupons: list[Coupon]
    next: ListPlace | None


class _CodesRead(NamedTuple):
    """What Redis has of some codes of a book: for each code a coupon, None for nobody, or QUARANTINED."""

    redemptions_max: int | None
    book_phase: BookPhase
    coupons: list[Coupon | str | None]


class Reading:
    """The use cases. They raise Refused, and LedgerUnavailable where Postgres was asked; they may be repeated at will."""

    def __init__(self, plane: DataPlane, directory: CodeDirectory, waiting: Waiting, durability: Durability) -> None:
        self._plane = plane
        self._directory = directory
        self._waiting = waiting
        self._durability = durability

    async def read_code(self, wanted: ReadCode) -> CodeRead:
        """Raises Refused(code_not_found) for a code that the tenant does not have."""
        begun = monotonic()
        tenant_id, code = wanted.tenant_id, wanted.code
        book_id = self._directory.known_book(tenant_id, code)
        if book_id is None:
            book_id = await self._directory.book_of_code(tenant_id, code, self._durability.left_s(begun))
        (read,) = await self.read_codes(tenant_id, book_id, [code], begun)
        return read

    async def read_codes(self, tenant_id: int, book_id: str, codes: list[str], begun: float) -> list[CodeRead]:
        """Up to 1,000 codes that the book has, each as `read_code` shows it. `begun`: when the request began, by the
        monotonic clock. Raises Refused(book_not_found)."""
        read = await self._read_codes(tenant_id, book_id, codes, begun)
        return [
            CodeRead(
                code,
                book_id,
                read.book_phase,
                read.redemptions_max,
                coupon if isinstance(coupon, Coupon) else None,
                coupon == QUARANTINED,
            )
            for code, coupon in zip(codes, read.coupons, strict=True)
        ]

    async def list_coupons(self, wanted: ListCoupons) -> CouponsPage:
        """The page is short when the request's time is over. Raises Refused(book_not_found) for a book that the tenant does
        not have."""
        begun = monotonic()
        if wanted.book_id is not None:
            await self._require_book(wanted.tenant_id, wanted.book_id, begun)
        # Of many coupons few may be wanted: each look costs a call to every shard, however short the page is.
        looked_at = wanted.limit if wanted.status is None else max(wanted.limit, LOOKED_AT_ONCE_MIN)
        after, coupons = wanted.after, list[Coupon]()
        while True:
            members = await self._members(wanted, after, looked_at + 1, begun)
            listed = await self._coupons(wanted.tenant_id, members[:looked_at], begun)
            for number, (place, coupon) in enumerate(zip(members, listed, strict=False), 1):
                after = place
                if wanted.status is None or coupon.status == wanted.status:
                    coupons.append(coupon)
                if len(coupons) == wanted.limit:
                    return CouponsPage(coupons, after if number < len(members) else None)
            if len(members) <= looked_at:
                return CouponsPage(coupons, None)
            if not self._durability.left_s(begun):
                return CouponsPage(coupons, after)

    async def _require_book(self, tenant_id: int, book_id: str, begun: float) -> None:
        view = self._plane.view_of_book(book_id)
        parameters = {"tenant_id": tenant_id, "book_id": book_id}
        reply = await self._plane.call("read_book", view, begun + self._durability.request_s, **parameters)
        if reply.outcome not in DECIDED:
            await self._waiting.decide(reply, "read_book", view, parameters, begun)

    async def _members(self, wanted: ListCoupons, after: ListPlace, limit: int, begun: float) -> list[ListPlace]:
        """The next members of a user's lists, by shard. A user's coupons may be in any shard, so all are asked. None of
        them may be in doubt, or the list would be too short."""
        book_id = wanted.book_id
        views: Sequence[ShardView] = self._plane.views if book_id is None else [self._plane.view_of_book(book_id)]

        async def of_shard(view: ShardView) -> list[ListPlace]:
            low, high = ListedCoupon.range(book_id, after.member if view.shard == after.shard else "")
            reply = await self._plane.call(
                "list_coupons",
                view,
                begun + self._durability.request_s,
                tenant_id=wanted.tenant_id,
                user_id=wanted.user_id,
                low=low,
                high=high,
                limit=limit,
            )
            return [ListPlace(view.shard, member) for member in reply.members]

        parts = await asyncio.gather(*(of_shard(view) for view in views if view.shard >= after.shard))
        return [place for part in parts for place in part][:limit]

    async def _coupons(self, tenant_id: int, places: Sequence[ListPlace], begun: float) -> list[Coupon]:
        """The coupons behind the members of the list, asked book by book and returned in their order."""
        listed = [ListedCoupon.parse(place.member) for place in places]
        by_book: dict[str, list[str]] = {}
        for book_id, code in listed:
            by_book.setdefault(book_id, []).append(code)
        reads = await asyncio.gather(
            *(self._read_codes(tenant_id, book_id, codes, begun) for book_id, codes in by_book.items())
        )
        found = {
            ListedCoupon(book_id, code): coupon
            for (book_id, codes), read in zip(by_book.items(), reads, strict=True)
            for code, coupon in zip(codes, read.coupons, strict=True)
        }
        coupons = []
        for one in listed:
            coupon = found[one]
            if not isinstance(coupon, Coupon):  # listed, and held by nobody: Redis has been tampered with
                raise Refused(Outcome.RECOVERING)
            coupons.append(coupon)
        return coupons

    async def _read_codes(self, tenant_id: int, book_id: str, codes: list[str], begun: float) -> _CodesRead:
        """Read some codes of a book. Waits until what it shows is durable."""
        view = self._plane.view_of_book(book_id)
        parameters = {"tenant_id": tenant_id, "book_id": book_id, "codes": codes}
        reply = await self._plane.call("read_codes", view, begun + self._durability.request_s, **parameters)
        if reply.outcome not in DECIDED:
            reply = await self._waiting.decide(reply, "read_codes", view, parameters, begun)
        holders: list[Holding | str] = reply.holders
        shown = [holding.last for holding in holders if isinstance(holding, Holding)]
        # Wait once, for the newest position. If one were waited for after the other and the epoch ended in between, the rest
        # would be of an older epoch, and be taken for durable although they may be lost.
        if shown and self._durability.durable_or_early(view, max(shown), reply.ack, made=False) is None:
            await self._durability.wait(view, max(shown), begun, Outcome.LEDGER_BEHIND)
        redemptions_max = int(reply.redemptions_max) if reply.redemptions_max else None
        coupons: list[Coupon | str | None] = []
        for code, holding, lock_ms in zip(codes, holders, reply.locks, strict=True):
            if not isinstance(holding, Holding):
                coupons.append(holding or None)
                continue
            left = None if redemptions_max is None else redemptions_max - holding.uses
            locked = lock_ms > 0 and left != 0
            coupons.append(
                Coupon(
                    code,
                    book_id,
                    holding.user_id,
                    "redeemed" if left == 0 else "locked" if locked else "assigned",
                    holding.at_ms,
                    holding.uses,
                    left,
                    int(reply.now_ms) + lock_ms if locked else None,
                )
            )
        return _CodesRead(redemptions_max, reply.book_status, coupons)
