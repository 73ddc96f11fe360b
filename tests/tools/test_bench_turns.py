"""What the bench counts: good answers alone, and the time until the ledger has everything."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from bench.figures import Figure
from bench.over_http import _figures, _Rounds
from bench.requests import Pairs, Requests
from bench.tail import open_loop
from bench.turns import Turn, open_ledger, take_turn
from tests.harness import Stack

LINES = ["redis", "ledger", "postgres", "pair"]


@asynccontextmanager
async def server(respond: Callable[[int], Awaitable[bytes]]) -> AsyncIterator[int]:
    """An HTTP server that gives its n-th request the n-th answer, from 1. Hands out its port."""
    number = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal number
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                size = int(head.lower().partition(b"content-length: ")[2].split(b"\r", 1)[0])
                await reader.readexactly(size)
                number += 1
                writer.write(await respond(number))
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield listening.sockets[0].getsockname()[1]
    finally:
        listening.close()


def answer(status: int, body: bytes) -> bytes:
    return b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n%b" % (status, len(body), body)


def turn(good: int = 100, **bad: int) -> Turn:
    return Turn(good=good, seconds=1.0, cpu_s=0.01, load_share=0.1, bad=Counter(bad))


async def test_a_refusal_is_counted_apart_from_good_answers() -> None:
    async def refuse_every_third(number: int) -> bytes:
        return answer(503, b'{"code":"refilling"}') if number % 3 == 0 else answer(201, b"{}")

    async with server(refuse_every_third) as port:
        taken = await take_turn(port, os.getpid(), Requests("k").echo(), 0.2, None, connections=3)
    assert set(taken.bad) == {"503 refilling"}
    assert abs(taken.good - 2 * taken.bad.total()) <= 3


async def test_a_turn_ends_when_the_last_request_is_answered() -> None:
    async def slow(number: int) -> bytes:
        await asyncio.sleep(0.3)
        return answer(201, b"{}")

    async with server(slow) as port:
        taken = await take_turn(port, os.getpid(), Requests("k").echo(), 0.1, None, connections=8)
    assert taken.good == 8
    assert taken.seconds >= 0.3


async def test_latency_in_the_open_loop_counts_from_when_a_request_was_due() -> None:
    async def stall_once(number: int) -> bytes:
        if number == 1:  # in one loop with the load: that stands still, too
            asyncio.get_running_loop().call_soon(time.sleep, 0.3)
        return answer(201, b"{}")

    async with server(stall_once) as port:
        latencies, bad = await open_loop(port, Requests("k").echo(), 200, 0.5)
    assert not bad
    assert len(latencies) == 100
    # Who was due in the first half of the stall has waited for at least the second.
    assert sum(latency > 0.15 for latency in latencies) >= 20


def test_a_line_with_an_answer_that_was_not_good_has_failed_and_so_has_what_is_held_against_it() -> None:
    rounds = _Rounds()
    for line in LINES:
        rounds.take(line, turn(refilling=1) if line == "postgres" else turn())
    rounds.echoes = [100.0]
    failed = [figure.id for figure in _figures(rounds) if figure.failed]
    assert failed == ["postgres_ledger", "postgres_redis"]


def test_a_pair_is_held_against_two_echoes() -> None:
    rounds = _Rounds()
    for line in LINES:
        rounds.take(line, turn(good=120 if line == "ledger" else 60))
    rounds.echoes = [120.0]
    figures: dict[str, Figure] = {figure.id: figure for figure in _figures(rounds)}
    assert figures["postgres_ledger"].samples == [2.0]
    assert figures["pair"].samples == [1.0]


def test_pairs_lock_a_coupon_and_redeem_it_with_the_token_of_its_lock() -> None:
    pairs = Pairs(Requests("k"), [b'{"code":"C-1","user_id":"alice"}'], with_key=True)
    assert b"POST /coupons/lock/C-1 " in pairs.next_request()
    pairs.take_answer(b'{"code":"C-1","user_id":"alice","lock_token":"lk_1"}')
    redeem = pairs.next_request()
    assert b"POST /coupons/redeem/C-1 " in redeem
    assert b'"lock_token":"lk_1"' in redeem
    assert pairs.redeemed == 0
    pairs.take_answer(b'{"code":"C-1","user_id":"alice","redeemed_at":"now"}')
    assert pairs.redeemed == 1
    assert not pairs.ran_out


async def test_the_ledger_has_caught_up_only_when_it_has_everything_that_was_decided(
    make_stack: Callable[[], Awaitable[Stack]],
) -> None:
    stack = await make_stack()
    writer = stack.writer()
    stack.api()
    await stack.ready()
    async with await stack.client() as client:
        rules = {"name": "late", "ack": "redis", "generate": {"pattern": "LATE-####", "total": 10}}
        book_id = (await client.post("/coupons", json=rules)).json()["book_id"]
        body = {"book_id": book_id, "user_id": "alice"}
        assert (await client.post("/coupons/assign", json=body)).status_code == 201
        await stack.drained()
        ledger = await open_ledger(stack.database_url, stack.redis_admin_url, stack.shards)
        await asyncio.wait_for(ledger.caught_up(), 5)
        writer.signal(signal.SIGSTOP)
        assert (await client.post("/coupons/assign", json=body)).status_code == 201
        waiting = asyncio.create_task(ledger.caught_up())
        done, _ = await asyncio.wait({waiting}, timeout=0.5)
        assert not done
        writer.signal(signal.SIGCONT)
        await asyncio.wait_for(waiting, 10)
        await ledger.close()
