"""How long a file of codes takes to come in, beside a plain COPY of the same rows into a table with the same indexes."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Iterator
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import asyncpg
import httpx

from bench.figures import BenchError
from coupon_svc.dev.throwaway import throwaway_service
from coupon_svc.domain.codes import parse_pattern
from coupon_svc.postgres.lend_order import ROUND, random_places

_PATTERN = parse_pattern("############", "alphanumeric")
_BLOCK = 10_000
_COLUMNS = ("tenant_id", "code", "book_id", "place")
WATCH_EVERY_S = 0.02
_SAME_TABLE = "CREATE TABLE copied (LIKE codes INCLUDING ALL)"


class UploadFigures(NamedTuple):
    """Of one file: seconds until it was received, until its job had succeeded, and for COPY; MiB by which the API process
    grew; how long, in ms, somebody waited for the row of the book meanwhile: median, 99th percentile, most."""

    codes: int
    body_bytes: int
    received_s: float
    succeeded_s: float
    copy_s: float
    growth_mib: float
    row_waits_ms: tuple[float, float, float]


def bench_upload(codes: int, padding: int) -> UploadFigures:
    """Upload a file of that many codes to a service of its own, each with `padding` bytes in another column, and COPY the
    codes. Raises BenchError."""
    with throwaway_service("bench") as told:
        return asyncio.run(_measure(told, codes, padding))


def show_upload(figures: UploadFigures) -> None:
    """Print the figures."""
    print(f"{figures.codes} codes, {figures.body_bytes / 1e6:.0f} MB")
    print(f"received after          {figures.received_s:8.2f} s")
    print(f"job succeeded after     {figures.succeeded_s:8.2f} s")
    print(f"COPY of the same rows   {figures.copy_s:8.2f} s")
    print(f"upload / COPY           {figures.succeeded_s / figures.copy_s:8.2f}")
    print(f"growth of the API       {figures.growth_mib:8.1f} MiB")
    print("wait for the book's row {:8.1f} ms median, {:.1f} ms p99, {:.1f} ms at most".format(*figures.row_waits_ms))


def _blocks(codes: int) -> Iterator[list[str]]:
    """The codes, drawn anew each time; of 62 bits each, so that hardly any two are alike."""
    for start in range(0, codes, _BLOCK):
        yield list(_PATTERN.draw(min(_BLOCK, codes - start)))


async def _measure(told: dict[str, Any], codes: int, padding: int) -> UploadFigures:
    (pid,) = told["pids"]["api"]
    headers = {"Authorization": f"Bearer {told['api_key']}"}
    async with httpx.AsyncClient(base_url=told["base_url"], headers=headers, timeout=600) as client:
        book_id = (await client.post("/coupons", json={"name": "bench"})).json()["book_id"]
        await _run(client, book_id, list(_blocks(1_000)), 0)  # whatever is made at the first upload
        blocks = list(_blocks(codes))
        before = _memory_mib(pid, "VmRSS")
        waits_ms: list[float] = []
        watching = asyncio.create_task(_watch_row(told["database_url"], book_id, waits_ms))
        received_s, succeeded_s, inserted = await _run(client, book_id, blocks, padding)
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        growth_mib = _memory_mib(pid, "VmHWM") - before
    if inserted != codes:
        raise BenchError(f"{inserted} of {codes} codes were inserted")
    copy_s = await _copy(told["database_url"], book_id, blocks)
    cuts = statistics.quantiles(waits_ms, n=100)
    body_bytes = sum(map(len, map(_file, blocks, repeat(padding))))
    row_waits_ms = (cuts[49], cuts[98], max(waits_ms))
    return UploadFigures(codes, body_bytes, received_s, succeeded_s, copy_s, growth_mib, row_waits_ms)


async def _watch_row(url: str, book_id: str, waits_ms: list[float]) -> None:
    """Ask for the row of the book again and again, as a refill or a change does, and note how long that took."""
    connection = await asyncpg.connect(url)
    try:
        while True:
            begun = time.perf_counter()
            await connection.execute("SELECT FROM books WHERE book_id = $1 FOR UPDATE", book_id)
            waits_ms.append(1000 * (time.perf_counter() - begun))
            await asyncio.sleep(WATCH_EVERY_S)
    finally:
        connection.terminate()


def _file(block: list[str], padding: int) -> bytes:
    """A part of the file."""
    end = "," + padding * "x" + "\n" if padding else "\n"
    return (end.join(block) + end).encode()


async def _run(
    client: httpx.AsyncClient, book_id: str, blocks: list[list[str]], padding: int
) -> tuple[float, float, int]:
    """Upload a file and wait for its job: (seconds until received, until succeeded, codes inserted)."""

    async def body() -> AsyncIterator[bytes]:
        for block in blocks:
            yield _file(block, padding)

    began = time.monotonic()
    sent = await client.post(
        "/coupons/codes", params={"book_id": book_id}, content=body(), headers={"Content-Type": "text/csv"}
    )
    received_s = time.monotonic() - began
    if sent.status_code != 202:
        raise BenchError(f"the upload was answered {sent.status_code}")
    while True:
        job = (await client.get(sent.headers["location"])).json()
        if job["status"] != "running":
            break
        await asyncio.sleep(0.1)
    if job["status"] != "succeeded":
        raise BenchError(f"the job has failed: {job['error']}")
    return received_s, time.monotonic() - began, job["inserted"]


async def _copy(url: str, book_id: str, blocks: list[list[str]]) -> float:
    """Seconds for the same rows, in the same order, by COPY."""
    connection = await asyncpg.connect(url)
    try:
        await _emptied(connection)
        await connection.execute(_SAME_TABLE)

        async def rows() -> AsyncIterator[bytes]:
            for block in blocks:
                places = random_places(len(block), 0, ROUND)
                lines = (f"1\t{code}\t{book_id}\t{place}\n" for code, place in zip(block, places, strict=True))
                yield "".join(lines).encode()

        await connection.execute("CHECKPOINT")
        began = time.monotonic()
        await connection.copy_to_table("copied", columns=_COLUMNS, source=rows(), format="text", timeout=3600)
        return time.monotonic() - began
    finally:
        await connection.close()


async def _emptied(connection: asyncpg.Connection) -> None:
    """Wait until nothing is staged any more: removing it would slow COPY down."""
    while True:
        if not await connection.fetch("SELECT FROM jobs WHERE NOT emptied"):
            return
        await asyncio.sleep(0.1)


def _memory_mib(pid: int, field: str) -> float:
    """Memory of a process: `VmRSS` that it has, `VmHWM` the most that it has had."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise BenchError("the process has ended")
