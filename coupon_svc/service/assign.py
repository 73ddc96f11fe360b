"""Assigning codes: a random one of a book, or the one that is named."""

from __future__ import annotations

from time import monotonic
from typing import Any

import msgspec

from coupon_svc.domain.position import Position
from coupon_svc.domain.receipts import Receipt, make_receipt
from coupon_svc.redis.codec import ALREADY_YOURS
from coupon_svc.redis.contract import Reply
from coupon_svc.redis.data_plane import DataPlane
from coupon_svc.redis.shard_view import ShardView
from coupon_svc.service.code_directory import CodeDirectory
from coupon_svc.service.durability import Durability
from coupon_svc.service.idempotency import NO_IDEMPOTENCY, Idempotency
from coupon_svc.service.registration import Registration
from coupon_svc.service.waiting import DECIDED, Waiting


class AssignCoupon(msgspec.Struct, frozen=True):
    """Give the user a random code of the book."""

    tenant_id: int
    book_id: str
    user_id: str
    idempotency: Idempotency = NO_IDEMPOTENCY


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


class Assigning:
    """The use cases. Both raise Refused, and LedgerUnavailable where Postgres was asked."""

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
        view = self._plane.view_of_book(wanted.book_id)
        parameters: dict[str, Any] = {
            "tenant_id": wanted.tenant_id,
            "book_id": wanted.book_id,
            "user_id": wanted.user_id,
            "idempotency_key": wanted.idempotency.key,
            "fingerprint": wanted.idempotency.fingerprint,
        }
        reply = await self._plane.call("assign_coupon", view, **parameters)
        if reply.outcome not in DECIDED:
            reply = await self._waiting.decide(reply, "assign_coupon", view, parameters, begun)
        return await self._assigned(reply, view, wanted, wanted.book_id, begun, already_yours=False)

    async def assign_code(self, wanted: AssignCode) -> Assigned:
        """As `assign_coupon`. Raises Refused(code_not_found) for a code that the tenant does not have."""
        begun = monotonic()
        tenant_id, code = wanted.tenant_id, wanted.code
        book_id = self._directory.known_book(tenant_id, code)
        if book_id is None:
            book_id = await self._directory.book_of_code(tenant_id, code, self._durability.left_s(begun))
        view = self._plane.view_of_book(book_id)
        parameters: dict[str, Any] = {
            "tenant_id": tenant_id,
            "book_id": book_id,
            "user_id": wanted.user_id,
            "code": code,
            "idempotency_key": wanted.idempotency.key,
            "fingerprint": wanted.idempotency.fingerprint,
        }
        reply = await self._plane.call("assign_code", view, **parameters)
        if reply.outcome not in DECIDED:
            reply = await self._waiting.decide(reply, "assign_code", view, parameters, begun, receipt=wanted.receipt)
        already_yours = reply.outcome == ALREADY_YOURS or (reply.outcome == "replayed" and reply.first == ALREADY_YOURS)
        return await self._assigned(reply, view, wanted, book_id, begun, already_yours=already_yours)

    async def _assigned(
        self,
        reply: Reply,
        view: ShardView,
        wanted: AssignCoupon | AssignCode,
        book_id: str,
        begun: float,
        *,
        already_yours: bool,
    ) -> Assigned:
        """The result of a reply that decided, once it may leave."""
        tenant_id, user_id = wanted.tenant_id, wanted.user_id
        outcome, code, ack = reply.outcome, reply.code, reply.ack
        assigned, last = reply.position
        at_ms = int(reply.at_ms)
        self._directory.learn_code(tenant_id, code, book_id)
        durable = self._durability.at_once(view, last, ack, made=outcome == "ok")
        if durable is None:
            durable = await self._durability.wait(view, last, begun)
        secret = self._registration.receipt_secret
        receipt = None
        if ack != "ledger" and secret is not None:
            proof = Receipt(user_id, assigned.epoch, assigned.seq, at_ms)
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
