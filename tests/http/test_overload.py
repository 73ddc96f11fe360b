"""Offered twice what it can do, the service does nearly as much as it can, and says of the rest that nothing was done."""

from __future__ import annotations

import asyncio
import multiprocessing
import re
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import httpx
import msgspec
import pytest
import uvloop

from coupon_svc.load.client import Connection, Reply, build_request
from tests.chaos.network import Network, running_network
from tests.http.helpers import assign, make_book

GOODPUT_MIN = 0.8
"""Of the highest rate."""
CALLERS = 8_192
"""Nearly as many as a process has connections."""
AT_ONCE = 1_000
"""Callers at a time, at the highest rate: with fewer, calls carry less, and the rate is lower."""
REDIS_AWAY_S = 0.3
"""By so much replies of Redis are late, that it is Redis that bounds the rate: the generator, which has the same machine,
can then offer twice as much, and the API has time to refuse."""
SENT_MIN = 0.99
"""Of the requests that were due: what is not sent, for want of a connection or of processor time, is not offered."""
WARM_S = 3.0
"""Not counted: until as many wait as ever will."""
HIGHEST_S, OVERLOAD_S = 5.0, 30.0
ROUNDS = 3
CODES = 10_000_000
"""More than are assigned in all rounds: a book that runs dry is no overload."""
REPLIES_S = 8.0
"""How long to wait for the last replies: no request waits for the ledger longer than 5.5 s."""
MEMORY_MAX_MB = {"api": 250, "redis": 60, "writer": 150}
"""After two rounds of a busy processor they were 186, 136 and 55, with 500,000 codes assigned."""
CODES_PER_MB = 2_000
"""Redis keeps what is assigned: so many codes may take a megabyte more."""


class Offer(NamedTuple):
    """What one load was told: replies by outcome, and the share of the requests that were sent when they were due."""

    outcomes: Counter[str]
    sent: float
    goodput: float
    """Assigned per second, while the load went on and after WARM_S."""


class Generator:
    """Sends assigns: `rate` per second by the clock, whatever becomes of them; without it, each connection asks again."""

    def __init__(self, headers: bytes, book_id: str, rate: float | None) -> None:
        self._requests = [
            build_request(
                b"POST", b"/coupons/assign", headers, msgspec.json.encode({"book_id": book_id, "user_id": f"u{n}"})
            )
            for n in range(1_000)
        ]
        self._rate = rate
        self._loop = asyncio.get_running_loop()
        self._free: deque[Connection] = deque()
        """Used in turns: the service closes one on which it has waited for a first request for 10 s."""
        self._sent = self._under_way = 0
        self._outcomes: Counter[str] = Counter()
        self._going_on = True
        self._last_reply: asyncio.Future[None] = self._loop.create_future()
        """The last one after the load."""

    async def offer(self, port: int, connections: int, seconds: float) -> Offer:
        for _ in range(connections):
            _, connection = await self._loop.create_connection(Connection, "127.0.0.1", port)
            self._free.append(connection)
        opened = list(self._free)
        began = self._loop.time()
        if self._rate is None:
            while self._free:
                self._send()
        warm_at, before = 0.0, 0
        while (now := self._loop.time() - began) < seconds:
            if not warm_at and now >= WARM_S:
                warm_at, before = now, self._outcomes["assigned"]
            while self._rate is not None and self._free and self._sent < now * self._rate:
                self._send()
            await asyncio.sleep(0.001)
        goodput, self._going_on = (self._outcomes["assigned"] - before) / (now - warm_at), False
        sent = self._sent / (self._rate * now) if self._rate else 1.0
        if self._under_way:
            await asyncio.wait([self._last_reply], timeout=REPLIES_S)
        self._outcomes["no reply"] += self._under_way
        for connection in opened:
            connection.abort()
        return Offer(+self._outcomes, sent, goodput)

    def _send(self) -> None:
        connection = self._free.popleft()
        self._sent += 1
        self._under_way += 1

        def done(reply: Reply) -> None:
            self._under_way -= 1
            if not self._going_on and not self._under_way:
                self._last_reply.set_result(None)
            if not connection.open:
                self._outcomes["no reply"] += self._going_on
                return
            self._free.append(connection)
            self._outcomes[outcome_of(reply)] += 1
            if self._rate is None and self._going_on:
                self._send()

        connection.request(self._requests[self._sent % 1_000], done, self._loop.time())


def outcome_of(reply: Reply) -> str:
    if reply.status == 201:
        return "assigned"
    code = str(msgspec.json.decode(reply.body)["code"])
    told_when = reply.status in (429, 503) and int(reply.header(b"retry-after") or 0) >= 1
    return code if told_when else f"{code} without Retry-After"


def run_load(port: int, headers: bytes, book_id: str, rate: float | None, connections: int, seconds: float) -> Offer:
    """One load, in a process of its own."""

    async def work() -> Offer:
        return await Generator(headers, book_id, rate).offer(port, connections, seconds)

    return uvloop.run(work())


def memory_mb(stack: Network) -> dict[str, float]:
    """The most that each process took so far."""
    writer, api = stack.newest(serves=False), stack.newest(serves=True)
    pids = {"api": api.process.pid, "redis": stack.master.pid, "writer": writer.process.pid}
    status = {part: Path(f"/proc/{pid}/status").read_text() for part, pid in pids.items()}
    return {part: int(re.findall(r"^VmHWM:\s*(\d+)", text, re.M)[0]) / 1024 for part, text in status.items()}


@pytest.mark.chaos
@pytest.mark.alone
@pytest.mark.parametrize("ack", ["ledger", "redis"])
@pytest.mark.parametrize(
    ("redis_away_s", "connections", "goodput_min"),
    [
        pytest.param(REDIS_AWAY_S, CALLERS, GOODPUT_MIN, id="redis_busy"),
        pytest.param(0.0, 4_000, GOODPUT_MIN, id="processor_busy"),
        pytest.param(0.0, CALLERS, 0.5, id="processor_busy_and_all_connections"),
    ],
)
async def test_twice_the_highest_rate_leaves_the_goodput_nearly_where_it_was(
    ack: str, redis_away_s: float, connections: int, goodput_min: float, postgres_url: str, tmp_path: Path
) -> None:
    """In the best of some rounds: others who use the machine make many a round slow. What holds in each round is that no
    request is unknown, that those who are refused are told when to come again, and that memory is bounded.

    Where Redis bounds the rate, all that is due is sent, and who has waited too long is refused. Where the processor does,
    no more can be sent than there are connections; and twice as many that wait cost each of them some processor time more.
    """
    loop = asyncio.get_running_loop()
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        async with running_network(postgres_url, tmp_path) as stack, await stack.client() as http:
            book_id = await make_book(http, ack=ack, generate={"pattern": "##########", "total": CODES})
            await assign(http, book_id)
            stack.redis_of["api"].delay_replies(redis_away_s)
            target = int(stack.base_url.rpartition(":")[2]), headers_of(http), book_id
            told, assigned = [], 0
            for _ in range(ROUNDS):
                highest = await loop.run_in_executor(pool, run_load, *target, None, AT_ONCE, HIGHEST_S)
                rate = 2 * highest.goodput
                overload = await loop.run_in_executor(pool, run_load, *target, rate, connections, OVERLOAD_S)
                memory = memory_mb(stack)
                assigned += highest.outcomes["assigned"] + overload.outcomes["assigned"]
                most = {**MEMORY_MAX_MB, "redis": MEMORY_MAX_MB["redis"] + assigned / CODES_PER_MB}
                told.append(f"{highest}, then {overload}, {memory}")
                assert overload.outcomes.keys() <= {"assigned", "refilling", "store_unavailable"}, told
                assert all(memory[part] < most[part] for part in most), told
                offered = not redis_away_s or (overload.sent >= SENT_MIN and overload.outcomes["store_unavailable"])
                if offered and overload.goodput >= goodput_min * highest.goodput:
                    print(told)
                    return
            raise AssertionError(told)


def headers_of(http: httpx.AsyncClient) -> bytes:
    return f"host: x\r\nauthorization: {http.headers['Authorization']}\r\ncontent-type: application/json\r\n".encode()
