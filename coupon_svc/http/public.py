"""What needs no key: health, readiness, metrics, and the documents."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec
from starlette.types import Receive, Scope, Send

from coupon_svc.domain.outcomes import Outcome, Refused
from coupon_svc.http.metrics import Metrics
from coupon_svc.http.operations import public_path
from coupon_svc.http.problems import PROBLEMS, log_failure, problem_response
from coupon_svc.http.request_id import request_id_of
from coupon_svc.http.response import Headers, Response, send_response
from coupon_svc.service.health import Health

_JSON, _HTML, _TEXT = b"application/json", b"text/html; charset=utf-8", b"text/plain; version=0.0.4; charset=utf-8"
_DOCS_HEADERS = [
    (b"content-security-policy", b"default-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'")
]


def _object(properties: dict[str, Any], required: Iterable[str] | None = None) -> dict[str, Any]:
    """JSON Schema of an object; all properties are required unless it is said which are."""
    return {"type": "object", "properties": properties, "required": list(properties if required is None else required)}


def _status(word: str, **more: dict[str, Any]) -> dict[str, Any]:
    return _object({"status": {"const": word}, **more})


_SHARDS = _object({"open": {"type": "integer"}, "of": {"type": "integer"}}) | {
    "description": "how many shards this process can use"
}
_EXPLANATION = _object(
    {
        "code": {"type": "string", "description": "the outcome"},
        "status": {"type": "integer", "description": "the HTTP status it is answered with"},
        "title": {"type": "string", "description": "the outcome in a few words"},
        "detail": {"type": "string", "description": "what it means"},
        "retry_after_s": {"type": ["integer", "null"], "description": "when to try again, in seconds"},
    }
)
_DOCUMENT = _object(
    {part: {} for part in ("openapi", "info", "servers", "security", "tags", "paths", "components")},
    required=("openapi", "info", "paths"),
)
_ANY_TEXT = {"type": "string"}


class Public:
    """Each method answers one path, as (content type, body), or raises Refused."""

    def __init__(self, health: Health, metrics: Metrics, openapi: dict[str, Any]) -> None:
        self._health = health
        self._metrics = metrics
        self.draining = False
        """Whether the process was told to stop and serves only until load balancers have noticed."""
        self._openapi = msgspec.json.encode(openapi)
        self._docs = (Path(__file__).parent / "docs.html").read_bytes()

    @public_path(
        "/healthz",
        name="read_health",
        summary="The process lives",
        media_type="application/json",
        schema=_status("alive"),
    )
    def healthz(self, _: Scope) -> tuple[bytes, bytes]:
        """200 whenever the process answers at all. Asks neither Redis nor Postgres."""
        return _JSON, b'{"status":"alive"}'

    @public_path(
        "/readyz",
        name="read_readiness",
        summary="Ready when every shard is certified and below its backlog cap, and the ledger was seen in the last 3 s",
        media_type="application/json",
        schema=_status("ready", shards=_SHARDS),
        refusals=(
            Outcome.SHUTTING_DOWN,
            Outcome.STORE_UNAVAILABLE,
            Outcome.RECOVERING,
            Outcome.BACKLOG_FULL,
            Outcome.LEDGER_BEHIND,
        ),
        problem_schema={"shards": _SHARDS},
    )
    def readyz(self, _: Scope) -> tuple[bytes, bytes]:
        """200 or 503. Both say how many shards are open, that is, certified in the Redis of this process."""
        of_shards = self._health.shards()
        shards = {"open": sum(shard.is_open for shard in of_shards), "of": len(of_shards)}
        unready = self._unready()
        if unready is not None:
            raise Refused(unready, shards=shards)
        return _JSON, msgspec.json.encode({"status": "ready", "shards": shards})

    def _unready(self) -> Outcome | None:
        """Why load balancers should send this process no requests; None if they should."""
        if self.draining:
            return Outcome.SHUTTING_DOWN
        return self._health.why_unready()

    @public_path(
        "/metrics", name="read_metrics", summary="Counters for Prometheus", media_type="text/plain", schema=_ANY_TEXT
    )
    def metrics(self, _: Scope) -> tuple[bytes, bytes]:
        """Counters of this process, in Prometheus's text format."""
        return _TEXT, self._metrics.render(self._health.shards())

    @public_path(
        "/openapi.json",
        name="read_openapi",
        summary="This document",
        media_type="application/json",
        schema=_DOCUMENT,
    )
    def openapi(self, _: Scope) -> tuple[bytes, bytes]:
        """The OpenAPI document."""
        return _JSON, self._openapi

    @public_path(
        "/docs", name="read_docs", summary="This document, for people", media_type="text/html", schema=_ANY_TEXT
    )
    def docs(self, _: Scope) -> tuple[bytes, bytes]:
        """A page that shows the OpenAPI document."""
        return _HTML, self._docs

    @public_path(
        "/problems/{outcome}",
        name="read_problem",
        summary="What a problem is about",
        media_type="application/json",
        schema=_EXPLANATION,
        refusals=(Outcome.NOT_FOUND,),
    )
    def problem(self, scope: Scope) -> tuple[bytes, bytes]:
        """Explain an outcome: the page that the `type` of a problem points to."""
        name = scope["path_params"]["outcome"]
        if name not in Outcome.__members__.values():
            raise Refused(Outcome.NOT_FOUND)
        problem = PROBLEMS[Outcome(name)]
        return _JSON, msgspec.json.encode({"code": name, **problem._asdict()})


class PublicEndpoint:
    """The ASGI application of one of Public's methods."""

    def __init__(self, answer: Callable[[Scope], tuple[bytes, bytes]]) -> None:
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a GET or HEAD; whatever the query."""
        try:
            if scope["method"] not in ("GET", "HEAD"):
                await send_problem(scope, send, Refused(Outcome.METHOD_NOT_ALLOWED), headers=[(b"allow", b"GET, HEAD")])
                return
            content_type, body = self._answer(scope)
        except Refused as refused:
            await send_problem(scope, send, refused)
            return
        except Exception as error:
            await send_problem(scope, send, Refused(Outcome.INTERNAL_ERROR), failure=error)
            return
        headers: Headers = [(b"content-type", content_type), (b"cache-control", b"no-store")]
        headers += _DOCS_HEADERS if content_type == _HTML else []
        await send_response(send, Response(200, headers, body))


async def send_problem(
    scope: Scope,
    send: Send,
    refused: Refused,
    *,
    headers: Headers | None = None,
    failure: Exception | None = None,
) -> None:
    """Refuse a request that came by ASGI and belongs to no operation. `failure` is what was not foreseen."""
    request_id = request_id_of(scope)
    log_failure(refused.outcome, "no operation", request_id, failure)
    await send_response(send, problem_response(refused, request_id, headers))


async def not_found(scope: Scope, receive: Receive, send: Send) -> None:
    """The application for every path that no route knows."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1000})
        return
    await send_problem(scope, send, Refused(Outcome.NOT_FOUND))
