"""What a code takes in Redis: free, assigned, and its event."""

from __future__ import annotations

import tempfile
from pathlib import Path

import msgspec

from bench.assigning import assign_many
from coupon_svc.dev.servers import EmbeddedRedis
from coupon_svc.redis.connection import Connection, connect
from coupon_svc.redis.control import Published, ShardControl, Term
from coupon_svc.redis.keys import ShardKeys
from coupon_svc.redis.scripts import Scripts
from coupon_svc.redis.server import load_library

BOOK_ID = "bk_00" + "m" * 16
TENANT_ID = 1
TERM = Term(0, 1, 1)


class Memory(msgspec.Struct, frozen=True):
    """Bytes, each for one code, on average."""

    free: float
    assigned: float
    event: float
    record: float
    """An Idempotency-Key's, kept for 24 hours."""


async def measure_memory(codes: int) -> Memory:
    """With so many codes of 15 characters in one book, each assigned to a user who has no other."""
    with tempfile.TemporaryDirectory(prefix="coupon-bench-") as folder, EmbeddedRedis(Path(folder) / "redis") as server:
        owner = ShardControl(server.url, 1, Scripts())
        await _open_book(owner)
        connection = await connect(server.url, "bench")
        await load_library(connection, Scripts().library)
        empty = await _used_memory(connection)
        await owner.load_codes(TERM, BOOK_ID, [f"SUMMER-{i:08d}" for i in range(codes)], 0)
        free = await _used_memory(connection)
        await assign_many(connection, ShardKeys(0, 1), 1, TENANT_ID, BOOK_ID, range(codes))
        assigned = await _used_memory(connection)
        tip = (await owner.read_meta(TERM.shard)).tip or ""
        await owner.publish_positions([Published(TERM, codes, tip, (), codes)], "committed")
        trimmed = await _used_memory(connection)
        await owner.load_codes(TERM, BOOK_ID, [f"WINTER-{i:08d}" for i in range(codes)], 0)
        await assign_many(connection, ShardKeys(0, 1), 1, TENANT_ID, BOOK_ID, range(codes, 2 * codes), with_key=True)
        tip = (await owner.read_meta(TERM.shard)).tip or ""
        await owner.publish_positions([Published(TERM, 2 * codes, tip, (), 2 * codes)], "committed")
        with_records = await _used_memory(connection)
        owner.close()
        connection.abort()
        return Memory(
            (free - empty) / codes,
            (trimmed - empty) / codes,
            (assigned - trimmed) / codes,
            (with_records - trimmed - (trimmed - empty)) / codes,
        )


async def _open_book(owner: ShardControl) -> None:
    """A shard that is certified in epoch 1, and an `ack = redis` book in it without a code."""
    await owner.shut_shard(TERM)
    await owner.certify_shard(TERM, await owner.connect(), 10**9)
    rules = {"tenant_id": str(TENANT_ID), "status": "active", "starts_at_ms": "", "expires_at_ms": "", "ack": "redis"}
    rules |= {"max_redemptions_per_code": "1", "max_codes_per_user": "1", "unlent": "0"}
    await owner.put_book(TERM, BOOK_ID, 1, rules, known=False)


def show_memory(memory: Memory) -> None:
    print(f"a free code:                                   {memory.free:6.0f} bytes")
    print(f"an assigned one, its user's only one:          {memory.assigned:6.0f} bytes")
    print(f"the record of an Idempotency-Key, for 24 h:    {memory.record:6.0f} bytes")
    print(f"its event, until the ledger has had it 1 min.: {memory.event:6.0f} bytes")


async def _used_memory(connection: Connection) -> int:
    text: str = await connection.ask("INFO", "memory")
    return int(next(line for line in text.splitlines() if line.startswith("used_memory:")).partition(":")[2])
