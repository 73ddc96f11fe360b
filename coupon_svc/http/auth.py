"""API keys: who calls, and what they may. What Postgres said of a key is kept for a few seconds."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from coupon_svc.domain.api_keys import ApiKey
from coupon_svc.domain.clock import now_ms
from coupon_svc.domain.errors import Unavailable
from coupon_svc.domain.outcomes import Outcome, Refused
from coupon_svc.hot import in_a_task

KEYS_KEPT_MAX = 10_000
UNKNOWN_KEPT_MS = 1_000
KEPT_WHILE_AWAY_MS = 600_000
"""How long a key that was good goes on while Postgres is away. A key revoked meanwhile works that much longer."""
PATIENCE_S = 0.25
"""How long a request with a key that was good waits for Postgres to say so again."""


FindKey = Callable[[bytes], Awaitable[ApiKey | None]]
"""Asks for the key with this hash. Raises Unavailable."""


class _Kept(NamedTuple):
    row: ApiKey | None
    asked_at_ms: int
    """By a clock that nobody can set: a key revoked before the wall clock was set back must not go on until then."""


class KeyRing:
    """One process's memory of keys, by hash: the keys themselves are not kept."""

    def __init__(self, find_key: FindKey, kept_ms: int) -> None:
        self._find_key = find_key
        self._kept_ms = kept_ms
        self._kept: OrderedDict[bytes, _Kept] = OrderedDict()
        self._unknown: OrderedDict[bytes, _Kept] = OrderedDict()  # apart, so that made-up keys push no good one out
        self._asking: dict[bytes, asyncio.Task[_Kept]] = {}

    async def authenticate(self, authorization: bytes) -> ApiKey:
        """The key in an Authorization header. Raises Refused: unauthenticated; store_unavailable when only Postgres
        could tell and it is away."""
        scheme, key = authorization[:7], authorization[7:]
        if not key or (scheme != b"Bearer " and scheme.lower() != b"bearer "):
            raise Refused(Outcome.UNAUTHENTICATED)
        key_hash = hashlib.sha256(key.strip()).digest()
        now = time.monotonic_ns() // 1_000_000
        kept = self._kept.get(key_hash) or self._unknown.get(key_hash)
        if kept is None or now - kept.asked_at_ms > (self._kept_ms if kept.row else UNKNOWN_KEPT_MS):
            kept = await self._ask_once(key_hash, kept, now)
        row = kept.row
        if row is None or row.revoked or (row.expires_at_ms is not None and row.expires_at_ms <= now_ms()):
            raise Refused(Outcome.UNAUTHENTICATED)
        return row

    async def _ask_once(self, key_hash: bytes, kept: _Kept | None, now: int) -> _Kept:
        """Many requests come with the same key: one of them asks for all. A Postgres that is silent holds up only those
        whose key was never good."""
        await in_a_task()
        task = self._asking.get(key_hash)
        if task is None:
            task = self._asking[key_hash] = asyncio.create_task(self._ask(key_hash, kept, now))
            task.add_done_callback(lambda _: self._asking.pop(key_hash, None))
        if kept is None or kept.row is None or now - kept.asked_at_ms >= KEPT_WHILE_AWAY_MS:
            return await asyncio.shield(task)
        await asyncio.wait({task}, timeout=PATIENCE_S)
        return task.result() if task.done() else kept

    async def _ask(self, key_hash: bytes, kept: _Kept | None, now: int) -> _Kept:
        try:
            fresh = _Kept(await self._find_key(key_hash), now)
        except Unavailable:
            if kept is not None and kept.row is not None and now - kept.asked_at_ms < KEPT_WHILE_AWAY_MS:
                return kept
            raise Refused(Outcome.STORE_UNAVAILABLE) from None
        kept_here = self._kept if fresh.row is not None else self._unknown
        kept_here[key_hash] = fresh
        if len(kept_here) > KEYS_KEPT_MAX:
            kept_here.popitem(last=False)
        return fresh
