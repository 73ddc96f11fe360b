"""Runs the scripts of a book, and waits a moment when the book or its codes are still on their way to Redis."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

from coupon_svc.domain.outcomes import Outcome, Refused
from coupon_svc.domain.shards import book_shard
from coupon_svc.postgres.catalogue import lease_code
from coupon_svc.postgres.database import Database
from coupon_svc.postgres.resolve import Resolver
from coupon_svc.redis.connection import Reply
from coupon_svc.redis.data_plane import ShardView, Store

PATIENCE_S = 0.5
"""How long a request waits for a book or for codes before it is told to come again."""
_ON_THEIR_WAY = frozenset({"book_not_loaded", "refilling", "not_lent"})


class Place(NamedTuple):
    """Where a book lives."""

    shard: int
    book_id: str
    view: ShardView


class BookRunner:
    """The way from the API's functions to a book's scripts."""

    def __init__(self, store: Store, resolver: Resolver, database: Database, shards: int) -> None:
        self._store = store
        self._resolver = resolver
        self._database = database
        self._shards = shards

    def place(self, book_id: str) -> Place:
        """Where a book of this id lives, if there is one. Raises Refused(book_not_found) for what is no book's id."""
        shard = book_shard(book_id, self._shards)
        if shard is None:
            raise Refused(Outcome.BOOK_NOT_FOUND)
        return Place(shard, book_id, self._store.views[shard])

    async def run(
        self,
        name: str,
        place: Place,
        tenant_id: int,
        keys: Sequence[str],
        args: Sequence[str | int],
        *,
        code: str = "",
        sure: bool = False,
    ) -> Reply:
        """The script's reply, once its book is in Redis. `code` is the one to be lent when it is not there.

        Raises Refused: what `Store.run` raises; book_not_found; recovering or refilling when it takes too long.
        """
        reply = await self._store.run(name, place.shard, keys, args, sure=sure)
        if reply[0] not in _ON_THEIR_WAY:
            return reply
        loop = asyncio.get_running_loop()
        deadline, pause, lent = loop.time() + PATIENCE_S, 0.004, False
        while reply[0] in _ON_THEIR_WAY:
            if loop.time() >= deadline:
                raise Refused(Outcome.RECOVERING if reply[0] == "book_not_loaded" else Outcome.REFILLING)
            if reply[0] == "book_not_loaded" and await self._was_loaded(tenant_id, place.book_id):
                reply = await self._store.run(name, place.shard, keys, args, sure=sure)
                if reply[0] == "book_not_loaded":  # it was here and is gone
                    await self._store.doubt(place.shard)
                    raise Refused(Outcome.RECOVERING)
                continue
            if reply[0] == "not_lent" and not lent:
                async with self._database.connection() as connection, connection.transaction():
                    await lease_code(connection, tenant_id, place.book_id, code)
                lent = True
            await asyncio.sleep(pause)
            pause *= 1.5
            reply = await self._store.run(name, place.shard, keys, args, sure=sure)
        return reply

    async def _was_loaded(self, tenant_id: int, book_id: str) -> bool:
        loaded = await self._resolver.book_loaded(tenant_id, book_id)
        if loaded is None:
            raise Refused(Outcome.BOOK_NOT_FOUND)
        return loaded
