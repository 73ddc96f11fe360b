"""The id of a request: the caller's own, or one that is made here.

Every response carries it as `X-Request-Id`, every problem as `request_id`, and so does the log line of every 5xx.
"""

from __future__ import annotations

import itertools
import re
import secrets
from collections.abc import Iterator

from starlette.types import Scope

HEADER = b"x-request-id"
STATE = "request_id"
"""Its name in the state of an ASGI scope."""
_CALLERS = re.compile(rb"[A-Za-z0-9._-]{1,64}")
"""What a caller's id must be to be taken. Any other is replaced, not refused."""


def make_request_ids() -> Iterator[bytes]:
    """Ids without end, e.g. `req_5f0c3f2a9d1e4b670000001a`: 64 random bits of this process, then a count.

    All have the same length, so that it tells nothing. `next` runs no Python code: an id costs the hot path one call.
    """
    prefix = b"req_" + secrets.token_hex(8).encode()
    return map((prefix + b"%08x").__mod__, itertools.count(1))


def choose_request_id(sent: bytes, made: Iterator[bytes]) -> bytes:
    """The id that a caller has sent if it is well-formed, else the next of those `made`."""
    return sent if _CALLERS.fullmatch(sent) else next(made)


def request_id_of(scope: Scope) -> bytes:
    """The id that the protocol gave to an ASGI request."""
    request_id: bytes = scope["state"][STATE]
    return request_id
