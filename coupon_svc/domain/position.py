"""Where an event stands: a position is an epoch of a shard and a number in it."""

from __future__ import annotations

from typing import NamedTuple, NewType

ShardNo = NewType("ShardNo", int)
"""The number of a shard, from 0."""
Epoch = NewType("Epoch", int)
"""One certified life of a shard, from 1; 0 stands for none. A recovery begins the next one."""
Seq = NewType("Seq", int)
"""The number of an event in its epoch, from 1; 0 is before the first."""


class Position(NamedTuple):
    """The place of one event in the history of a shard. Positions of a shard are ordered as its events are."""

    epoch: Epoch
    seq: Seq

    @classmethod
    def parse(cls, text: str) -> Position:
        """The position in a text such as `4-17`, which is also the id of a stream entry. Raises ValueError."""
        epoch, _, seq = text.partition("-")
        if not (text.isascii() and epoch.isdigit() and seq.isdigit()):
            raise ValueError("not a position")
        return tuple.__new__(cls, (int(epoch), int(seq)))  # cheaper than cls(…), and done for every event and reply

    def __str__(self) -> str:
        return f"{self.epoch}-{self.seq}"

    @property
    def next(self) -> Position:
        """The position of the event that follows in the same epoch."""
        return Position(self.epoch, Seq(self.seq + 1))

    def in_shard(self, shard: int) -> str:
        """The position as callers see it, with its shard: `07:4-17`."""
        return f"{shard:02d}:{self.epoch}-{self.seq}"

    def redemption_id(self, shard: int) -> str:
        """The id of the redemption at this position, as callers see it: `rd_07_4_17`."""
        return f"rd_{shard:02d}_{self.epoch}_{self.seq}"


def parse_shard_position(text: str) -> tuple[ShardNo, Position]:
    """The shard and the position in a text such as `07:4-17`. Raises ValueError."""
    shard, _, position = text.partition(":")
    if not (shard.isascii() and shard.isdigit()):
        raise ValueError("not a shard's position")
    return ShardNo(int(shard)), Position.parse(position)
