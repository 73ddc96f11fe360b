"""Idempotency-Keys within a list: each of its users has a record of its own.

Their keys are in a name space that no caller can spell: an Idempotency-Key is printable.
"""

from __future__ import annotations

_SEPARATOR = "\x1f"


def key_of_user(list_key: str, index: int) -> str:
    """The key of the user at `index` in a list with the Idempotency-Key `list_key`; "" where the list has none."""
    return f"{list_key}{_SEPARATOR}{index}" if list_key else ""


def key_of_list(key: str) -> str | None:
    """The Idempotency-Key of the list, for the key of one of its users; None for any other key."""
    list_key, separator, _ = key.partition(_SEPARATOR)
    return list_key if separator else None
