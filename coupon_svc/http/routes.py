"""Which function answers which operation, and the router over all of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any
from urllib.parse import unquote

from starlette.routing import Route, Router
from starlette.types import Receive, Scope, Send

from coupon_svc.domain.outcomes import Outcome, Refused
from coupon_svc.http.auth import KeyRing
from coupon_svc.http.books import Books
from coupon_svc.http.call import Answer, Call, Handler
from coupon_svc.http.coupons import Coupons
from coupon_svc.http.endpoint import ENCODED_SLASH, Endpoint
from coupon_svc.http.limits import Limits
from coupon_svc.http.metrics import Metrics
from coupon_svc.http.operations import OPERATIONS
from coupon_svc.http.public import Public, PublicEndpoint, not_found
from coupon_svc.http.request_id import make_request_ids

HOT_PATHS = (
    "/coupons/assign",
    "/coupons/assign/{code}",
    "/coupons/lock/{code}",
    "/coupons/unlock/{code}",
    "/coupons/redeem/{code}",
)
"""What a flash sale is made of: POST only, and the code is the last part."""
_PLAIN = re.compile(rb"[A-Za-z0-9._~-]+")
"""Parts of a path that stand for themselves (RFC 3986, unreserved)."""


async def read_job(call: Call) -> Answer:
    """Streamed uploads, and so their jobs, are still to come: no job exists."""
    raise Refused(Outcome.JOB_NOT_FOUND)


def make_app(
    books: Books,
    coupons: Coupons,
    public: Public,
    keys: KeyRing,
    metrics: Metrics,
    lifespan: Callable[[Any], AbstractAsyncContextManager[None]],
    limits: Limits | None = None,
) -> Api:
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
    ordered = sorted(endpoints, key=lambda path: (path not in HOT_PATHS, "{book_id}" in path))
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
    return Api(Router(routes, redirect_slashes=False, default=not_found, lifespan=lifespan), limits)


class Api:
    """The ASGI application: routes what uvicorn has parsed, and names the endpoints that need no routing.

    A percent-encoded slash stays within its part of the path; servers decode it before anybody can route by it.
    """

    def __init__(self, router: Router, limits: Limits | None = None) -> None:
        self.router = router
        self.limits = limits or Limits()
        self.request_ids = make_request_ids()
        """For requests that bring none. Made with the application, so that no two processes share them."""
        self.draining = False
        """Whether each answer is its connection's last: the caller is to connect again, to another process."""
        self._hot_whole: dict[bytes, Endpoint] = {}
        self._hot_folders: dict[bytes, Endpoint] = {}
        for route in router.routes:
            if isinstance(route, Route) and route.path in HOT_PATHS:
                assert isinstance(route.app, Endpoint)
                folder, code, _ = route.path.partition("/{code}")
                (self._hot_folders if code else self._hot_whole)[folder.encode()] = route.app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        raw: bytes = scope.get("raw_path") or b""
        if b"%2" in raw:
            parts = re.split("%2[Ff]", raw.decode("latin-1"))
            scope = {**scope, "path": ENCODED_SLASH.join(unquote(part) for part in parts)}
        await self.router(scope, receive, send)

    def hot_endpoint(self, url: bytes) -> tuple[Endpoint, dict[str, str]] | None:
        """The endpoint of a hot path as it stands in the request line, and its parameters. None for any other, and for
        one with a query or anything in it that is or may be escaped."""
        if url in self._hot_whole:
            return self._hot_whole[url], {}
        folder, _, code = url.rpartition(b"/")
        endpoint = self._hot_folders.get(folder)
        if endpoint is None or not _PLAIN.fullmatch(code):
            return None
        return endpoint, {"code": code.decode()}
