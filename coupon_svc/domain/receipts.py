"""Receipts: what an answer that the ledger did not know of yet carries, to bring its record back should it be lost."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from typing import NamedTuple

import msgspec

_PREFIX = "rc_"
_MAC_BYTES = 16


class Receipt(NamedTuple):
    """What a receipt proves: this user was given this code, at this position. `at_ms` is when."""

    user_id: str
    epoch: int
    seq: int
    at_ms: int


def make_receipt(secret: bytes, tenant_id: int, book_id: str, code: str, receipt: Receipt) -> str:
    """The receipt as text, URL-safe. The code is not in it, but in what is signed."""
    payload = msgspec.json.encode(receipt)
    mac = _mac(secret, tenant_id, book_id, code, payload)
    return _PREFIX + _encode(payload) + "." + _encode(mac)


def check_receipt(secret: bytes, tenant_id: int, book_id: str, code: str, text: str) -> Receipt | None:
    """What the receipt says, or None when it is not one of ours for this code."""
    payload_text, _, mac_text = text.removeprefix(_PREFIX).partition(".")
    try:
        payload, mac = _decode(payload_text), _decode(mac_text)
    except (binascii.Error, ValueError):
        return None
    if not hmac.compare_digest(mac, _mac(secret, tenant_id, book_id, code, payload)):
        return None
    return msgspec.json.decode(payload, type=Receipt)


def _mac(secret: bytes, tenant_id: int, book_id: str, code: str, payload: bytes) -> bytes:
    signed = msgspec.json.encode((tenant_id, book_id, code)) + payload
    return hmac.new(secret, signed, hashlib.sha256).digest()[:_MAC_BYTES]


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _decode(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
