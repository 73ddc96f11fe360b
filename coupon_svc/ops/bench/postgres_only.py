"""Assign with nothing but Postgres: what one would write first, and tuned as well as we could.

Everything but the decision is the service's own, the short way of hot requests included: key, scope, validation,
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
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import uvicorn

from coupon_svc.domain.clock import now_ms, rfc3339
from coupon_svc.domain.outcomes import Outcome, Refused
from coupon_svc.http.auth import KeyRing
from coupon_svc.http.books import Books
from coupon_svc.http.call import Answer, Call
from coupon_svc.http.coupons import Coupons
from coupon_svc.http.metrics import Metrics
from coupon_svc.http.public import Public
from coupon_svc.http.routes import Api, make_app
from coupon_svc.http.runner import BookRunner
from coupon_svc.http.schemas import AssignAnswer, AssignCoupon
from coupon_svc.http.server import SERVER_SETTINGS, CouponProtocol
from coupon_svc.postgres.database import Database, open_connection
from coupon_svc.postgres.resolve import Resolver
from coupon_svc.postgres.uploads import Uploads
from coupon_svc.redis.data_plane import Store
from coupon_svc.redis.positions import Positions
from coupon_svc.redis.scripts import Scripts

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


class PostgresOnly(Coupons):
    """The one verb that is compared; the others stay what they are, and are not to be called."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    async def assign_coupon(self, call: Call) -> Answer:
        body: AssignCoupon = call.body
        at_ms = now_ms()
        arguments: list[Any] = [body.book_id, call.key.tenant_id, body.user_id, at_ms, call.idempotency_key]
        statement, more = _WITHOUT_KEY, []
        if call.idempotency_key is not None:
            statement, more = _WITH_KEY, [call.fingerprint("/coupons/assign")]
        try:
            code = await self._pool.fetchval(statement, *arguments, secrets.randbelow(_DRAW_MAX), *more)
            if code is None:  # nothing is free above that place: from the beginning, then
                code = await self._pool.fetchval(statement, *arguments, 0, *more)
        except asyncpg.UniqueViolationError:
            return await self._replay(body, call, more[0])
        if code is None:
            raise Refused(await self._why_none(body.book_id, call.key.tenant_id, at_ms))
        return _answer(body, code, at_ms, replayed=False)

    async def _replay(self, body: AssignCoupon, call: Call, fingerprint: str) -> Answer:
        row = await self._pool.fetchrow(
            "SELECT fingerprint, convert_from(answer, 'UTF8') AS answer FROM idempotency_keys WHERE scope = $1 AND key = $2",
            body.book_id,
            call.idempotency_key,
        )
        assert row is not None
        if row["fingerprint"] != fingerprint:
            raise Refused(Outcome.IDEMPOTENCY_KEY_REUSED)
        at_ms, _, code = row["answer"].partition(" ")
        return _answer(body, code, int(at_ms), replayed=True)

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


def _answer(body: AssignCoupon, code: str, at_ms: int, *, replayed: bool) -> Answer:
    answer = AssignAnswer(
        code=code,
        book_id=body.book_id,
        user_id=body.user_id,
        assigned_at=rfc3339(at_ms),
        redemptions_left=1,
        position="00:1-0",
        durable=True,
    )
    return Answer(201, answer, replayed)


def postgres_only_app(url: str) -> Api:
    """The API with its assign replaced. There is no Redis."""
    database = Database(url, "coupon-bench")
    resolver = Resolver(database)
    store = Store("redis://unused", 16, Positions(16, 5_000), Scripts())
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

    runner = BookRunner(store, resolver, database, 16)
    return make_app(
        Books(runner, database, Uploads(database), 16),
        PostgresOnly(pool),
        Public(store, metrics),
        KeyRing(resolver, 5_000),
        metrics,
        lifespan,
    )


async def _nothing(_: asyncpg.Connection) -> None:
    """What the pool does before a connection is used again."""


def serve_postgres_only(fd: int) -> None:
    """Serve it on a listening socket as the API is served, until SIGTERM."""
    url = os.environ["COUPON_DATABASE_URL"]
    config = uvicorn.Config(lambda: postgres_only_app(url), factory=True, http=CouponProtocol, **SERVER_SETTINGS)
    uvicorn.Server(config).run(sockets=[socket.socket(fileno=fd)])
