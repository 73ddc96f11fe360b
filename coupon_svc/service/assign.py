"""Assigning codes: a random one of a book, to one user or to each of a list; or the one that is named."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from itertools import groupby
from time import monotonic
from typing import Any, NamedTuple

import msgspec

from coupon_svc.domain.lists import key_of_user
from coupon_svc.domain.outcomes import Outcome, Refused
from coupon_svc.domain.position import Position
from coupon_svc.domain.receipts import Receipt, make_receipt
from coupon_svc.hot import together
from coupon_svc.postgres.errors import LedgerUnavailable
from coupon_svc.redis.codec import ALREADY_YOURS
from coupon_svc.redis.contract import Reply
from coupon_svc.redis.data_plane import DataPlane
from coupon_svc.redis.shard_view import ShardView
from coupon_svc.service.code_directory import CodeDirectory
from coupon_svc.service.durability import Durability
from coupon_svc.service.idempotency import NO_IDEMPOTENCY, Idempotency
from coupon_svc.service.registration import Registration
from coupon_svc.service.waiting import DECIDED, Waiting

_ALREADY_THE_USERS = frozenset({ALREADY_YOURS, "confirmed"})
"""The code is the user's already; `confirmed` where an event was made, so that the key's answer is kept."""


class AssignCoupon(msgspec.Struct, frozen=True):
    """Give the user a random code of the book."""

    tenant_id: int
    book_id: str
    user_id: str
    idempotency: Idempotency = NO_IDEMPOTENCY


class AssignCoupons(msgspec.Struct, frozen=True):
    """Give each user a random code of the book; one who is named twice is asked for twice."""

    tenant_id: int
    book_id: str
    user_ids: Sequence[str]
    idempotency: Idempotency = NO_IDEMPOTENCY
    """Of the whole list. Each of its users has a record of its own under it."""


class AssignCode(msgspec.Struct, frozen=True):
    """Give the user this code, in its one spelling. `receipt` brings its record back where that was lost."""

    tenant_id: int
    code: str
    user_id: str
    receipt: str | None = None
    idempotency: Idempotency = NO_IDEMPOTENCY


class Assigned(msgspec.Struct, frozen=True):
    """What a user holds now. Times are Unix milliseconds."""

    code: str
    book_id: str
    user_id: str
    shard: int
    position: Position
    at_ms: int
    redemptions_left: int | None
    """None without a limit."""
    durable: bool
    """Whether the ledger has it already."""
    receipt: str | None
    """In `ack = redis` books."""
    replayed: bool
    already_yours: bool


LIST_PIECE = 32
"""Users of a list that are asked for at once. The next ones wait until these are decided, so that whoever comes meanwhile
comes between."""
_WHOEVER_ASKS = frozenset(
    {Outcome.RECOVERING, Outcome.STORE_UNAVAILABLE, Outcome.IDEMPOTENCY_KEY_REUSED, Outcome.BOOK_NOT_FOUND}
)
"""Refusals that say that nothing was done, and that hold for each user of a list alike."""
_WITHOUT_A_RECORD = frozenset(
    {
        Outcome.BOOK_CLOSED,
        Outcome.BOOK_PAUSED,
        Outcome.BOOK_NOT_STARTED,
        Outcome.BOOK_EXPIRED,
        Outcome.BACKLOG_FULL,
        Outcome.LEDGER_BEHIND,
    }
)
"""Those that hold alike for each user without an idempotency record: who has one is told its code again."""


class _Undurable(NamedTuple):
    """A reply of which it is not known yet whether it is durable, and the position that must be for that."""

    last: Position
    reply: Reply


class Assigning:
    """The use cases. All raise Refused, and LedgerUnavailable where Postgres was asked."""

    def __init__(
        self,
        plane: DataPlane,
        directory: CodeDirectory,
        waiting: Waiting,
        durability: Durability,
        registration: Registration,
    ) -> None:
        self._plane = plane
        self._directory = directory
        self._waiting = waiting
        self._durability = durability
        self._registration = registration

    async def assign_coupon(self, wanted: AssignCoupon) -> Assigned:
        """Returns once the answer may leave: when the ledger has the event, or early in an `ack = redis` book."""
        begun = monotonic()
        until = begun + self._durability.request_s
        view = self._plane.view_of_book(wanted.book_id)
        parameters: dict[str, Any] = {
            "tenant_id": wanted.tenant_id,
            "book_id": wanted.book_id,
            "user_id": wanted.user_id,
            "idempotency_key": wanted.idempotency.key,
            "fingerprint": wanted.idempotency.fingerprint,
        }
        reply = await self._plane.call("assign_coupon", view, until, **parameters)
        if reply.outcome not in DECIDED:
            reply = await self._waiting.decide(reply, "assign_coupon", view, parameters, begun)
        _, last = reply.position
        durable = self._durability.durable_or_early(view, last, reply.ack, made=reply.entry is not None)
        if durable is None:
            durable = await self._durability.wait(view, last, begun, entry=reply.entry)
        return self._result(reply, view, wanted.tenant_id, wanted.user_id, wanted.book_id, durable)

    async def assign_code(self, wanted: AssignCode) -> Assigned:
        """As `assign_coupon`. Raises Refused(code_not_found) for a code that the tenant does not have."""
        begun = monotonic()
        tenant_id, code = wanted.tenant_id, wanted.code
        book_id = self._directory.known_book(tenant_id, code)
        if book_id is None:
            book_id = await self._directory.book_of_code(tenant_id, code, self._durability.left_s(begun))
        until = begun + self._durability.request_s
        view = self._plane.view_of_book(book_id)
        parameters: dict[str, Any] = {
            "tenant_id": tenant_id,
            "book_id": book_id,
            "user_id": wanted.user_id,
            "code": code,
            "idempotency_key": wanted.idempotency.key,
            "fingerprint": wanted.idempotency.fingerprint,
        }
        reply = await self._plane.call("assign_code", view, until, **parameters)
        if reply.outcome not in DECIDED:
            reply = await self._waiting.decide(reply, "assign_code", view, parameters, begun, receipt=wanted.receipt)
        already_yours = reply.outcome in _ALREADY_THE_USERS or (
            reply.outcome == "replayed" and reply.first == ALREADY_YOURS
        )
        _, last = reply.position
        durable = self._durability.durable_or_early(view, last, reply.ack, made=reply.entry is not None)
        if durable is None:
            durable = await self._durability.wait(view, last, begun, entry=reply.entry)
        return self._result(reply, view, tenant_id, wanted.user_id, book_id, durable, already_yours=already_yours)

    async def assign_coupons(self, wanted: AssignCoupons, caller_gone: Callable[[], bool]) -> list[Assigned | Refused]:
        """What became of each user, in their order. Returns once the whole answer may leave. Once the caller is gone, nobody
        further is asked for.

        Raises Refused where the book or the shard refuses all of them, and nothing was done.
        """
        begun = monotonic()
        view = self._plane.view_of_book(wanted.book_id)
        replies: list[Reply | Refused] = []
        users = list(enumerate(wanted.user_ids))
        of_all = _WHOEVER_ASKS if wanted.idempotency.key else _WHOEVER_ASKS | _WITHOUT_A_RECORD
        while users and self._durability.left_s(begun) > 0 and not caller_gone():
            piece, users = users[:LIST_PIECE], users[LIST_PIECE:]
            asked = await together([self._ask_for_one(wanted, view, index, user, begun) for index, user in piece])
            found = [reply or Refused(Outcome.INTERNAL_ERROR) for reply in asked]
            if not replies and (refused := _refusal_of_all(found, of_all)):
                raise refused
            replies += found
        if not replies:
            raise Refused(Outcome.STORE_UNAVAILABLE)
        if not users and (refused := _refusal_of_all(replies, _WITHOUT_A_RECORD & {replies[0].outcome})):
            raise refused
        replies += [Refused(Outcome.STORE_UNAVAILABLE) for _ in users]  # nobody asked for them
        durable = await self._durable(view, [reply for reply in replies if isinstance(reply, Reply)], begun)
        results: list[Assigned | Refused] = []
        for user_id, reply in zip(wanted.user_ids, replies, strict=True):
            if isinstance(reply, Refused):
                results.append(reply)
            elif (known := durable[id(reply)]) is None:
                results.append(Refused(Outcome.OUTCOME_UNKNOWN))
            else:
                results.append(self._result(reply, view, wanted.tenant_id, user_id, wanted.book_id, known))
        return results

    async def _ask_for_one(
        self, wanted: AssignCoupons, view: ShardView, index: int, user_id: str, begun: float
    ) -> Reply | Refused:
        """The reply for one user of a list, or why there is none."""
        parameters: dict[str, Any] = {
            "tenant_id": wanted.tenant_id,
            "book_id": wanted.book_id,
            "user_id": user_id,
            "idempotency_key": key_of_user(wanted.idempotency.key, index),
            "list_idempotency_key": wanted.idempotency.key,
            "fingerprint": wanted.idempotency.fingerprint,
        }
        until = begun + self._durability.request_s
        try:
            reply = await self._plane.call("assign_coupon", view, until, **parameters)
            if reply.outcome not in DECIDED:
                reply = await self._waiting.decide(reply, "assign_coupon", view, parameters, begun)
        except Refused as refused:
            return refused
        except LedgerUnavailable:
            return Refused(Outcome.STORE_UNAVAILABLE)
        except Exception as error:  # of this user: what the others have got must be answered
            failed = Refused(Outcome.INTERNAL_ERROR)
            failed.__cause__ = error
            return failed
        return reply

    async def _durable(self, view: ShardView, replies: Sequence[Reply], begun: float) -> dict[int, bool | None]:
        """Whether each reply is durable, by its `id`, once all may leave together; None where that stays unknown."""
        durable: dict[int, bool | None] = {}
        waiting: list[_Undurable] = []
        for reply in replies:
            _, last = reply.position
            made = reply.entry is not None
            durable[id(reply)] = known = self._durability.durable_or_early(view, last, reply.ack, made=made)
            if known is None:
                waiting.append(_Undurable(last, reply))
        # The ledger takes entries in their order: who waits for the first one has time for the next.
        waiting.sort(key=lambda one: one.last)
        try:
            for _, together_there in groupby(waiting, key=lambda one: one.reply.entry or one.last):
                there = list(together_there)
                newest = there[-1]
                await self._durability.wait(view, newest.last, begun, entry=newest.reply.entry)
                durable.update((id(one.reply), True) for one in there)
        except Refused:
            pass  # what is left stays unknown
        return durable

    def _result(
        self,
        reply: Reply,
        view: ShardView,
        tenant_id: int,
        user_id: str,
        book_id: str,
        durable: bool,
        *,
        already_yours: bool = False,
    ) -> Assigned:
        """What a reply that decided tells of its user."""
        outcome, code, ack = reply.outcome, reply.code, reply.ack
        assigned, _ = reply.position
        at_ms = int(reply.at_ms)
        self._directory.learn_code(tenant_id, code, book_id)
        secret = self._registration.receipt_secret
        receipt = None
        if ack != "ledger" and secret is not None:
            proof = Receipt(user_id, assigned, at_ms)
            receipt = make_receipt(secret, tenant_id, book_id, code, proof)
        left = reply.redemptions_left
        return Assigned(
            code,
            book_id,
            user_id,
            view.shard,
            assigned,
            at_ms,
            int(left) if left else None,
            durable,
            receipt,
            outcome == "replayed",
            already_yours,
        )


def _refusal_of_all(replies: Sequence[Reply | Refused], outcomes: Set[str]) -> Refused | None:
    """The first refusal, when each of the replies is one with any of the `outcomes`."""
    first = replies[0]
    refused = all(isinstance(reply, Refused) and reply.outcome in outcomes for reply in replies)
    return first if refused and isinstance(first, Refused) else None
