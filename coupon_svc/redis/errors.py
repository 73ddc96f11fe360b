"""What can go wrong with Redis, by what the caller may conclude. `StoreError` is about the server and so about every
shard; `ShardNotUsable` is about one shard of a server that answers."""

from __future__ import annotations

from coupon_svc.domain.errors import CouponError


class StoreError(CouponError):
    """Redis could not be used. Whether the command took effect is unknown unless the subclass says so."""


class NotSent(StoreError):
    """The command was not sent: it has had no effect."""


class OutcomeUnknown(StoreError):
    """The command was sent, and the connection broke before its reply: it may have had its effect."""


class ServerUnfit(StoreError):
    """The server would break a promise as it is set up; the message names the setting and says what to do."""


class ForeignRedis(StoreError):
    """The keys in this Redis belong to another installation; nothing was written. The message names both."""


class OutOfMemory(StoreError):
    """Redis has no memory for the command, which did nothing. Commands that take no memory still work."""


class ReplyError(StoreError):
    """Redis replied with an error instead of a result."""

    @property
    def word(self) -> str:
        """The first word of the error: `NOSCRIPT`, `OOM`, `WRONGTYPE`, …"""
        return str(self).partition(" ")[0]

    @property
    def not_loaded(self) -> bool:
        """The server does not know the script or the function, and so nothing ran."""
        return self.word == "NOSCRIPT" or str(self) == "ERR Function not found"


class ShardNotUsable(CouponError):
    """Redis answers, and this shard must not be used as it is. The message may name the script and its reason."""


class Fenced(ShardNotUsable):
    """A newer owner, or a newer recovery by this owner, has written to the shard; or the shard is not shut."""


class EpochNotInForce(ShardNotUsable):
    """Redis decides in another epoch, or in none: the shard is shut, in doubt, or was never certified."""


class WrongServer(ShardNotUsable):
    """This Redis is not the server for which the shard was certified."""


class MetaTorn(ShardNotUsable):
    """A field of the shard's meta is missing or is not a number: it was changed by hand."""


class PositionMismatch(ShardNotUsable):
    """The shard's position lies behind, or ahead of, what the caller knows."""


class EventDiffers(ShardNotUsable):
    """The stream holds another event at a position that the ledger has: keys of an earlier moment were put back."""


class CountsDiffer(ShardNotUsable):
    """A book or some of its codes are missing from Redis."""


class FormatDiffers(ShardNotUsable):
    """The shard was certified by a version whose entries have another format."""


class WrongKeyType(ShardNotUsable):
    """A key of the shard has a type that the service does not give it."""


class ClocksApart(ShardNotUsable):
    """Redis's clock and Postgres's differ too much to be trusted; the message says by how much."""


_BY_REASON: dict[str, type[ShardNotUsable]] = {
    "owner": Fenced,
    "epoch": EpochNotInForce,
    "server": WrongServer,
    "meta": MetaTorn,
    "position": PositionMismatch,
    "entry": EventDiffers,
    "counts": CountsDiffer,
    "format": FormatDiffers,
    "type": WrongKeyType,
}


def shard_not_usable(script: str, reason: str = "") -> ShardNotUsable:
    """The exception for a script's reply `suspect`, by the reason that the reply gives as its second field."""
    return _BY_REASON.get(reason, ShardNotUsable)(f"{script}: {reason}" if reason else script)
