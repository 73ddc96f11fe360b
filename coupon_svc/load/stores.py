"""What Redis and the ledger hold after a load, held against what its callers were answered. It only reads."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import asyncpg
from redis.asyncio import Redis
from redis.exceptions import RedisError

from coupon_svc.config import load_settings
from coupon_svc.domain.position import parse_shard_position
from coupon_svc.load.audit import LOST_NOTE, Verdict
from coupon_svc.load.history import Book, Coupon, History
from coupon_svc.load.plan import LoadError
from coupon_svc.ops.verify import Verifier
from coupon_svc.postgres.database import PATIENT_S, open_connection
from coupon_svc.postgres.errors import LedgerUnavailable

ARRIVAL_WAIT_S = 15.0
"""How long the ledger may take to have what was under way when the load ended."""


class Stores(NamedTuple):
    """Connections that read."""

    redis: Any
    database: Any
    redis_url: str
    database_url: str

    async def redis_bytes(self) -> int:
        """Memory that Redis uses for its data. Raises OSError."""
        try:
            info = await self.redis.info("memory")
        except RedisError as error:
            raise OSError(str(error)) from None
        return int(info["used_memory"])


@asynccontextmanager
async def open_stores(redis_url: str, database_url: str) -> AsyncIterator[Stores]:
    """Both stores. Raises LoadError when one cannot be read; their addresses, which may hold passwords, are not repeated."""
    redis = Redis.from_url(redis_url, decode_responses=True)
    try:
        await redis.ping()
        database = await open_connection(database_url, "coupon-load", PATIENT_S)
    except (RedisError, OSError) as error:
        raise LoadError(f"Redis cannot be read ({type(error).__name__}); check COUPON_REDIS_URL") from None
    except (LedgerUnavailable, asyncpg.PostgresError, ValueError) as error:
        raise LoadError(f"Postgres cannot be read ({type(error).__name__}); check COUPON_DATABASE_URL") from None
    try:
        yield Stores(redis, database, redis_url, database_url)
    finally:
        await redis.aclose()
        database.terminate()


async def audit_stores(stores: Stores, history: History) -> Verdict:
    """Compare every answer with the ledger's rows, and Redis with the ledger. Nothing is raised."""
    audit = _StoresAudit(stores.database, history)
    try:
        await audit.ledger()
        shards = await stores.database.fetchval("SELECT shards FROM settings")
        settings = load_settings({}, redis_url=stores.redis_url, database_url=stores.database_url, shards=shards)
        report = await Verifier(settings, stores.database, stores.redis, show_progress=False).verify()
    except (LedgerUnavailable, asyncpg.PostgresError, asyncpg.InterfaceError, RedisError, OSError) as error:
        audit.verdict.unchecked.append(f"a store cannot be read ({type(error).__name__}); the audit is not complete")
        return audit.verdict
    for finding in report.findings:
        audit.verdict.find(finding.what, finding.number, finding.book_id)
    audit.verdict.unchecked += report.unchecked
    audit.verdict.checked["codes held in Redis, against the ledger (coupon-svc verify)"] = report.codes_held
    audit.verdict.checked["codes free in Redis, against the ledger (coupon-svc verify)"] = report.codes_free
    return audit.verdict


class _StoresAudit:
    def __init__(self, database: Any, history: History) -> None:
        self._database = database
        self._history = history
        self.verdict = Verdict()

    async def ledger(self) -> None:
        of_book: dict[str, dict[str, Coupon]] = {book_id: {} for book_id in self._history.books}
        for code, coupon in self._history.coupons.items():
            of_book[coupon.book_id][code] = coupon
        for book_id, book in self._history.books.items():
            rows = await self._arrived(book_id, of_book[book_id])
            await self._coupons(book, of_book[book_id], rows)
            await self._redemptions(book, of_book[book_id])
            await self._events(book, of_book[book_id])
        self.verdict.checked["answers with a code, against the ledger"] = len(self._history.coupons)
        self.verdict.checked["answers with a redemption, against the ledger"] = self._history.redemptions

    async def _arrived(self, book_id: str, answered: dict[str, Coupon]) -> dict[str, Any]:
        """The book's rows, once all that was answered is among them, or ARRIVAL_WAIT_S later."""
        deadline = asyncio.get_running_loop().time() + ARRIVAL_WAIT_S
        while True:
            rows = {
                row["code"]: row
                for row in await self._database.fetch(
                    "SELECT code, user_id, uses, epoch, seq, shard FROM coupons JOIN books USING (book_id)"
                    " WHERE book_id = $1",
                    book_id,
                )
            }
            lost = await self._database.fetchval("SELECT count(*) FROM quarantine WHERE book_id = $1", book_id)
            missing = sum(code not in rows for code in answered)
            if missing <= lost or asyncio.get_running_loop().time() > deadline:
                return rows
            await asyncio.sleep(0.2)

    async def _coupons(self, book: Book, answered: dict[str, Coupon], rows: dict[str, Any]) -> None:
        book_id, find, history = book.book_id, self.verdict.find, self._history
        quarantined = {
            row["code"] for row in await self._database.fetch("SELECT code FROM quarantine WHERE book_id = $1", book_id)
        }
        for code, coupon in answered.items():
            row = rows.get(code)
            if row is None:
                if book.ack == "redis" and not coupon.durable and not coupon.redemptions and code in quarantined:
                    self.verdict.note(LOST_NOTE)
                else:
                    find("a coupon that was answered is not in the ledger", 1, book_id)
            elif row["user_id"] != coupon.user_id:
                find("a coupon is another user's in the ledger than was answered", 1, book_id)
            elif _position(row) != coupon.position:
                find("a coupon's position in the ledger is not the one that was answered", 1, book_id)
        held = Counter(row["user_id"] for row in rows.values())
        for user_id, number in held.items():
            if book.max_codes_per_user is not None and number > book.max_codes_per_user:
                find("a user has more codes in the ledger than the book allows", 1, book_id)
            if number > history.held[book_id, user_id] + history.unknown_assigns[book_id, user_id]:
                find("a coupon is in the ledger that nobody had asked for", 1, book_id)

    async def _redemptions(self, book: Book, answered: dict[str, Coupon]) -> None:
        rows = {
            (row["code"], row["uses"]): row
            for row in await self._database.fetch(
                "SELECT r.*, shard FROM redemptions r JOIN books USING (book_id) WHERE book_id = $1", book.book_id
            )
        }
        find, most = self.verdict.find, book.max_redemptions_per_code
        for code, coupon in answered.items():
            for uses, redeemed in coupon.redemptions.items():
                row = rows.get((code, uses))
                if row is None:
                    find("a redemption that was answered is not in the ledger", 1, book.book_id)
                elif row["user_id"] != coupon.user_id or _position(row) != redeemed.position:
                    find("a redemption is not in the ledger as it was answered", 1, book.book_id)
        number = Counter(code for code, _ in rows)
        for code, spent in number.items():
            if most is not None and spent > most:
                find("a code has more redemptions in the ledger than its book allows", 1, book.book_id)
            told = len(answered[code].redemptions) if code in answered else 0
            if spent > told + self._history.unknown_redeems[code]:
                find("a redemption is in the ledger that nobody had asked for", 1, book.book_id)

    async def _events(self, book: Book, answered: dict[str, Coupon]) -> None:
        """Every effect has one event, and every Idempotency-Key one effect of a kind."""
        positions = [redeemed.position for coupon in answered.values() for redeemed in coupon.redemptions.values()]
        positions += [coupon.position for coupon in answered.values() if coupon.durable]
        if not positions:
            return
        shard, oldest = min(parse_shard_position(position) for position in positions)
        events = await self._database.fetch(  # from the first on: the key is (shard, epoch, seq)
            "SELECT shard, epoch, seq, event, idem FROM events"
            " WHERE shard = $1 AND (epoch, seq) >= ($2, $3) AND book_id = $4",
            shard,
            *oldest,
            book.book_id,
        )
        there = {_position(row) for row in events}
        missing = sum(position not in there for position in positions)
        self.verdict.find("an event that was answered as durable is not in the ledger", missing, book.book_id)
        keys = Counter((row["event"], row["idem"]) for row in events if row["idem"])
        twice = sum(number > 1 for number in keys.values())
        self.verdict.find("an Idempotency-Key has two effects in the ledger", twice, book.book_id)


def _position(row: Any) -> str:
    return f"{row['shard']:02d}:{row['epoch']}-{row['seq']}"
