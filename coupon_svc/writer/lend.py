"""Brings books and codes to Redis: new and changed books, the next block of codes before the pool runs dry, and codes
that were lent alone. Postgres notes first that codes are lent; so whatever dies here, nothing is lent twice."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Mapping

from coupon_svc.domain.books import Book
from coupon_svc.domain.shards import shard_of
from coupon_svc.postgres import lending, outstanding
from coupon_svc.postgres.books import WRITER_CHANNEL, books_of_shard
from coupon_svc.postgres.computed.ciphers import NO_CIPHERS, Ciphers
from coupon_svc.postgres.database import UNAVAILABLE, LedgerConnection, LedgerSession, within
from coupon_svc.postgres.errors import BookBusy, DatabaseUnfit, LedgerUnavailable, NotOwner
from coupon_svc.postgres.idempotency import forget_old
from coupon_svc.postgres.lone_leases import lone_leases, note_lone_brought
from coupon_svc.postgres.shards import OwnedShard, connection_name
from coupon_svc.redis.codec import encode_book
from coupon_svc.redis.control import ShardControl
from coupon_svc.redis.errors import CountsDiffer, OutOfMemory, StoreError
from coupon_svc.writer.crash import crash_point
from coupon_svc.writer.pool import Pool
from coupon_svc.writer.shard import Shard, term_of

log = logging.getLogger(__name__)

STATEMENTS_TIMEOUT_S = 10.0
LOOK_EVERY_S = 1.0
FORGET_EVERY_S = 600.0
FAST_REFILL_S, SLOW_REFILL_S = 2.0, 30.0
CODES_PER_LEASE_MAX = 5_000
"""A block is lent in pieces. While the rows of one are read, the writer does nothing else: 1 ms, but 46 ms for 100,000."""


class Lender:
    """Works when told to, by NOTIFY and by the pools that the persister counts down. Once a second it looks for books that
    have changed and codes that were lent alone, in case it was not told."""

    def __init__(
        self,
        url: str,
        writer_id: str,
        store: ShardControl,
        shards: Mapping[int, Shard],
        lease_min: int,
        lease_max: int,
        ciphers: Ciphers = NO_CIPHERS,
    ) -> None:
        self.session = LedgerSession(url, connection_name(writer_id), on_open=self._listen)
        self._writer_id = writer_id
        self._store = store
        self._shards = shards
        self._lease_min = lease_min
        self._lease_max = lease_max
        self._ciphers = ciphers
        self._work = asyncio.Event()
        self._to_look_at: dict[str, Shard] = {}
        self._in_doubt: dict[str, Shard] = {}
        """Books whose last lease may have been committed and not have come to Redis."""

    def count_assigned(self, shard: Shard, book_id: str, number: int) -> None:
        """The persister saw this many codes of the book leave the pool."""
        pool = shard.pools.get(book_id)
        if pool is not None:
            pool.in_pool -= number
            if not pool.wants_refill():
                return
        self.look_at(shard, book_id)

    def look_at(self, shard: Shard, book_id: str) -> None:
        """See soon whether the book's pool wants codes."""
        self._to_look_at[book_id] = shard
        self._work.set()

    async def run(self) -> None:
        """Lend until cancelled."""
        forgotten_at = 0.0
        loop = asyncio.get_running_loop()
        while True:
            try:
                async with asyncio.timeout(LOOK_EVERY_S):
                    await self._work.wait()
            except TimeoutError:
                pass
            self._work.clear()
            try:
                connection = await self.session.connection()
                async with within(connection, STATEMENTS_TIMEOUT_S):
                    await self.turn(connection)
                await self._bring_doubtful(connection)
                if loop.time() - forgotten_at > FORGET_EVERY_S:
                    async with within(connection, STATEMENTS_TIMEOUT_S):
                        await forget_old(connection)
                    forgotten_at = loop.time()
            except (StoreError, LedgerUnavailable) as error:
                log.info("lending has to wait: %s", error)
                await asyncio.sleep(0.1)

    async def turn(self, connection: LedgerConnection) -> None:
        """Everything there is to lend now. Raises StoreError, LedgerUnavailable."""
        # The shards themselves, not their numbers: meanwhile one may be given up, or be taken anew as another object.
        open_shards = {n: shard for n, shard in self._shards.items() if shard.is_open}
        await self._load_changed(connection, open_shards)
        # What is lent in a term is brought in that term: a recovery that comes between may give the code to another.
        lent_in = {number: (shard, shard.owned) for number, shard in open_shards.items()}
        for book_id, lease in (await lone_leases(connection, list(open_shards))).items():
            shard, owned = lent_in[shard_of(book_id)]
            if self._shard_of(book_id) is shard:
                await self._guarded(shard, owned, self._bring_lone(connection, shard, owned, book_id, lease))
        for book_id, shard in list(self._to_look_at.items()):
            if self._shards.get(shard.number) is not shard:
                del self._to_look_at[book_id]  # it is another writer's by now, or was taken anew
            elif shard.is_open:  # else it is being opened: look again then
                await self._guarded(shard, shard.owned, self._refill(connection, shard, book_id))
                # A book that was paused must not wait for the refills of all others.
                await self._load_changed(connection, open_shards)

    async def _load_changed(self, connection: LedgerConnection, open_shards: Mapping[int, Shard]) -> None:
        """Bring books whose rules or codes have changed. Raises StoreError, LedgerUnavailable."""
        for book in await lending.books_to_load(connection, list(open_shards)):
            if shard := self._shard_of(book.book_id):
                await self._guarded(shard, shard.owned, self._load_book(connection, shard, book))

    async def bring_outstanding_of_shard(self, connection: LedgerConnection, shard: Shard) -> None:
        """Bring again what was lent and may not have arrived, and look at every pool: after a take-over.

        Raises StoreError, LedgerUnavailable; ShardNotUsable when a book is gone from Redis.
        """
        owned = shard.owned
        async with within(connection, STATEMENTS_TIMEOUT_S):
            books = await books_of_shard(connection, owned.shard)
        counts = await self._store.lent_counts(owned.shard, [book.book_id for book in books])
        for book, count in zip(books, counts, strict=True):
            if count is None:
                raise CountsDiffer(f"book {book.book_id} is gone")
            if count != book.lent:
                await self._bring_outstanding_of_book(connection, shard, book.book_id)
            if book.unlent > 0:
                self.look_at(shard, book.book_id)

    async def _bring_doubtful(self, connection: LedgerConnection) -> None:
        """Bring what books in doubt were lent, each by itself: however long that takes, it holds up no turn."""
        for book_id, shard in list(self._in_doubt.items()):
            if self._shards.get(shard.number) is not shard:
                if self._in_doubt.get(book_id) is shard:
                    del self._in_doubt[book_id]  # whoever opens the shard now looks at all its books
            elif shard.is_open:  # else it is being opened: look again then
                await self._guarded(shard, shard.owned, self._bring_outstanding_of_book(connection, shard, book_id))

    async def _bring_outstanding_of_book(self, connection: LedgerConnection, shard: Shard, book_id: str) -> None:
        """Bring what the book was lent and has no coupon. What cannot be brought now leaves the book in doubt."""
        owned = shard.owned
        self._in_doubt[book_id] = shard
        try:
            more = True
            while more:
                async with within(connection, STATEMENTS_TIMEOUT_S):
                    more = await outstanding.account_piece(connection, book_id, ciphers=self._ciphers)
            async with within(connection, STATEMENTS_TIMEOUT_S):
                lease = await outstanding.outstanding_lease(connection, book_id)
            # Whatever was on its way is among them.
            await self._bring(shard, owned, book_id, lease, doubtful=False)
        except (BookBusy, OutOfMemory) as error:
            # No reason to keep the shard shut: redeems go on, and only its owner takes from the stream.
            log.info("shard %02d: codes have to wait: %s", owned.shard, type(error).__name__)
            return
        self._in_doubt.pop(book_id, None)

    async def _guarded(self, shard: Shard, owned: OwnedShard, work: Awaitable[None]) -> None:
        """Do one piece of work for a shard, as it was `owned` when that began. What is found amiss shuts that shard, and
        holds up no other.

        Raises StoreError, LedgerUnavailable, which are the trouble of all shards."""
        try:
            await work
        except OutOfMemory as error:  # the rules of other books need no memory, and are to be in force all the same
            log.warning("shard %02d: codes have to wait: %s", shard.number, error)
        except DatabaseUnfit as error:  # a key is missing that this process did not need when it started
            log.error("shard %02d: codes have to wait: %s", shard.number, error)
        except (StoreError, LedgerUnavailable, *UNAVAILABLE):
            raise
        except NotOwner as error:
            shard.report(term_of(owned), error)
        except Exception as error:  # to take the shard over again would not mend a book that cannot be brought
            shard.report(term_of(owned), error, recover=True)

    async def _load_book(self, connection: LedgerConnection, shard: Shard, book: Book) -> None:
        owned = shard.owned
        book, loaded, lone = await lending.read_book_now(connection, book.book_id)
        rules = encode_book(book) | {"unlent": str(_kept_back(book.unlent, lone, book.book_id in self._in_doubt))}
        await self._store.put_book(term_of(owned), book.book_id, book.version, rules, known=loaded)
        crash_point("lend.put")
        if not loaded and not await lending.mark_loaded(connection, self._writer_id, owned, book.book_id, 0):
            return  # somebody writes to it; it stays to be loaded
        await self._refill(connection, shard, book.book_id)
        await lending.mark_loaded(connection, self._writer_id, owned, book.book_id, book.version)
        crash_point("lend.marked")

    async def _refill(self, connection: LedgerConnection, shard: Shard, book_id: str) -> None:
        """Lend the next piece of a block if the pool wants it; tell Redis in any case how many codes are kept back. The book
        stays to be looked at until that is done."""
        self._to_look_at[book_id] = shard
        owned = shard.owned
        book, _, lone = await lending.read_book_now(connection, book_id)
        pool = shard.pools.get(book_id)
        if pool is None:
            pool = shard.pools[book_id] = Pool(book.ack, self._lease_min)
        pool.unlent = book.unlent
        doubtful = book_id in self._in_doubt
        kept_back = _kept_back(book.unlent, lone, doubtful)
        pool.in_pool = await self._store.load_codes(term_of(owned), book_id, [], kept_back)
        if not pool.wants_refill():
            self._to_look_at.pop(book_id, None)
            return
        if not pool.to_lend:
            self._begin_block(pool)
        piece = min(pool.to_lend, CODES_PER_LEASE_MAX)
        self._in_doubt[book_id] = shard  # until it is brought: a lease may be committed, and its reply lost
        lease = await lending.lease_block(connection, self._writer_id, owned, book_id, piece, self._ciphers)
        if lease is None:
            if not doubtful:
                self._in_doubt.pop(book_id, None)
            return  # somebody writes to the book, and tells when it is done
        crash_point("lend.leased")
        pool.in_pool = await self._bring(shard, owned, book_id, lease, doubtful=doubtful)
        if not doubtful:
            self._in_doubt.pop(book_id, None)
        pool.unlent, pool.to_lend = lease.unlent, max(0, pool.to_lend - len(lease.codes)) if lease.unlent else 0
        if pool.wants_refill():  # there is another piece, or what was brought is gone already
            self._work.set()
        else:
            self._to_look_at.pop(book_id, None)
        crash_point("lend.brought")

    def _begin_block(self, pool: Pool) -> None:
        """Blocks grow while refills come fast, and shrink when they are rare."""
        now = asyncio.get_running_loop().time()
        since, pool.refilled_at = now - pool.refilled_at, now
        if since < FAST_REFILL_S:
            pool.block = min(2 * pool.block, self._lease_max)
        elif since > SLOW_REFILL_S:
            pool.block = max(pool.block // 2, self._lease_min)
        pool.to_lend = pool.block

    async def _bring_lone(
        self, connection: LedgerConnection, shard: Shard, owned: OwnedShard, book_id: str, lease: lending.Lease
    ) -> None:
        await self._bring(shard, owned, book_id, lease, doubtful=book_id in self._in_doubt)
        crash_point("lend.lone_brought")
        await note_lone_brought(connection, book_id, lease.codes)

    async def _bring(
        self, shard: Shard, owned: OwnedShard, book_id: str, lease: lending.Lease, *, doubtful: bool
    ) -> int:
        """Put leased codes into the pool, however often it takes: they are lent, so nobody else will bring them. `owned` is
        the shard as it was when they were lent: in another epoch they may be somebody's by now. `doubtful`: whether another
        block of the book may be on its way."""
        kept_back = _kept_back(lease.unlent, lease.lone, doubtful)
        while True:
            try:
                return await self._store.load_codes(term_of(owned), book_id, lease.codes, kept_back)
            except OutOfMemory:
                raise
            except StoreError:
                if not shard.is_open:
                    raise  # whoever opens the shard again brings what is outstanding
                await asyncio.sleep(0.1)

    def _shard_of(self, book_id: str) -> Shard | None:
        shard = self._shards.get(shard_of(book_id))
        return shard if shard is not None and shard.is_open else None

    async def _listen(self, connection: LedgerConnection) -> None:
        await connection.add_listener(WRITER_CHANNEL, lambda *_: self._work.set())
        self._work.set()  # what was told before is in the tables


def _kept_back(unlent: int, lone: int, doubtful: bool) -> int:
    """How many codes of a book are still to come to Redis: those that are not lent, and those that were lent alone. A block
    may be on its way, too, if its lease was committed and the reply lost: it counts as one. While any are to come, the book
    is not exhausted."""
    return unlent + lone + doubtful
