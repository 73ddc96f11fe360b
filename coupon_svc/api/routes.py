"""Which function answers which operation, and the router over all of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any
from urllib.parse import unquote

from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from coupon_svc.api.auth import KeyRing
from coupon_svc.api.books import Books
from coupon_svc.api.coupons import Coupons
from coupon_svc.api.http import ENCODED_SLASH, Answer, Call, Endpoint, Handler
from coupon_svc.api.metrics import Metrics
from coupon_svc.api.operations import OPERATIONS
from coupon_svc.api.public import Public, PublicEndpoint, not_found
from coupon_svc.domain.outcomes import Outcome, Refused


async def read_job(call: Call) -> Answer:
    """Streamed uploads, and so their jobs, are still to come: no job exists."""
    raise Refused(Outcome.JOB_NOT_FOUND)


def make_router(
    books: Books,
    coupons: Coupons,
    public: Public,
    keys: KeyRing,
    metrics: Metrics,
    lifespan: Callable[[Any], AbstractAsyncContextManager[None]],
) -> Router:
    """The whole HTTP application. A path has one endpoint for all its methods, so that a wrong one is answered 405."""
    handlers: dict[str, Handler] = {
        "create_book": books.create_book,
        "list_books": books.list_books,
        "read_book": books.read_book,
        "update_book": books.update_book,
        "upload_codes": books.upload_codes,
        "assign_coupon": coupons.assign_coupon,
        "assign_code": coupons.assign_code,
        "lock_coupon": coupons.lock_coupon,
        "unlock_coupon": coupons.unlock_coupon,
        "redeem_coupon": coupons.redeem_coupon,
        "list_coupons": coupons.list_coupons,
        "read_code": coupons.read_code,
        "read_job": read_job,
    }
    endpoints: dict[str, Endpoint] = {}
    for operation in OPERATIONS:
        endpoint = endpoints.setdefault(operation.path, Endpoint(keys, metrics))
        endpoint.add(operation, handlers[operation.name])
    hot = ("/coupons/assign", "/coupons/lock/{code}", "/coupons/redeem/{code}")
    ordered = sorted(endpoints, key=lambda path: (path not in hot, "{book_id}" in path))
    routes = [Route(path, endpoints[path]) for path in ordered]
    open_to_all = {
        "/healthz": public.healthz,
        "/readyz": public.readyz,
        "/metrics": public.metrics,
        "/openapi.json": public.openapi,
        "/docs": public.docs,
        "/problems/{outcome}": public.problem,
    }
    routes += [Route(path, PublicEndpoint(answer)) for path, answer in open_to_all.items()]
    return Router(routes, redirect_slashes=False, default=not_found, lifespan=lifespan)


class KeepSlashes:
    """Keeps a percent-encoded slash within its part of the path. Servers decode it before anybody can route by it."""

    def __init__(self, router: ASGIApp) -> None:
        self._router = router

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        raw: bytes = scope.get("raw_path") or b""
        if b"%2" in raw:
            parts = re.split("%2[Ff]", raw.decode("latin-1"))
            scope = {**scope, "path": ENCODED_SLASH.join(unquote(part) for part in parts)}
        await self._router(scope, receive, send)
