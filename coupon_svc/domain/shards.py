"""Shards: the fixed parts the keyspace is cut into. A book lives whole in one, and its id says in which."""

from __future__ import annotations

import binascii
import re
import secrets
from functools import cache
from itertools import product

from coupon_svc.domain.position import ShardNo

CLUSTER_SLOTS = 16_384
_SUFFIX_SYMBOLS = "abcdefghijklmnopqrstuvwxyz"
_ID_SYMBOLS = "0123456789abcdefghjkmnpqrstvwxyz"
_ID_LENGTH = 16
_BEGIN_OF_ID = re.compile("bk_([0-9]{2})")
_BOOK_ID = re.compile(rf"{_BEGIN_OF_ID.pattern}[0-9A-Za-z]{{{_ID_LENGTH}}}")


def key_slot(tag: str) -> int:
    """The cluster slot of a key whose hash tag is `tag`: CRC16 (XMODEM) modulo 16384, as the cluster spec has it."""
    return binascii.crc_hqx(tag.encode(), 0) % CLUSTER_SLOTS


@cache
def shard_tag(shard: int, shards: int) -> str:
    """The hash tag of a shard, e.g. `07abc`: its number, and letters that put it in the middle of its stripe of slots.

    Shard i of n gets a slot close to (i + 1/2) * 16384 / n. So any even cut of the slots between cluster nodes is an even
    cut of the shards. The search is deterministic: every process finds the same tags.
    """
    centre = (2 * shard + 1) * CLUSTER_SLOTS // (2 * shards)
    for letters in product(_SUFFIX_SYMBOLS, repeat=3):
        tag = f"{shard:02d}{''.join(letters)}"
        if abs(key_slot(tag) - centre) <= 16:
            return tag
    raise AssertionError(f"no tag for shard {shard} of {shards}")


def new_book_id(shards: int) -> str:
    """A fresh id such as `bk_07q3…` in a shard drawn at random; 80 random bits make it unguessable and unique."""
    return f"bk_{secrets.randbelow(shards):02d}" + "".join(secrets.choice(_ID_SYMBOLS) for _ in range(_ID_LENGTH))


def book_shard(book_id: str, shards: int) -> int | None:
    """The shard a book id names, or None when no book can have this id."""
    parts = _BOOK_ID.fullmatch(book_id)
    if parts is None:
        return None
    shard = int(parts[1])
    return shard if shard < shards else None


def shard_of(book_id: str) -> ShardNo:
    """The shard that the id of an existing book names; `book_shard` judges an id that a caller sent."""
    parts = _BEGIN_OF_ID.match(book_id)
    assert parts is not None
    return ShardNo(int(parts[1]))
