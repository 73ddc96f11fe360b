"""The hash chain over a shard's ledger rows: each carries a hash over itself and the one before it.

A hash is the BLAKE2b of 32 bytes over the msgpack of (hash before, shard, epoch, record). The record of an entry is
(seq, n, after, tip, at_ms, its events byte for byte); of a late event (link, recorded, its `Event.record`). Ledgers of older
versions have rows of single events (`Event.record`) and of dead letters (seq, fields, reason, book_id, code) before their
first entry. msgpack tells texts, bytes, numbers, nulls and lengths apart, so no two rows are the same bytes.

Nothing here is secret: who may write to the tables can compute the chain anew (docs/architecture.md, *The hash chain*).
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import msgspec

CHAIN_START = bytes(32)
"""The hash before the first row."""

_encode = msgspec.msgpack.encode


def chain_hash(before: bytes, shard: int, epoch: int, record: Sequence[Any]) -> bytes:
    """The hash of a row, given that of the row before it. 32 bytes."""
    return blake2b(_encode((before, shard, epoch, record)), digest_size=32).digest()
