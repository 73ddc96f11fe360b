"""What callers can do with coupons: each function parses one call, runs one use case and tells its result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import msgspec
from msgspec import UNSET

from coupon_svc.domain.clock import rfc3339
from coupon_svc.domain.codes import normalise_code
from coupon_svc.domain.outcomes import Outcome, Refused
from coupon_svc.http import schemas
from coupon_svc.http.call import Answer, Call
from coupon_svc.http.cursors import Cursors
from coupon_svc.http.inputs import check_user_id, encode_metadata
from coupon_svc.http.operations import BOOK_SHUT, NO_ROOM, NOT_REDEEMABLE, operation
from coupon_svc.http.problems import PROBLEMS, log_failures
from coupon_svc.service.assign import AssignCode, AssignCoupon, AssignCoupons, Assigned
from coupon_svc.service.reading import CodeRead, Coupon, ListCoupons, ListPlace, ReadCode, Reading
from coupon_svc.service.redeem import LockCoupon, RedeemCoupon, Redeeming, UnlockCoupon


class AssignUseCases(Protocol):
    """Of `service.assign.Assigning`, what is asked of it."""

    async def assign_coupon(self, wanted: AssignCoupon) -> Assigned: ...

    async def assign_coupons(
        self, wanted: AssignCoupons, caller_gone: Callable[[], bool]
    ) -> list[Assigned | Refused]: ...

    async def assign_code(self, wanted: AssignCode) -> Assigned: ...


class Coupons:
    """The data plane. Refusals are raised as Refused."""

    def __init__(self, assigning: AssignUseCases, redeeming: Redeeming, reading: Reading, cursors: Cursors) -> None:
        self._assigning = assigning
        self._redeeming = redeeming
        self._reading = reading
        self._cursors = cursors

    @operation(
        "POST",
        "/coupons/assign",
        summary="Assign a random code of a book to a user",
        tag="Coupons",
        scopes=("coupons:assign",),
        body=schemas.AssignCoupon,
        answers={201: schemas.AssignAnswer},
        refusals=(
            Outcome.BOOK_NOT_FOUND,
            *BOOK_SHUT,
            Outcome.USER_CODE_LIMIT,
            Outcome.BOOK_EXHAUSTED,
            Outcome.REFILLING,
            *NO_ROOM,
            Outcome.OUTCOME_UNKNOWN,
        ),
        hot=True,
    )
    async def assign_coupon(self, call: Call) -> Answer:
        """Give a user a random code. Decided in Redis; answered once the ledger has it, or in an `ack = redis` book at once.
        Repeat it with the same Idempotency-Key; without one it gives another code."""
        body: schemas.AssignCoupon = call.body
        idempotency = call.idempotency()
        return _assign_answer(
            await self._assigning.assign_coupon(
                AssignCoupon(call.key.tenant_id, body.book_id, body.user_id, idempotency)
            )
        )

    @operation(
        "POST",
        "/coupons/assignments",
        summary="Assign a random code of a book to each user of a list",
        tag="Coupons",
        scopes=("coupons:assign",),
        body=schemas.AssignCoupons,
        answers={200: schemas.AssignmentsAnswer},
        refusals=(Outcome.BOOK_NOT_FOUND, *BOOK_SHUT, *NO_ROOM, Outcome.OUTCOME_UNKNOWN),
    )
    async def assign_coupons(self, call: Call) -> Answer:
        """Give each of up to 1,000 users a random code. Each is decided by itself, and one user's refusal changes nothing
        for the others; the answer leaves when it holds for all. Repeat it with the same Idempotency-Key: whoever got a code
        gets that code again, and the refused are judged anew."""
        body: schemas.AssignCoupons = call.body
        wanted = AssignCoupons(call.key.tenant_id, body.book_id, body.user_ids, call.idempotency())
        found = await self._assigning.assign_coupons(wanted, call.caller_gone)
        log_failures((one for one in found if isinstance(one, Refused)), "assign_coupons", call.request_id)
        results = [_user_result(user_id, result) for user_id, result in zip(body.user_ids, found, strict=True)]
        assigned = sum(result.status == 201 for result in results)
        answer = schemas.AssignmentsAnswer(book_id=body.book_id, assigned=assigned, results=results)
        return Answer(200, answer, replayed=all(isinstance(one, Assigned) and one.replayed for one in found))

    @operation(
        "POST",
        "/coupons/assign/{code}",
        summary="Assign a given code to a user; 200 when it is this user's already",
        tag="Coupons",
        scopes=("coupons:assign",),
        body=schemas.AssignCode,
        answers={201: schemas.AssignAnswer, 200: schemas.AssignAnswer},
        refusals=(
            Outcome.CODE_NOT_FOUND,
            *BOOK_SHUT,
            Outcome.ALREADY_ASSIGNED,
            Outcome.CODE_QUARANTINED,
            Outcome.USER_CODE_LIMIT,
            Outcome.REFILLING,
            *NO_ROOM,
            Outcome.OUTCOME_UNKNOWN,
        ),
        hot=True,
    )
    async def assign_code(self, call: Call) -> Answer:
        """Give a user the code in the path. Decided in Redis, lent by Postgres where Redis does not have it; answered as
        `assign_coupon`. It may be repeated: a code that is the user's already stays so."""
        body: schemas.AssignCode = call.body
        code = _code(call)
        idempotency = call.idempotency(code)
        return _assign_answer(
            await self._assigning.assign_code(
                AssignCode(call.key.tenant_id, code, body.user_id, body.receipt, idempotency)
            )
        )

    @operation(
        "POST",
        "/coupons/lock/{code}",
        summary="Hold a coupon for one redemption attempt; 200 when the hold is renewed with its token",
        tag="Coupons",
        scopes=("coupons:redeem",),
        body=schemas.LockCoupon,
        answers={201: schemas.LockAnswer, 200: schemas.LockAnswer},
        refusals=(Outcome.CODE_NOT_FOUND, *BOOK_SHUT, *NOT_REDEEMABLE, *NO_ROOM, Outcome.OUTCOME_UNKNOWN),
        hot=True,
    )
    async def lock_coupon(self, call: Call) -> Answer:
        """Hold a coupon for one redemption attempt, or renew the hold. Kept in Redis alone; answered once the ledger has the
        coupon, or in an `ack = redis` book at once. Repeat it with the same Idempotency-Key, or renew with the token."""
        body: schemas.LockCoupon = call.body
        code = _code(call)
        locked = await self._redeeming.lock_coupon(
            LockCoupon(
                call.key.tenant_id,
                code,
                body.user_id or "",
                body.lock_token or "",
                body.ttl_seconds * 1000 if body.ttl_seconds else None,
                body.receipt,
                call.idempotency(code),
            )
        )
        answer = schemas.LockAnswer(
            code=locked.code,
            book_id=locked.book_id,
            user_id=locked.user_id,
            lock_token=locked.lock_token,
            locked_until=rfc3339(locked.until_ms),
            ttl_seconds=max(1, locked.ttl_ms // 1000),
        )
        return Answer(200 if locked.renewed else 201, answer, locked.replayed)

    @operation(
        "POST",
        "/coupons/unlock/{code}",
        summary="Give up the hold whose token is shown",
        tag="Coupons",
        scopes=("coupons:redeem",),
        body=schemas.UnlockCoupon,
        answers={204: None},
        refusals=(Outcome.CODE_NOT_FOUND, Outcome.LOCK_NOT_HELD, Outcome.OUTCOME_UNKNOWN),
        hot=True,
    )
    async def unlock_coupon(self, call: Call) -> Answer:
        """End a lock. Done in Redis and answered at once. Repeat it with the same Idempotency-Key; without one a second call
        finds no lock."""
        body: schemas.UnlockCoupon = call.body
        code = _code(call)
        idempotency = call.idempotency(code)
        unlocked = await self._redeeming.unlock_coupon(
            UnlockCoupon(call.key.tenant_id, code, body.lock_token, idempotency)
        )
        return Answer(204, None, unlocked.replayed)

    @operation(
        "POST",
        "/coupons/redeem/{code}",
        summary="Spend one use of a coupon, for good",
        tag="Coupons",
        scopes=("coupons:redeem",),
        body=schemas.RedeemCoupon,
        answers={201: schemas.RedeemAnswer},
        refusals=(Outcome.CODE_NOT_FOUND, *BOOK_SHUT, *NOT_REDEEMABLE, *NO_ROOM, Outcome.OUTCOME_UNKNOWN),
        hot=True,
    )
    async def redeem_coupon(self, call: Call) -> Answer:
        """Spend one use of a coupon. Decided in Redis; answered once the ledger has it, in every book. Repeat it with the
        same Idempotency-Key; without one it may spend another use."""
        body: schemas.RedeemCoupon = call.body
        metadata = encode_metadata(body.metadata) if body.metadata is not None else ""
        code = _code(call)
        redeemed = await self._redeeming.redeem_coupon(
            RedeemCoupon(
                call.key.tenant_id,
                code,
                body.user_id or "",
                body.lock_token or "",
                body.reference or "",
                metadata,
                body.receipt,
                call.idempotency(code),
            )
        )
        position = redeemed.position
        answer = schemas.RedeemAnswer(
            redemption_id=position.redemption_id(redeemed.shard),
            code=redeemed.code,
            book_id=redeemed.book_id,
            user_id=redeemed.user_id,
            redeemed_at=rfc3339(redeemed.at_ms),
            redemptions_used=redeemed.redemptions_used,
            redemptions_left=redeemed.redemptions_left,
            position=position.in_shard(redeemed.shard),
            durable=True,
        )
        return Answer(201, answer, redeemed.replayed)

    @operation(
        "GET",
        "/coupons/codes/{code}",
        summary="Read the state of one code",
        tag="Codes",
        scopes=("coupons:read",),
        answers={200: schemas.CodeAnswer},
        refusals=(Outcome.CODE_NOT_FOUND, Outcome.LEDGER_BEHIND),
    )
    async def read_code(self, call: Call) -> Answer:
        """Show a code. Read from Redis; answered once the ledger has what is shown, or in an `ack = redis` book at once. It
        may be repeated at will."""
        read = await self._reading.read_code(ReadCode(call.key.tenant_id, _code(call)))
        return Answer(200, code_answer(read))

    @operation(
        "GET",
        "/users/{user_id}/coupons",
        summary="List what a user holds",
        tag="Coupons",
        scopes=("coupons:read",),
        query=schemas.ListCoupons,
        answers={200: schemas.CouponsPage},
        refusals=(Outcome.BOOK_NOT_FOUND, Outcome.LEDGER_BEHIND),
    )
    async def list_coupons(self, call: Call) -> Answer:
        """List what a user holds. Read from Redis, of every shard; answered as `read_code`. It may be repeated at will."""
        query: schemas.ListCoupons = call.query
        user_id = call.path["user_id"]
        check_user_id(user_id)
        book_id = None if query.book_id is UNSET else query.book_id
        list_name = f"coupons {call.key.tenant_id} {book_id or ''} {user_id}"
        after = ListPlace(*self._cursors.open(list_name, query.cursor)) if query.cursor else ListPlace()
        page = await self._reading.list_coupons(
            ListCoupons(call.key.tenant_id, user_id, query.limit, book_id, query.status or None, after)
        )
        coupons = [_coupon_answer(coupon) for coupon in page.coupons]
        next_cursor = self._cursors.seal(list_name, *page.next) if page.next else None
        return Answer(200, schemas.CouponsPage(coupons, next_cursor))


def code_answer(read: CodeRead) -> schemas.CodeAnswer:
    """A code as callers see it."""
    coupon = read.coupon
    if coupon is None:
        return schemas.CodeAnswer(
            code=read.code,
            book_id=read.book_id,
            status=read.status,
            book_status=read.book_phase,
            user_id=None,
            assigned_at=None,
            redemptions_used=0,
            redemptions_left=read.redemptions_max,
            locked_until=None,
        )
    return schemas.CodeAnswer(
        code=coupon.code,
        book_id=coupon.book_id,
        status=coupon.status,
        book_status=read.book_phase,
        user_id=coupon.user_id,
        assigned_at=rfc3339(coupon.assigned_at_ms),
        redemptions_used=coupon.redemptions_used,
        redemptions_left=coupon.redemptions_left,
        locked_until=_moment(coupon.locked_until_ms),
    )


def _code(call: Call) -> str:
    """The code in the path, in its one spelling. Raises Refused(code_not_found) for what no code can be."""
    code = normalise_code(call.path["code"])
    if code is None:
        raise Refused(Outcome.CODE_NOT_FOUND)
    return code


def _assign_answer(assigned: Assigned) -> Answer:
    answer = schemas.AssignAnswer(
        code=assigned.code,
        book_id=assigned.book_id,
        user_id=assigned.user_id,
        assigned_at=rfc3339(assigned.at_ms),
        redemptions_left=assigned.redemptions_left,
        position=assigned.position.in_shard(assigned.shard),
        durable=assigned.durable,
        receipt=UNSET if assigned.receipt is None else assigned.receipt,
    )
    return Answer(200 if assigned.already_yours else 201, answer, assigned.replayed)


def _user_result(user_id: str, result: Assigned | Refused) -> schemas.UserResult:
    if isinstance(result, Refused):
        outcome = result.outcome
        fields = {"user_id": user_id, "status": PROBLEMS[outcome].status, "code": outcome.value, **result.facts}
        return msgspec.convert(fields, schemas.UserResult)
    return schemas.UserResult(
        user_id=user_id,
        status=201,
        code=result.code,
        book_id=result.book_id,
        assigned_at=rfc3339(result.at_ms),
        redemptions_left=result.redemptions_left,
        position=result.position.in_shard(result.shard),
        durable=result.durable,
        receipt=UNSET if result.receipt is None else result.receipt,
    )


def _coupon_answer(coupon: Coupon) -> schemas.CouponAnswer:
    return schemas.CouponAnswer(
        code=coupon.code,
        book_id=coupon.book_id,
        user_id=coupon.user_id,
        status=coupon.status,
        assigned_at=rfc3339(coupon.assigned_at_ms),
        redemptions_used=coupon.redemptions_used,
        redemptions_left=coupon.redemptions_left,
        locked_until=_moment(coupon.locked_until_ms),
    )


def _moment(at_ms: int | None) -> str | None:
    return rfc3339(at_ms) if at_ms is not None else None
