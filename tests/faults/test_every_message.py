"""The connection breaks before and after each message of an operation, to Redis and to Postgres.

A sweep plays the operation again and again, and cuts at its first message, its second, and so on, until a play ends before
the cut. A message is a command of Redis, or a frame of Postgres's protocol. What the processes send by themselves meanwhile
counts, too: it makes a sweep a little longer.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping
from typing import Any, ClassVar, NamedTuple

import httpx
import pytest

from tests.audit import audit
from tests.chaos.network import Network, network_stage
from tests.chaos.proxy import Proxy, Side
from tests.harness import until
from tests.http.helpers import make_book
from tests.test_verify import report_of

DECIDED_S = 15.0
"""How long a caller asks again: longer than any wait of the service."""
HEALTHY_S = 5.0
UNDECIDED = {409: "idempotency_in_progress", 500: "internal_error", 503: ""}
"""What a caller repeats, by status: with this outcome, or with any."""
PASSES_MAX = 5
TENANT = "swept"
STOCK = {"pattern": "########", "total": 2_000}
WAYS = ("api redis", "api postgres", "writer redis", "writer postgres")

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
    if answer.status_code not in UNDECIDED:
        return False
    return UNDECIDED[answer.status_code] in ("", answer.json()["code"])


@pytest.fixture(scope="module")
async def stage(postgres_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stage]:
    async with network_stage(postgres_url, tmp_path_factory.mktemp("messages"), shards=1) as network:
        try:
            network.writer()
            network.api()
            await network.ready()
            async with await network.client(TENANT) as http:
                stage = Stage(network, http, await make_book(http, generate=STOCK))
                yield stage
                await in_order(stage)
        finally:
            network.close()


class Operation(ABC):
    """What a sweep plays. Each play begins afresh: another user, another key, another book."""

    MARKS: ClassVar[Mapping[str, tuple[bytes, ...]]]
    """By way, what the operation itself sends there: one of the messages that are cut must match each of these patterns."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage

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

    MARKS: ClassVar = {
        "api redis": (rb"^\*\d+\r\n\$5\r\nFCALL\r\n.*assign_coupon",),
        "api postgres": (rb"^B", rb"^S"),
        "writer redis": (rb"\r\ncommitted\r\n",),
        "writer postgres": (rb"^B.*user-", rb"^E", rb"^S"),
    }

    def __init__(self, stage: Stage, ack: str) -> None:
        super().__init__(stage)
        self._ack = ack
        self._book, self._plays = "", 0

    async def prepare(self) -> None:
        if not self._book:
            self._book = await make_book(self.stage.http, generate=STOCK, ack=self._ack)
        self._plays += 1
        self._user = f"user-{self._plays}"

    async def play(self) -> None:
        self._answer = await self.stage.decided("/coupons/assign", *self._asked())
        await self.stage.network.drained()

    async def check(self) -> None:
        assert self._answer.status_code == 201, self._answer.text
        assert_replayed(await self.stage.ask("/coupons/assign", *self._asked()), self._answer)
        held = await self.stage.held(self._book)
        assert held[self._user] == [self._answer.json()["code"]]
        assert len(held) == self._plays

    def _asked(self) -> tuple[Body, str]:
        return {"book_id": self._book, "user_id": self._user}, f"key of {self._user}"


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


def on_every_way(*quick: str) -> pytest.MarkDecorator:
    """A test with each way; those that are not `quick` run with the chaos suite."""
    return pytest.mark.parametrize(
        "way", [pytest.param(way, marks=() if way in quick else pytest.mark.chaos) for way in WAYS]
    )


on_both_sides = pytest.mark.parametrize("side", ["before", "after"])


@on_both_sides
@on_every_way("api redis", "writer redis")
async def test_an_assign_that_the_ledger_acknowledges(stage: Stage, way: str, side: Side) -> None:
    await sweep(Assign(stage, "ledger"), way, side)


@pytest.mark.chaos
@on_both_sides
@on_every_way()
async def test_an_assign_that_redis_acknowledges(stage: Stage, way: str, side: Side) -> None:
    await sweep(Assign(stage, "redis"), way, side)
