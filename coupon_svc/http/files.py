"""Bodies that are files: which requests have one, and the file's bytes as they arrive, decompressed.

The server stops reading from a caller whose bytes are not taken, so a body is never in memory as a whole.
"""

from __future__ import annotations

import asyncio
import re
import zlib
from collections.abc import AsyncIterator, Mapping

import msgspec
from starlette.types import Receive

from coupon_svc.domain.errors import CouponError
from coupon_svc.domain.outcomes import Outcome, Refused
from coupon_svc.domain.upload_files import FileKind
from coupon_svc.http.inputs import invalid

FILE_KINDS: dict[bytes, FileKind] = {b"text/csv": "csv", b"text/plain": "text"}
"""What kind of file a body of this media type is."""
PIECE_BYTES = 16_384
"""How much of a body is handed on at once: a millisecond of parsing, or a few where every line has quotes."""
INFLATED_FREE_BYTES = 16 * 1024 * 1024
"""How much any compressed body may come to; beyond it, INFLATED_RATIO_MAX applies."""
INFLATED_RATIO_MAX = 100
_CHARSETS = {b"", b"utf-8", b"utf8", b"us-ascii"}
_CHARSET = re.compile(rb';\s*charset\s*=\s*"?([^\s;"]*)', re.IGNORECASE)


class ClientGone(CouponError):
    """The caller has hung up before its request was complete."""


class FileBody(msgspec.Struct, frozen=True):
    """A body that is a file: its kind, and its bytes in pieces of at most PIECE_BYTES."""

    kind: FileKind
    pieces: AsyncIterator[bytes]


def file_kind(headers: Mapping[bytes, bytes]) -> FileKind | None:
    """The kind of file that a request says it brings; None for any other body."""
    return FILE_KINDS.get(headers.get(b"content-type", b"").partition(b";")[0].strip().lower())


def file_body(kind: FileKind, headers: Mapping[bytes, bytes], receive: Receive) -> FileBody:
    """The file, still to be received. Raises Refused(unsupported_media_type) for a charset other than UTF-8, and for a
    Content-Encoding other than gzip.

    Reading it raises ClientGone; Refused: invalid_request for gzip that is damaged or ends too early, body_too_large for
    gzip that grows beyond bounds.
    """
    charset = _CHARSET.search(headers.get(b"content-type", b""))
    if charset is not None and charset[1].lower() not in _CHARSETS:
        raise Refused(Outcome.UNSUPPORTED_MEDIA_TYPE, "An upload file is in UTF-8.")
    encoding = headers.get(b"content-encoding", b"").strip().lower()
    if encoding in (b"", b"identity"):
        return FileBody(kind, _in_pieces(_received(receive)))
    if encoding in (b"gzip", b"x-gzip"):
        return FileBody(kind, _in_pieces(_inflated(_received(receive))))
    raise Refused(Outcome.UNSUPPORTED_MEDIA_TYPE, "A Content-Encoding is gzip, or there is none.")


async def _received(receive: Receive) -> AsyncIterator[bytes]:
    more = True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            raise ClientGone
        yield message.get("body", b"")
        more = message.get("more_body", False)


async def _in_pieces(body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The same bytes; others have their turn after each piece."""
    async for data in body:
        for start in range(0, len(data), PIECE_BYTES):
            yield data[start : start + PIECE_BYTES]
            await asyncio.sleep(0)


async def _inflated(body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """What was compressed with gzip, of one or several members."""
    member = zlib.decompressobj(wbits=31)
    taken = given = 0
    begun = False
    async for data in body:
        taken += len(data)
        while data:
            begun = True
            if member.eof:
                member = zlib.decompressobj(wbits=31)
            try:
                piece = member.decompress(data, PIECE_BYTES)
            except zlib.error:
                raise invalid("", "the gzip stream is damaged; nothing was added") from None
            data = member.unused_data if member.eof else member.unconsumed_tail
            given += len(piece)
            if given > INFLATED_FREE_BYTES and given > taken * INFLATED_RATIO_MAX:
                raise Refused(
                    Outcome.BODY_TOO_LARGE,
                    f"The compressed body comes to more than {INFLATED_RATIO_MAX} times its size. Send it uncompressed.",
                    limit_ratio=INFLATED_RATIO_MAX,
                )
            yield piece
    if begun and not member.eof:
        raise invalid("", "the gzip stream is cut short; nothing was added")
