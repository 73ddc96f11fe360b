"""What an operation that could not be decided yet waits for: a book or codes on their way to Redis, a receipt's record.
Nothing is asked for here but a code by name: the shard's owner brings books and codes by itself (coupon_svc/writer/lend.py).

The usual reply never comes here. A use case runs its operation, and hands over what is not in DECIDED.
"""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import Any

from coupon_svc.domain.outcomes import Outcome, Refused
from coupon_svc.hot import in_a_task
from coupon_svc.postgres.computed.ciphers import NO_CIPHERS, Ciphers
from coupon_svc.postgres.database import Database
from coupon_svc.postgres.lone_leases import lease_code
from coupon_svc.redis.contract import Reply
from coupon_svc.redis.data_plane import DataPlane
from coupon_svc.redis.shard_view import ShardView
from coupon_svc.service.code_directory import CodeDirectory
from coupon_svc.service.durability import PATIENCE_S, Durability
from coupon_svc.service.polling import Poll, Run
from coupon_svc.service.receipt_rescue import ReceiptRescue

DECIDED = frozenset({"ok", "replayed", "already_yours", "confirmed", "renewed"})
"""Outcomes of an operation that are no refusal."""
_BOOK, _CODES = "book_not_loaded", "refilling"
"""Outcomes for which all who ask for the same book wait together."""


class Waiting:
    """Runs an operation again until it is decided."""

    def __init__(
        self,
        plane: DataPlane,
        directory: CodeDirectory,
        database: Database,
        durability: Durability,
        rescue: ReceiptRescue,
        ciphers: Ciphers = NO_CIPHERS,
    ) -> None:
        self._plane = plane
        self._directory = directory
        self._database = database
        self._durability = durability
        self._rescue = rescue
        self._ciphers = ciphers
        self._polls: dict[tuple[int, str, str], Poll] = {}
        """By tenant, book, and what is waited for."""

    async def decide(
        self,
        reply: Reply,
        operation: str,
        view: ShardView,
        parameters: dict[str, Any],
        begun: float,
        *,
        receipt: str | None = None,
    ) -> Reply:
        """The reply that decides, where `reply` did not.

        `parameters` are those of the operation: tenant_id, book_id and, where a code may have to be lent or to leave the
        quarantine, code. A code in quarantine whose `receipt` is shown leaves it first.

        Raises Refused: the operation's own refusal; what `DataPlane.call` raises; book_not_found; recovering or refilling
        when PATIENCE_S are over.
        """
        tenant_id, book_id = parameters["tenant_id"], parameters["book_id"]
        until = begun + self._durability.request_s
        pause, lent, rescued = 0.004, False, False

        async def run() -> Reply:
            return await self._plane.call(operation, view, until, **parameters)

        while reply.outcome not in DECIDED:
            outcome = reply.outcome
            if outcome in (_BOOK, _CODES):
                reply, lost = await self._wait_together(tenant_id, book_id, outcome, run, begun)
                if lost:  # the book was here and is gone
                    await self._plane.doubt(view)
                    raise Refused(Outcome.RECOVERING)
            elif outcome == "not_lent":
                if monotonic() >= begun + PATIENCE_S:
                    raise Refused(Outcome.REFILLING)
                await in_a_task()
                if not lent:
                    await self._lend(tenant_id, book_id, parameters["code"], begun)
                    lent = True
                await asyncio.sleep(pause)
                pause *= 1.5
                reply = await run()
            elif outcome == "code_quarantined" and receipt is not None and not rescued:
                rescued = await self._rescue.restore(view, tenant_id, book_id, parameters["code"], receipt, begun)
                if not rescued:
                    raise refusal(reply)
                reply = await run()
            else:
                raise refusal(reply)
        return reply

    async def _wait_together(
        self, tenant_id: int, book_id: str, outcome: str, run: Run, begun: float
    ) -> tuple[Reply, bool]:
        """As `Poll.wait`, with all who wait for the same thing of the same book."""

        async def was_loaded(asked_for: float) -> bool:
            return await self._was_loaded(tenant_id, book_id, asked_for)

        key = tenant_id, book_id, outcome
        poll = self._polls.get(key)
        if poll is None:
            poll = Poll(_BOOK, Outcome.RECOVERING, was_loaded) if outcome == _BOOK else Poll(_CODES, Outcome.REFILLING)
            self._polls[key] = poll
        try:
            return await poll.wait(run, begun)
        finally:
            if poll.is_over:
                self._polls.pop(key, None)

    async def _was_loaded(self, tenant_id: int, book_id: str, begun: float) -> bool:
        loaded = await self._directory.book_loaded(tenant_id, book_id, self._durability.left_s(begun))
        if loaded is None:
            raise Refused(Outcome.BOOK_NOT_FOUND)
        return loaded

    async def _lend(self, tenant_id: int, book_id: str, code: str, begun: float) -> None:
        """Lend the code alone, before its turn."""
        left_s = self._durability.left_s(begun)
        async with self._database.connection(left_s, wait_s=left_s) as connection, connection.transaction():
            await lease_code(connection, tenant_id, book_id, code, self._ciphers)


def refusal(reply: Reply) -> Refused:
    """An operation's refusal as the exception that tells it."""
    outcome = Outcome(reply.outcome)
    if outcome is Outcome.USER_CODE_LIMIT:
        return Refused(outcome, limit=reply.limit, held=reply.held)
    if outcome is Outcome.LOCKED:
        return Refused(outcome, retry_after_seconds=max(1, -(-reply.retry_after_ms // 1000)))
    return Refused(outcome)
