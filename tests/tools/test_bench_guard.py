"""What an operation takes is guarded where it can be counted: commands, bytes, statements, calls, memory. Of times there
is one, with much room: the processor time of an assign against that of the bare echo, both taken in turns.

A bound is what was counted when it was last moved, with as much room as its comment says. Who betters a count moves it.
"""

from __future__ import annotations

import asyncio
import re
import signal
import socket
import statistics
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from types import CodeType, FrameType

import asyncpg
import httpx
import msgspec
import pytest
import uvicorn

import coupon_svc
from bench.memory import measure_memory
from bench.requests import Requests
from bench.stand import Process
from bench.turns import take_turn
from coupon_svc.app import make_api
from coupon_svc.config import load_settings
from coupon_svc.http.server import SERVER_SETTINGS, CouponProtocol
from coupon_svc.load.client import Connections
from coupon_svc.redis.scripts import Scripts
from tests.harness import Stack, until

KEYED = {"Idempotency-Key": "guard-0001"}

REDIS_COMMANDS_MAX = {
    "assign_coupon": 12,
    "assign_coupon, with a key": 14,
    "lock_coupon": 8,
    "redeem_coupon": 13,
}
"""Commands that a call of one operation runs, exactly: the most that it costs. Those of a call share all but a few."""

REDIS_BYTES_MAX = {"assign_coupon": (140, 190), "lock_coupon": (185, 135), "redeem_coupon": (235, 195)}
"""Sent and received for one operation among 32 that come at once; received with the entry that it stands in, which the
process keeps until the ledger has it. There is room for smaller calls on a busy machine."""

STATEMENTS_A_COMMIT_MAX = 1
"""The function `commit_entries`."""

WAL_BYTES_PER_EVENT_MAX = 1_500
"""It was 940, in batches of two events; every commit moves a position, and pages are written whole after a checkpoint."""

REDIS_MEMORY_BYTES_MAX = {"free": 88, "assigned": 240, "event": 100}
"""For each of 20,000 codes, with 10 % of room."""

PYTHON_CALLS_MAX = {"assign_coupon": 115, "assign_coupon, with a key": 124}
"""Calls of and from the service's own functions, of an assign among 16 that come at once: they share what a call to Redis
costs. It was 113 and 122."""

CPU_AGAINST_ECHO_MAX = 2.0
"""1.0 to 1.5 where it was measured: a shared machine is no place for a finer bound."""


@pytest.fixture
async def book_id(client: httpx.AsyncClient) -> str:
    return await make_book(client, "redis")


async def make_book(client: httpx.AsyncClient, ack: str, codes: int = 4_000) -> str:
    """A book of a size that is lent whole: nothing is refilled while one counts."""
    rules = {"name": "guard", "ack": ack, "generate": {"pattern": "GUARD-######", "total": codes}}
    answer = await client.post("/coupons", json=rules)
    assert answer.status_code == 201
    book: str = answer.json()["book_id"]
    await assign(client, book, "who waits until the codes are there")
    return book


async def assign(client: httpx.AsyncClient, book_id: str, user_id: str, **headers: str) -> str:
    answer = await client.post("/coupons/assign", json={"book_id": book_id, "user_id": user_id}, headers=headers)
    assert answer.status_code == 201, answer.text
    code: str = answer.json()["code"]
    return code


async def lock(client: httpx.AsyncClient, code: str, user_id: str) -> str:
    answer = await client.post(f"/coupons/lock/{code}", json={"user_id": user_id})
    assert answer.status_code == 201, answer.text
    token: str = answer.json()["lock_token"]
    return token


async def redeem(client: httpx.AsyncClient, code: str, user_id: str, token: str) -> None:
    answer = await client.post(f"/coupons/redeem/{code}", json={"user_id": user_id, "lock_token": token})
    assert answer.status_code == 201, answer.text


# --- Redis: commands and bytes


@asynccontextmanager
async def monitored(stack: Stack) -> AsyncIterator[Callable[[], Awaitable[dict[str, list[str]]]]]:
    """Hands out a function that stops listening and returns the commands of each call that ran meanwhile, by the name of its
    one operation."""
    redis, marker = stack.redis(), "guard-monitor-end"
    names = re.compile("|".join(sorted(Scripts().operations, key=len, reverse=True)))
    async with redis.monitor() as monitor:

        async def stop() -> dict[str, list[str]]:
            ran: dict[str, list[str]] = {}
            commands: list[str] = []
            await redis.echo(marker)
            while True:
                seen = await asyncio.wait_for(monitor.next_command(), 10)
                words = seen["command"].split()
                if seen["client_type"] == "lua":
                    commands.append(words[0].upper())
                elif marker in seen["command"]:
                    return ran
                elif words[0].upper() in ("EVALSHA", "FCALL"):
                    name = names.search(seen["command"])
                    with_key = ", with a key" if "guard-0001" in seen["command"] else ""
                    commands = ran[name[0] + with_key if name else "of an owner"] = []

        yield stop
    await redis.aclose()


async def test_a_script_runs_no_more_commands_than_it_did(
    service: Stack, client: httpx.AsyncClient, book_id: str
) -> None:
    async with monitored(service) as stop:
        code = await assign(client, book_id, "alice")
        await assign(client, book_id, "bob", **KEYED)
        await redeem(client, code, "alice", await lock(client, code, "alice"))
        ran = await stop()
    counts = {name: len(ran[name]) for name in REDIS_COMMANDS_MAX}
    assert {name: ran[name] for name, most in REDIS_COMMANDS_MAX.items() if counts[name] > most} == {}


async def bytes_of_api(stack: Stack) -> tuple[int, int]:
    """What the API's connection to Redis has sent and received so far."""
    redis = stack.redis()
    try:
        (line,) = [c for c in await redis.client_list() if c["name"] == "coupon-api"]
    finally:
        await redis.aclose()
    return int(line["tot-net-in"]), int(line["tot-net-out"])


async def test_an_operation_sends_and_receives_no_more_bytes_than_it_did(
    service: Stack, client: httpx.AsyncClient, book_id: str
) -> None:
    connections = Connections("127.0.0.1", int(service.base_url.rpartition(":")[2]), 32)
    headers = f"authorization: {client.headers['Authorization']}\r\ncontent-type: application/json\r\n".encode()
    counted: dict[str, list[tuple[float, float]]] = {name: [] for name in REDIS_BYTES_MAX}

    async def count(name: str, requests: list[tuple[str, dict[str, str]]]) -> list[dict[str, str]]:
        before = await bytes_of_api(service)
        replies = await asyncio.gather(
            *(connections.send(b"POST", path.encode(), headers, msgspec.json.encode(body)) for path, body in requests)
        )
        after = await bytes_of_api(service)
        assert {reply.status for reply in replies} == {201}
        counted[name].append(((after[0] - before[0]) / len(requests), (after[1] - before[1]) / len(requests)))
        return [msgspec.json.decode(reply.body) for reply in replies]

    for block in range(6):
        users = [f"user-{block}-{number:04d}" for number in range(150)]
        held = await count("assign_coupon", [("/coupons/assign", {"book_id": book_id, "user_id": u}) for u in users])
        locks = await count("lock_coupon", [(f"/coupons/lock/{h['code']}", {"user_id": h["user_id"]}) for h in held])
        await count(
            "redeem_coupon",
            [
                (f"/coupons/redeem/{lock['code']}", {"user_id": lock["user_id"], "lock_token": lock["lock_token"]})
                for lock in locks
            ],
        )
    connections.close()
    # Once a second the API asks Redis who it is: in the lowest of the blocks it did not, or hardly.
    lowest = {name: (min(b[0] for b in blocks), min(b[1] for b in blocks)) for name, blocks in counted.items()}
    assert {name: lowest[name] for name, most in REDIS_BYTES_MAX.items() if not within(lowest[name], most)} == {}


def within(counted: tuple[float, float], most: tuple[int, int]) -> bool:
    return counted[0] <= most[0] and counted[1] <= most[1]


async def test_redis_takes_no_more_memory_than_it_did() -> None:
    memory = await measure_memory(20_000)
    taken = {name: getattr(memory, name) for name in REDIS_MEMORY_BYTES_MAX}
    assert {name: taken[name] for name, most in REDIS_MEMORY_BYTES_MAX.items() if taken[name] > most} == {}


# --- Postgres: statements and WAL


async def test_a_commit_of_the_writer_takes_no_more_statements_and_an_event_no_more_wal(
    make_stack: Callable[[], Awaitable[Stack]],
) -> None:
    stack = await make_stack()
    admin = await asyncpg.connect(stack.database_url)
    log = Path(await admin.fetchval("SHOW data_directory")).parent / "server.log"
    if not log.exists():
        pytest.skip("the log of a Postgres that is given cannot be read")
    name = await admin.fetchval("SELECT current_database()")
    await admin.execute(f"ALTER DATABASE \"{name}\" SET log_statement = 'all'")
    begin = log.stat().st_size
    stack.writer()
    stack.api()
    await stack.ready()
    async with await stack.client() as client:
        book_id = await make_book(client, "redis")
        await stack.drained()
        before = await admin.fetchval("SELECT pg_current_wal_lsn()")
        await assign_many(stack, client, book_id, 1_000)
        await stack.drained()
        wal = await admin.fetchval("SELECT pg_current_wal_lsn() - $1::pg_lsn", before)
    events = await admin.fetchval("SELECT count(*) FROM events")
    await admin.close()
    commits = list(commits_of_events(log.read_bytes()[begin:].decode()))
    assert events == 1_001
    assert len(commits) > 2
    # In its first commit the writer's connection learns of its types.
    assert [statements for statements in commits[1:] if len(statements) > STATEMENTS_A_COMMIT_MAX] == []
    assert wal / 1_000 <= WAL_BYTES_PER_EVENT_MAX


async def assign_many(stack: Stack, client: httpx.AsyncClient, book_id: str, number: int) -> None:
    connections = Connections("127.0.0.1", int(stack.base_url.rpartition(":")[2]), 64)
    next_request = Requests(client.headers["Authorization"].removeprefix("Bearer ")).assign(book_id, with_key=False)
    await asyncio.gather(*(one(connections, next_request()) for _ in range(number)))
    connections.close()


def commits_of_events(log: str) -> Iterator[list[str]]:
    """The statements of each commit of the writer: those of its connection since the last one."""
    by_process: dict[str, list[str]] = {}
    for process, statement in re.findall(
        r"\[(\d+)\] LOG:  (?:statement|execute [^:]*): *(.*)", log.replace("\n\t", " ")
    ):
        statements = by_process.setdefault(process, [])
        statements.append(statement)
        if "commit_entries" in statement:
            yield statements
            by_process[process] = []


# --- the API process: calls, and processor time


@contextmanager
def counted_calls() -> Iterator[Callable[[], int]]:
    """Hands out how many calls of the service's functions, and of C functions from them, there have been."""
    ours: dict[CodeType, bool] = {}
    package = str(Path(coupon_svc.__file__).parent)
    number = 0

    def is_ours(code: CodeType) -> bool:
        path = code.co_filename
        return path.startswith(package) and not path.startswith(f"{package}/load/")

    def profile(frame: FrameType, event: str, _: object) -> None:
        nonlocal number
        if event in ("call", "c_call"):
            code = frame.f_code
            known = ours.get(code)
            if known is None:
                known = ours[code] = is_ours(code)
            number += known

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        yield lambda: number
    finally:
        sys.setprofile(before)


@asynccontextmanager
async def api_in_this_process(stack: Stack) -> AsyncIterator[int]:
    """One more API of the stack, as `coupon-svc api` serves it but in this process. Hands out its port."""
    settings = load_settings(stack.environment)
    config = uvicorn.Config(
        lambda: make_api(settings), factory=True, **{**SERVER_SETTINGS, "loop": "none"}, http=CouponProtocol
    )
    server = uvicorn.Server(config)
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    listener = socket.create_server(("127.0.0.1", 0))
    port: int = listener.getsockname()[1]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    connections = Connections("127.0.0.1", port, 1)

    async def ready() -> bool:
        return (await connections.send(b"GET", b"/readyz")).status == 200

    try:
        await until(ready)
        yield port
    finally:
        connections.close()
        server.should_exit = True
        await serving
        for number, handler in handlers.items():
            signal.signal(number, handler)


async def test_an_assign_takes_no_more_calls_in_the_api_than_it_did(
    service: Stack, client: httpx.AsyncClient, book_id: str
) -> None:
    key = client.headers["Authorization"].removeprefix("Bearer ")
    requests, counted = Requests(key), dict[str, float]()
    async with api_in_this_process(service) as port:
        connections = Connections("127.0.0.1", port, 16)
        for name, with_key in (("assign_coupon", False), ("assign_coupon, with a key", True)):
            next_request = requests.assign(book_id, with_key=with_key)
            blocks = []
            for _ in range(12):  # the first warms up; some hold what runs beside requests, or calls of fewer than 16
                with counted_calls() as calls:
                    for _ in range(5):
                        await asyncio.gather(*(one(connections, next_request()) for _ in range(16)))
                    blocks.append(calls() / (5 * 16))
            counted[name] = min(blocks[1:])
        connections.close()
    assert {name: counted[name] for name, most in PYTHON_CALLS_MAX.items() if counted[name] > most} == {}


async def one(connections: Connections, request: bytes) -> None:
    answered: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    connections.submit(request, lambda reply: answered.set_result(reply.status))
    assert await answered == 201


@pytest.mark.chaos
async def test_an_assign_takes_less_than_twice_the_processor_time_of_the_echo(
    service: Stack, client: httpx.AsyncClient, tmp_path: Path
) -> None:
    requests = Requests(client.headers["Authorization"].removeprefix("Bearer "))
    book_id = await make_book(client, "redis", codes=40_000)
    api = service.parts[-1].process.pid
    api_port = int(service.base_url.rpartition(":")[2])
    echo = Process("bench", ["--serve=echo"], {}, tmp_path / "echo.log", listen=True)
    ratios = []
    try:
        next_echo, next_assign = requests.echo(), requests.assign(book_id, with_key=True)
        await take_turn(echo.port, echo.pid, next_echo, 0.3, None)
        await take_turn(api_port, api, next_assign, 0.3, None)
        for _ in range(5):
            theirs = await take_turn(echo.port, echo.pid, next_echo, 0.3, None)
            ours = await take_turn(api_port, api, next_assign, 0.4, None)
            assert not theirs.bad
            assert not ours.bad
            ratios.append((ours.cpu_s / ours.good) / (theirs.cpu_s / theirs.good))
    finally:
        echo.stop()
    assert statistics.median(ratios) < CPU_AGAINST_ECHO_MAX, ratios
