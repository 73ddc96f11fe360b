"""The router over all declared operations."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from itertools import chain
from typing import Any
from urllib.parse import unquote

from starlette.routing import Route, Router
from starlette.types import Receive, Scope, Send

from coupon_svc.http.auth import KeyRing
from coupon_svc.http.books import Books
from coupon_svc.http.codes_out import CodesOut
from coupon_svc.http.coupons import Coupons
from coupon_svc.http.endpoint import ENCODED_SLASH, Admit, Endpoint
from coupon_svc.http.jobs import Jobs
from coupon_svc.http.limits import Limits
from coupon_svc.http.metrics import Metrics
from coupon_svc.http.operations import Operation, PublicPath, declared_in
from coupon_svc.http.public import Public, PublicEndpoint, not_found
from coupon_svc.http.request_id import make_request_ids

HANDLERS = (Books, Jobs, CodesOut, Coupons)
"""The classes that declare the operations of the service."""
OPERATIONS: tuple[Operation, ...] = tuple(
    declaration for declaration, _ in chain.from_iterable(map(declared_in, HANDLERS))
)
"""Every operation of the service, as its handler declares it."""
PUBLIC_PATHS: tuple[PublicPath, ...] = tuple(declaration for declaration, _ in declared_in(Public))
_PLAIN = re.compile(rb"[A-Za-z0-9._~-]+")
"""Parts of a path that stand for themselves (RFC 3986, unreserved)."""


def make_app(
    handlers: Iterable[object],
    public: Public,
    keys: KeyRing,
    metrics: Metrics,
    admit: Admit,
    lifespan: Callable[[Any], AbstractAsyncContextManager[None]],
    limits: Limits | None = None,
) -> Api:
    """The whole HTTP application. `handlers` are instances of HANDLERS. A path has one endpoint for all its methods, so that
    a wrong one is answered 405."""
    endpoints: dict[str, Endpoint] = {}
    hot_paths = set()
    for operation, handler in chain.from_iterable(map(declared_in, handlers)):
        endpoints.setdefault(operation.path, Endpoint(keys, metrics, admit)).add(operation, handler)
        if operation.hot:
            hot_paths.add(operation.path)
    routes = [Route(path, endpoints[path]) for path in sorted(endpoints, key=_where_parameters_stand)]
    routes += [Route(path.path, PublicEndpoint(answer)) for path, answer in declared_in(public)]
    hot = {path: endpoints[path] for path in hot_paths}
    return Api(Router(routes, redirect_slashes=False, default=not_found, lifespan=lifespan), hot, limits)


def _where_parameters_stand(path: str) -> list[bool]:
    """Sorts paths so that each is matched before those that have a parameter in its place: `/coupons/codes/{code}` before
    `/coupons/{book_id}/codes`."""
    return [part.startswith("{") for part in path.split("/")]


class Api:
    """The ASGI application: routes what uvicorn has parsed, and names the endpoints that need no routing.

    A percent-encoded slash stays within its part of the path; servers decode it before anybody can route by it.
    """

    def __init__(self, router: Router, hot: Mapping[str, Endpoint], limits: Limits | None = None) -> None:
        self.router = router
        self.limits = limits or Limits()
        self.request_ids = make_request_ids()
        """For requests that bring none. Made with the application, so that no two processes share them."""
        self.draining = False
        """Whether each answer is its connection's last: the caller is to connect again, to another process."""
        self._hot_whole: dict[bytes, Endpoint] = {}
        """Endpoints of hot paths without a parameter."""
        self._hot_folders: dict[bytes, Endpoint] = {}
        """Those of hot paths that end with `/{code}`, by what stands before it."""
        for path, endpoint in hot.items():
            folder, code, _ = path.partition("/{code}")
            (self._hot_folders if code else self._hot_whole)[folder.encode()] = endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Route a request that came by ASGI."""
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
