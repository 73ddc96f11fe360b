"""What must hold of both stores, told from them alone, shard by shard, while the service runs:

* the ledger by itself (coupon_svc/invariants/ledger.py);
* its history (coupon_svc/invariants/chains.py): no row was edited, removed, added or moved since it was written;
* Redis against the ledger: both have the same holders, no free code has one, users' lists are complete, the counts add up.

While the service runs, Redis is ahead of the ledger by the events under way. What it has and the ledger has not must be
among them, and must have arrived in the ledger a moment later.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Collection, Mapping
from functools import partial
from typing import cast

import msgspec
from redis.asyncio import Redis

from coupon_svc.config import Settings
from coupon_svc.domain.books import Book
from coupon_svc.domain.holding import Holding, ListedCoupon
from coupon_svc.invariants.chains import Head, walk_history
from coupon_svc.invariants.check import Check
from coupon_svc.invariants.ledger import LedgerCheck
from coupon_svc.postgres.books import books_of_shard
from coupon_svc.postgres.computed.ciphers import Ciphers, has_master_key
from coupon_svc.postgres.computed.lending import accounted_codes
from coupon_svc.postgres.computed.rows import lent_by_number
from coupon_svc.postgres.database import LedgerConnection
from coupon_svc.postgres.rebuild_source import coupons_of_book
from coupon_svc.redis.keys import ShardKeys
from coupon_svc.redis.meta import META_FIELDS, parse_meta

ARRIVAL_WAIT_S = 10.0
CHUNK = 500


_HAS_RANGES = "SELECT EXISTS (SELECT FROM code_ranges WHERE book_id = $1)"
_WITHOUT_ROW = """
    SELECT code FROM unnest($2::text[]) AS code
    WHERE NOT EXISTS (SELECT FROM codes c WHERE c.tenant_id = $1 AND c.code = code.code)
"""
_NEITHER_HELD_NOR_STORED = """
    SELECT count(*) FROM unnest($3::text[]) AS code
    WHERE NOT EXISTS (SELECT FROM coupons c WHERE c.book_id = $1 AND c.code = code.code)
      AND NOT EXISTS (SELECT FROM codes c WHERE c.tenant_id = $2 AND c.code = code.code)
"""


class RedisCheck(Check):
    """What must hold of a book in Redis, beside the ledger's."""

    REDEMPTIONS = "P4", "a book counts other redemptions than its coupons have"
    HELD = "P1", "a coupon of the ledger is not in Redis, or another's there"
    OLDER_EPOCH = "P2", "a coupon of an older epoch is in Redis and not in the ledger"
    ARRIVED = "P2", "an event was made and has not arrived in the ledger"
    FREE = "P1", "a code is free that somebody holds"
    LISTED = "P2", "a coupon is not in its user's list"
    FREE_LENT = "P4", "a free code was not lent"
    COMPUTED_LENT = "P4", "an assigned computed code was not lent"
    NUMBERS = "P4", "a number that was lent has neither a coupon nor a row"
    COUNTS = "P4", "codes are missing from Redis"


class Finding(msgspec.Struct, frozen=True):
    """One thing that is not as it should be. It names books and numbers, never a code, a user or a key."""

    shard: int
    what: str
    number: int
    book_id: str | None = None


class Report(msgspec.Struct):
    """What was looked at, and what was found."""

    shards: int = 0
    books: int = 0
    codes_held: int = 0
    codes_free: int = 0
    under_way: int = 0
    computed_books: int = 0
    without_key: int = 0
    """Books with computed codes of which nobody could tell whether each is of its range: the master key was not given."""
    unchecked: list[str] = []
    findings: list[Finding] = []
    heads: list[Head] = []

    @property
    def holds(self) -> bool:
        return not self.findings and not self.unchecked

    @property
    def told_without_key(self) -> str:
        """What was not checked of computed codes; "" where the master key was given."""
        if not self.without_key:
            return ""
        return (
            f"{self.without_key} books have computed codes. Their counts were checked; whether each code is of its book's"
            " numbers only COUPON_MASTER_KEY tells."
        )


class Verifier:
    """Verifies with reads alone: it changes nothing in either store."""

    def __init__(
        self,
        settings: Settings,
        connection: LedgerConnection,
        redis: Redis,
        *,
        show_progress: bool,
        earlier: Mapping[int, Head] | None = None,
    ) -> None:
        self._settings = settings
        self._connection = connection
        self._redis = redis
        self._show_progress = show_progress
        self._earlier = earlier or {}
        self.report = Report()
        self._ciphers = Ciphers(settings.master_key)
        self._has_key = False

    async def verify(self) -> Report:
        """Look at every shard. Raises LedgerUnavailable, RedisError."""
        self._has_key = await has_master_key(self._connection, self._ciphers.keys)
        for shard in range(self._settings.shards):
            self._progress(shard)
            for check in LedgerCheck:
                self._find(shard, check, await self._connection.fetchval(check.statement, shard))
            history = await walk_history(
                self._connection, shard, self._earlier.get(shard), partial(self._progress, shard)
            )
            for what, number in history.findings:
                self._find(shard, what, number)
            self.report.heads.append(history.head)
            await self._verify_redis(shard)
            self.report.shards += 1
        self._progress(self._settings.shards)
        return self.report

    async def _verify_redis(self, shard: int) -> None:
        keys = ShardKeys(shard, self._settings.shards)
        values = cast(list[str | None], await self._redis.hmget(keys.meta, META_FIELDS))
        epoch = await self._connection.fetchval("SELECT epoch FROM shards WHERE shard = $1", shard)
        if parse_meta(values).epoch != epoch:
            self.report.unchecked.append(
                f"shard {shard:02d} is not certified in Redis: it is being recovered, or stopped"
            )
            return
        for book in await books_of_shard(self._connection, shard):
            await self._verify_book(shard, keys, book, epoch)
            self.report.books += 1

    async def _verify_book(self, shard: int, keys: ShardKeys, book: Book, epoch: int) -> None:
        ledger = await self._ledger_coupons(book)
        counted = await self._redemptions(keys, book.book_id)
        held = {code: Holding.parse(text) async for code, text in self._scan_hash(keys.holders(book.book_id))}
        uses = sum(holder.uses for holder in held.values())
        wrong = max(counted - uses, uses - await self._redemptions(keys, book.book_id), 0)
        self._find(shard, RedisCheck.REDEMPTIONS, wrong, book)
        missing = [code for code, (user, uses) in ledger.items() if not _same(held.get(code), user, uses)]
        self._find(shard, RedisCheck.HELD, len(missing), book)
        ahead = {code: holder for code, holder in held.items() if code not in ledger or ledger[code][1] < holder.uses}
        old = sum(1 for holder in ahead.values() if holder.last.epoch != epoch)
        self._find(shard, RedisCheck.OLDER_EPOCH, old, book)
        self.report.under_way += len(ahead)
        if ahead and not old:
            lost = await self._not_arrived(shard, book, ahead)
            self._find(shard, RedisCheck.ARRIVED, lost, book)
        free = {code async for code in self._scan_zset(keys.free(book.book_id))}
        self._find(shard, RedisCheck.FREE, len(free & ledger.keys()), book)
        self._find(shard, RedisCheck.LISTED, await self._unlisted(keys, book, held), book)
        self._find(shard, RedisCheck.FREE_LENT, await self._unlent(book, list(free)), book)
        await self._verify_computed(shard, book, list(ledger))
        in_pool, in_hands, lent = await self._counts(keys, book.book_id)
        if in_pool + in_hands != lent:
            self._find(shard, RedisCheck.COUNTS, abs(lent - in_pool - in_hands), book)
        self.report.codes_held += len(held)
        self.report.codes_free += len(free)

    async def _ledger_coupons(self, book: Book) -> dict[str, tuple[str, int]]:
        ledger: dict[str, tuple[str, int]] = {}
        rows = await coupons_of_book(self._connection, book.book_id)
        while rows:
            ledger.update((row["code"], (row["user_id"], row["uses"])) for row in rows)
            rows = await coupons_of_book(self._connection, book.book_id, rows[-1]["code"])
        return ledger

    async def _not_arrived(self, shard: int, book: Book, ahead: dict[str, Holding]) -> int:
        """How many of the coupons that were only in Redis are still not in the ledger a moment later."""
        deadline = asyncio.get_running_loop().time() + ARRIVAL_WAIT_S
        while True:
            rows = await self._connection.fetch(
                "SELECT code, user_id, uses FROM coupons WHERE book_id = $1 AND code = ANY ($2)",
                book.book_id,
                list(ahead),
            )
            arrived = {row["code"]: (row["user_id"], row["uses"]) for row in rows}
            wrong = [
                code
                for code, holder in ahead.items()
                if code not in arrived or arrived[code][0] != holder.user_id or arrived[code][1] < holder.uses
            ]
            if not wrong or asyncio.get_running_loop().time() >= deadline:
                return len(wrong)
            await asyncio.sleep(0.2)

    async def _unlisted(self, keys: ShardKeys, book: Book, held: dict[str, Holding]) -> int:
        unlisted = 0
        codes = list(held.items())
        for start in range(0, len(codes), CHUNK):
            pipe = self._redis.pipeline(transaction=False)
            for code, holder in codes[start : start + CHUNK]:
                pipe.zscore(keys.coupons(book.tenant_id, holder.user_id), ListedCoupon(book.book_id, code).format())
            unlisted += sum(1 for score in await pipe.execute() if score is None)
        return unlisted

    async def _unlent(self, book: Book, free: list[str]) -> int:
        rows = await self._connection.fetch(
            "SELECT free.code, codes.code IS NOT NULL AS stored FROM unnest($2::text[]) AS free (code)"
            " LEFT JOIN codes ON codes.tenant_id = $3 AND codes.code = free.code"
            " WHERE codes.code IS NULL OR codes.book_id <> $1"
            " OR place NOT BETWEEN 0 AND (SELECT leased_upto FROM books WHERE book_id = $1)",
            book.book_id,
            free,
            book.tenant_id,
        )
        without_row = [row["code"] for row in rows if not row["stored"]]
        return len(rows) - len(await self._lent_by_number(book, without_row))

    async def _lent_by_number(self, book: Book, codes: list[str]) -> Collection[str]:
        """Those of the codes that are computed ones of the book, and lent. Without the master key: all, where the book has
        computed codes."""
        if not codes or not await self._connection.fetchval(_HAS_RANGES, book.book_id):
            return ()
        if not self._has_key:
            return codes
        return await lent_by_number(self._connection, book.tenant_id, book.book_id, codes, self._ciphers)

    async def _verify_computed(self, shard: int, book: Book, held: list[str]) -> None:
        """What only the master key can tell of a book with computed codes."""
        if not await self._connection.fetchval(_HAS_RANGES, book.book_id):
            return
        self.report.computed_books += 1
        if not self._has_key:
            self.report.without_key += 1
            return
        rows = await self._connection.fetch(_WITHOUT_ROW, book.tenant_id, held)
        without_row = [row["code"] for row in rows]
        lent = await self._lent_by_number(book, without_row)
        self._find(shard, RedisCheck.COMPUTED_LENT, len(without_row) - len(lent), book)
        unknown = 0
        async for codes in accounted_codes(self._connection, book.book_id, self._ciphers):
            unknown += await self._connection.fetchval(_NEITHER_HELD_NOR_STORED, book.book_id, book.tenant_id, codes)
        self._find(shard, RedisCheck.NUMBERS, unknown, book)

    async def _counts(self, keys: ShardKeys, book_id: str) -> tuple[int, int, int]:
        pipe = self._redis.pipeline(transaction=True)  # one moment
        pipe.zcard(keys.free(book_id))
        pipe.hlen(keys.holders(book_id))
        pipe.hget(keys.book(book_id), "lent")
        in_pool, in_hands, lent = await pipe.execute()
        return in_pool, in_hands, int(lent if lent is not None else -1)

    async def _redemptions(self, keys: ShardKeys, book_id: str) -> int:
        counts = await self._redis.hmget(keys.book(book_id), "redeemed", "partly_redeemed")
        return sum(int(count or 0) for count in counts)

    async def _scan_hash(self, key: str) -> AsyncIterator[tuple[str, str]]:
        async for field, value in self._redis.hscan_iter(key, count=CHUNK):
            yield field, value

    async def _scan_zset(self, key: str) -> AsyncIterator[str]:
        async for member, _ in self._redis.zscan_iter(key, count=CHUNK):
            yield member

    def _find(self, shard: int, what: str, number: int, book: Book | None = None) -> None:
        if number:
            self.report.findings.append(Finding(shard, what, number, book.book_id if book else None))

    def _progress(self, done: int, rows: int = 0) -> None:
        if self._show_progress:
            total = self._settings.shards
            bar = "#" * (30 * done // total)
            at = f", {rows} rows of the next" if rows else ""
            end = "\n" if done == total else ""
            print(f"\r\033[K[{bar:30}] {done}/{total} shards{at}", end=end, file=sys.stderr, flush=True)


def _same(holder: Holding | None, user_id: str, uses: int) -> bool:
    return holder is not None and holder.user_id == user_id and holder.uses >= uses
