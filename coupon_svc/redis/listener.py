"""Hears how far the ledger is: the writers publish it, one message per commit."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from time import monotonic

from coupon_svc.redis.connection import Connection, Reply, connect
from coupon_svc.redis.errors import NotSent, OutcomeUnknown, ReplyError, StoreError
from coupon_svc.redis.keys import parse_position_message

PING_EVERY_S = 1.0


class PositionListener:
    """A subscription that is made again whenever its connection breaks.

    `on_position` is called with (shard, epoch, committed, tips) for each shard that a message tells of.
    """

    def __init__(self, url: str, on_position: Callable[[int, int, int, Sequence[str]], None]) -> None:
        self._url = url
        self._on_position = on_position
        self._connection: Connection | None = None
        self._pinged_at = 0.0

    async def listen(self, channel: str) -> None:
        """Subscribe and hear, for ever."""
        while True:
            with contextlib.suppress(StoreError):
                self._connection = connection = await connect(self._url, "coupon-api-positions", self.on_message)
                try:
                    await connection.ask("SUBSCRIBE", channel)
                    await connection.closed
                finally:
                    self._connection = None
                    connection.abort()  # one that was refused must not stay open beside the next
            await asyncio.sleep(0.2)

    def ping(self) -> None:
        """Ask whether somebody is at the other end; to be called often. Without it a half-open connection would stay, and
        positions would be learnt by polling alone."""
        if self._connection is not None and monotonic() - self._pinged_at >= PING_EVERY_S:
            self._pinged_at = monotonic()
            with contextlib.suppress(NotSent):
                self._connection.submit(("PING",), self._on_pong)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.abort()

    def on_message(self, message: Reply) -> None:
        """Take what the subscription received."""
        if not isinstance(message, ReplyError) and message[0] == "message":
            for told in parse_position_message(message[2]):
                self._on_position(*told)

    def _on_pong(self, pong: Reply) -> None:
        """A message that was on its way before the answer to PING came in its place."""
        if not isinstance(pong, OutcomeUnknown):
            self.on_message(pong)
