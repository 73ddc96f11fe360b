"""What a code takes in Redis: free, assigned, and its event."""

from __future__ import annotations

import tempfile
from pathlib import Path

import msgspec

from coupon_svc.dev.servers import EmbeddedRedis
from coupon_svc.ops.bench.assigning import assign_many
from coupon_svc.ops.bench.scripts import BOOK_ID, TENANT_ID, TERM, open_book
from coupon_svc.redis.connection import Connection, connect
from coupon_svc.redis.control import ShardControl
from coupon_svc.redis.keys import ShardKeys
from coupon_svc.redis.scripts import Scripts


class Memory(msgspec.Struct, frozen=True):
    """Bytes, each for one code, on average."""

    free: float
    assigned: float
    event: float


async def measure_memory(codes: int) -> Memory:
    """With so many codes of 15 characters in one book, each assigned to a user who has no other."""
    with tempfile.TemporaryDirectory(prefix="coupon-bench-") as folder, EmbeddedRedis(Path(folder) / "redis") as server:
        await open_book(server.url, [])
        connection = await connect(server.url, "bench")
        empty = await _used_memory(connection)
        owner = ShardControl(server.url, 1, Scripts())
        await owner.load_codes(TERM, BOOK_ID, [f"SUMMER-{i:08d}" for i in range(codes)], 0)
        free = await _used_memory(connection)
        await assign_many(connection, ShardKeys(0, 1), 1, TENANT_ID, BOOK_ID, range(codes))
        assigned = await _used_memory(connection)
        tip = (await owner.read_meta(TERM.shard)).tip or ""
        await owner.publish_position(TERM, codes, "committed", tip=tip, trim_seq=codes)
        trimmed = await _used_memory(connection)
        owner.close()
        connection.abort()
        return Memory((free - empty) / codes, (trimmed - empty) / codes, (assigned - trimmed) / codes)


def show_memory(memory: Memory) -> None:
    print(f"a free code:                                   {memory.free:6.0f} bytes")
    print(f"an assigned one, its user's only one:          {memory.assigned:6.0f} bytes")
    print(f"its event, until the ledger has had it 1 min.: {memory.event:6.0f} bytes")


async def _used_memory(connection: Connection) -> int:
    text: str = await connection.ask("INFO", "memory")
    return int(next(line for line in text.splitlines() if line.startswith("used_memory:")).partition(":")[2])
