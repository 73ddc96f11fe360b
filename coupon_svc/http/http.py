"""The way of every request: key, scope, body, the operation's own function, answer. Plain ASGI, without a framework's
request and response objects, since the hot routes pass through here tens of thousands of times a second."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple
from urllib.parse import unquote_to_bytes

import msgspec
from starlette.types import Receive, Scope, Send

from coupon_svc.domain.errors import CouponError, error_location
from coupon_svc.domain.outcomes import Outcome, Refused
from coupon_svc.http.auth import KeyRing
from coupon_svc.http.inputs import invalid
from coupon_svc.http.metrics import Metrics
from coupon_svc.http.problems import Headers, problem_response
from coupon_svc.postgres.errors import LedgerUnavailable
from coupon_svc.postgres.idempotency import IdempotentCall, Remembered
from coupon_svc.postgres.keys import KeyRow

log = logging.getLogger(__name__)

BODY_BYTES_MAX = 2 * 1024 * 1024
ENCODED_SLASH = "\udc2f"
"""Stands for `%2F` while a path is routed, so that it parts nothing: no decoded UTF-8 holds it."""
_IDEMPOTENCY_KEY = re.compile(r"[\x20-\x7e]{1,255}")
_AT = re.compile(r" - at `(?:key in )?\$(.*)`$")
_JSON = (b"content-type", b"application/json")
_encode = msgspec.json.Encoder().encode
_encode_in_order = msgspec.json.Encoder(order="deterministic").encode
_PLAIN_NAME = re.compile(r"[a-z][a-z_]{0,40}")
_BROKEN_ESCAPE = re.compile(rb"%(?![0-9A-Fa-f]{2})")
PARAMETER_SHOWN_MAX = 100
"""Characters of the name of an unknown query parameter that a refusal repeats."""


class Call:
    """One request as its function sees it: who calls, with what. Everything here has been checked."""

    __slots__ = ("body", "idempotency_key", "key", "method", "path", "query")

    def __init__(self, key: KeyRow, method: str, path: Mapping[str, str]) -> None:
        self.key = key
        self.method = method
        self.path = path
        self.query: Any = None
        self.body: Any = None
        self.idempotency_key: str | None = None

    def fingerprint(self, path: str) -> str:
        """What tells this request from another with the same Idempotency-Key: method, `path` with its code normalised,
        and the body as parsed, so that white space and the order of fields do not matter."""
        seen = hashlib.blake2b(f"{self.method} {path}\n".encode(), digest_size=16)
        seen.update(_encode_in_order(self.body))
        return seen.hexdigest()

    def idempotent(self, scope: str, path: str) -> IdempotentCall | None:
        """The Idempotency-Key of a request whose effect is in Postgres."""
        if self.idempotency_key is None:
            return None
        return IdempotentCall(scope, self.idempotency_key, self.fingerprint(path))


class Answer(msgspec.Struct, frozen=True):
    """What a function returns: a status, and a body to be encoded or (of a replay) already encoded."""

    status: int
    body: Any = None
    replayed: bool = False
    location: str | None = None

    @classmethod
    def again(cls, remembered: Remembered, location: str | None = None) -> Answer:
        return cls(remembered.status, msgspec.Raw(remembered.answer), True, location)


class Response(NamedTuple):
    """What goes out, but for Content-Length, which whoever sends it adds."""

    status: int
    headers: Headers
    body: bytes


Handler = Callable[[Call], Awaitable[Answer]]


class Operation(msgspec.Struct, frozen=True, kw_only=True):
    """One method of one path. The routes, the checks and the OpenAPI document are all made from it."""

    name: str
    method: str
    path: str
    summary: str
    tag: str
    """The group of operations that it is shown in."""
    scopes: tuple[str, ...] = ()
    """Any of them is enough; none means that no key is needed."""
    query: type[msgspec.Struct] | None = None
    """The query parameters that are known; None: none is."""
    body: type[msgspec.Struct] | None = None
    answers: dict[int, Any] = {}
    """Status -> type of the body, None for an empty one."""
    outcomes: tuple[Outcome, ...] = ()
    """Refusals that are this operation's own; those that any operation can meet are added."""


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


def check_media_type(headers: Mapping[bytes, bytes]) -> None:
    """Raises Refused(unsupported_media_type) unless the body is said to be JSON."""
    media_type = headers.get(b"content-type", b"")
    if media_type != b"application/json" and media_type.partition(b";")[0].strip().lower() != b"application/json":
        raise Refused(Outcome.UNSUPPORTED_MEDIA_TYPE)


def decode_body(decoder: msgspec.json.Decoder[Any], body: bytes) -> Any:
    """The body as its struct; an empty one is `{}`. Raises Refused: malformed_json, invalid_request."""
    try:
        return decoder.decode(body or b"{}")
    except msgspec.ValidationError as error:
        wrong = error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise Refused(Outcome.MALFORMED_JSON) from None
    parsed = _parsed(body or b"{}")  # the decoder found what is wrong before it saw the end
    if "got `float`" in str(wrong):
        try:
            return msgspec.convert(_whole_numbers(parsed), decoder.type)
        except msgspec.ValidationError as error:
            wrong = error
    raise _invalid(str(wrong))


def _parsed(body: bytes) -> Any:
    """The body as JSON, whatever it says. Raises Refused(malformed_json)."""
    try:
        return msgspec.json.decode(body)
    except msgspec.ValidationError:
        return None  # a number too large for anything is JSON all the same
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise Refused(Outcome.MALFORMED_JSON) from None


def _whole_numbers(body: Any) -> Any:
    """The same body with `1.0` as `1`: for JSON Schema it is an integer. The caller's metadata stays as it is."""
    if not isinstance(body, dict):
        return body
    whole = {name: _whole_numbers(value) if name != "metadata" else value for name, value in body.items()}
    return {n: int(v) if isinstance(v, float) and v.is_integer() else v for n, v in whole.items()}


def decode_query(known: type[msgspec.Struct] | None, query_string: bytes) -> Any:
    """The query as its struct, None where no parameter is known. Raises Refused(invalid_request) for a parameter that is
    unknown, given twice, not percent-encoded UTF-8 or out of bounds."""
    names = known.__struct_fields__ if known is not None else ()
    given: dict[str, str] = {}
    for part in filter(None, query_string.split(b"&")):
        try:
            name, value = (_unquoted(text) for text in part.split(b"=", 1) + [b""] * (b"=" not in part))
        except ValueError:
            raise invalid("", "a query is percent-encoded UTF-8") from None
        pointer = "/" + name[:PARAMETER_SHOWN_MAX].replace("~", "~0").replace("/", "~1")
        if name not in names:
            raise invalid(pointer, "this endpoint does not know this query parameter")
        if name in given:
            raise invalid(pointer, "give this query parameter once")
        given[name] = value
    if known is None:
        return None
    try:
        return msgspec.convert(given, known, strict=False)  # every value is text, also one that stands for a number
    except msgspec.ValidationError as error:
        raise _invalid(str(error).replace(", got `str`", "")) from None


def _unquoted(text: bytes) -> str:
    """Raises ValueError for a broken escape, and for what is not UTF-8."""
    if _BROKEN_ESCAPE.search(text):
        raise ValueError
    return unquote_to_bytes(text.replace(b"+", b" ")).decode()


def _invalid(text: str) -> Refused:
    """The refusal of what msgspec says is wrong."""
    at = _AT.search(text)
    return invalid(json_pointer(at[1] if at else ""), _without_values(text[: at.start()] if at else text))


def _without_values(detail: str) -> str:
    """msgspec's sentence without what the caller sent, which may be a code: field names stay where they look like some."""
    kind, _, value = detail.partition(" `" if "unknown field" in detail else " '")
    if not value or _PLAIN_NAME.fullmatch(value.rstrip("`")):
        return detail
    return kind


def json_pointer(path: str) -> str:
    """msgspec's `.codes[3]` as RFC 6901's `/codes/3`; the whole document is the empty text."""
    return re.sub(r"\.|\[", "/", path.replace("[...]", "").replace("]", ""))


def parse_idempotency_key(header: bytes) -> str:
    """The key, bare or as a quoted string of RFC 8941: both spell the same key. Raises Refused."""
    text = header.decode("latin-1").strip()
    if len(text) >= 2 and text[0] == text[-1] == '"':
        text = re.sub(r"\\([\"\\])", r"\1", text[1:-1])
    if not _IDEMPOTENCY_KEY.fullmatch(text):
        raise Refused(Outcome.INVALID_IDEMPOTENCY_KEY)
    return text
