"""The Idempotency-Key of a request, as a value: who parses the request says what tells it from another."""

from __future__ import annotations

from typing import NamedTuple

import msgspec


class Idempotency(msgspec.Struct, frozen=True):
    """An Idempotency-Key, and the fingerprint of its request. The same key with another fingerprint is refused."""

    key: str
    fingerprint: str


NO_IDEMPOTENCY = Idempotency("", "")
"""Of a request without an Idempotency-Key, in the words of the scripts."""


class KeptAnswer(NamedTuple):
    """The first answer to a request, in HTTP's words: kept in the ledger, and told again. Use cases only carry it."""

    status: int
    body: bytes
