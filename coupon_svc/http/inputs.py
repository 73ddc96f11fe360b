"""Parts of requests that a struct alone cannot judge: user ids, metadata."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from coupon_svc.domain.outcomes import Outcome, Refused
from coupon_svc.http.schemas import METADATA_BYTES_MAX, METADATA_DEPTH_MAX, USER_ID_RULE, UserId


def invalid(pointer: str, detail: str) -> Refused:
    """The refusal of one part of a request: where, as a JSON pointer, and what to do about it."""
    return Refused(Outcome.INVALID_REQUEST, errors=[{"pointer": pointer, "detail": detail}])


def check_user_id(text: str) -> None:
    """A user id in a path, held to what it must be in a body. Raises Refused(invalid_request)."""
    try:
        msgspec.convert(text, UserId)
    except msgspec.ValidationError:
        raise invalid("/user_id", f"give {USER_ID_RULE}") from None


def encode_metadata(metadata: dict[str, Any] | None) -> str:
    """The caller's object as compact JSON. Raises Refused(invalid_request) beyond METADATA_BYTES_MAX or _DEPTH_MAX."""
    level: list[Any] = [metadata]
    for _ in range(METADATA_DEPTH_MAX):
        level = [part for whole in level for part in _parts(whole)]
        if not level:
            break
    else:
        raise invalid("/metadata", f"at most {METADATA_DEPTH_MAX} objects and lists within each other")
    text = msgspec.json.encode(metadata or {})
    if len(text) > METADATA_BYTES_MAX:
        raise invalid("/metadata", f"at most {METADATA_BYTES_MAX} bytes of JSON")
    return text.decode()


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()
