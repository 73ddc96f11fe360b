"""The transport's side of an operation: authenticate, admit, read the body, check the request, call the handler, respond.

Plain ASGI without a framework's request and response objects: hot routes pass through here tens of thousands of times per
second."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any, NamedTuple

import msgspec
from starlette.types import Receive, Scope, Send

from coupon_svc.domain.errors import CouponError, Unavailable, error_location
from coupon_svc.domain.outcomes import Outcome, Refused
from coupon_svc.http.auth import KeyRing
from coupon_svc.http.call import Answer, Call, CallerGone, Handler, StreamedAnswer, caller_stays
from coupon_svc.http.files import ClientGone, file_body, file_kind
from coupon_svc.http.metrics import Metrics
from coupon_svc.http.operations import Operation
from coupon_svc.http.problems import log_failure, problem_response
from coupon_svc.http.request_id import request_id_of
from coupon_svc.http.response import Response, send_pieces, send_response
from coupon_svc.http.validation import check_file_request, check_request

log = logging.getLogger(__name__)

BODY_BYTES_MAX = 2 * 1024 * 1024
CALLER_GONE = "caller_gone"
"""Name of a CallerGone in the state of an ASGI scope."""
ENCODED_SLASH = "\udc2f"
"""Stands for `%2F` while a path is routed, so that it separates nothing. No decoded UTF-8 contains it."""
_JSON = (b"content-type", b"application/json")
_encode = msgspec.json.Encoder().encode


class _Method(NamedTuple):
    """An operation, its handler, and the decoder of its body."""

    operation: Operation
    handler: Handler
    decoder: msgspec.json.Decoder[Any] | None


Admit = Callable[[int, str | None], None]
"""Lets a request of a tenant in, which names a code, as it was sent. Raises Refused where a budget is spent."""


class Endpoint:
    """The ASGI application of one path: an operation and its handler for each method."""

    def __init__(self, keys: KeyRing, metrics: Metrics, admit: Admit) -> None:
        self._keys = keys
        self._metrics = metrics
        self._admit = admit
        self._methods: dict[str, _Method] = {}

    def add(self, operation: Operation, handler: Handler) -> None:
        """Let `handler` answer the operation's method. HEAD is answered as GET."""
        decoder = msgspec.json.Decoder(operation.body) if operation.body is not None else None
        self._methods[operation.method] = _Method(operation, handler, decoder)
        if operation.method == "GET":
            self._methods["HEAD"] = self._methods["GET"]

    @property
    def methods(self) -> list[str]:
        """The methods that are answered, in alphabetical order."""
        return sorted(self._methods)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request that came by ASGI."""
        path = {name: value.replace(ENCODED_SLASH, "/") for name, value in scope["path_params"].items()}
        request_id = request_id_of(scope)
        response = await self.respond(
            request_id,
            scope["method"],
            path,
            scope["query_string"],
            dict(scope["headers"]),
            receive,
            scope["state"].get(CALLER_GONE, caller_stays),
        )
        if response is None:
            return
        if response.pieces is None:
            await send_response(send, response)
            return
        # Without the end of its body the connection is closed: the caller sees that the answer is short.
        answer = f"answer of {self._methods[scope['method']].operation.name} to request {request_id.decode()}"
        try:
            await send_pieces(send, receive, response)
        except asyncio.CancelledError:
            log.info("%s cut short: the process stops", answer)
        except CouponError as error:
            log.warning("%s cut short: %s", answer, type(error).__name__)
        except Exception as error:
            log.error("%s cut short: %s at %s", answer, type(error).__name__, error_location(error))

    async def respond(
        self,
        request_id: bytes,
        method: str,
        path: Mapping[str, str],
        query_string: bytes,
        headers: Mapping[bytes, bytes],
        body: bytes | Receive,
        caller_gone: CallerGone = caller_stays,
    ) -> Response | None:
        """The response to one request. `headers` have lower-case names; `body` is whole, or still to be received.

        Raises nothing. None when the caller hung up before its request was complete.
        """
        started = time.perf_counter()
        found = self._methods.get(method)
        name = "none"
        refused: Refused | None = None
        failure: Exception | None = None
        response: Response | None = None
        try:
            if found is None:
                raise Refused(Outcome.METHOD_NOT_ALLOWED)
            operation, handler, decoder = found
            name = operation.name
            key = await self._keys.authenticate(headers.get(b"authorization", b""))
            if key.scopes.isdisjoint(operation.scopes):
                raise Refused(Outcome.MISSING_SCOPE, scopes=list(operation.scopes))
            self._admit(key.tenant_id, path.get("code"))
            call = Call(key, method, operation.path, path)
            call.request_id = request_id
            call.headers = headers
            call.caller_gone = caller_gone
            if operation.file_query is not None and (kind := file_kind(headers)):
                call.file = file_body(kind, headers, body)  # type: ignore[arg-type]  # a hot path takes no file
                call.query, call.idempotency_key = check_file_request(operation, query_string, headers)
            else:
                content = b""
                if decoder is not None:
                    content = body if type(body) is bytes else await read_body(headers, body)  # type: ignore[arg-type]
                call.query, call.body, call.idempotency_key = check_request(
                    operation, decoder, query_string, headers, content
                )
            answer = await handler(call)
            response = _encoded(answer) if type(answer) is Answer else await _streamed(answer, method)
            outcome = "ok"
        except ClientGone:
            outcome = "client_gone"
        except asyncio.CancelledError:  # the server stops, and has given this request its time
            refused = Refused(Outcome.OUTCOME_UNKNOWN)
        except Refused as error:
            refused = error
        except Unavailable as error:
            refused = Refused(Outcome.OUTCOME_UNKNOWN if error.may_have_happened else Outcome.STORE_UNAVAILABLE)
        except Exception as error:
            refused, failure = Refused(Outcome.INTERNAL_ERROR), error
        if refused is not None:
            outcome = refused.outcome.value
            response = self._refuse(refused, request_id)
            log_failure(refused.outcome, name, request_id, failure)
        self._metrics.count(name, outcome, time.perf_counter() - started)
        return response

    def _refuse(self, refused: Refused, request_id: bytes) -> Response:
        allow = (
            [(b"allow", ", ".join(self.methods).encode())] if refused.outcome is Outcome.METHOD_NOT_ALLOWED else None
        )
        return problem_response(refused, request_id, allow)


async def _streamed(answer: StreamedAnswer, method: str) -> Response:
    if method == "HEAD":  # nobody reads the pieces
        await answer.pieces.aclose()
        return Response(answer.status, answer.headers, b"", _nothing())
    return Response(answer.status, answer.headers, b"", answer.pieces)


def _encoded(answer: Answer) -> Response:
    headers = [] if answer.body is None else [_JSON]
    if answer.replayed:
        headers.append((b"idempotent-replayed", b"true"))
    if answer.location is not None:
        headers.append((b"location", answer.location.encode()))
    return Response(answer.status, headers, b"" if answer.body is None else _encode(answer.body))


async def _nothing() -> AsyncGenerator[bytes]:
    pieces: tuple[bytes, ...] = ()
    for piece in pieces:
        yield piece


async def read_body(headers: Mapping[bytes, bytes], receive: Receive) -> bytes:
    """The whole body. Raises Refused(body_too_large) beyond BODY_BYTES_MAX, and ClientGone."""
    length = headers.get(b"content-length")
    # Python refuses to parse thousands of digits, which leading zeros may be.
    if length is not None and int(length.lstrip(b"0")[:20] or 0) > BODY_BYTES_MAX:
        raise Refused(Outcome.BODY_TOO_LARGE, limit_bytes=BODY_BYTES_MAX)
    message = await receive()
    if message["type"] != "http.request":
        raise ClientGone
    body: bytes = message.get("body", b"")
    if message.get("more_body", False):
        parts = bytearray(body)
        while message.get("more_body", False):
            message = await receive()
            if message["type"] != "http.request":
                raise ClientGone
            parts += message.get("body", b"")
            if len(parts) > BODY_BYTES_MAX:
                raise Refused(Outcome.BODY_TOO_LARGE, limit_bytes=BODY_BYTES_MAX)
        body = bytes(parts)
    return body
