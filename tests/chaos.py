"""One seeded run of the service under load and a fault, and what must be true of it afterwards.

Clients record every request before they send it and every answer, outside the system under test. A fault is injected while
they work, and the run fails if it was not seen to bite. Then the system is left to heal, what is unknown is asked again with
the same Idempotency-Key, the ledger catches up, and the history is held against itself, Redis and Postgres.

`python -m tests.chaos --runs 100 [--fault NAME] [--seed N]` repeats it; a failing run prints the seed that repeats it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
from redis.asyncio import Redis

from coupon_svc.config import load_settings
from coupon_svc.dev.servers import EmbeddedPostgres, EmbeddedRedis
from coupon_svc.ledger.database import open_connection
from coupon_svc.ops.verify import Verifier
from tests.harness import Stack, fresh_database, until

SHARDS = 4
CLIENTS = 8
LOAD_S = 2.0
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
        async with self._client() as http:
            for ack in ("ledger", "redis"):
                for limit in (None, 1):
                    rules = {"name": ack, "ack": ack, "max_codes_per_user": limit, "max_redemptions_per_code": 2}
                    generate = {"pattern": f"{ack[0]}{limit or 0}-########", "total": CODES}
                    answer = await http.post("/coupons", json={**rules, "generate": generate})
                    assert answer.status_code == 201, answer.text
                    self.books[answer.json()["book_id"]] = ack
                    if limit:
                        self.limited.add(answer.json()["book_id"])
        self.epochs = await self._epochs()

    async def load(self, seconds: float) -> None:
        """Work of all clients for a while."""
        deadline = time.monotonic() + seconds
        async with self._client() as http:
            await asyncio.gather(*(self._work(http, number, deadline) for number in range(CLIENTS)))

    async def heal(self) -> None:
        """Wait until all books deal again, then ask what is unknown again."""
        async with self._client() as http:
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

    def _client(self) -> httpx.AsyncClient:
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
        async with self._client() as http:
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
        async with self._client() as http:
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

    async def _epochs(self) -> dict[int, int]:
        return {row["shard"]: row["epoch"] for row in await self.stack.ledger("SELECT shard, epoch FROM shards")}

    async def recovered(self, *, all_shards: bool = True) -> None:
        """Wait until shards are in a newer epoch than before the fault: it was seen to bite."""

        async def newer() -> bool:
            now = await self._epochs()
            return (all if all_shards else any)(now[shard] > epoch for shard, epoch in self.epochs.items())

        await until(newer, HEAL_S, "the fault should have been followed by a recovery")

    def where_books_live(self) -> list[int]:
        return sorted({int(book_id[3:5]) for book_id in self.books})


# --- faults: each takes a run under load, does its harm, and shows that it bit


Fault = Callable[[Run], Awaitable[None]]


async def writer_killed(run: Run) -> None:
    run.stack.parts[0].kill()
    run.stack.parts[0] = run.stack.writer(COUPON_LEASE_CODES_MIN="20")


async def writer_paused_across_a_recovery(run: Run) -> None:
    old = run.stack.parts[0]
    old.signal(signal.SIGSTOP)
    run.stack.writer(COUPON_LEASE_CODES_MIN="20")

    async def taken_over() -> bool:
        rows = await run.stack.ledger("SELECT count(DISTINCT owner) AS owners, min(generation) AS g FROM shards")
        return bool(rows[0]["g"] > 1)

    await until(taken_over, HEAL_S)
    run.loses_records = True
    async with run.stack.redis() as redis:
        await redis.flushall()
    await run.recovered()
    old.signal(signal.SIGCONT)


async def api_killed(run: Run) -> None:
    api = run.stack.parts[1]
    api.kill()
    run.stack.parts[1] = run.stack.api()
    await run.stack.ready()


@contextlib.asynccontextmanager
async def written_to_redis_alone(run: Run) -> AsyncIterator[None]:
    """What is done just before the block is in Redis and not in the ledger: the writer is paused meanwhile."""
    writer = run.stack.parts[0]
    writer.signal(signal.SIGSTOP)
    try:
        await asyncio.sleep(run.random.uniform(0.2, 0.6))
        yield
    finally:
        writer.signal(signal.SIGCONT)


async def redis_killed(run: Run) -> None:
    assert run.stack.redis_server is not None
    async with written_to_redis_alone(run):
        run.stack.redis_server.kill()
    run.stack.redis_server.start()
    await run.recovered()


async def redis_rolled_back(run: Run) -> None:
    """An old copy of the append-only file is restored: everything since is gone."""
    server = run.stack.redis_server
    assert server is not None
    run.loses_records = True
    (folder,) = server.directory.rglob("appendonlydir")
    shutil.copytree(folder, run.stack.folder / "old")
    async with written_to_redis_alone(run):
        server.kill()
    shutil.rmtree(folder)
    shutil.copytree(run.stack.folder / "old", folder)
    server.start()
    await run.recovered()


async def redis_lost(run: Run) -> None:
    """Redis comes back empty."""
    server = run.stack.redis_server
    assert server is not None
    run.loses_records = True
    async with written_to_redis_alone(run):
        server.kill()
    for folder in server.directory.rglob("appendonlydir"):
        shutil.rmtree(folder)
    server.start()
    await run.recovered()


async def everything_flushed(run: Run) -> None:
    run.loses_records = True
    async with run.stack.redis() as redis, written_to_redis_alone(run):
        await redis.flushall()
    await run.recovered()


async def redis_and_api_killed(run: Run) -> None:
    """Nobody is left who could say what was answered: what has no record must be quarantined."""
    run.loses_records = True
    assert run.stack.redis_server is not None
    async with written_to_redis_alone(run):
        run.stack.parts[1].kill()
        run.stack.redis_server.kill()
    run.stack.redis_server.start()
    run.stack.parts[1] = run.stack.api()
    await run.recovered()
    await run.stack.ready()


async def scripts_flushed(run: Run) -> None:
    async with run.stack.redis() as redis:
        await redis.script_flush()
    await asyncio.sleep(0.5)
    assert await run._epochs() == run.epochs, "a script that is not loaded is no reason for a recovery"


async def redis_stopped(run: Run) -> None:
    assert run.stack.redis_server is not None
    os.kill(run.stack.redis_server.pid, signal.SIGSTOP)
    await asyncio.sleep(3.0)
    os.kill(run.stack.redis_server.pid, signal.SIGCONT)


async def backend_stopped(run: Run) -> None:
    """A Postgres backend of the writer stops: no time-out of the server reaches it."""
    rows = await run.stack.ledger(
        "SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'coupon-writer%' AND datname = current_database()"
    )
    for row in rows:
        os.kill(row["pid"], signal.SIGSTOP)
    await asyncio.sleep(6.0)
    for row in rows:
        os.kill(row["pid"], signal.SIGCONT)


def _deleted(kind: str) -> Fault:
    async def fault(run: Run) -> None:
        run.loses_records = kind in ("meta", "holders", "book", "free", "events")
        async with run.stack.redis() as redis:
            found = [key async for key in redis.scan_iter(f"cb:*:{kind}*")]
            assert found, "there was nothing to delete"
            await redis.delete(*found)
        if kind == "events":
            return  # gone from the stream is lost only what the ledger had not: there may have been nothing
        async with run._client() as http:
            # A missing key is found when it is looked for.
            for book_id in run.books:
                await http.get(f"/coupons/{book_id}")
        await run.recovered(all_shards=False)

    fault.__name__ = f"{kind}_deleted"
    return fault


async def stream_trimmed(run: Run) -> None:
    run.loses_records = True
    async with run.stack.redis() as redis:
        run.stack.parts[0].signal(signal.SIGSTOP)
        await asyncio.sleep(0.3)
        for key in [key async for key in redis.scan_iter("cb:*:events")]:
            await redis.xtrim(key, maxlen=0, approximate=False)
        run.stack.parts[0].signal(signal.SIGCONT)
    await run.recovered(all_shards=False)


FAULTS: dict[str, Fault] = {
    fault.__name__: fault
    for fault in (
        writer_killed,
        writer_paused_across_a_recovery,
        api_killed,
        redis_killed,
        redis_rolled_back,
        redis_lost,
        everything_flushed,
        redis_and_api_killed,
        scripts_flushed,
        redis_stopped,
        backend_stopped,
        stream_trimmed,
        *(_deleted(kind) for kind in ("meta", "holders", "book", "free", "events")),
    )
}


async def run_once(postgres_url: str, folder: Path, fault: str, seed: int, without: str = "") -> Run:
    """One run from an empty stack to the last check, `without` one of tests.unsafe's safeguards.

    Raises AssertionError with what broke.
    """
    os.makedirs(folder, exist_ok=True)
    server = EmbeddedRedis(folder / "redis")
    server.start()
    stack = Stack(server, server.url, await fresh_database(postgres_url, SHARDS), folder, SHARDS)
    if without:
        stack.module = ("tests.unsafe", without)
    run = Run(stack, seed)
    try:
        stack.writer(COUPON_LEASE_CODES_MIN="20")
        stack.api()
        await stack.ready()
        await run.prepare()
        load = asyncio.create_task(run.load(LOAD_S))
        await asyncio.sleep(run.random.uniform(0.3, 1.2))  # the moment of the fault is drawn
        await FAULTS[fault](run)
        await load
        await run.heal()
        await run.check()
        return run
    finally:
        stack.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--fault", choices=sorted(FAULTS))
    parser.add_argument("--without", default="", metavar="SAFEGUARD", help="take a safeguard out: see tests/unsafe.py")
    parser.add_argument("--seed", type=int, default=None, help="of the first run; the next ones count up")
    args = parser.parse_args()
    first = args.seed if args.seed is not None else secrets.randbelow(10**6)
    failed = 0
    with tempfile.TemporaryDirectory() as folder, EmbeddedPostgres(Path(folder) / "postgres") as postgres:
        for number in range(args.runs):
            seed = first + number
            fault = args.fault or sorted(FAULTS)[seed % len(FAULTS)]
            place = Path(folder) / f"run{number}"
            try:
                run = asyncio.run(run_once(postgres.admin_url, place, fault, seed, args.without))
                counts = Counter(attempt.outcome for attempt in run.history)
                doubts = sum(attempt.in_doubt for attempt in run.history)
                print(f"ok   {fault} --seed {seed}: {dict(counts)}, {doubts} in doubt at first", flush=True)
            except AssertionError as error:
                failed += 1
                print(
                    f"FAIL {fault}: {error}\n     repeat: python -m tests.chaos --runs 1 --fault {fault} --seed {seed}"
                )
                for log in ("writer.log", "api.log"):
                    print("     " + "\n     ".join((place / log).read_text().splitlines()[-15:]))
    print(f"{args.runs - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
