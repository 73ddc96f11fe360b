"""Cursors: where a page of a list ended, readable by this installation alone.

A cursor stands in a URL, and URLs stand in the logs of proxies, while a page may end at a code. So it is encrypted, with
AES-SIV (RFC 5297): deterministic, so the same page has the same cursor, and authenticated, so a forged one is refused.
"""

from __future__ import annotations

import binascii
import hashlib
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESSIV

from coupon_svc.domain.outcomes import Outcome, Refused
from coupon_svc.http.inputs import invalid


class Cursors:
    """Makes and reads cursors. `secret` returns the installation's secret, None while it is not known yet."""

    def __init__(self, secret: Callable[[], bytes | None]) -> None:
        self._secret = secret

    def seal(self, list_name: str, number: int, text: str) -> str:
        """The place (`number`, `text`) in a list, URL-safe. `list_name` tells the list from every other one, of other
        tenants too. Raises Refused(store_unavailable) while the secret is not known."""
        sealed = self._cipher().encrypt(msgspec.json.encode((number, text)), [list_name.encode()])
        return urlsafe_b64encode(sealed).decode().rstrip("=")

    def open(self, list_name: str, cursor: str) -> tuple[int, str]:
        """What `seal` was given for this list. Raises Refused: invalid_request; store_unavailable, as `seal`."""
        try:
            sealed = urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4))
            place = self._cipher().decrypt(sealed, [list_name.encode()])
        except (binascii.Error, ValueError, InvalidTag):
            raise invalid("/cursor", "give the next_cursor of the previous page of this list, unchanged") from None
        number, text = msgspec.json.decode(place, type=tuple[int, str])
        return number, text

    def _cipher(self) -> AESSIV:
        """With a key of its own: what signs receipts encrypts nothing."""
        secret = self._secret()
        if secret is None:
            raise Refused(Outcome.STORE_UNAVAILABLE)
        return AESSIV(hashlib.blake2b(key=secret, person=b"cursors", digest_size=64).digest())
