"""What a handler takes and returns: a checked request and an answer, without any transport."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any, final

import msgspec

from coupon_svc.domain.api_keys import ApiKey
from coupon_svc.http.files import FileBody
from coupon_svc.http.response import Headers
from coupon_svc.service.idempotency import NO_IDEMPOTENCY, Idempotency

CallerGone = Callable[[], bool]
"""Whether the caller has hung up, or half-closed its side for longer than its request may wait."""
_encode_in_order = msgspec.json.Encoder(order="deterministic").encode


def caller_stays() -> bool:
    """The CallerGone of a request that is withdrawn as a whole, if at all."""
    return False


class Call:
    """One request as its handler sees it. Key, scope, query, body and Idempotency-Key have been checked.

    `query` and `body` are of the types that the operation declares, or None. `file` is a body that is one, still to be read;
    `query` is of its type then. `path` holds the parameters of the path as they were sent, percent-decoded.
    """

    __slots__ = (
        "body",
        "caller_gone",
        "file",
        "headers",
        "idempotency_key",
        "key",
        "method",
        "path",
        "query",
        "request_id",
        "template",
    )

    def __init__(self, key: ApiKey, method: str, template: str, path: Mapping[str, str]) -> None:
        self.key = key
        self.method = method
        self.template = template
        """The operation's declared path, as `/coupons/lock/{code}`."""
        self.path = path
        self.query: Any = None
        self.body: Any = None
        self.file: FileBody | None = None
        self.caller_gone: CallerGone = caller_stays
        self.headers: Mapping[bytes, bytes] = {}
        """By their names in lower case."""
        self.idempotency_key: str | None = None
        self.request_id = b""
        """For the log."""

    @property
    def accept(self) -> bytes:
        """The Accept header, empty where there is none."""
        return self.headers.get(b"accept", b"")

    def idempotency(self, code: str = "") -> Idempotency:
        """The Idempotency-Key, with the fingerprint of this request; NO_IDEMPOTENCY without one.

        The fingerprint tells this request from another with the same key. It covers the method, the declared path with
        `code` in its one spelling, and the body as parsed. White space and the order of fields do not matter.
        """
        if self.idempotency_key is None:
            return NO_IDEMPOTENCY
        seen = self._fingerprint(self.template.format(code=code))
        seen.update(_encode_in_order(self.body))
        return Idempotency(self.idempotency_key, seen.hexdigest())

    def file_fingerprint(self, file: FileBody) -> hashlib.blake2b:
        """The fingerprint of this request, to which the bytes of its file are still to be added as they arrive."""
        return self._fingerprint(f"{self.template} {file.kind}")

    def _fingerprint(self, path: str) -> hashlib.blake2b:
        return hashlib.blake2b(f"{self.method} {path}\n".encode(), digest_size=16)


@final
class Answer(msgspec.Struct, frozen=True):
    """What a handler returns: a status, and a body that msgspec can encode (`msgspec.Raw` if it is encoded already)."""

    status: int
    body: Any = None
    replayed: bool = False
    """Whether it is the first answer to an Idempotency-Key, once more."""
    location: str | None = None
    """The Location header."""


class StreamedAnswer(msgspec.Struct, frozen=True):
    """What a handler returns instead: a body of any length. `pieces` is read no faster than the caller takes it; when it
    raises, the connection is closed without the end of the body."""

    status: int
    headers: Headers
    pieces: AsyncGenerator[bytes]


Handler = Callable[[Call], Awaitable[Answer | StreamedAnswer]]
"""Answers an operation, or raises Refused."""
