"""Idempotency-Keys of requests whose effect is in Postgres. Those of the data plane live in Redis, with its scripts."""

from __future__ import annotations

from typing import NamedTuple

import asyncpg

from coupon_svc.domain.outcomes import Outcome, Refused


class IdempotentCall(NamedTuple):
    """A request that carries an Idempotency-Key. `scope` is the book's id, or the tenant where there is no book."""

    scope: str
    key: str
    fingerprint: str


class Remembered(NamedTuple):
    """The first answer to a request."""

    status: int
    answer: bytes


async def recall(connection: asyncpg.Connection, call: IdempotentCall) -> Remembered | None:
    """What this key was answered in the last 24 hours, or None; then the key is this transaction's until it ends.

    Raises Refused: idempotency_in_progress while another transaction has it, idempotency_key_reused for another request.
    """
    mine = await connection.fetchval(
        "SELECT pg_try_advisory_xact_lock(hashtextextended($1, 0))", f"{call.scope} {call.key}"
    )
    if not mine:
        raise Refused(Outcome.IDEMPOTENCY_IN_PROGRESS)
    row = await connection.fetchrow(
        "SELECT fingerprint, status, answer FROM idempotency_keys"
        " WHERE scope = $1 AND key = $2 AND created_at > now() - interval '24 hours'",
        call.scope,
        call.key,
    )
    if row is None:
        return None
    if row["fingerprint"] != call.fingerprint:
        raise Refused(Outcome.IDEMPOTENCY_KEY_REUSED)
    return Remembered(row["status"], row["answer"])


async def remember(connection: asyncpg.Connection, call: IdempotentCall, status: int, answer: bytes) -> None:
    """Keep the answer for 24 hours, if the transaction commits."""
    await connection.execute(
        "INSERT INTO idempotency_keys (scope, key, fingerprint, status, answer) VALUES ($1, $2, $3, $4, $5)"
        " ON CONFLICT (scope, key) DO UPDATE SET fingerprint = $3, status = $4, answer = $5, created_at = now()",
        *call,
        status,
        answer,
    )


async def forget_old(connection: asyncpg.Connection) -> None:
    """Drop what is older than 24 hours."""
    await connection.execute("DELETE FROM idempotency_keys WHERE created_at <= now() - interval '24 hours'")
