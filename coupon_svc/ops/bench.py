"""Figures, each with its spread: `python -m coupon_svc.ops.bench` (an assign against a bare JSON echo under the same
server) and `python -m coupon_svc.ops.bench --memory` (bytes a code takes in Redis, with a million of them).

Ratios count, not figures: echo and assign are measured in turns within one run, on one machine, under one load.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from coupon_svc.api.server import SERVER_SETTINGS
from coupon_svc.dev.servers import EmbeddedPostgres, EmbeddedRedis
from coupon_svc.ledger.database import open_connection
from coupon_svc.ledger.keys import create_key, new_key
from coupon_svc.ledger.migrations import migrate
from coupon_svc.store.connection import Connection, connect
from coupon_svc.store.keys import ShardKeys
from coupon_svc.store.owner import OwnerStore, Term
from coupon_svc.store.scripts import Scripts

CONNECTIONS = 64
SECONDS_A_TURN = 3.0
CODES = 600_000


class _Caller(asyncio.Protocol):
    """One connection that sends the next request as soon as the last is answered."""

    def __init__(self, next_request: Callable[[], bytes], counts: dict[int, int]) -> None:
        self._next = next_request
        self._counts = counts
        self._buffer = b""
        self.stopped = False
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.write(self._next())

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head = self._buffer.find(b"\r\n\r\n")
        if head < 0:
            return
        at = self._buffer.lower().find(b"content-length: ") + 16
        end = head + 4 + int(self._buffer[at : self._buffer.index(b"\r", at)])
        if len(self._buffer) < end:
            return
        status = int(self._buffer[9:12])
        self._counts[status] = self._counts.get(status, 0) + 1
        self._buffer = b""
        if self.transport is not None and not self.stopped:
            self.transport.write(self._next())


async def load(port: int, next_request: Callable[[], bytes], seconds: float) -> dict[int, int]:
    """Closed-loop load on a local port. Returns how many answers came, by status."""
    loop = asyncio.get_running_loop()
    counts: dict[int, int] = {}
    callers = []
    for _ in range(CONNECTIONS):
        _, caller = await loop.create_connection(lambda: _Caller(next_request, counts), "127.0.0.1", port)
        callers.append(caller)
    await asyncio.sleep(seconds)
    for caller in callers:
        caller.stopped = True
        if caller.transport is not None:
            caller.transport.abort()
    return counts


def cpu_seconds(pid: int) -> float:
    """What a process has used of the processors so far (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def echo_app() -> Starlette:
    """The bare JSON echo that the service is measured against."""

    async def echo(request: Request) -> JSONResponse:
        return JSONResponse(await request.json())

    return Starlette(routes=[Route("/echo", echo, methods=["POST"])])


def serve_echo(fd: int) -> None:
    """Serve the echo as `coupon-svc api` serves the API: same server, same settings."""
    config = uvicorn.Config(echo_app, factory=True, http="httptools", **SERVER_SETTINGS)
    uvicorn.Server(config).run(sockets=[socket.socket(fileno=fd)])


@contextlib.contextmanager
def _process(args: list[str], environment: dict[str, str], *, listen: bool = False) -> Iterator[tuple[int, int]]:
    """A process of ours and the port it serves on (0: none)."""
    listener = socket.create_server(("127.0.0.1", 0)) if listen else None
    fd = listener.fileno() if listener else -1
    process = subprocess.Popen(
        [sys.executable, "-m", *args, *([f"--fd={fd}"] if listener else [])],
        env={**os.environ, **environment},
        pass_fds=(fd,) if listener else (),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    port = listener.getsockname()[1] if listener else 0
    if listener:
        listener.close()
    try:
        yield process.pid, port
    finally:
        process.terminate()
        process.wait()


def _post(path: str, headers: dict[str, str], body: dict[str, Any]) -> bytes:
    text = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: b", "Content-Type: application/json", f"Content-Length: {len(text)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + text


async def _prepare(database_url: str) -> str:
    connection = await open_connection(database_url, "coupon-bench")
    await migrate(connection, 16)
    key = new_key()
    await create_key(connection, "bench", key)
    await connection.close()
    return key


def bench_http(rounds: int) -> None:
    """Print requests per second and processor time per request of echo and assign, and their ratios."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as running:
        redis = running.enter_context(EmbeddedRedis(Path(folder) / "redis"))
        postgres = running.enter_context(EmbeddedPostgres(Path(folder) / "postgres"))
        key = asyncio.run(_prepare(postgres.url))
        settings = {"COUPON_REDIS_URL": redis.url, "COUPON_DATABASE_URL": postgres.url}
        running.enter_context(_process(["coupon_svc", "writer"], settings))
        api_pid, api_port = running.enter_context(_process(["coupon_svc", "api"], settings, listen=True))
        echo_pid, echo_port = running.enter_context(_process(["coupon_svc.ops.bench"], {}, listen=True))
        authorization = {"Authorization": f"Bearer {key}"}
        books = {ack: _make_book(api_port, authorization, ack) for ack in ("redis", "ledger")}
        users = iter(range(10**12))

        def assign(ack: str) -> Callable[[], bytes]:
            return lambda: _post(
                "/coupons/assign", authorization, {"book_id": books[ack], "user_id": f"user-{next(users)}"}
            )

        def echo() -> bytes:
            return _post("/echo", authorization, {"book_id": books["redis"], "user_id": f"user-{next(users)}"})

        rows: dict[str, list[tuple[float, float]]] = {"echo": [], "redis": [], "ledger": []}
        for _ in range(rounds):
            for name, pid, port, request in (
                ("echo", echo_pid, echo_port, echo),
                ("redis", api_pid, api_port, assign("redis")),
                ("ledger", api_pid, api_port, assign("ledger")),
            ):
                before = cpu_seconds(pid)
                counts = asyncio.run(load(port, request, SECONDS_A_TURN))
                good = counts.get(200, 0) + counts.get(201, 0)
                if good != sum(counts.values()):
                    print(f"  {name}: not all answers were good: {counts}", file=sys.stderr)
                rows[name].append((good / SECONDS_A_TURN, (cpu_seconds(pid) - before) / max(1, good) * 1e6))
        for name, figures in rows.items():
            rate, cpu = (statistics.median(column) for column in zip(*figures, strict=True))
            print(f"{name:7} {rate:8.0f} requests/s  {cpu:6.1f} µs of the process per request")
        for name in ("redis", "ledger"):
            pairs = list(zip(rows[name], rows["echo"], strict=True))
            _print_ratio(f"ack={name}: requests/s against the echo", [a[0] / b[0] for a, b in pairs])
            _print_ratio(f"ack={name}: processor time against the echo", [a[1] / b[1] for a, b in pairs])


def _make_book(port: int, headers: dict[str, str], ack: str) -> str:
    url = f"http://127.0.0.1:{port}/coupons"
    body = {"name": ack, "ack": ack, "generate": {"pattern": f"{ack[0]}-##########", "total": CODES}}
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {**headers, "Content-Type": "application/json"}, method="POST"
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        book_id: str = json.load(answer)["book_id"]
        return book_id


def _print_ratio(name: str, ratios: list[float]) -> None:
    print(f"{name}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


async def bench_memory(codes: int) -> None:
    """Print the bytes that a code takes in Redis: free, and then assigned to a user who has no other."""
    with tempfile.TemporaryDirectory() as folder, EmbeddedRedis(Path(folder) / "redis") as server:
        owner = OwnerStore(server.url, 1, Scripts())
        term, keys, book_id = Term(0, 1, 1), ShardKeys(0, 1), "bk_00" + "m" * 16
        await owner.shut_shard(term)
        await owner.certify_shard(term, await owner.connect(), 10**9)
        rules = {"tenant_id": "1", "status": "active", "starts_at_ms": "", "expires_at_ms": "", "ack": "redis"}
        rules |= {"max_redemptions_per_code": "1", "max_codes_per_user": "1", "unlent": "0"}
        await owner.put_book(term, book_id, 1, rules, known=False)
        connection = await connect(server.url, "bench")
        empty = await _used_memory(connection)
        await owner.load_codes(term, book_id, [f"SUMMER-{i:08d}" for i in range(codes)], 0)
        free = await _used_memory(connection)
        script = Scripts()["assign_coupon"]
        for start in range(0, codes, 5_000):
            futures = [
                connection.send(
                    "EVALSHA", script.sha, 6, keys.meta, keys.book(book_id), keys.free(book_id), keys.holders(book_id),
                    keys.coupons(1, f"user-{i}"), keys.events, 1, 0, 1, book_id, f"user-{i}", "", "",
                )
                for i in range(start, min(start + 5_000, codes))
            ]  # fmt: skip
            await asyncio.gather(*futures)
        assigned = await _used_memory(connection)
        await owner.publish_position(term, codes, trim_seq=codes)
        trimmed = await _used_memory(connection)
        print(f"a free code:                                   {(free - empty) / codes:6.0f} bytes")
        print(f"an assigned one, its user's only one:          {(trimmed - empty) / codes:6.0f} bytes")
        print(f"its event, until the ledger has had it 1 min.: {(assigned - trimmed) / codes:6.0f} bytes")
        owner.close()
        connection.abort()


_MANY_COUPONS = """
    INSERT INTO tenants (name) VALUES ('bench');
    INSERT INTO books (book_id, shard, tenant_id, name, max_redemptions_per_code, lock_ttl_seconds, ack, metadata,
                       created_at_ms, total, lent, leased_upto, loaded, loaded_version)
    VALUES ('{book}', 0, 1, 'bench', 1, 120, 'ledger', '{{}}', 0, {codes}, {codes}, {codes}, true, 1);
    INSERT INTO codes SELECT 1, 'C-' || i, '{book}', i FROM generate_series(1, {codes}) i;
    INSERT INTO coupons SELECT '{book}', 'C-' || i, 'user-' || i, 1795357061878, 0, 1, i FROM generate_series(1, {codes}) i;
    INSERT INTO events SELECT 0, 1, i, 'coupon_assigned', '{book}', 'C-' || i, 'user-' || i, 1795357061878
        FROM generate_series(1, {codes}) i;
    UPDATE shards SET epoch = 1, certified_epoch = 1, committed = {codes} WHERE shard = 0;
"""


async def bench_rebuild(codes: int) -> None:
    """Print how long it takes to rebuild an empty Redis from a ledger with this many assigned codes in one book."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as running:
        redis = running.enter_context(EmbeddedRedis(Path(folder) / "redis"))
        postgres = running.enter_context(EmbeddedPostgres(Path(folder) / "postgres"))
        connection = await open_connection(postgres.url, "coupon-bench")
        await migrate(connection, 1)
        await connection.execute(_MANY_COUPONS.format(book="bk_00" + "m" * 16, codes=codes))
        settings = {"COUPON_REDIS_URL": redis.url, "COUPON_DATABASE_URL": postgres.url, "COUPON_SHARDS": "1"}
        started = time.perf_counter()
        pid, _ = running.enter_context(_process(["coupon_svc", "writer"], settings))
        while await connection.fetchval("SELECT certified_epoch FROM shards") < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        took, cpu = time.perf_counter() - started, cpu_seconds(pid)
        print(f"{codes} assigned codes rebuilt in {took:.1f} s; the writer used {cpu:.1f} s of a processor")
        connection.terminate()


async def _used_memory(connection: Connection) -> int:
    text: str = await connection.ask("INFO", "memory")
    return int(next(line for line in text.splitlines() if line.startswith("used_memory:")).partition(":")[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory", action="store_true", help="measure memory per code instead")
    parser.add_argument("--rebuild", action="store_true", help="measure how long Redis takes to rebuild instead")
    parser.add_argument("--codes", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--fd", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.fd is not None:
        serve_echo(args.fd)
    elif args.rebuild:
        asyncio.run(bench_rebuild(args.codes))
    elif args.memory:
        asyncio.run(bench_memory(args.codes))
    else:
        bench_http(args.rounds)


if __name__ == "__main__":
    main()
