"""What an operation's function takes and returns: a checked request and an answer, without any transport."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec

from coupon_svc.domain.api_keys import ApiKey
from coupon_svc.service.idempotency import NO_IDEMPOTENCY, Idempotency

_encode_in_order = msgspec.json.Encoder(order="deterministic").encode


class Call:
    """One request as its function sees it: who calls, with what. Everything here has been checked."""

    __slots__ = ("body", "idempotency_key", "key", "method", "path", "query")

    def __init__(self, key: ApiKey, method: str, path: Mapping[str, str]) -> None:
        self.key = key
        self.method = method
        self.path = path
        self.query: Any = None
        self.body: Any = None
        self.idempotency_key: str | None = None

    def fingerprint(self, path: str) -> str:
        """What tells this request from another with the same Idempotency-Key: method, `path` with its code normalised,
        and the body as parsed, so that white space and the order of fields do not matter."""
        seen = hashlib.blake2b(f"{self.method} {path}\n".encode(), digest_size=16)
        seen.update(_encode_in_order(self.body))
        return seen.hexdigest()

    def idempotency(self, path: str) -> Idempotency:
        """The Idempotency-Key, with the fingerprint of this request under `path`; NO_IDEMPOTENCY without one."""
        if self.idempotency_key is None:
            return NO_IDEMPOTENCY
        return Idempotency(self.idempotency_key, self.fingerprint(path))


class Answer(msgspec.Struct, frozen=True):
    """What a function returns: a status, and a body to be encoded or (of a replay) already encoded."""

    status: int
    body: Any = None
    replayed: bool = False
    location: str | None = None


Handler = Callable[[Call], Awaitable[Answer]]
"""An operation's own function."""
