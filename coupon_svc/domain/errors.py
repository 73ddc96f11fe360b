"""The root of every exception that this package raises on purpose."""

from __future__ import annotations


class CouponError(Exception):
    """Something that the code foresees. Redis's errors are in redis/errors.py, the ledger's in postgres/errors.py.

    No message may hold a code, a key or a token: messages are logged.
    """
