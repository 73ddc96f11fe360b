"""The master key, under which the keys of patterns are encrypted at rest. It is in the environment and in no store."""

from __future__ import annotations

import base64
import binascii
import hashlib
import secrets
from collections.abc import Mapping

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from coupon_svc.domain.errors import CouponError

KEY_BYTES = 32
_NONCE_BYTES = 12


class InvalidMasterKey(CouponError):
    """A text is no master key. The message says what to give, and repeats nothing of it."""


class MasterKeys:
    """The keys that a process has, each known by its id. The first one encrypts where nothing speaks for another."""

    def __init__(self, keys: Mapping[str, bytes] | None = None) -> None:
        self._keys = dict(keys or {})

    @classmethod
    def parse(cls, text: str) -> MasterKeys:
        """One key in base64, or several with commas between them. No key at all for "". Raises InvalidMasterKey."""
        keys = [_decode(part.strip()) for part in text.split(",")] if text.strip() else []
        return cls({key_id(key): key for key in keys})

    def __str__(self) -> str:
        return ", ".join(self._keys) or "none"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MasterKeys) and self._keys == other._keys

    def __hash__(self) -> int:
        return hash(tuple(self._keys))

    def __contains__(self, wanted: str) -> bool:
        return wanted in self._keys

    def __bool__(self) -> bool:
        return bool(self._keys)

    @property
    def first(self) -> str:
        """The id of the first key. Raises StopIteration where there is none."""
        return next(iter(self._keys))

    def seal(self, key: str, secret: bytes, of: str) -> bytes:
        """A secret encrypted under the key with this id. `of` says whose it is, and must be said again to open it."""
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return nonce + AESGCM(self._keys[key]).encrypt(nonce, secret, of.encode())

    def open(self, key: str, sealed: bytes, of: str) -> bytes:
        """The inverse of `seal`. Raises InvalidMasterKey when it was not sealed so; KeyError for an unknown key."""
        nonce, text = sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:]
        try:
            return AESGCM(self._keys[key]).decrypt(nonce, text, of.encode())
        except InvalidTag:
            raise InvalidMasterKey("a pattern's key was changed in the database, or moved to another pattern") from None


NO_MASTER_KEY = MasterKeys()


def new_master_key() -> str:
    """A fresh key, as COUPON_MASTER_KEY takes it."""
    return base64.urlsafe_b64encode(secrets.token_bytes(KEY_BYTES)).decode()


def key_id(key: bytes) -> str:
    """What a key is called in the database and in messages. It says nothing about the key."""
    return hashlib.sha256(b"coupon-svc master key " + key).hexdigest()[:12]


def _decode(text: str) -> bytes:
    try:
        key = base64.b64decode(text.replace("-", "+").replace("_", "/"), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) != KEY_BYTES:
        raise InvalidMasterKey(f"give {KEY_BYTES} random bytes in base64, e.g. from `coupon-svc master-key new`")
    return key
