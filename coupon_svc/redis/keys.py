"""Every key the service has in Redis, and its channel, spelled here and nowhere else. `docs/redis.md` is the same for a
person.

All keys of a shard share its hash tag, and so one slot. A call, and `publish_positions`, name keys of several shards. What
follows the tag may hold any character: Redis takes the first `{…}` of a key as its tag, and that one is ours.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from coupon_svc.domain.shards import shard_tag

POSITIONS_CHANNEL = "cb:positions"
"""Where writers tell how far the ledger is (`position_message`)."""


def positions_channel(installation: str) -> str:
    """The channel of one installation. A channel, unlike a key, is heard in all numbered databases of a server, and what
    another installation's ledger holds says nothing about ours."""
    return f"{POSITIONS_CHANNEL}:{installation}"


class ToldPosition(NamedTuple):
    """The ledger has a shard's events up to `committed` of `epoch`. `tips` are those of the entries that came last, in
    order."""

    shard: int
    epoch: int
    committed: int
    tips: list[str]


_encode_positions = msgspec.json.Encoder().encode
_decode_positions = msgspec.json.Decoder(list[ToldPosition]).decode


def position_message(*told: ToldPosition) -> str:
    """What is sent on the channel, e.g. `[[7, 4, 17, ["a-1", "a-2"]]]`: where the ledger is in some shards."""
    return _encode_positions(told).decode()


def parse_position_message(text: str) -> list[ToldPosition]:
    """What a message on the channel says. Raises ValueError."""
    return _decode_positions(text)


class ShardKeys:
    """The keys of one shard."""

    def __init__(self, shard: int, shards: int, tag: str | None = None) -> None:
        self.prefix = f"cb:{{{tag or shard_tag(shard, shards)}}}:"
        self.pattern = self.prefix + "*"
        """What SCAN finds the shard's keys by."""
        self.meta = self.prefix + "meta"
        self.events = self.prefix + "events"

    def book(self, book_id: str) -> str:
        return f"{self.prefix}book:{book_id}"

    def free(self, book_id: str) -> str:
        return f"{self.prefix}free:{book_id}"

    def holders(self, book_id: str) -> str:
        return f"{self.prefix}holders:{book_id}"

    def coupons(self, tenant_id: int, user_id: str) -> str:
        return f"{self.prefix}coupons:{tenant_id}:{user_id}"

    def quarantine(self, book_id: str) -> str:
        return f"{self.prefix}quarantine:{book_id}"

    def lock(self, book_id: str, code: str) -> str:
        return f"{self.prefix}lock:{book_id}:{code}"

    def idem(self, tenant_id: int, book_id: str, idempotency_key: str) -> str:
        """The tenant is part of it: a record is looked up before its book is, and must be nobody else's."""
        return f"{self.prefix}idem:{tenant_id}:{book_id}:{idempotency_key}"

    def list(self, tenant_id: int, book_id: str, list_idempotency_key: str) -> str:
        """The record that a list was assigned codes under this Idempotency-Key: in its place, so that no other request can
        use it."""
        return self.idem(tenant_id, book_id, list_idempotency_key)
