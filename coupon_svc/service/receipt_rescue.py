"""Brings back the record of an assign that was lost, when its receipt is shown: into the ledger first, then to Redis."""

from __future__ import annotations

from coupon_svc.domain.holding import Holding
from coupon_svc.domain.outcomes import Outcome, Refused
from coupon_svc.domain.receipts import check_receipt
from coupon_svc.hot import in_a_task
from coupon_svc.postgres.database import Database
from coupon_svc.postgres.late_events import redeem_receipt
from coupon_svc.redis.data_plane import DataPlane
from coupon_svc.redis.shard_view import ShardView
from coupon_svc.service.durability import Durability
from coupon_svc.service.registration import Registration


class ReceiptRescue:
    """Takes codes out of quarantine."""

    def __init__(
        self, plane: DataPlane, database: Database, durability: Durability, registration: Registration
    ) -> None:
        self._plane = plane
        self._database = database
        self._durability = durability
        self._registration = registration

    async def restore(self, view: ShardView, tenant_id: int, book_id: str, code: str, text: str, begun: float) -> bool:
        """Whether the ledger and Redis have the record that the receipt proves. False for a receipt that is not ours for
        this code, or that another history contradicts.

        Raises Refused(outcome_unknown) when the ledger has it and Redis may not; LedgerUnavailable. May be repeated.
        """
        secret = self._registration.receipt_secret
        receipt = check_receipt(secret, tenant_id, book_id, code, text) if secret else None
        if receipt is None:
            return False
        await in_a_task()
        left_s = self._durability.left_s(begun)
        async with self._database.connection(left_s, wait_s=left_s) as connection, connection.transaction():
            if not await redeem_receipt(connection, view.shard, book_id, code, receipt):
                return False
        holding = Holding(receipt.position, receipt.position, 0, receipt.at_ms, receipt.user_id)
        try:
            await self._plane.call(
                "release_coupon",
                view,
                begun + self._durability.request_s,
                tenant_id=tenant_id,
                book_id=book_id,
                code=code,
                user_id=receipt.user_id,
                holding=holding.format(),
            )
        except Refused:  # whatever it says of Redis, the ledger has the record by now
            raise Refused(Outcome.OUTCOME_UNKNOWN) from None
        return True
