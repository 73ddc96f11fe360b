"""Tells Postgres that this process lives, and learns from it which epochs are over.

Only while registered may an answer of an `ack = redis` book leave before the ledger knows: see `DataPlane.may_answer_early`.
"""

from __future__ import annotations

import asyncio
import logging
import secrets

from coupon_svc.domain.clock import boot_s
from coupon_svc.domain.master_key import MasterKeys
from coupon_svc.domain.reports import Report
from coupon_svc.loops import keep_running
from coupon_svc.postgres.computed.ciphers import NO_CIPHERS, check_master_key
from coupon_svc.postgres.database import LedgerConnection, LedgerSession
from coupon_svc.postgres.epochs import EPOCH_CHANNEL
from coupon_svc.postgres.errors import DatabaseUnfit, LedgerUnavailable
from coupon_svc.postgres.migrations import check_installation, known_migrations
from coupon_svc.postgres.processes import (
    PROCESS_TTL_S,
    begin_process,
    end_process,
    epochs_of_shards,
    receipt_secret,
    renew_process,
    report_seen,
)
from coupon_svc.redis.data_plane import DataPlane

log = logging.getLogger(__name__)

RENEW_EVERY_S = 1.0
TIMEOUT_S = 2.0
MARGIN_S = 1.0


class Registration:
    """Runs in the background of an API process; `start` and `stop` it with the data plane."""

    def __init__(self, url: str, plane: DataPlane, master_keys: MasterKeys = NO_CIPHERS.keys) -> None:
        self._plane = plane
        self._known = known_migrations()
        self._master_keys = master_keys
        self.session = LedgerSession(url, "coupon-api-registration", on_open=self._join)
        self._process_id = ""
        """New with every registration: one that has lapsed cannot be taken up again."""
        self._reports: list[Report] = []
        """Of epochs that are over, until Postgres has them."""
        self.receipt_secret: bytes | None = None
        """Known from the first registration on, and so before the first answer that may need one."""
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._task = asyncio.create_task(keep_running(self._run))

    async def stop(self) -> None:
        """End for good: report what was seen of every epoch. No request may be under way any more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._plane.register_until(0.0)
        if not self._process_id:
            return
        try:
            async with self.session.work(TIMEOUT_S) as connection:
                await report_seen(connection, self._process_id, [*self._reports, *self._plane.reports()])
                await end_process(connection, self._process_id)
            self.session.close()
        except LedgerUnavailable:
            log.warning("postgres is away: what this process has answered is not reported")

    async def _run(self) -> None:
        while True:
            try:
                async with self.session.work(TIMEOUT_S) as connection:
                    await self._renew(connection)
            except LedgerUnavailable:
                pass
            except DatabaseUnfit as error:
                log.critical("this process answers nothing: %s", error)
            try:
                async with asyncio.timeout(RENEW_EVERY_S):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()

    async def _renew(self, connection: LedgerConnection) -> None:
        if self.receipt_secret is None:
            self.receipt_secret = await receipt_secret(connection)
        asked_at = boot_s()
        if not self._process_id or not await renew_process(connection, self._process_id):
            self._process_id = "api_" + secrets.token_hex(8)
            await begin_process(connection, self._process_id)
        for shard, (epoch, live) in enumerate(await epochs_of_shards(connection)):
            # It stops early answers of older epochs, so what it returns is final and can be reported.
            report = self._plane.epoch_began(shard, epoch, live)
            if report is not None:
                self._reports.append(report)
        if self._reports:
            await report_seen(connection, self._process_id, self._reports)
            self._reports = []
        self._plane.register_until(asked_at + PROCESS_TTL_S - MARGIN_S)

    async def _join(self, connection: LedgerConnection) -> None:
        """Listen on a new connection, and learn whose database this is. Raises DatabaseUnfit."""
        await connection.add_listener(EPOCH_CHANNEL, lambda *_: self._wake.set())
        installation = await check_installation(connection, len(self._plane.views), self._known)
        await check_master_key(connection, self._master_keys)
        self._plane.join(installation)
