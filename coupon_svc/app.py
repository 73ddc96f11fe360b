"""The one place where the API's things are joined: settings in, an application out."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from coupon_svc.config import Settings, load_settings
from coupon_svc.http.auth import KeyRing
from coupon_svc.http.books import BookAnswers, Books
from coupon_svc.http.codes_out import CodesOut
from coupon_svc.http.coupons import Coupons
from coupon_svc.http.cursors import Cursors
from coupon_svc.http.jobs import JobAnswers, Jobs
from coupon_svc.http.limits import Limits, drain_at_sigterm
from coupon_svc.http.metrics import Metrics
from coupon_svc.http.openapi import openapi_document
from coupon_svc.http.public import Public
from coupon_svc.http.routes import OPERATIONS, PUBLIC_PATHS, Api, make_app
from coupon_svc.http.schemas import REJECTED_SHOWN_MAX
from coupon_svc.postgres.computed.ciphers import Ciphers
from coupon_svc.postgres.database import Database, LedgerConnection
from coupon_svc.postgres.migrations import check_installation, known_migrations
from coupon_svc.postgres.uploads import Uploads
from coupon_svc.redis.data_plane import DataPlane
from coupon_svc.redis.scripts import Scripts
from coupon_svc.service import books, jobs
from coupon_svc.service.api_keys import ApiKeys
from coupon_svc.service.assign import Assigning
from coupon_svc.service.budgets import Budget, Budgets
from coupon_svc.service.code_directory import CodeDirectory
from coupon_svc.service.durability import Durability
from coupon_svc.service.health import Health
from coupon_svc.service.issued_codes import IssuedCodes
from coupon_svc.service.listing import Listing
from coupon_svc.service.missed_messages import MissedMessages
from coupon_svc.service.patterns import Patterns
from coupon_svc.service.reading import Reading
from coupon_svc.service.receipt_rescue import ReceiptRescue
from coupon_svc.service.redeem import Redeeming
from coupon_svc.service.registration import Registration
from coupon_svc.service.waiting import Waiting

GC_THRESHOLD = 10_000
"""New objects between two collections. Requests leave no cycles behind; with Python's 700 each burst of them was searched
for some, which took a twelfth of the process's time."""

UNKNOWN_CODES_AT_ONCE_S = 10
"""A tenant that has rested may name so many seconds' worth of codes that do not exist at once."""

_DOCUMENT = openapi_document(OPERATIONS, PUBLIC_PATHS)


def make_api(settings: Settings | None = None) -> Api:
    """The API as an ASGI application. It connects when it starts, and starts whether or not the stores are there."""
    settings = settings or load_settings()
    plane = DataPlane(settings.redis_url, settings.shards, Scripts())
    known = known_migrations()

    async def check(connection: LedgerConnection) -> None:
        await check_installation(connection, settings.shards, known)

    def pool(name: str, size: int) -> Database:
        return Database(settings.database_url, name, size, on_open=check)

    database = pool("coupon-api", 8)
    lookups = pool("coupon-api-lookups", 4)  # they must not stand behind uploads
    bulk = pool("coupon-api-uploads", 4)  # what is slow has connections of its own
    bodies = pool("coupon-api-files", 2)
    job_work = pool("coupon-api-jobs", 2 * jobs.WORKERS)
    lists = pool("coupon-api-lists", 4)
    ciphers = Ciphers(settings.master_key)
    uploads = Uploads(bulk, ciphers)
    registration = Registration(settings.database_url, plane, ciphers.keys)
    missed = MissedMessages(plane.waiters, lookups)

    unknown_codes = Budget(settings.unknown_codes_per_s, UNKNOWN_CODES_AT_ONCE_S * settings.unknown_codes_per_s)
    requests = Budget(settings.requests_per_s, settings.requests_per_s) if settings.requests_per_s else None
    directory = CodeDirectory(lookups, IssuedCodes(lookups, ciphers), unknown_codes)
    budgets = Budgets(requests, unknown_codes, directory.has_met)
    durability = Durability(plane, settings.ledger_wait_ms)
    rescue = ReceiptRescue(plane, database, durability, registration)
    waiting = Waiting(plane, directory, database, durability, rescue, ciphers)
    assigning = Assigning(plane, directory, waiting, durability, registration)
    redeeming = Redeeming(plane, directory, waiting, durability)
    reading = Reading(plane, directory, waiting, durability)
    book_service = books.Books(plane, waiting, database, uploads, settings.shards, BookAnswers(), ciphers)
    listing = Listing(plane, lists, book_service, reading, durability, ciphers)

    job_service = jobs.Jobs(
        uploads, bodies, job_work, lookups, book_service.in_force, JobAnswers(), REJECTED_SHOWN_MAX, ciphers
    )

    metrics = Metrics()
    public = Public(Health(plane), metrics, _DOCUMENT)

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        gc.set_threshold(GC_THRESHOLD, *gc.get_threshold()[1:])
        await plane.start()
        await registration.start()
        await uploads.start()
        await job_service.start()
        await missed.start()
        try:
            with drain_at_sigterm(asyncio.get_running_loop(), settings.drain_ms, drain):
                yield
        finally:
            await missed.stop()
            await job_service.stop()
            await uploads.stop()
            await registration.stop()
            await plane.stop()
            for one in (database, lookups, bulk, bodies, job_work, lists):
                await one.close()

    cursors = Cursors(lambda: registration.receipt_secret)
    api = make_app(
        (
            Books(book_service, job_service, cursors),
            Jobs(job_service, cursors),
            CodesOut(listing, Patterns(lists, ciphers), cursors),
            Coupons(assigning, redeeming, reading, cursors),
        ),
        public,
        KeyRing(ApiKeys(lookups).find, settings.key_cache_ms),
        metrics,
        budgets.admit,
        lifespan,
        Limits.of(settings),
    )

    def drain() -> None:
        public.draining = api.draining = True

    return api
