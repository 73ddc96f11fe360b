"""What Redis and the ledger hold after a load, held against what its callers were answered. It only reads."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import asyncpg
import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError

from coupon_svc.config import Settings
from coupon_svc.invariants.answers import Coupon, History
from coupon_svc.invariants.kept import compare, read_coupons, read_rows
from coupon_svc.invariants.stores import Verifier
from coupon_svc.load.audit import LOST_NOTE, Verdict
from coupon_svc.load.plan import LoadError
from coupon_svc.postgres.database import PATIENT_S, LedgerConnection, open_connection
from coupon_svc.postgres.errors import LedgerUnavailable

ARRIVAL_WAIT_S = 15.0
"""How long the ledger may take to have what was under way when the load ended."""


class Stores(NamedTuple):
    """Connections that read."""

    redis: Any
    database: LedgerConnection
    settings: Settings

    async def redis_bytes(self) -> int:
        """Memory that Redis uses for its data. Raises OSError."""
        try:
            info = await self.redis.info("memory")
        except RedisError as error:
            raise OSError(str(error)) from None
        return int(info["used_memory"])


@asynccontextmanager
async def open_stores(settings: Settings) -> AsyncIterator[Stores]:
    """The stores of these settings. Raises LoadError when one cannot be read; their addresses, which may hold passwords,
    are not repeated.
    """
    redis = Redis.from_url(settings.redis_url, decode_responses=True)
    try:
        await redis.ping()
        database = await open_connection(settings.database_url, "coupon-load", PATIENT_S)
    except (RedisError, OSError) as error:
        raise LoadError(f"Redis cannot be read ({type(error).__name__}); check COUPON_REDIS_URL") from None
    except (LedgerUnavailable, asyncpg.PostgresError, ValueError) as error:
        raise LoadError(f"Postgres cannot be read ({type(error).__name__}); check COUPON_DATABASE_URL") from None
    try:
        yield Stores(redis, database, settings)
    finally:
        await redis.aclose()
        database.terminate()


async def audit_stores(stores: Stores, history: History) -> Verdict:
    """Compare every answer with the ledger's rows, and Redis with the ledger. Nothing is raised."""
    verdict = Verdict()
    try:
        await _audit_ledger(stores.database, history, verdict)
        shards = await stores.database.fetchval("SELECT shards FROM settings")
        settings = msgspec.structs.replace(stores.settings, shards=shards)
        report = await Verifier(settings, stores.database, stores.redis, show_progress=False).verify()
    except (LedgerUnavailable, asyncpg.PostgresError, asyncpg.InterfaceError, RedisError, OSError) as error:
        verdict.unchecked.append(f"a store cannot be read ({type(error).__name__}); the audit is not complete")
        return verdict
    for finding in report.findings:
        verdict.find(finding.what, finding.number, finding.book_id)
    verdict.unchecked += report.unchecked
    if report.told_without_key:
        verdict.note(report.told_without_key)
    verdict.checked["codes held in Redis, against the ledger (coupon-svc verify)"] = report.codes_held
    verdict.checked["codes free in Redis, against the ledger (coupon-svc verify)"] = report.codes_free
    return verdict


async def _audit_ledger(database: LedgerConnection, history: History, verdict: Verdict) -> None:
    for book_id, answered in history.by_book().items():
        await _arrived(database, book_id, answered)
        rows = await read_rows(database, book_id, answered)
        compared = compare(history, history.books[book_id], answered, rows)
        for check, number in compared.found.items():
            verdict.find(check, number, book_id)
        if compared.lost:
            verdict.note(LOST_NOTE)
    verdict.checked["answers with a code, against the ledger"] = len(history.coupons)
    verdict.checked["answers with a redemption, against the ledger"] = history.redemptions


async def _arrived(database: LedgerConnection, book_id: str, answered: dict[str, Coupon]) -> None:
    """Wait until the ledger has all that was answered of a book, or ARRIVAL_WAIT_S."""
    deadline = asyncio.get_running_loop().time() + ARRIVAL_WAIT_S
    while True:
        rows = await read_coupons(database, book_id)
        missing = sum(code not in rows.coupons for code in answered)
        if missing <= len(rows.quarantined) or asyncio.get_running_loop().time() > deadline:
            return
        await asyncio.sleep(0.2)
