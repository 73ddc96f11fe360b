"""How long Redis takes to be rebuilt from the ledger."""

from __future__ import annotations

import asyncio
import time

from bench.stand import Stand
from bench.turns import cpu_seconds
from coupon_svc.postgres.database import open_connection

_MANY_COUPONS = """
    INSERT INTO books (book_id, shard, tenant_id, name, max_redemptions_per_code, lock_ttl_seconds, ack, metadata,
                       created_at_ms, total, lent, leased_upto, loaded, loaded_version)
    SELECT '{book}', 0, tenant_id, 'bench', 1, 120, 'ledger', '{{}}', 0, {codes}, {codes}, {codes}, true, 1 FROM tenants;
    INSERT INTO codes SELECT tenant_id, 'C-' || i, '{book}', i FROM tenants, generate_series(1, {codes}) i;
    INSERT INTO coupons SELECT '{book}', 'C-' || i, 'user-' || i, 1795357061878, 0, 1, i FROM generate_series(1, {codes}) i;
    INSERT INTO old_events SELECT 0, 1, i, 'coupon_assigned', '{book}', 'C-' || i, 'user-' || i, 1795357061878
        FROM generate_series(1, {codes}) i;
    UPDATE shards SET epoch = 1, certified_epoch = 1, committed = {codes} WHERE shard = 0;
"""


def bench_rebuild(codes: int) -> None:
    """Print how long one shard with so many assigned codes in one book takes, Redis being empty."""
    with Stand(shards=1) as stand:
        took, cpu = asyncio.run(_rebuild(stand, codes))
    print(f"{codes} assigned codes rebuilt in {took:.1f} s; the writer used {cpu:.1f} s of a processor")


async def _rebuild(stand: Stand, codes: int) -> tuple[float, float]:
    connection = await open_connection(stand.postgres.url, "coupon-bench")
    await connection.execute(_MANY_COUPONS.format(book="bk_00" + "m" * 16, codes=codes))
    started = time.perf_counter()
    writer = stand.writer()
    while await connection.fetchval("SELECT certified_epoch FROM shards") < 2:  # noqa: ASYNC110
        await asyncio.sleep(0.1)
    took = time.perf_counter() - started
    connection.terminate()
    return took, cpu_seconds(writer.pid)
