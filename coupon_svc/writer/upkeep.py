"""The writer's upkeep of its shards: what a recovery would otherwise have to look for among all that ever was."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

from coupon_svc.postgres import outstanding
from coupon_svc.postgres.computed.ciphers import NO_CIPHERS, Ciphers
from coupon_svc.postgres.database import LedgerSession
from coupon_svc.postgres.errors import BookBusy, LedgerUnavailable
from coupon_svc.postgres.marks import note_marks
from coupon_svc.postgres.parts import make_parts
from coupon_svc.postgres.shards import connection_name
from coupon_svc.writer.shard import Shard

log = logging.getLogger(__name__)

LOOK_EVERY_S = 60.0
SWEEP_EVERY_S = 3600.0
STATEMENTS_TIMEOUT_S = 10.0
ENOUGH_CODES = 20_000
"""A book with so many codes lent since it was accounted for is not kept waiting for the hourly sweep."""


class Upkeep:
    """Once a minute: marks, and the books that were lent much. Once an hour: every book, and parts for months to come."""

    def __init__(self, url: str, writer_id: str, shards: Mapping[int, Shard], ciphers: Ciphers = NO_CIPHERS) -> None:
        self._ciphers = ciphers
        self._writer_id = writer_id
        self._shards = shards
        self.session = LedgerSession(url, connection_name(writer_id))

    async def run(self) -> None:
        """Work until cancelled."""
        loop = asyncio.get_running_loop()
        swept_at = loop.time()
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            sweep = loop.time() - swept_at > SWEEP_EVERY_S
            try:
                await self.turn(sweep=sweep)
            except LedgerUnavailable as error:
                log.info("upkeep has to wait: %s", error)
                continue
            if sweep:
                swept_at = loop.time()

    async def turn(self, *, sweep: bool) -> None:
        """Everything there is to do now, in pieces. Raises LedgerUnavailable."""
        async with self.session.work(STATEMENTS_TIMEOUT_S) as connection:
            await note_marks(connection, self._writer_id)
        shards = [number for number, shard in self._shards.items() if shard.is_open]
        async with self.session.work(STATEMENTS_TIMEOUT_S) as connection:
            due = await outstanding.books_to_account(connection, shards, 0 if sweep else ENOUGH_CODES)
        for book_id in due:
            try:
                while await self._account_piece(book_id):
                    pass
            except BookBusy:
                continue  # there is another turn
        if sweep:
            await self._prune(shards)
            async with self.session.work(STATEMENTS_TIMEOUT_S) as connection:
                await make_parts(connection)

    async def _account_piece(self, book_id: str) -> bool:
        async with self.session.work(STATEMENTS_TIMEOUT_S) as connection:
            return await outstanding.account_piece(connection, book_id, ciphers=self._ciphers)

    async def _prune(self, shards: list[int]) -> None:
        async with self.session.work(STATEMENTS_TIMEOUT_S) as connection:
            books = await outstanding.books_with_outstanding(connection, shards)
        for book_id in books:
            last: str | None = ""
            while last is not None:
                async with self.session.work(STATEMENTS_TIMEOUT_S) as connection:
                    last = await outstanding.prune_piece(connection, book_id, last)
