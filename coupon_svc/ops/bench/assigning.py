"""The script that assigns, called as the API calls it, without the API: whole turns of it in one write."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import hiredis

from coupon_svc.redis.connection import Connection
from coupon_svc.redis.contract import Command
from coupon_svc.redis.errors import ReplyError
from coupon_svc.redis.keys import ShardKeys
from coupon_svc.redis.scripts import Script, Scripts

FINGERPRINT = "f" * 32
_IN_FLIGHT = 5_000


def assign_command(
    script: Script, keys: ShardKeys, epoch: int, tenant_id: int, book_id: str, user_id: str, key: str = ""
) -> Command:
    """assign_coupon as the API has it sent; `key` is an Idempotency-Key, or none."""
    return script.pack(
        meta=keys.meta,
        book=keys.book(book_id),
        free=keys.free(book_id),
        holders=keys.holders(book_id),
        coupons=keys.coupons(tenant_id, user_id),
        events=keys.events,
        idem=keys.idem(tenant_id, book_id, key) if key else None,
        epoch=epoch,
        seen_seq=0,
        tenant_id=tenant_id,
        book_id=book_id,
        user_id=user_id,
        idempotency_key=key,
        fingerprint=FINGERPRINT if key else "",
    )


def pack(commands: Iterable[Sequence[str | int]]) -> bytes:
    """Commands as they are written to the socket."""
    return b"".join(hiredis.pack_command(cast(Any, tuple(command))) for command in commands)


async def assign_many(
    connection: Connection,
    keys: ShardKeys,
    epoch: int,
    tenant_id: int,
    book_id: str,
    numbers: Sequence[int],
    *,
    with_key: bool = False,
) -> None:
    """Assign a code to `user-<number>` for each number. The script must be loaded; every reply must be `ok`."""
    script = Scripts()["assign_coupon"]
    for begin in range(0, len(numbers), _IN_FLIGHT):
        futures = [
            connection.send(
                *assign_command(
                    script, keys, epoch, tenant_id, book_id, f"user-{number}", f"key-{number}" if with_key else ""
                )
            )
            for number in numbers[begin : begin + _IN_FLIGHT]
        ]
        for future in futures:
            reply = await future
            assert not isinstance(reply, ReplyError), reply
            assert script.reply(reply).outcome == "ok", reply
