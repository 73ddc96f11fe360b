"""The one place where the API's things are joined: settings in, an application out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from coupon_svc.config import Settings, load_settings
from coupon_svc.http.auth import KeyRing
from coupon_svc.http.books import Books
from coupon_svc.http.coupons import Coupons
from coupon_svc.http.limits import Limits, drain_at_sigterm
from coupon_svc.http.metrics import Metrics
from coupon_svc.http.public import Public
from coupon_svc.http.registration import Registration
from coupon_svc.http.routes import Api, make_app
from coupon_svc.http.runner import BookRunner
from coupon_svc.postgres.database import Database
from coupon_svc.postgres.resolve import Resolver
from coupon_svc.postgres.uploads import Uploads
from coupon_svc.redis.data_plane import Store
from coupon_svc.redis.positions import Positions
from coupon_svc.redis.scripts import Scripts


def make_api(settings: Settings | None = None) -> Api:
    """The API as an ASGI application. It connects when it starts, and starts whether or not the stores are there."""
    settings = settings or load_settings()
    positions = Positions(settings.shards, settings.ledger_wait_ms)
    store = Store(settings.redis_url, settings.shards, positions, Scripts())
    database = Database(settings.database_url, "coupon-api")
    lookups = Database(settings.database_url, "coupon-api-lookups", size=4)  # they must not stand behind uploads
    bulk = Database(settings.database_url, "coupon-api-uploads", size=4)  # what is slow has connections of its own
    uploads = Uploads(bulk)
    resolver = Resolver(lookups)
    runner = BookRunner(store, resolver, database, settings.shards)
    metrics = Metrics()
    public = Public(store, metrics)
    registration = Registration(settings.database_url, store)

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        await store.start()
        await registration.start()
        await uploads.start()
        try:
            with drain_at_sigterm(asyncio.get_running_loop(), settings.drain_ms, drain):
                yield
        finally:
            await uploads.stop()
            await registration.stop()
            await store.stop()
            await database.close()
            await lookups.close()
            await bulk.close()

    api = make_app(
        Books(runner, database, uploads, settings.shards),
        Coupons(store, runner, resolver, database, registration),
        public,
        KeyRing(resolver, settings.key_cache_ms),
        metrics,
        lifespan,
        Limits.of(settings),
    )

    def drain() -> None:
        public.draining = api.draining = True

    return api
