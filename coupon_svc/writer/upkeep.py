"""The writer's upkeep of its shards: what a recovery would otherwise have to look for among all that ever was."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

from coupon_svc.postgres import outstanding
from coupon_svc.postgres.database import bounded, open_connection
from coupon_svc.postgres.errors import BookBusy, LedgerUnavailable
from coupon_svc.postgres.marks import note_marks
from coupon_svc.postgres.shards import connection_name
from coupon_svc.writer.shard import Shard

log = logging.getLogger(__name__)

LOOK_EVERY_S = 60.0
SWEEP_EVERY_S = 3600.0
STATEMENTS_TIMEOUT_S = 10.0
ENOUGH_CODES = 20_000
"""A book with so many codes lent since it was accounted for is not kept waiting for the hourly sweep."""


class Upkeep:
    """Once a minute: marks, and the books that were lent much. Once an hour: every book."""

    def __init__(self, url: str, writer_id: str, shards: Mapping[int, Shard]) -> None:
        self._url = url
        self._writer_id = writer_id
        self._shards = shards
        self._connection: Any = None

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
        connection = await self._connected()
        await bounded(connection, note_marks(connection, self._writer_id), STATEMENTS_TIMEOUT_S)
        shards = [number for number, shard in self._shards.items() if shard.opened_on is not None]
        due = outstanding.books_to_account(connection, shards, 0 if sweep else ENOUGH_CODES)
        for book_id in await bounded(connection, due, STATEMENTS_TIMEOUT_S):
            try:
                while await bounded(connection, outstanding.account_piece(connection, book_id), STATEMENTS_TIMEOUT_S):
                    pass
            except BookBusy:
                continue  # there is another turn
        if sweep:
            await self._prune(connection, shards)

    async def _prune(self, connection: Any, shards: list[int]) -> None:
        books = outstanding.books_with_outstanding(connection, shards)
        for book_id in await bounded(connection, books, STATEMENTS_TIMEOUT_S):
            last: str | None = ""
            while last is not None:
                piece = outstanding.prune_piece(connection, book_id, last)
                last = await bounded(connection, piece, STATEMENTS_TIMEOUT_S)

    async def _connected(self) -> Any:
        if self._connection is None or self._connection.is_closed():
            self._connection = await open_connection(self._url, connection_name(self._writer_id))
        return self._connection
