"""A shard's meta in Redis, parsed here and nowhere else: a field that is missing or torn is None, and never an error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec


class Recovery(NamedTuple):
    """What tells one recovery of a shard from every other one. Its text, `generation-epoch`, is made and read here; of the
    scripts `shut_shard` alone reads it."""

    generation: int
    """Of the owner."""
    epoch: int
    """That it makes."""

    def __str__(self) -> str:
        return f"{self.generation}-{self.epoch}"


def _recovery_epoch(text: str | None) -> int | None:
    return _number((text or "").rpartition("-")[2])


class ShardMeta(msgspec.Struct, frozen=True, kw_only=True):
    """What a shard's meta says. Times are Unix milliseconds by Redis's clock."""

    installation: str | None
    """Whose keys these are."""
    epoch: int | None
    """In which Redis decides; None while the shard is shut, in doubt, or was never certified."""
    was: int | None
    """The epoch before the shard was shut or put in doubt."""
    generation: int | None
    """Of the owner who wrote last."""
    recovery_epoch: int | None
    """The epoch that the last recovery was to make."""
    format: str | None
    """Of the stream's entries: FORMAT."""
    run_id: str | None
    replid: str | None
    tip: str | None
    """Of the last entry, "" before the first."""
    seq: int | None
    committed: int | None
    backlog_max: int | None
    ledger_at_ms: int | None
    """When a commit, or an empty backlog beside a Postgres that answers, was seen last; 0 while Postgres is away."""
    owner_at_ms: int | None
    """When the owner wrote last."""

    @property
    def newest_epoch(self) -> int:
        """The highest epoch of which this meta knows; 0 for none."""
        return max(self.epoch or 0, self.was or 0, self.recovery_epoch or 0)


META_FIELDS = (
    "installation", "epoch", "was", "generation", "recovery", "format", "run", "replid", "seq", "tip", "committed",
    "backlog_max", "ledger_at_ms", "owner_at_ms",
)  # fmt: skip
"""What `parse_meta` takes, as HMGET names it."""

FORMAT = "2"
"""Entries carry any number of events, and a tip. Versions that know only single events find no `run_id` in the meta. So they
take the shard for one that is not certified, and neither write to it nor open it."""

_DIGITS_MAX = 15
"""More than any number of ours has; what is longer was put there by hand."""


def parse_meta(values: Sequence[str | None]) -> ShardMeta:
    """The meta from what HMGET replied for META_FIELDS."""
    return meta_of(dict(zip(META_FIELDS, values, strict=True)))


def meta_of(fields: Mapping[str, str | None]) -> ShardMeta:
    """The meta from its hash; fields that are no part of it are left out."""
    return ShardMeta(
        installation=fields.get("installation"),
        format=fields.get("format"),
        run_id=fields.get("run"),
        replid=fields.get("replid"),
        tip=fields.get("tip"),
        recovery_epoch=_recovery_epoch(fields.get("recovery")),
        **{
            name: _number(fields.get(name))
            for name in (
                "epoch", "was", "generation", "seq", "committed", "backlog_max", "ledger_at_ms", "owner_at_ms",
            )
        },
    )  # fmt: skip


def _number(text: str | None) -> int | None:
    if text is None or not (text.isascii() and text.isdigit() and len(text) <= _DIGITS_MAX):
        return None
    return int(text)
