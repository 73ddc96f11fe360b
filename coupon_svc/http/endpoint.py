"""The transport's side of an operation: authenticate, read the body, call the operation's function, send the response.

Plain ASGI without a framework's request and response objects: hot routes pass through here tens of thousands of times per
second."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec
from starlette.types import Receive, Scope, Send

from coupon_svc.domain.errors import CouponError, error_location
from coupon_svc.domain.outcomes import Outcome, Refused
from coupon_svc.http.auth import KeyRing
from coupon_svc.http.call import Answer, Call, Handler
from coupon_svc.http.metrics import Metrics
from coupon_svc.http.operations import Operation
from coupon_svc.http.problems import Headers, problem_response
from coupon_svc.http.validation import check_media_type, decode_body, decode_query, parse_idempotency_key
from coupon_svc.postgres.errors import LedgerUnavailable

log = logging.getLogger(__name__)

BODY_BYTES_MAX = 2 * 1024 * 1024
ENCODED_SLASH = "\udc2f"
"""Stands for `%2F` while a path is routed, so that it parts nothing: no decoded UTF-8 holds it."""
_JSON = (b"content-type", b"application/json")
_encode = msgspec.json.Encoder().encode


class Response(NamedTuple):
    """What goes out, but for Content-Length, which whoever sends it adds."""

    status: int
    headers: Headers
    body: bytes


class Endpoint:
    """The ASGI application of one path: an operation and its function for each method."""

    def __init__(self, keys: KeyRing, metrics: Metrics) -> None:
        self._keys = keys
        self._metrics = metrics
        self._methods: dict[str, tuple[Operation, Handler, msgspec.json.Decoder[Any] | None]] = {}

    def add(self, operation: Operation, handler: Handler) -> None:
        decoder = msgspec.json.Decoder(operation.body) if operation.body is not None else None
        self._methods[operation.method] = (operation, handler, decoder)
        if operation.method == "GET":
            self._methods["HEAD"] = self._methods["GET"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = {name: value.replace(ENCODED_SLASH, "/") for name, value in scope["path_params"].items()}
        response = await self.respond(scope["method"], path, scope["query_string"], dict(scope["headers"]), receive)
        if response is not None:
            await send_response(send, *response)

    async def respond(
        self,
        method: str,
        path: Mapping[str, str],
        query_string: bytes,
        headers: Mapping[bytes, bytes],
        body: bytes | Receive,
    ) -> Response | None:
        """The response to one request. `headers` have lower-case names; `body` is whole, or to be received yet. Raises
        nothing; None when the caller hung up before its request was complete."""
        started = time.perf_counter()
        found = self._methods.get(method)
        name = found[0].name if found else "none"
        response: Response | None = None
        try:
            if found is None:
                raise Refused(Outcome.METHOD_NOT_ALLOWED)
            response = _encoded(await self._answer(*found, path, query_string, headers, body))
            outcome = "ok"
        except ClientGone:
            outcome = "client_gone"
        except asyncio.CancelledError:  # the server stops, and has waited for this long enough
            outcome = Outcome.OUTCOME_UNKNOWN.value
            response, _ = self._refuse(Refused(Outcome.OUTCOME_UNKNOWN))
        except Refused as refused:
            outcome = refused.outcome.value
            response, _ = self._refuse(refused)
        except LedgerUnavailable as error:
            unavailable = Outcome.OUTCOME_UNKNOWN if error.may_have_happened else Outcome.STORE_UNAVAILABLE
            outcome = unavailable.value
            response, _ = self._refuse(Refused(unavailable))
        except Exception as error:
            outcome = Outcome.INTERNAL_ERROR.value
            response, request_id = self._refuse(Refused(Outcome.INTERNAL_ERROR))
            log.error("%s in %s, request %s, at %s", type(error).__name__, name, request_id, error_location(error))
        self._metrics.count(name, outcome, time.perf_counter() - started)
        return response

    async def _answer(
        self,
        operation: Operation,
        handler: Handler,
        decoder: msgspec.json.Decoder[Any] | None,
        path: Mapping[str, str],
        query_string: bytes,
        headers: Mapping[bytes, bytes],
        body: bytes | Receive,
    ) -> Answer:
        key = await self._keys.authenticate(headers.get(b"authorization", b""))
        if key.scopes.isdisjoint(operation.scopes):
            raise Refused(Outcome.MISSING_SCOPE, scopes=list(operation.scopes))
        call = Call(key, operation.method, path)
        wrong: Refused | None = None
        if query_string or operation.query is not None:
            try:
                call.query = decode_query(operation.query, query_string)
            except Refused as refused:
                wrong = refused
        if decoder is not None:
            content = body if isinstance(body, bytes) else await read_body(headers, body)
            if content:
                check_media_type(headers)
            try:
                call.body = decode_body(decoder, content)
            except Refused as refused:
                if refused.outcome is not Outcome.INVALID_REQUEST:
                    raise
                wrong = wrong or refused
            if operation.method == "POST" and b"idempotency-key" in headers:
                call.idempotency_key = parse_idempotency_key(headers[b"idempotency-key"])
        if wrong is not None:
            raise wrong
        return await handler(call)

    def _refuse(self, refused: Refused) -> tuple[Response, str]:
        extra: Headers = []
        if refused.outcome is Outcome.METHOD_NOT_ALLOWED:
            extra.append((b"allow", ", ".join(sorted(self._methods)).encode()))
        status, headers, body, request_id = problem_response(refused, extra)
        return Response(status, headers, body), request_id


def _encoded(answer: Answer) -> Response:
    headers = [] if answer.body is None else [_JSON]
    if answer.replayed:
        headers.append((b"idempotent-replayed", b"true"))
    if answer.location is not None:
        headers.append((b"location", answer.location.encode()))
    return Response(answer.status, headers, b"" if answer.body is None else _encode(answer.body))


class ClientGone(CouponError):
    """The caller has hung up before its request was complete."""


async def send_response(send: Send, status: int, headers: Headers, body: bytes) -> None:
    """Send a whole response."""
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [*headers, (b"content-length", str(len(body)).encode())] if status != 204 else headers,
        }
    )
    await send({"type": "http.response.body", "body": body})


async def read_body(headers: Mapping[bytes, bytes], receive: Receive) -> bytes:
    """The whole body. Raises Refused(body_too_large) beyond BODY_BYTES_MAX; ClientGone."""
    length = headers.get(b"content-length")
    # Its zeros first: Python refuses to read a number of thousands of digits.
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
