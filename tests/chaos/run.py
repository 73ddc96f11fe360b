"""Clients on one stack, the history of what they asked and were answered, and what must be true of it afterwards."""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from collections import Counter
from typing import Any

import httpx
import msgspec
from redis.asyncio import Redis

from coupon_svc.config import load_settings
from coupon_svc.ledger.database import open_connection
from coupon_svc.ops.verify import Verifier
from tests.harness import Stack, until

CLIENTS = 8
CODES = 400
HEAL_S = 40.0


class Attempt(msgspec.Struct):
    """One request of a client, and what became of it: `ok`, `refused`, or `unknown` (it may have happened)."""

    verb: str
    path: str
    body: dict[str, str]
    key: str
    ack: str
    user: str
    outcome: str = "unknown"
    answer: dict[str, Any] = {}
    in_doubt: bool = False
    """It was unknown at first."""


class Run:
    """Load on one stack, with a history of its own."""

    def __init__(self, stack: Stack, seed: int) -> None:
        self.stack = stack
        self.random = random.Random(seed)
        self.history: list[Attempt] = []
        self.books: dict[str, str] = {}
        self.limited: set[str] = set()
        self.epochs: dict[int, int] = {}
        self.loses_records = False
        self._key = ""

    async def prepare(self) -> None:
        """Two books of each kind: one for many codes, one with a limit of one code a user."""
        self._key = await self.stack.key()
        async with self.client() as http:
            for ack in ("ledger", "redis"):
                for limit in (None, 1):
                    rules = {"name": ack, "ack": ack, "max_codes_per_user": limit, "max_redemptions_per_code": 2}
                    generate = {"pattern": f"{ack[0]}{limit or 0}-########", "total": CODES}
                    answer = await http.post("/coupons", json={**rules, "generate": generate})
                    assert answer.status_code == 201, answer.text
                    self.books[answer.json()["book_id"]] = ack
                    if limit:
                        self.limited.add(answer.json()["book_id"])
        self.epochs = await self.epochs_now()

    async def load(self, seconds: float) -> None:
        """Work of all clients for a while."""
        deadline = time.monotonic() + seconds
        async with self.client() as http:
            await asyncio.gather(*(self._work(http, number, deadline) for number in range(CLIENTS)))

    async def heal(self) -> None:
        """Wait until all books deal again, then ask what is unknown again."""
        async with self.client() as http:
            for book_id in self.books:

                async def deals(book_id: str = book_id) -> bool:
                    attempt = self._assign(book_id, f"healer-{secrets.token_hex(4)}")
                    await self._send(http, attempt)
                    return attempt.outcome == "ok" or attempt.answer.get("code") == "book_exhausted"

                await until(deals, HEAL_S, "every book should deal again")
            for attempt in self.history:
                if attempt.outcome == "unknown":
                    attempt.in_doubt = True

                    async def known(attempt: Attempt = attempt) -> bool:
                        await self._send(http, attempt, record=False)
                        return attempt.outcome != "unknown"

                    await until(known, HEAL_S, "an unknown outcome should become known")
        await self.stack.drained()

    async def check(self) -> None:
        """Everything that must hold now, whatever happened."""
        self._check_history()
        await self._check_replays()
        await self._check_ledger()
        await self._check_lists()
        await self._check_verify()

    # --- load

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            base_url=self.stack.base_url, headers={"Authorization": f"Bearer {self._key}"}, timeout=15
        )

    def _assign(self, book_id: str, user: str) -> Attempt:
        body = {"book_id": book_id, "user_id": user}
        return Attempt("assign", "/coupons/assign", body, secrets.token_hex(8), self.books[book_id], user)

    async def _work(self, http: httpx.AsyncClient, number: int, deadline: float) -> None:
        held: list[tuple[str, str, str]] = []
        while time.monotonic() < deadline:
            if held and self.random.random() < 0.4:
                code, user, ack = self.random.choice(held)
                attempt = Attempt(
                    "redeem", f"/coupons/redeem/{code}", {"user_id": user}, secrets.token_hex(8), ack, user
                )
            else:
                book_id = self.random.choice(list(self.books))
                attempt = self._assign(book_id, f"u{number}-{self.random.randrange(30)}")
            await self._send(http, attempt)
            if attempt.outcome == "ok" and attempt.verb == "assign":
                held.append((attempt.answer["code"], attempt.user, attempt.ack))
            if attempt.outcome == "unknown":
                await asyncio.sleep(0.02)

    async def _send(self, http: httpx.AsyncClient, attempt: Attempt, *, record: bool = True) -> None:
        if record:
            self.history.append(attempt)
        try:
            answer = await http.post(attempt.path, json=attempt.body, headers={"Idempotency-Key": attempt.key})
        except httpx.HTTPError:
            attempt.outcome = "unknown"
            return
        attempt.answer = answer.json()
        if answer.status_code in (200, 201):
            attempt.outcome = "ok"
        elif answer.status_code == 503 or answer.status_code >= 500:
            attempt.outcome = "unknown" if attempt.answer["code"] == "outcome_unknown" else "refused"
            assert answer.status_code != 500, attempt.answer
        else:
            attempt.outcome = "refused"

    # --- checks

    def _ok(self, verb: str) -> list[Attempt]:
        return [attempt for attempt in self.history if attempt.verb == verb and attempt.outcome == "ok"]

    def _check_history(self) -> None:
        holders: dict[str, str] = {}
        for attempt in self._ok("assign"):
            code = attempt.answer["code"]
            assert attempt.answer["user_id"] == attempt.user
            assert holders.setdefault(code, attempt.user) == attempt.user, "P1: a code was answered to two users"
        keys = Counter(attempt.key for attempt in self.history)
        assert max(keys.values()) == 1
        uses = Counter(attempt.path for attempt in self._ok("redeem"))
        assert not uses or max(uses.values()) <= 2, "P3: a code was redeemed more often than allowed"
        positions = Counter(attempt.answer["position"] for attempt in [*self._ok("assign"), *self._ok("redeem")])
        assert not positions or max(positions.values()) == 1, "two events were answered with one position"

    async def _check_replays(self) -> None:
        """The same Idempotency-Key gives the first answer again, after all that has happened."""
        answered = [*self._ok("assign"), *self._ok("redeem")]
        if self.loses_records:  # what only Redis had is gone, and its key with it
            answered = [attempt for attempt in answered if attempt.ack == "ledger"]
        async with self.client() as http:
            for attempt in self.random.sample(answered, min(40, len(answered))):
                again = Attempt(attempt.verb, attempt.path, attempt.body, attempt.key, attempt.ack, attempt.user)
                await self._send(http, again, record=False)
                first, second = ({**answer, "durable": None} for answer in (attempt.answer, again.answer))
                assert first == second, "P5: the same key was not given the same answer"  # but may be durable by now

    async def _check_ledger(self) -> None:
        rows = await self.stack.ledger("SELECT book_id, code, user_id, uses FROM coupons")
        ledger = {row["code"]: row for row in rows}
        for attempt in self._ok("assign"):
            row = ledger.get(attempt.answer["code"])
            if row is None:
                assert attempt.ack == "redis", "P2: a durable answer is not in the ledger"
                assert self.loses_records, "a record is lost, and the fault does not lose any"
                quarantined = await self.stack.ledger("SELECT FROM quarantine WHERE code = $1", attempt.answer["code"])
                assert quarantined, "P1: a code was answered, its record lost, and it is not in quarantine"
            else:
                assert row["user_id"] == attempt.user, "P1: the ledger has the code in other hands than it was answered"
        redeemed = Counter(attempt.path.rpartition("/")[2] for attempt in self._ok("redeem"))
        for code, number in redeemed.items():
            assert code in ledger, "P2: a code that was redeemed is not in the ledger"
            assert ledger[code]["uses"] >= number, "P2: a redemption that was answered is not in the ledger"
        invoked = Counter(a.path.rpartition("/")[2] for a in self.history if a.verb == "redeem")
        for code, row in ledger.items():
            assert row["uses"] <= invoked[code], "a redemption is in the ledger that nobody asked for"
        asked = Counter((a.body["book_id"], a.user) for a in self.history if a.verb == "assign")
        given = Counter((row["book_id"], row["user_id"]) for row in rows)
        assert all(given[place] <= asked[place] for place in given), "P5: one request had two effects"
        held = Counter((row["book_id"], row["user_id"]) for row in rows if row["book_id"] in self.limited)
        assert not held or max(held.values()) <= 1, "P3: a user holds more codes than the limit"

    async def _check_lists(self) -> None:
        """What was answered is in its user's list, unless its record was lost (and then it is in quarantine)."""
        expected: dict[str, set[str]] = {}
        for attempt in self._ok("assign"):
            expected.setdefault(attempt.user, set()).add(attempt.answer["code"])
        async with self.client() as http:
            for user, codes in expected.items():
                answer = await http.get(f"/users/{user}/coupons", params={"limit": 1000})
                assert answer.status_code == 200, answer.text
                missing = codes - {coupon["code"] for coupon in answer.json()["coupons"]}
                assert not missing or self.loses_records, "P2: what was answered is not in the user's list"

    async def _check_verify(self) -> None:
        settings = load_settings(self.stack.environment)
        connection = await open_connection(settings.database_url, "chaos")
        redis = Redis.from_url(settings.redis_url, decode_responses=True)
        report = await Verifier(settings, connection, redis, show_progress=False).verify()
        await redis.aclose()
        connection.terminate()
        assert report.holds, (report.findings, report.unchecked)

    async def epochs_now(self) -> dict[int, int]:
        return {row["shard"]: row["epoch"] for row in await self.stack.ledger("SELECT shard, epoch FROM shards")}

    async def recovered(self, *, all_shards: bool = True) -> None:
        """Wait until shards are in a newer epoch than before the fault: it was seen to bite."""

        async def newer() -> bool:
            now = await self.epochs_now()
            return (all if all_shards else any)(now[shard] > epoch for shard, epoch in self.epochs.items())

        await until(newer, HEAL_S, "the fault should have been followed by a recovery")

    def where_books_live(self) -> list[int]:
        return sorted({int(book_id[3:5]) for book_id in self.books})
