"""Assign with nothing but Postgres: what one would write first, and tuned as well as we could.

Everything but the decision is the service's own, the fast path of hot operations included: key, scope, validation,
fingerprint, problems, the schema's books and idempotency records. One statement on one connection of a pool checks the
book, draws a free code, gives it to the user and keeps the Idempotency-Key; it is a transaction of its own, and
`synchronous_commit` is on, as it is for the writer.

- The draw begins at a random place of an index over random keys that holds the free codes alone, and skips what others
  have locked: so callers seldom meet, and no dead entries pile up where everybody begins.
- A key that was used before breaks the statement, and only then the record is read: the usual case pays one insert.
- It does not do what the service does beyond this: no limit per user (which would need one more lock), no events, no
  leases, and a draw that is only nearly fair.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import uvicorn

from coupon_svc.domain.clock import now_ms
from coupon_svc.domain.outcomes import Outcome, Refused
from coupon_svc.domain.position import Epoch, Position, Seq
from coupon_svc.http.auth import KeyRing
from coupon_svc.http.books import BookAnswers, Books
from coupon_svc.http.coupons import Coupons
from coupon_svc.http.cursors import Cursors
from coupon_svc.http.jobs import JobAnswers, Jobs
from coupon_svc.http.metrics import Metrics
from coupon_svc.http.public import Public
from coupon_svc.http.routes import Api, make_app
from coupon_svc.http.server import SERVER_SETTINGS, CouponProtocol
from coupon_svc.postgres.computed.ciphers import NO_CIPHERS
from coupon_svc.postgres.database import Database, open_connection
from coupon_svc.postgres.uploads import Uploads
from coupon_svc.redis.data_plane import DataPlane
from coupon_svc.redis.scripts import Scripts
from coupon_svc.service import books, jobs
from coupon_svc.service.api_keys import ApiKeys
from coupon_svc.service.assign import AssignCode, AssignCoupon, AssignCoupons, Assigned
from coupon_svc.service.budgets import Budget
from coupon_svc.service.code_directory import CodeDirectory
from coupon_svc.service.durability import Durability
from coupon_svc.service.health import Health
from coupon_svc.service.issued_codes import IssuedCodes
from coupon_svc.service.reading import Reading
from coupon_svc.service.receipt_rescue import ReceiptRescue
from coupon_svc.service.redeem import Redeeming
from coupon_svc.service.registration import Registration
from coupon_svc.service.waiting import Waiting

POOL_SIZE = 32
BOOK_ID = "bk_00" + "p" * 16

_SCHEMA = f"""
    CREATE TABLE dealt (
        book_id         text NOT NULL,
        code            text NOT NULL COLLATE "C",
        draw            bigint NOT NULL,
        user_id         text,
        assigned_at_ms  bigint,
        PRIMARY KEY (book_id, code)
    );
    INSERT INTO books (book_id, shard, tenant_id, name, max_redemptions_per_code, lock_ttl_seconds, ack, metadata,
                       created_at_ms, total)
    SELECT '{BOOK_ID}', 0, tenant_id, 'bench', 1, 120, 'ledger', '{{}}', 0, $1 FROM tenants;
    INSERT INTO dealt SELECT '{BOOK_ID}', 'P-' || lpad(i::text, 12, '0'), (random() * 9e15)::bigint
        FROM generate_series(1, $1) i;
    CREATE INDEX free_by_draw ON dealt (book_id, draw) WHERE user_id IS NULL;
    CREATE INDEX dealt_to_a_user ON dealt (book_id, user_id) WHERE user_id IS NOT NULL;
    ANALYZE dealt;
"""
_ASSIGN = """
    WITH drawn AS (
        SELECT free.book_id, free.code
        FROM books, LATERAL (
            SELECT book_id, code FROM dealt
            WHERE dealt.book_id = books.book_id AND user_id IS NULL AND draw >= $6
            ORDER BY draw LIMIT 1 FOR UPDATE SKIP LOCKED
        ) AS free
        WHERE books.book_id = $1 AND tenant_id = $2 AND status = 'active'
          AND (starts_at_ms IS NULL OR starts_at_ms <= $4) AND (expires_at_ms IS NULL OR expires_at_ms > $4)
    ),
    given AS (
        UPDATE dealt SET user_id = $3, assigned_at_ms = $4 FROM drawn
        WHERE dealt.book_id = drawn.book_id AND dealt.code = drawn.code
        RETURNING dealt.code
    )
"""
_WITHOUT_KEY = _ASSIGN + "SELECT code FROM given WHERE $5::text IS NULL"
_WITH_KEY = (
    _ASSIGN
    + """,
    kept AS (
        INSERT INTO idempotency_keys (scope, key, fingerprint, status, answer)
        SELECT $1, $5, $7, 201, convert_to($4::bigint || ' ' || code, 'UTF8') FROM given
    )
    SELECT code FROM given
"""
)
_DRAW_MAX = 9 * 10**15


async def fill(url: str, codes: int) -> None:
    """Make the table and one book with so many codes, in a database that has the service's schema."""
    connection = await open_connection(url, "coupon-bench")
    await connection.execute(_SCHEMA.replace("$1", str(codes)))
    await connection.execute("VACUUM dealt")
    await connection.close()


class PostgresOnly:
    """The one use case that is compared, in the place of `service.assign.Assigning`."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    async def assign_coupon(self, wanted: AssignCoupon) -> Assigned:
        at_ms, idempotency = now_ms(), wanted.idempotency
        statement, more = _WITHOUT_KEY, list[Any]()
        key = idempotency.key or None
        if key is not None:
            statement, more = _WITH_KEY, [idempotency.fingerprint]
        arguments: list[Any] = [wanted.book_id, wanted.tenant_id, wanted.user_id, at_ms, key]
        try:
            code = await self._pool.fetchval(statement, *arguments, secrets.randbelow(_DRAW_MAX), *more)
            if code is None:  # nothing is free above that place: from the beginning, then
                code = await self._pool.fetchval(statement, *arguments, 0, *more)
        except asyncpg.UniqueViolationError:
            return await self._replay(wanted)
        if code is None:
            raise Refused(await self._why_none(wanted.book_id, wanted.tenant_id, at_ms))
        return _assigned(wanted, code, at_ms, replayed=False)

    async def assign_coupons(self, wanted: AssignCoupons, caller_gone: Callable[[], bool]) -> list[Assigned | Refused]:
        """Is not compared."""
        raise Refused(Outcome.BOOK_NOT_FOUND)

    async def assign_code(self, wanted: AssignCode) -> Assigned:
        """Is not compared."""
        raise Refused(Outcome.CODE_NOT_FOUND)

    async def _replay(self, wanted: AssignCoupon) -> Assigned:
        row = await self._pool.fetchrow(
            "SELECT fingerprint, convert_from(answer, 'UTF8') AS answer FROM idempotency_keys WHERE scope = $1 AND key = $2",
            wanted.book_id,
            wanted.idempotency.key,
        )
        assert row is not None
        if row["fingerprint"] != wanted.idempotency.fingerprint:
            raise Refused(Outcome.IDEMPOTENCY_KEY_REUSED)
        at_ms, _, code = row["answer"].partition(" ")
        return _assigned(wanted, code, int(at_ms), replayed=True)

    async def _why_none(self, book_id: str, tenant_id: int, at_ms: int) -> Outcome:
        row = await self._pool.fetchrow(
            "SELECT status, starts_at_ms, expires_at_ms FROM books WHERE book_id = $1 AND tenant_id = $2",
            book_id,
            tenant_id,
        )
        if row is None:
            return Outcome.BOOK_NOT_FOUND
        if row["status"] != "active":
            return Outcome.BOOK_CLOSED if row["status"] == "closed" else Outcome.BOOK_PAUSED
        if row["starts_at_ms"] is not None and at_ms < row["starts_at_ms"]:
            return Outcome.BOOK_NOT_STARTED
        if row["expires_at_ms"] is not None and at_ms >= row["expires_at_ms"]:
            return Outcome.BOOK_EXPIRED
        return Outcome.BOOK_EXHAUSTED


def _assigned(wanted: AssignCoupon, code: str, at_ms: int, *, replayed: bool) -> Assigned:
    return Assigned(
        code=code,
        book_id=wanted.book_id,
        user_id=wanted.user_id,
        shard=0,
        position=Position(Epoch(1), Seq(0)),
        at_ms=at_ms,
        redemptions_left=1,
        durable=True,
        receipt=None,
        replayed=replayed,
        already_yours=False,
    )


def postgres_only_app(url: str) -> Api:
    """The API with its assign replaced. There is no Redis, so every other verb is refused."""
    database = Database(url, "coupon-bench")
    metrics = Metrics()
    # Its connections are nobody else's and hold no state between statements: the pool need not reset them.
    pool = asyncpg.create_pool(url, min_size=POOL_SIZE, max_size=POOL_SIZE, reset=_nothing)

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        await pool
        try:
            yield
        finally:
            pool.terminate()
            await database.close()

    plane = DataPlane("redis://unused", 16, Scripts())
    registration = Registration(url, plane)
    durability = Durability(plane, 5_000)
    unknown_codes = Budget(1, 1)  # spent, and nobody asks for it
    directory = CodeDirectory(database, IssuedCodes(database, NO_CIPHERS), unknown_codes)
    waiting = Waiting(plane, directory, database, durability, ReceiptRescue(plane, database, durability, registration))
    uploads = Uploads(database)
    book_service = books.Books(plane, waiting, database, uploads, 16, BookAnswers())
    job_service = jobs.Jobs(uploads, database, database, database, book_service.in_force, JobAnswers(), 100, NO_CIPHERS)
    cursors = Cursors(lambda: registration.receipt_secret)
    redeeming = Redeeming(plane, directory, waiting, durability)
    reading = Reading(plane, directory, waiting, durability)
    return make_app(
        (
            Books(book_service, job_service, cursors),
            Jobs(job_service, cursors),
            Coupons(PostgresOnly(pool), redeeming, reading, cursors),
        ),
        Public(Health(plane), metrics, {}),
        KeyRing(ApiKeys(database).find, 5_000),
        metrics,
        lambda *_: None,
        lifespan,
    )


async def _nothing(_: asyncpg.Connection) -> None:
    """What the pool does before a connection is used again."""


def serve_postgres_only(fd: int) -> None:
    """Serve it on a listening socket as the API is served, until SIGTERM."""
    url = os.environ["COUPON_DATABASE_URL"]
    config = uvicorn.Config(lambda: postgres_only_app(url), factory=True, http=CouponProtocol, **SERVER_SETTINGS)
    uvicorn.Server(config).run(sockets=[socket.socket(fileno=fd)])
