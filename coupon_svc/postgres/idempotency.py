"""Idempotency-Keys of requests whose effect is in Postgres. Those of the data plane live in Redis, with its scripts."""

from __future__ import annotations

from typing import NamedTuple

import asyncpg

from coupon_svc.domain.bounds import IDEMPOTENCY_MS
from coupon_svc.domain.outcomes import Outcome, Refused

_KEPT_SINCE = f"now() - interval '{IDEMPOTENCY_MS} milliseconds'"


class IdempotentCall(NamedTuple):
    """A request that carries an Idempotency-Key. `scope` is the book's id, or the tenant where there is no book."""

    scope: str
    key: str
    fingerprint: str


class Remembered(NamedTuple):
    """The first answer to a request."""

    status: int
    answer: bytes
    unfinished: bool = False
    """Its upload has died on the way: some codes that the answer counts are not in their book yet."""


async def recall(
    connection: asyncpg.Connection, call: IdempotentCall, *, for_session: bool = False
) -> Remembered | None:
    """What this key was answered in the last 24 hours, or None; then the key is this transaction's until it ends, or the
    session's.

    Raises Refused: idempotency_in_progress while another session has it, idempotency_key_reused for another request.
    """
    take = "pg_try_advisory_lock" if for_session else "pg_try_advisory_xact_lock"
    mine = await connection.fetchval(f"SELECT {take}(hashtextextended($1, 0))", f"{call.scope} {call.key}")
    if not mine:
        raise Refused(Outcome.IDEMPOTENCY_IN_PROGRESS)
    row = await connection.fetchrow(
        "SELECT fingerprint, status, answer, EXISTS (SELECT FROM uploads u WHERE u.upload_id = k.upload_id) AS unfinished"
        f" FROM idempotency_keys k WHERE scope = $1 AND key = $2 AND created_at > {_KEPT_SINCE}",
        call.scope,
        call.key,
    )
    if row is None:
        return None
    if row["fingerprint"] != call.fingerprint:
        raise Refused(Outcome.IDEMPOTENCY_KEY_REUSED)
    return Remembered(row["status"], row["answer"], row["unfinished"])


async def is_remembered(connection: asyncpg.Connection, scope: str, key: str) -> bool:
    """Whether this key was answered in the last 24 hours: for a request whose fingerprint is not known yet."""
    found: bool = await connection.fetchval(
        f"SELECT EXISTS (SELECT FROM idempotency_keys WHERE scope = $1 AND key = $2 AND created_at > {_KEPT_SINCE})",
        scope,
        key,
    )
    return found


async def remember(
    connection: asyncpg.Connection, call: IdempotentCall, status: int, answer: bytes, upload_id: int | None = None
) -> None:
    """Keep the answer for 24 hours, if the transaction commits. `upload_id`: the upload that is still to make it true."""
    await connection.execute(
        "INSERT INTO idempotency_keys (scope, key, fingerprint, status, answer, upload_id) VALUES ($1, $2, $3, $4, $5, $6)"
        " ON CONFLICT (scope, key) DO UPDATE"
        " SET fingerprint = $3, status = $4, answer = $5, upload_id = $6, created_at = now()",
        *call,
        status,
        answer,
        upload_id,
    )


async def forget_old(connection: asyncpg.Connection) -> None:
    """Drop what is older than 24 hours."""
    await connection.execute(f"DELETE FROM idempotency_keys WHERE created_at <= {_KEPT_SINCE}")
