"""Using a coupon: lock it for one attempt, unlock it, redeem it."""

from __future__ import annotations

import secrets
from time import monotonic
from typing import Any

import msgspec

from coupon_svc.domain.position import Position
from coupon_svc.redis.data_plane import DataPlane
from coupon_svc.service.code_directory import CodeDirectory
from coupon_svc.service.durability import Durability
from coupon_svc.service.idempotency import NO_IDEMPOTENCY, Idempotency
from coupon_svc.service.waiting import DECIDED, Waiting


class LockCoupon(msgspec.Struct, frozen=True):
    """Hold the coupon for one redemption attempt, or with `lock_token` renew the lock that has it.

    "" stands for a user or a token that is not given. `ttl_ms` None is the book's own.
    """

    tenant_id: int
    code: str
    user_id: str = ""
    lock_token: str = ""
    ttl_ms: int | None = None
    receipt: str | None = None
    idempotency: Idempotency = NO_IDEMPOTENCY


class UnlockCoupon(msgspec.Struct, frozen=True):
    """End the lock that has this token."""

    tenant_id: int
    code: str
    lock_token: str
    idempotency: Idempotency = NO_IDEMPOTENCY


class RedeemCoupon(msgspec.Struct, frozen=True):
    """Spend one use of the coupon, and its lock with it. "" stands for what is not given; `metadata` is JSON."""

    tenant_id: int
    code: str
    user_id: str = ""
    lock_token: str = ""
    reference: str = ""
    metadata: str = ""
    receipt: str | None = None
    idempotency: Idempotency = NO_IDEMPOTENCY


class Locked(msgspec.Struct, frozen=True):
    """A lock, until when and for how long from its making. Times are milliseconds."""

    code: str
    book_id: str
    user_id: str
    lock_token: str
    until_ms: int
    ttl_ms: int
    replayed: bool
    renewed: bool


class Unlocked(msgspec.Struct, frozen=True):
    replayed: bool


class Redeemed(msgspec.Struct, frozen=True):
    """One use of a coupon that is spent, and durable. `at_ms`: Unix milliseconds."""

    code: str
    book_id: str
    user_id: str
    shard: int
    position: Position
    at_ms: int
    redemptions_used: int
    redemptions_left: int | None
    """None without a limit."""
    replayed: bool


class Redeeming:
    """The use cases. All raise Refused, of which code_not_found is one for a code that the tenant does not have; and
    LedgerUnavailable where Postgres was asked."""

    def __init__(self, plane: DataPlane, directory: CodeDirectory, waiting: Waiting, durability: Durability) -> None:
        self._plane = plane
        self._directory = directory
        self._waiting = waiting
        self._durability = durability

    async def lock_coupon(self, wanted: LockCoupon) -> Locked:
        """A lock lives in Redis alone. Returns once the answer may leave: in an `ack = ledger` book the ledger then has the
        coupon's last event."""
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
            "code": code,
            "user_id": wanted.user_id,
            "lock_token": wanted.lock_token,
            "new_token": "lk_" + secrets.token_urlsafe(18),
            "ttl_ms": wanted.ttl_ms or "",
            "idempotency_key": wanted.idempotency.key,
            "fingerprint": wanted.idempotency.fingerprint,
        }
        reply = await self._plane.call("lock_coupon", view, until, **parameters)
        if reply.outcome not in DECIDED:
            reply = await self._waiting.decide(reply, "lock_coupon", view, parameters, begun, receipt=wanted.receipt)
        _, last = reply.position
        if self._durability.durable_or_early(view, last, reply.ack, made=False) is None:
            await self._durability.wait(view, last, begun)
        outcome, token = reply.outcome, reply.lock_token
        renewed = outcome == "renewed" or (outcome == "replayed" and token == wanted.lock_token)
        return Locked(
            code,
            book_id,
            reply.user_id,
            token,
            int(reply.until_ms),
            int(reply.ttl_ms),
            outcome == "replayed",
            renewed,
        )

    async def unlock_coupon(self, wanted: UnlockCoupon) -> Unlocked:
        """Returns once Redis has ended the lock."""
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
            "code": code,
            "lock_token": wanted.lock_token,
            "idempotency_key": wanted.idempotency.key,
            "fingerprint": wanted.idempotency.fingerprint,
        }
        reply = await self._plane.call("unlock_coupon", view, until, **parameters)
        if reply.outcome not in DECIDED:
            reply = await self._waiting.decide(reply, "unlock_coupon", view, parameters, begun)
        return Unlocked(reply.outcome == "replayed")

    async def redeem_coupon(self, wanted: RedeemCoupon) -> Redeemed:
        """Returns once the ledger has the redemption, whatever the book's `ack`."""
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
            "code": code,
            "user_id": wanted.user_id,
            "lock_token": wanted.lock_token,
            "reference": wanted.reference,
            "metadata": wanted.metadata,
            "idempotency_key": wanted.idempotency.key,
            "fingerprint": wanted.idempotency.fingerprint,
        }
        reply = await self._plane.call("redeem_coupon", view, until, **parameters)
        if reply.outcome not in DECIDED:
            reply = await self._waiting.decide(reply, "redeem_coupon", view, parameters, begun, receipt=wanted.receipt)
        _, position = reply.position
        if self._durability.durable_or_early(view, position, "ledger", made=reply.entry is not None) is None:
            await self._durability.wait(view, position, begun, entry=reply.entry)
        left = reply.redemptions_left
        return Redeemed(
            code,
            book_id,
            reply.user_id,
            view.shard,
            position,
            int(reply.at_ms),
            int(reply.uses),
            int(left) if left else None,
            reply.outcome == "replayed",
        )
