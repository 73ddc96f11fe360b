"""Assign's script in Redis against a script with the bare four writes, in turns on one server."""

from __future__ import annotations

import asyncio
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import hiredis

from coupon_svc.dev.servers import EmbeddedRedis
from coupon_svc.ops.bench.assigning import Assigns, pack
from coupon_svc.ops.bench.figures import BenchError, Figure, rate_text, ratios
from coupon_svc.redis.contract import Command
from coupon_svc.redis.control import ShardControl, Term
from coupon_svc.redis.keys import ShardKeys
from coupon_svc.redis.scripts import Scripts

CALLS_A_TURN = 2_000
BOOK_ID = "bk_00" + "m" * 16
TENANT_ID = 1
TERM = Term(0, 1, 1)

BARE = """#!lua
local code = redis.call("SPOP", KEYS[1])
redis.call("HSET", KEYS[2], code, ARGV[2])
redis.call("HSET", KEYS[3], code, ARGV[1])
redis.call("XADD", KEYS[4], "*", "book", ARGV[1], "code", code, "user", ARGV[2])
return code
"""
"""What any script that deals a code at random, knows whose it is, and leaves a trace has to write. Nothing is checked."""
_BARE_KEYS = ("bare:{b}:free", "bare:{b}:holders", "bare:{b}:books", "bare:{b}:events")


def bench_scripts(rounds: int, say: Callable[[str], None]) -> list[Figure]:
    """Calls a second, pipelined in one write a turn, without and with an Idempotency-Key. Raises BenchError."""
    with tempfile.TemporaryDirectory(prefix="coupon-bench-") as folder, EmbeddedRedis(Path(folder) / "redis") as server:
        asyncio.run(open_book(server.url, _codes(2 * (rounds + 1) * CALLS_A_TURN)))
        with _Pipe(server.admin_url) as pipe:
            return _measure(pipe, rounds, say)


async def open_book(url: str, codes: Sequence[str]) -> None:
    """A shard that is certified in epoch 1, and an `ack = redis` book in it with these codes in its pool."""
    owner = ShardControl(url, 1, Scripts())
    await owner.shut_shard(TERM)
    await owner.certify_shard(TERM, await owner.connect(), 10**9)
    rules = {"tenant_id": str(TENANT_ID), "status": "active", "starts_at_ms": "", "expires_at_ms": "", "ack": "redis"}
    rules |= {"max_redemptions_per_code": "1", "max_codes_per_user": "1", "unlent": "0"}
    await owner.put_book(TERM, BOOK_ID, 1, rules, known=False)
    await owner.load_codes(TERM, BOOK_ID, codes, 0)
    owner.close()


def _codes(number: int) -> list[str]:
    return [f"SUMMER-{i:08d}" for i in range(number)]


def _measure(pipe: _Pipe, rounds: int, say: Callable[[str], None]) -> list[Figure]:
    keys = ShardKeys(0, 1)
    assigns = Assigns(Scripts())
    bare_sha = pipe.ask("SCRIPT", "LOAD", BARE)
    pool = _codes((rounds + 1) * CALLS_A_TURN)
    for begin in range(0, len(pool), 1_000):
        pipe.ask("SADD", _BARE_KEYS[0], *pool[begin : begin + 1_000])
    rates: dict[str, list[float]] = {"bare": [], "plain": [], "keyed": []}
    for number in range(rounds + 1):
        users = range(number * CALLS_A_TURN, (number + 1) * CALLS_A_TURN)
        turns: dict[str, list[Command]] = {
            "bare": [("EVALSHA", bare_sha, 4, *_BARE_KEYS, BOOK_ID, f"user-{u}") for u in users],
            "plain": [assigns.command(keys, 1, TENANT_ID, BOOK_ID, [(f"user-p{u}", "")]) for u in users],
            "keyed": [assigns.command(keys, 1, TENANT_ID, BOOK_ID, [(f"user-k{u}", f"key-{u}")]) for u in users],
        }
        for name, commands in turns.items():
            rate = pipe.time(pack(commands), CALLS_A_TURN)
            if number:  # the first round warms up
                rates[name].append(rate)
    say(", ".join(f"{name} {rate_text(samples)}" for name, samples in rates.items()))
    figures = []
    for kind, words in (("keyed", "with an Idempotency-Key"), ("plain", "without one")):
        figures.append(
            Figure(
                id=f"script_{kind}",
                what=f"Redis: assign scripts a second, pipelined, {words}, against a script with the bare four writes",
                samples=ratios(rates[kind], rates["bare"]),
                goal=0.7,
                note=f"{rate_text(rates[kind])} against {rate_text(rates['bare'])}",
            )
        )
    return figures


class _Pipe:
    """A blocking connection that takes as little of the machine as it can while the server works."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._reader = hiredis.Reader(encoding="utf-8")
        self._socket = socket.create_connection((parts.hostname, parts.port or 6379))
        self.ask("AUTH", parts.username or "default", parts.password or "")

    def __enter__(self) -> _Pipe:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def ask(self, *command: str) -> str:
        self._socket.sendall(pack([command]))
        return str(self._read(1)[0])

    def time(self, commands: bytes, number: int) -> float:
        """Calls a second. Raises BenchError unless each was answered with a code."""
        began = time.perf_counter()
        self._socket.sendall(commands)
        replies = self._read(number)
        rate = number / (time.perf_counter() - began)
        bad = [
            reply for reply in replies if (reply[0] != "ok" if isinstance(reply, list) else not isinstance(reply, str))
        ]
        if bad:
            raise BenchError(f"a script did not deal a code: {bad[0]}")
        return rate

    def _read(self, number: int) -> list[object]:
        replies: list[object] = []
        while len(replies) < number:
            reply = self._reader.gets()
            if reply is False:
                self._reader.feed(self._socket.recv(1 << 20))
                continue
            if isinstance(reply, hiredis.ReplyError):
                raise BenchError(str(reply))
            replies.append(reply)
        return replies
