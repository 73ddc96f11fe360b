"""What a fault asks the service itself while it is at work: with books of its own, which the load does not empty."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import secrets
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import Any

import httpx

from tests.chaos.run import HEAL_S, Attempt, Run, new_book
from tests.harness import until

PROBE_CODES = 300


@contextlib.asynccontextmanager
async def under_load(run: Run) -> AsyncIterator[None]:
    """Clients work on, at a walk, for as long as the block takes: the run's own load may be over before that."""
    load = asyncio.create_task(run.load(60.0, pause_s=0.1))
    try:
        yield
    finally:
        load.cancel()  # what is under way stays unknown, and is asked again
        (result,) = await asyncio.gather(load, return_exceptions=True)
    if isinstance(result, AssertionError):
        raise result


@contextlib.asynccontextmanager
async def probing(run: Run) -> AsyncIterator[Probe]:
    """A probe with a book of each kind, at a moment when the service is well."""
    async with run.client() as http:
        books = {}
        for ack in ("ledger", "redis"):
            rules = {"name": "probe", "ack": ack, "max_redemptions_per_code": 2}
            generate = {"pattern": f"probe{ack[0]}-########", "total": PROBE_CODES}
            books[ack] = await new_book(run.stack, http, {**rules, "generate": generate})
        yield Probe(run, http, books)


async def all_sent(http: httpx.AsyncClient, requests: Sequence[Awaitable[None]]) -> asyncio.Future[list[None]]:
    """Begin requests of this client, and wait until the last byte of each was sent. Returns what ends with their answers."""
    sent = 0

    async def count(event: str, _: Any) -> None:
        nonlocal sent
        sent += event == "http11.send_request_body.complete"

    async def watch(request: httpx.Request) -> None:
        request.extensions["trace"] = count

    async def all_are() -> bool:
        return sent >= len(requests)

    http.event_hooks["request"].append(watch)
    answers = asyncio.gather(*requests)
    await until(all_are, HEAL_S, "requests should be sent")
    http.event_hooks["request"].remove(watch)
    return answers


class Probe:
    """Every request of it is in the run's history, and checked like the others."""

    def __init__(self, run: Run, http: httpx.AsyncClient, books: dict[str, str]) -> None:
        self.http = http
        self._run = run
        self.books = books

    async def assign(self, ack: str, *, at: str = "") -> Attempt:
        """`at` is the API process that is asked, the first unless given."""
        user = f"probe-{secrets.token_hex(4)}"
        body: dict[str, str | int] = {"book_id": self.books[ack], "user_id": user}
        return await self._ask("assign", "/coupons/assign", ack, user, body, at)

    async def assign_code(self, held: Attempt, *, at: str = "") -> Attempt:
        """Ask for a code that somebody holds, for the same user."""
        path = f"/coupons/assign/{held.answer['code']}"
        body: dict[str, str | int] = {"book_id": held.book_id, "user_id": held.user}
        return await self._ask("assign_code", path, held.ack, held.user, body, at)

    async def redeem(self, held: Attempt, lock_token: str = "") -> Attempt:
        shown: dict[str, str | int] = {"lock_token": lock_token} if lock_token else {}
        path = f"/coupons/redeem/{held.answer['code']}"
        return await self._ask("redeem", path, held.ack, held.user, {"user_id": held.user, **shown})

    async def lock(self, held: Attempt, ttl_seconds: int) -> dict[str, Any]:
        """The body of the answer, a problem or not."""
        path = f"/coupons/lock/{held.answer['code']}"
        body: dict[str, str | int] = {"user_id": held.user, "ttl_seconds": ttl_seconds}
        return (await self._ask("lock", path, held.ack, held.user, body)).answer

    async def goes_on(self, timeout: float = HEAL_S) -> Attempt:
        """Wait until books of both kinds deal at every API process. Returns an assign of the one that waits for the
        ledger."""

        dealt = None
        for api in self._run.apis:

            async def deals(ack: str, at: str = api.base_url) -> Attempt | None:
                attempt = await self.assign(ack, at=at)
                return attempt if attempt.outcome == "ok" else None

            what = "a book that does not wait for the ledger should deal"
            await until(functools.partial(deals, "redis"), timeout, what)
            dealt = await until(functools.partial(deals, "ledger"), timeout, "a book that waits for it should deal")
        assert dealt is not None
        return dealt

    async def decided(self, ack: str, number: int) -> asyncio.Future[list[Attempt]]:
        """Ask for `number` codes at once, and wait until Redis has given one away. Returns what will be answered; it is done
        already when all were refused, as on a machine so slow that the ledger was not seen for 3 s meanwhile."""
        _, before = await self.in_redis(ack)
        asked = asyncio.gather(*(self.assign(ack) for _ in range(number)))

        async def given_away() -> bool:
            return asked.done() or (await self.in_redis(ack))[1] > before

        await until(given_away, HEAL_S, "Redis should have decided")
        return asked

    async def is_ready(self) -> bool:
        return (await self.http.get("/readyz")).status_code == 200

    async def in_redis(self, ack: str) -> tuple[int, int]:
        """(codes in the pool, codes held) of a book, as an administrator counts them."""
        async with self._run.stack.redis() as redis:
            counts = []
            for kind, count in (("free", redis.zcard), ("holders", redis.hlen)):
                keys = [key async for key in redis.scan_iter(f"cb:*:{kind}:{self.books[ack]}")]
                counts.append(await count(keys[0]) if keys else 0)
            return counts[0], counts[1]

    async def _ask(
        self, verb: str, path: str, ack: str, user: str, body: dict[str, str | int], at: str = ""
    ) -> Attempt:
        attempt = Attempt(verb, path, body, secrets.token_hex(8), self.books[ack], ack, user)
        await self._run.send(self.http, attempt, at=at)
        return attempt
