"""A response before it is sent, and how it is sent by ASGI."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import NamedTuple

from starlette.types import Receive, Send

Headers = list[tuple[bytes, bytes]]
"""Names in lower case."""
SENT_BYTES_MAX = 64 * 1024
"""How much of a streamed body is given to the transport at once. It takes no more while it holds as much as that."""


class Response(NamedTuple):
    """A whole response, or one whose body comes in pieces. Whoever sends a whole one adds Content-Length; the protocol adds
    Date and X-Request-Id."""

    status: int
    headers: Headers
    body: bytes
    pieces: AsyncGenerator[bytes] | None = None


async def send_pieces(send: Send, receive: Receive, response: Response) -> None:
    """Send a response whose body comes in pieces by ASGI, as fast as the caller takes it. A piece is asked for when the one
    before was taken, and none once the caller has hung up.

    Raises what the pieces raise; then the body has no end.
    """
    assert response.pieces is not None
    caller_gone = asyncio.ensure_future(_hung_up(receive))
    try:
        await send({"type": "http.response.start", "status": response.status, "headers": response.headers})
        async with aclosing(response.pieces):
            async for piece in response.pieces:
                for start in range(0, len(piece), SENT_BYTES_MAX):
                    if caller_gone.done():
                        return
                    part = piece[start : start + SENT_BYTES_MAX]
                    await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
    finally:
        caller_gone.cancel()


async def _hung_up(receive: Receive) -> None:
    """Return once the caller has hung up."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def send_response(send: Send, response: Response) -> None:
    """Send a whole response by ASGI."""
    status, headers, body, _ = response
    if status != 204:
        headers = [*headers, (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
