"""Receipts: what an answer that the ledger did not know of yet carries, to bring its record back should it be lost."""

from __future__ import annotations

import binascii
import hashlib
import hmac
from base64 import urlsafe_b64decode, urlsafe_b64encode
from typing import NamedTuple

from coupon_svc.domain.position import Position

_PREFIX = "rc_"
_MAC_BYTES = 16


class Receipt(NamedTuple):
    """What a receipt proves: this user was given this code, at this position. `at_ms` is when."""

    user_id: str
    position: Position
    at_ms: int


def make_receipt(secret: bytes, tenant_id: int, book_id: str, code: str, receipt: Receipt) -> str:
    """The receipt as text, URL-safe. The code is not in it, but in what is signed."""
    payload = f"{receipt.position} {receipt.at_ms} {receipt.user_id}".encode()
    return _PREFIX + urlsafe_b64encode(_mac(secret, tenant_id, book_id, code, payload) + payload).decode()


def check_receipt(secret: bytes, tenant_id: int, book_id: str, code: str, text: str) -> Receipt | None:
    """What the receipt says, or None when it is not one of ours for this code."""
    try:
        signed = urlsafe_b64decode(text.removeprefix(_PREFIX))
    except (binascii.Error, ValueError):
        return None
    mac, payload = signed[:_MAC_BYTES], signed[_MAC_BYTES:]
    if not hmac.compare_digest(mac, _mac(secret, tenant_id, book_id, code, payload)):
        return None
    position, at_ms, user_id = payload.decode().split(" ", 2)
    return Receipt(user_id, Position.parse(position), int(at_ms))


def _mac(secret: bytes, tenant_id: int, book_id: str, code: str, payload: bytes) -> bytes:
    """BLAKE2b with a key is a MAC by itself (RFC 7693), and a fraction of the price of an HMAC in Python."""
    signed = f"{tenant_id} {book_id} {code} ".encode() + payload
    return hashlib.blake2b(signed, key=secret, digest_size=_MAC_BYTES).digest()
