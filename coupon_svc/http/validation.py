"""Checks a request against its operation. Pure functions; refusals come in the order of docs/api.md."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote_to_bytes

import msgspec

from coupon_svc.domain.outcomes import Outcome, Refused
from coupon_svc.http.inputs import invalid
from coupon_svc.http.operations import Operation

PARAMETER_SHOWN_MAX = 100
"""Characters of the name of an unknown query parameter that a refusal repeats."""
_IDEMPOTENCY_KEY = re.compile(r"[\x20-\x7e]{1,255}")
_AT = re.compile(r" - at `(?:key in )?\$(.*)`$")
_PLAIN_NAME = re.compile(r"[a-z][a-z_]{0,40}")
_BROKEN_ESCAPE = re.compile(rb"%(?![0-9A-Fa-f]{2})")


def check_request(
    operation: Operation,
    decoder: msgspec.json.Decoder[Any] | None,
    query_string: bytes,
    headers: Mapping[bytes, bytes],
    content: bytes,
) -> tuple[Any, Any, str | None]:
    """(query, body, Idempotency-Key) of a request whose body has been read; `decoder` is that of the operation's body.

    Raises Refused for the first that applies: unsupported_media_type, malformed_json, invalid_idempotency_key,
    invalid_request.
    """
    query = body = idempotency_key = wrong = None
    if query_string or operation.query is not None:
        try:
            query = decode_query(operation.query, query_string)
        except Refused as refused:
            wrong = refused
    if decoder is not None:
        media_type = headers.get(b"content-type", b"")
        if content and media_type != b"application/json" and not is_json(media_type):
            raise Refused(Outcome.UNSUPPORTED_MEDIA_TYPE)
        try:
            body = decode_body(decoder, content)
        except Refused as refused:
            if refused.outcome is not Outcome.INVALID_REQUEST:
                raise
            wrong = wrong or refused
        if operation.method == "POST" and b"idempotency-key" in headers:
            idempotency_key = parse_idempotency_key(headers[b"idempotency-key"])
    if wrong is not None:
        raise wrong
    return query, body, idempotency_key


def check_file_request(
    operation: Operation, query_string: bytes, headers: Mapping[bytes, bytes]
) -> tuple[Any, str | None]:
    """(query, Idempotency-Key) of a request that brings a file, which is still to be read.

    Raises Refused for the first that applies: invalid_idempotency_key, invalid_request.
    """
    key = parse_idempotency_key(headers[b"idempotency-key"]) if b"idempotency-key" in headers else None
    return decode_query(operation.file_query, query_string), key


def is_json(content_type: bytes) -> bool:
    """Whether a Content-Type header, whatever its parameters, is that of JSON."""
    return content_type.partition(b";")[0].strip().lower() == b"application/json"


def decode_body(decoder: msgspec.json.Decoder[Any], body: bytes) -> Any:
    """The body as its struct; an empty one is `{}`. Raises Refused: malformed_json, invalid_request."""
    try:
        return decoder.decode(body or b"{}")
    except msgspec.ValidationError as error:
        wrong = error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise Refused(Outcome.MALFORMED_JSON) from None
    # The decoder stopped at the first wrong field. What follows may be malformed, which is judged first.
    parsed = _parsed(body or b"{}")
    if "got `float`" in str(wrong):
        try:
            return msgspec.convert(whole_numbers(parsed), decoder.type)
        except msgspec.ValidationError as error:
            wrong = error
    raise _invalid(str(wrong))


def _parsed(body: bytes) -> Any:
    """The body as JSON, without a schema. Raises Refused(malformed_json)."""
    try:
        return msgspec.json.decode(body)
    except msgspec.ValidationError:
        return None  # a number that is too large is JSON all the same
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise Refused(Outcome.MALFORMED_JSON) from None


def whole_numbers(body: Any) -> Any:
    """The same body with `1.0` as `1`, which JSON Schema takes for an integer. The caller's metadata stays as it is."""
    if not isinstance(body, dict):
        return body
    whole = {name: whole_numbers(value) if name != "metadata" else value for name, value in body.items()}
    return {n: int(v) if isinstance(v, float) and v.is_integer() else v for n, v in whole.items()}


def decode_query(known: type[msgspec.Struct] | None, query_string: bytes) -> Any:
    """The query as its struct; None if the operation knows no parameter.

    Raises Refused(invalid_request) for a parameter that is unknown, given twice, not percent-encoded UTF-8 or out of
    bounds.
    """
    names = known.__struct_fields__ if known is not None else ()
    given: dict[str, str] = {}
    for part in filter(None, query_string.split(b"&")):
        try:
            name, value = (unquote(text) for text in part.split(b"=", 1) + [b""] * (b"=" not in part))
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


def unquote(text: bytes) -> str:
    """A name or a value of a query string. Raises ValueError for a broken escape, and for what is not UTF-8."""
    if _BROKEN_ESCAPE.search(text):
        raise ValueError
    return unquote_to_bytes(text.replace(b"+", b" ")).decode()


def _invalid(text: str) -> Refused:
    """The refusal of what msgspec says is wrong."""
    at = _AT.search(text)
    return invalid(json_pointer(at[1] if at else ""), without_values(text[: at.start()] if at else text))


def without_values(detail: str) -> str:
    """msgspec's message without what the caller sent, which may be a code. What looks like a field's name stays."""
    kind, _, value = detail.partition(" `" if "unknown field" in detail else " '")
    if not value or _PLAIN_NAME.fullmatch(value.rstrip("`")):
        return detail
    return kind


def json_pointer(path: str) -> str:
    """msgspec's `.codes[3]` as `/codes/3` (RFC 6901). The whole document is the empty string."""
    return re.sub(r"\.|\[", "/", path.replace("[...]", "").replace("]", ""))


def parse_idempotency_key(header: bytes) -> str:
    """The key, bare or as a quoted string of RFC 8941: both spell the same key. Raises Refused(invalid_idempotency_key)."""
    text = header.decode("latin-1").strip()
    if len(text) >= 2 and text[0] == text[-1] == '"':
        text = re.sub(r"\\([\"\\])", r"\1", text[1:-1])
    if not _IDEMPOTENCY_KEY.fullmatch(text):
        raise Refused(Outcome.INVALID_IDEMPOTENCY_KEY)
    return text
