"""Declares operations: `@operation` stands on the function that answers one, and is the only place that describes it.

Routes, hot paths, checks, the OpenAPI document and the tests all follow from the declaration. What any operation can be
refused with is added here: nobody has to list it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import msgspec

from coupon_svc.domain.outcomes import Outcome

F = TypeVar("F", bound=Callable[..., Any])

_DECLARATION = "__declared__"

ANY_REQUEST = (
    Outcome.TOO_MANY_CONNECTIONS,
    Outcome.REQUEST_TIMEOUT,
    Outcome.SHUTTING_DOWN,
    Outcome.MALFORMED_HTTP,
    Outcome.METHOD_NOT_ALLOWED,
    Outcome.INTERNAL_ERROR,
)
"""What every request can be refused with, also one that needs no key."""

ANY_OPERATION = (
    *ANY_REQUEST,
    Outcome.UNAUTHENTICATED,
    Outcome.MISSING_SCOPE,
    Outcome.RATE_LIMITED,
    Outcome.INVALID_REQUEST,
    Outcome.RECOVERING,
    Outcome.STORE_UNAVAILABLE,
)
"""What every operation that needs a key can be refused with."""

BOOK_SHUT = (Outcome.BOOK_CLOSED, Outcome.BOOK_PAUSED, Outcome.BOOK_NOT_STARTED, Outcome.BOOK_EXPIRED)
"""How a book that is not open refuses."""

NOT_REDEEMABLE = (
    Outcome.CODE_QUARANTINED,
    Outcome.NOT_ASSIGNED,
    Outcome.NOT_HOLDER,
    Outcome.ALREADY_REDEEMED,
    Outcome.LOCK_NOT_HELD,
    Outcome.LOCKED,
)
"""How a code refuses to be locked or redeemed."""

NO_ROOM = (Outcome.BACKLOG_FULL, Outcome.LEDGER_BEHIND)
"""How what needs the ledger is refused while that is too far behind."""

_ANY_BODY = (Outcome.BODY_TOO_LARGE, Outcome.UNSUPPORTED_MEDIA_TYPE, Outcome.MALFORMED_JSON)
_ANY_POST = (Outcome.INVALID_IDEMPOTENCY_KEY, Outcome.IDEMPOTENCY_KEY_REUSED, Outcome.IDEMPOTENCY_IN_PROGRESS)


class CsvAnswer(msgspec.Struct, frozen=True):
    """What an operation answers to a caller who accepts `text/csv`: a body of any length."""

    example: str
    headers: dict[str, str]
    """Name -> what it says."""


class Operation(msgspec.Struct, frozen=True, kw_only=True):
    """One method of one path, for callers with a key."""

    name: str
    """That of its function."""
    method: str
    path: str
    summary: str
    tag: str
    """The group of operations that the documents show it in."""
    scopes: tuple[str, ...]
    """Any of them is enough."""
    query: type[msgspec.Struct] | None
    """The query parameters that are known; None: none is."""
    body: type[msgspec.Struct] | None
    file_query: type[msgspec.Struct] | None
    """The query parameters of a request that brings a file instead of JSON; None: it may not."""
    answers: dict[int, type[msgspec.Struct] | None]
    """Status -> type of the body, None for an empty one."""
    outcomes: tuple[Outcome, ...]
    """What it is refused with, beyond ANY_OPERATION."""
    csv: CsvAnswer | None
    """The answer to a caller who asks for CSV; None without one."""
    location: str | None
    """The address that the Location header of a 201 or 202 names."""
    hot: bool
    """Whether it takes the fast path past ASGI: a POST whose code, if there is one, is the last part of the path."""


class PublicPath(msgspec.Struct, frozen=True, kw_only=True):
    """One path for GET and HEAD that needs no key and ignores its query."""

    name: str
    path: str
    summary: str
    media_type: str
    schema: dict[str, Any]
    """JSON Schema of the answer."""
    outcomes: tuple[Outcome, ...]
    """What it is refused with, beyond ANY_REQUEST."""
    problem_schema: dict[str, Any]
    """JSON Schema of what its problems say beyond the usual."""


def operation(
    method: str,
    path: str,
    *,
    summary: str,
    tag: str,
    scopes: tuple[str, ...],
    answers: dict[int, type[msgspec.Struct] | None],
    refusals: tuple[Outcome, ...] = (),
    query: type[msgspec.Struct] | None = None,
    body: type[msgspec.Struct] | None = None,
    file_query: type[msgspec.Struct] | None = None,
    csv: CsvAnswer | None = None,
    location: str | None = None,
    hot: bool = False,
) -> Callable[[F], F]:
    """Declare that a handler, `async (self, Call) -> Answer`, answers `method` of `path`. Its name is the operation's.

    `refusals` leaves out what follows from the method, from naming a code and from having a body.
    """

    def declare(handler: F) -> F:
        outcomes = (
            *((Outcome.TOO_MANY_UNKNOWN_CODES,) if "{code}" in path else ()),
            *(_ANY_BODY if body is not None else ()),
            *(_ANY_POST if method == "POST" else ()),
            *refusals,
        )
        declared = Operation(
            name=handler.__name__,
            method=method,
            path=path,
            summary=summary,
            tag=tag,
            scopes=scopes,
            query=query,
            body=body,
            file_query=file_query,
            answers=answers,
            outcomes=outcomes,
            csv=csv,
            location=location,
            hot=hot,
        )
        setattr(handler, _DECLARATION, declared)
        return handler

    return declare


def public_path(
    path: str,
    *,
    name: str,
    summary: str,
    media_type: str,
    schema: dict[str, Any],
    refusals: tuple[Outcome, ...] = (),
    problem_schema: dict[str, Any] | None = None,
) -> Callable[[F], F]:
    """Declare that a method of Public answers GET and HEAD of `path`."""

    def declare(handler: F) -> F:
        declared = PublicPath(
            name=name,
            path=path,
            summary=summary,
            media_type=media_type,
            schema=schema,
            outcomes=refusals,
            problem_schema=problem_schema or {},
        )
        setattr(handler, _DECLARATION, declared)
        return handler

    return declare


def declared_in(handlers: object) -> Iterator[tuple[Any, Callable[..., Any]]]:
    """(declaration, function) of each that a class declares, or (declaration, bound method) of an instance; in the order
    in which they stand in the class."""
    cls = handlers if isinstance(handlers, type) else type(handlers)
    for name, function in vars(cls).items():
        declaration = getattr(function, _DECLARATION, None)
        if declaration is not None:
            yield declaration, getattr(handlers, name)
