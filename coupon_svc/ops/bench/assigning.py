"""The script that assigns, called as the API calls it, without the API: whole turns of it in one write."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import hiredis

from coupon_svc.redis.connection import Connection
from coupon_svc.redis.errors import ReplyError
from coupon_svc.redis.keys import ShardKeys
from coupon_svc.redis.scripts import Scripts

FINGERPRINT = "f" * 32
_IN_FLIGHT = 5_000


def assign_command(
    sha: str, keys: ShardKeys, epoch: int, tenant_id: int, book_id: str, user_id: str, idem: str = ""
) -> tuple[str | int, ...]:
    """EVALSHA as coupon_svc/http/coupons.py has it sent; `idem` is an Idempotency-Key, or none."""
    touched = [
        keys.meta,
        keys.book(book_id),
        keys.free(book_id),
        keys.holders(book_id),
        keys.coupons(tenant_id, user_id),
        keys.events,
        *([keys.idem(tenant_id, book_id, idem)] if idem else []),
    ]
    arguments: list[str | int] = [epoch, 0, tenant_id, book_id, user_id, idem, FINGERPRINT if idem else ""]
    return ("EVALSHA", sha, len(touched), *touched, *arguments)


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
    sha = Scripts()["assign_coupon"].sha
    for begin in range(0, len(numbers), _IN_FLIGHT):
        futures = [
            connection.send(
                *assign_command(
                    sha, keys, epoch, tenant_id, book_id, f"user-{number}", f"key-{number}" if with_key else ""
                )
            )
            for number in numbers[begin : begin + _IN_FLIGHT]
        ]
        for future in futures:
            reply = await future
            assert not isinstance(reply, ReplyError), reply
            assert reply[0] == "ok", reply
