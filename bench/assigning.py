"""Assigns, called as the API calls it, without the API: whole turns of it in one write."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import hiredis

from coupon_svc.redis.call_queue import CALL_WEIGHT_MAX
from coupon_svc.redis.calls import KeyTable, Section, bind_operation, call_command, section_replies
from coupon_svc.redis.connection import Connection
from coupon_svc.redis.contract import Command, Reply, ReplyReader
from coupon_svc.redis.errors import ReplyError
from coupon_svc.redis.keys import ShardKeys
from coupon_svc.redis.scripts import Scripts

FINGERPRINT = "f" * 32
_IN_FLIGHT = 5_000


class Assigns:
    """Calls that assign coupons, as the API sends them and reads their replies."""

    def __init__(self, scripts: Scripts) -> None:
        self._operation = bind_operation(scripts.operations["assign_coupon"].contract)
        self._section = ReplyReader(scripts.section)
        self._function = scripts.library.function(self._operation.call_class)

    def command(
        self, shard: ShardKeys, epoch: int, tenant_id: int, book_id: str, asked: Iterable[tuple[str, str]]
    ) -> Command:
        """A call that assigns one coupon for each of `asked`: a user, and an Idempotency-Key or "" for none."""
        keys: KeyTable = {}
        section = Section(keys, shard, epoch, 0)
        for user_id, key in asked:
            section.add(
                self._operation.pack(
                    keys,
                    shard.prefix,
                    tenant_id=tenant_id,
                    book_id=book_id,
                    user_id=user_id,
                    idempotency_key=key,
                    fingerprint=FINGERPRINT if key else "",
                )
            )
        return call_command(self._function, keys, [section])

    def replies(self, raw: Any) -> list[Reply]:
        """What the call replied to each that was asked."""
        (section,) = map(self._section, section_replies(raw))
        assert section.outcome == "ok", raw
        return [self._operation.reply(reply) for reply in section.replies]


def pack(commands: Iterable[Command]) -> bytes:
    """Commands as they are written to the socket."""
    return b"".join(hiredis.pack_command(cast(Any, command)) for command in commands)


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
    """Assign a code to `user-<number>` for each number. The library must be loaded; every reply must be `ok`."""
    assigns = Assigns(Scripts())
    for begin in range(0, len(numbers), _IN_FLIGHT):
        some = numbers[begin : begin + _IN_FLIGHT]
        asked = [(f"user-{number}", f"key-{number}" if with_key else "") for number in some]
        slots = [
            connection.send(*assigns.command(keys, epoch, tenant_id, book_id, asked[first : first + CALL_WEIGHT_MAX]))
            for first in range(0, len(asked), CALL_WEIGHT_MAX)
        ]
        for slot in slots:
            raw = await slot
            assert not isinstance(raw, ReplyError), raw
            replies = assigns.replies(raw)
            assert all(reply.outcome == "ok" for reply in replies), replies[0]
