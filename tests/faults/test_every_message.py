"""The connection breaks before and after each message of an operation, to Redis and to Postgres.

A sweep plays the operation again and again, and cuts at its first message, its second, and so on, until a play ends before
the cut. A message is a command to Redis, or what Postgres acts on as one (`PostgresMessages`). What the processes send by
themselves meanwhile counts, too: it makes a sweep a little longer.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import re
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import httpx
import pytest

from coupon_svc.postgres.codes import PIECE_CODES
from tests.audit import audit, settled
from tests.chaos.network import Network, direct, network_stage
from tests.chaos.proxy import Proxy, Side
from tests.harness import until
from tests.http.helpers import counters, make_book
from tests.test_verify import report_of

DECIDED_S = 15.0
"""How long a caller asks again: longer than any wait of the service."""
HEALTHY_S = 5.0
PASSES_MAX = 5
TENANT = "swept"
STOCK = {"pattern": "########", "total": 1_000}
WAYS = ("api redis", "api postgres", "writer redis", "writer postgres")

BLOCK = 40
"""Codes that the writer lends of a book at a time."""
MANY = 20

ASSIGN_MARKS = {
    "api redis": (rb"FCALL\r\n.*assign_coupon",),
    "api postgres": (rb"^B",),
    "writer redis": (rb"\r\ncommitted\r\n",),
    "writer postgres": (rb"^B.*user-",),
}

Body = dict[str, Any]


class Stage(NamedTuple):
    network: Network
    http: httpx.AsyncClient
    witness: str
    """A book of which anybody may have a code, to see that the service is healthy."""

    def proxy(self, way: str) -> Proxy:
        part, server = way.split()
        return (self.network.redis_of if server == "redis" else self.network.postgres_of)[part]

    async def ask(self, path: str, body: Body, key: str) -> httpx.Response:
        """POST with an Idempotency-Key, and a new API key of the tenant: the service has to look it up in the ledger."""
        headers = {"Authorization": f"Bearer {await self.network.key(TENANT)}", "Idempotency-Key": key}
        return await self.http.post(path, json=body, headers=headers)

    async def decided(self, path: str, body: Body, key: str) -> httpx.Response:
        """The answer, asked for with the same key until there is one, as callers are told to."""
        began = time.monotonic()
        while undecided(answer := await self.ask(path, body, key)):
            assert time.monotonic() - began < DECIDED_S, f"not decided yet: {answer.text}"
            await asyncio.sleep(0.05)
        return answer

    async def held(self, book_id: str) -> dict[str, list[str]]:
        """The codes that the ledger has of the book, by user."""
        held: dict[str, list[str]] = {}
        for row in await self.network.ledger("SELECT user_id, code FROM coupons WHERE book_id = $1", book_id):
            held.setdefault(row["user_id"], []).append(row["code"])
        return held

    async def healthy(self) -> None:
        """Wait until the service is ready, and an assign is answered with what the ledger has."""

        async def well() -> bool:
            if (await self.http.get("/readyz")).status_code != 200:
                return False
            answer = await self.http.post("/coupons/assign", json={"book_id": self.witness, "user_id": "witness"})
            return answer.status_code == 201 and answer.json()["durable"]

        await until(well, HEALTHY_S, "the service should be healthy again")


def assert_replayed(again: httpx.Response, first: httpx.Response) -> None:
    """Nothing is new in `again`, and it says what was said first; but the ledger may have it by now."""

    def told(answer: httpx.Response) -> Any:
        return json.loads(answer.text, object_hook=lambda fields: {k: v for k, v in fields.items() if k != "durable"})

    assert again.headers.get("idempotent-replayed") == "true", again.text
    assert told(again) == told(first)


async def in_order(stage: Stage) -> None:
    """What both stores hold adds up, by the service's own check and by the tests' auditor."""
    report = await report_of(stage.network)
    assert report.holds, report
    await audit(stage.network)


def undecided(answer: httpx.Response) -> bool:
    """Whether a caller has to repeat the request; of a list, if that is so for one of its users."""
    body = answer.json()
    return (
        answer.status_code == 503
        or body.get("code") == "idempotency_in_progress"
        or any(result["status"] == 503 for result in body.get("results", ()))
    )


@contextlib.asynccontextmanager
async def swept_stage(postgres_url: str, folder: Path, **of_writer: str) -> AsyncIterator[Stage]:
    """One writer, one API process, one shard; what both stores hold in the end adds up."""
    async with network_stage(postgres_url, folder, shards=1) as network:
        try:
            network.writer(**of_writer)
            network.api()
            await network.ready()
            async with await network.client(TENANT) as http:
                stage = Stage(network, http, await make_book(http, generate=STOCK))
                yield stage
                await in_order(stage)
        finally:
            network.close()


@pytest.fixture(scope="module")
async def stage(postgres_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stage]:
    async with swept_stage(postgres_url, tmp_path_factory.mktemp("messages")) as stage:
        yield stage


@pytest.fixture(scope="module")
async def stage_of_small_blocks(postgres_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stage]:
    """Whose writer lends BLOCK codes of a book at a time."""
    folder, block = tmp_path_factory.mktemp("blocks"), str(BLOCK)
    async with swept_stage(postgres_url, folder, COUPON_LEASE_CODES_MIN=block, COUPON_LEASE_CODES_MAX=block) as stage:
        yield stage


class Operation(ABC):
    """What a sweep plays. Each play begins afresh: another user, another key, another book."""

    MARKS: ClassVar[Mapping[str, tuple[bytes, ...]]]
    """By way, what the operation itself sends there: one of the messages that are cut must match each of these patterns."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self._plays = 0

    @abstractmethod
    async def prepare(self) -> None:
        """Make ready for the next play, while nothing is cut."""

    @abstractmethod
    async def play(self) -> None:
        """Go on until the caller knows what became of it, and nothing is under way."""

    @abstractmethod
    async def check(self) -> None:
        """Hold what the caller was told against what the service answers now, and against the ledger."""


class Assign(Operation):
    """One assign to one user."""

    MARKS = ASSIGN_MARKS

    def __init__(self, stage: Stage, ack: str) -> None:
        super().__init__(stage)
        self._ack = ack

    async def prepare(self) -> None:
        if not self._plays:
            self._book = await make_book(self.stage.http, generate=STOCK, ack=self._ack)
        self._plays += 1
        self._user = f"user-{self._plays}"

    async def play(self) -> None:
        self._answer = await self.stage.decided("/coupons/assign", *self._asked())
        await settled(self.stage.network)

    async def check(self) -> None:
        assert self._answer.status_code == 201, self._answer.text
        assert_replayed(await self.stage.ask("/coupons/assign", *self._asked()), self._answer)
        held = await self.stage.held(self._book)
        assert held[self._user] == [self._answer.json()["code"]]
        assert len(held) == self._plays

    def _asked(self) -> tuple[Body, str]:
        return {"book_id": self._book, "user_id": self._user}, f"key of {self._user}"


class AssignMany(Operation):
    """One call that assigns to many users."""

    MARKS = ASSIGN_MARKS

    async def prepare(self) -> None:
        if not self._plays:
            self._book = await make_book(self.stage.http, generate=STOCK)
        self._plays += 1
        self._users = [f"user-{self._plays}-{number}" for number in range(MANY)]

    async def play(self) -> None:
        self._answer = await self.stage.decided("/coupons/assignments", *self._asked())
        await settled(self.stage.network)

    async def check(self) -> None:
        assert_replayed(await self.stage.ask("/coupons/assignments", *self._asked()), self._answer)
        results = self._answer.json()["results"]
        assert [(one["user_id"], one["status"]) for one in results] == [(user, 201) for user in self._users]
        held = await self.stage.held(self._book)
        assert {user: held[user] for user in self._users} == {one["user_id"]: [one["code"]] for one in results}
        assert len(held) == MANY * self._plays

    def _asked(self) -> tuple[Body, str]:
        return {"book_id": self._book, "user_ids": self._users}, f"key {self._plays}"


class Refill(Operation):
    """The writer lends the second block of a book: one more assign leaves half of the first."""

    MARKS: ClassVar = {
        "writer redis": (rb":free:bk_",),
        "writer postgres": (rb"^B.*bk_", rb"^Q.*COMMIT"),
    }

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage)
        self._numbers = itertools.count()
        """Of users: each gets one code."""

    async def prepare(self) -> None:
        self._plays += 1
        self._book = await make_book(self.stage.http, generate={"pattern": "########", "total": BLOCK + BLOCK // 2})
        await self._assign(BLOCK // 2 - 1)
        await settled(self.stage.network)

    async def play(self) -> None:
        await self._assign(1)

        async def lent() -> bool:
            rows = await self.stage.network.ledger(
                "SELECT lent = total AS all FROM books WHERE book_id = $1", self._book
            )
            return bool(rows[0]["all"])

        await until(lent, DECIDED_S, "the writer should lend what is left")
        await settled(self.stage.network)

    async def check(self) -> None:
        await self._assign(BLOCK)
        held = await self.stage.held(self._book)
        assert sorted(len(codes) for codes in held.values()) == [1] * (BLOCK + BLOCK // 2)
        assert len({codes[0] for codes in held.values()}) == len(held)
        over = await self.stage.decided("/coupons/assign", {"book_id": self._book, "user_id": "late"}, "late")
        assert over.json()["code"] == "book_exhausted"

    async def _assign(self, number: int) -> None:
        """Give so many users a code each."""
        users = [f"user-{next(self._numbers)}" for _ in range(number)]
        asked = {"book_id": self._book, "user_ids": users}
        answer = await self.stage.decided("/coupons/assignments", asked, f"key of {users[0]}")
        assert {one["status"] for one in answer.json()["results"]} == {201}, answer.text


class Upload(Operation):
    """One JSON upload into a new book."""

    MARKS: ClassVar = {
        "api redis": (rb"read_book",),
        "api postgres": (rb"^B.*UP-", rb"^Q.*COMMIT"),
        "writer redis": (rb":free:bk_",),
        "writer postgres": (rb"^B.*bk_", rb"^Q.*COMMIT"),
    }

    def __init__(self, stage: Stage, number: int) -> None:
        super().__init__(stage)
        self._number = number

    async def prepare(self) -> None:
        self._plays += 1
        self._book = await make_book(self.stage.http, codes=[])
        self._codes = [f"UP-{self._book[3:].upper()}-{number}" for number in range(self._number)]
        await settled(self.stage.network)

    async def play(self) -> None:
        self._answer = await self.stage.decided("/coupons/codes", *self._asked())
        await settled(self.stage.network)

    async def check(self) -> None:
        assert self._answer.status_code == 200, self._answer.text
        assert (self._answer.json()["inserted"], self._answer.json()["duplicates"]) == (self._number, 0)
        assert_replayed(await self.stage.ask("/coupons/codes", *self._asked()), self._answer)
        rows = await self.stage.network.ledger("SELECT code FROM codes WHERE book_id = $1", self._book)
        assert sorted(row["code"] for row in rows) == sorted(self._codes)
        counts = await counters(self.stage.http, self._book)
        assert counts["available"] == self._number

    def _asked(self) -> tuple[Body, str]:
        return {"book_id": self._book, "codes": self._codes}, f"key {self._book}"


class Recovery(Assign):
    """The shard is rebuilt from the ledger after Redis has lost all keys."""

    MARKS: ClassVar = {"writer redis": (rb"EVALSHA.*user-",), "writer postgres": (rb"^B.*wr_",)}

    async def prepare(self) -> None:
        await super().prepare()
        await super().play()
        self._epoch = await self._epoch_now()

    async def play(self) -> None:
        async with direct(self.stage.network.master) as redis:
            await redis.flushall()

        async def recovered() -> bool:
            return await self._epoch_now() > self._epoch and (await self.stage.http.get("/readyz")).status_code == 200

        await until(recovered, DECIDED_S, "the shard should be recovered")
        await settled(self.stage.network)

    async def _epoch_now(self) -> int:
        return int((await self.stage.network.ledger("SELECT epoch FROM shards"))[0]["epoch"])


async def sweep(operation: Operation, way: str, side: Side) -> None:
    """Cut at the first message of a play, at the second of another one, and so on, until a play ends before the cut.

    That is done again while a message that the operation itself sends was missed: what a process sends by itself may have
    come where it was expected.
    """
    cut: list[bytes] = []
    missed = set(operation.MARKS[way])
    for _ in range(PASSES_MAX):
        for number in itertools.count(1):
            message = await played(operation, operation.stage.proxy(way), number, side)
            if message is None:
                break
            cut.append(message)
        missed -= {mark for mark in missed if any(re.search(mark, message, re.DOTALL) for message in cut)}
        if not missed:
            return
    raise AssertionError(f"{len(cut)} messages were cut, and none of {missed}")


async def played(operation: Operation, proxy: Proxy, number: int, side: Side) -> bytes | None:
    """Play once, with a cut at this message, and check. Returns the message, or None if it did not come."""
    await operation.prepare()
    cuts = proxy.cuts
    proxy.cut_at(number, side)
    try:
        await operation.play()
    finally:
        message = proxy.cut_message()
    assert proxy.cuts - cuts == (message is not None)
    await operation.stage.healthy()
    await operation.check()
    return message


CHAOS = pytest.mark.chaos
on_both_sides = pytest.mark.parametrize("side", ["before", "after"])
on_every_way = pytest.mark.parametrize("way", WAYS)
of_the_writer = pytest.mark.parametrize("way", ["writer redis", "writer postgres"])


@on_both_sides
@pytest.mark.parametrize(
    "way",
    [
        "api redis",
        "writer redis",
        pytest.param("api postgres", marks=CHAOS),
        pytest.param("writer postgres", marks=CHAOS),
    ],
)
async def test_an_assign_that_the_ledger_acknowledges(stage: Stage, way: str, side: Side) -> None:
    await sweep(Assign(stage, "ledger"), way, side)


@CHAOS
@on_both_sides
@on_every_way
async def test_an_assign_that_redis_acknowledges(stage: Stage, way: str, side: Side) -> None:
    await sweep(Assign(stage, "redis"), way, side)


@CHAOS
@on_both_sides
@on_every_way
async def test_a_call_that_assigns_to_many(stage: Stage, way: str, side: Side) -> None:
    await sweep(AssignMany(stage), way, side)


@CHAOS
@on_both_sides
@of_the_writer
async def test_a_refill(stage_of_small_blocks: Stage, way: str, side: Side) -> None:
    await sweep(Refill(stage_of_small_blocks), way, side)


@CHAOS
@pytest.mark.parametrize("number", [10, PIECE_CODES + 1], ids=["at_once", "in_pieces"])
@on_both_sides
@on_every_way
async def test_an_upload(stage: Stage, way: str, side: Side, number: int) -> None:
    await sweep(Upload(stage, number), way, side)


@CHAOS
@of_the_writer
async def test_a_recovery(way: str, postgres_url: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Both sides at once, each on a stage of its own, with few books: the sweep of a recovery takes minutes, and mostly
    waits."""

    async def swept(side: Side) -> None:
        async with swept_stage(postgres_url, tmp_path_factory.mktemp(side)) as stage:
            await sweep(Recovery(stage, "ledger"), way, side)

    await asyncio.gather(swept("before"), swept("after"))
