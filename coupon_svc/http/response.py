"""A response before it is sent, and how it is sent by ASGI."""

from __future__ import annotations

from typing import NamedTuple

from starlette.types import Send

Headers = list[tuple[bytes, bytes]]
"""Names in lower case."""


class Response(NamedTuple):
    """A whole response. Whoever sends it adds Content-Length; the protocol adds Date and X-Request-Id."""

    status: int
    headers: Headers
    body: bytes


async def send_response(send: Send, response: Response) -> None:
    """Send a whole response by ASGI."""
    status, headers, body = response
    if status != 204:
        headers = [*headers, (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
