"""Stages whose machine can be harmed: a disk that is small or slow, a clock that can be set, a Postgres of the run's own."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Self

from coupon_svc.dev.servers import EmbeddedPostgres, EmbeddedRedis
from tests.chaos.fault import SHARDS
from tests.chaos.run import Run
from tests.harness import Stack, fresh_database

SOURCES = Path(__file__).parent
FEW_PLACES = ("max_connections=50",)
"""One of the faults takes them all. The last three are for superusers, as the service is one."""


def lacks_a_compiler() -> str:
    """Shims are C files that the dynamic linker puts before the system's functions."""
    if sys.platform != "linux":
        return "shims are preloaded as Linux does it"
    return "" if shutil.which("cc") else "the C compiler cc is missing"


@functools.cache
def lacks_mount() -> str:
    """Small disks are made with tmpfs, which root may mount, and in many containers not even root."""
    if sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("mount"):
        return "mounting a small disk needs root on Linux"
    with tempfile.TemporaryDirectory() as folder:
        try:
            with small_disk(Path(folder), "64k"):
                return ""
        except subprocess.CalledProcessError:
            return "this root may not mount"


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of this size at `folder`, gone again in the end. Raises CalledProcessError when it cannot be had."""
    folder.mkdir(mode=0o711, parents=True, exist_ok=True)
    options = f"size={size},mode=0711"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "chaos", str(folder)], check=True, capture_output=True)
    try:
        yield folder
    finally:
        # Lazily: whoever still has a file open there must not keep the mount in the tree.
        subprocess.run(["umount", "--lazy", str(folder)], check=True, capture_output=True)


def fill_disk(folder: Path, *, leaving: int) -> Path:
    """Occupy the file system of `folder` but for about `leaving` bytes. Returns the file to be removed again."""
    filler = folder / "filler"
    with filler.open("wb") as file:
        for _ in range(20):  # others write to it at the same time, and may take what was free a moment ago
            status = os.statvfs(folder)
            free = status.f_bavail * status.f_frsize
            if free <= leaving:
                break
            with contextlib.suppress(OSError):
                os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, free - leaving)
    assert filler.stat().st_size > 0, "the disk was to have room still"
    return filler


class Dial:
    """A number that a shim reads while its process runs, in microseconds."""

    def __init__(self, folder: Path, source: str, variable: str) -> None:
        """`source` is the shim's C file beside this one, `variable` the name that it finds the number's file by."""
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / f"{source}.dial"
        self.set_s(0)
        library = folder / f"{source}.so"
        command = [
            "cc",
            "-O1",
            "-Wall",
            "-Werror",
            "-shared",
            "-fPIC",
            "-o",
            str(library),
            str(SOURCES / f"{source}.c"),
        ]
        subprocess.run(command, check=True)
        self.environment = {"LD_PRELOAD": str(library), variable: str(self._file)}

    def set_s(self, seconds: float) -> None:
        """Turn to `seconds`; whoever is preloaded has it at once."""
        # In place: the file is mapped into the process.
        with self._file.open("r+b" if self._file.exists() else "wb") as file:
            file.write(int(seconds * 1e6).to_bytes(8, sys.byteorder, signed=True))


class ShimmedRedis(EmbeddedRedis):
    """An EmbeddedRedis that is started with more environment."""

    shim: Dial

    def _command(self) -> list[str]:
        shim = (f"{name}={value}" for name, value in self.shim.environment.items())
        return ["/usr/bin/env", *shim, *super()._command()]


class OwnStack(Stack):
    """A stack with something of its own to be harmed."""

    @classmethod
    def of(cls, run: Run) -> Self:
        assert isinstance(run.stack, cls)
        return run.stack


class SlowDiskStack(OwnStack):
    """Its Redis waits `disk` at every fsync."""

    disk: Dial


class ClockStack(OwnStack):
    """Its Redis is off by `redis_clock`, and its API processes and writers by `service_clock`."""

    redis_clock: Dial
    service_clock: Dial

    @property
    def environment(self) -> dict[str, str]:
        return {**super().environment, **self.service_clock.environment}


class ShimmedPostgres(EmbeddedPostgres):
    """An EmbeddedPostgres that is started with more environment."""

    shim: Dial

    def _command(self) -> list[str]:
        shim = (f"{name}={value}" for name, value in self.shim.environment.items())
        return ["/usr/bin/env", *shim, *super()._command()]


class PostgresClockStack(OwnStack):
    """Its Postgres is off by `postgres_clock`."""

    postgres_clock: Dial


class PostgresStack(OwnStack):
    """Its Postgres is nobody else's."""

    postgres: EmbeddedPostgres


@contextlib.asynccontextmanager
async def slow_disk_stage(postgres_url: str, folder: Path) -> AsyncIterator[Stack]:
    server = ShimmedRedis(folder / "redis")
    server.shim = Dial(folder / "shim", "slow_fsync", "CHAOS_FSYNC")
    with server:
        stack = SlowDiskStack(server, server.url, await fresh_database(postgres_url, SHARDS), folder, SHARDS)
        stack.disk = server.shim
        try:
            yield stack
        finally:
            server.shim.set_s(0)


@contextlib.asynccontextmanager
async def clock_stage(postgres_url: str, folder: Path) -> AsyncIterator[Stack]:
    server = ShimmedRedis(folder / "redis")
    server.shim = Dial(folder / "redis_shim", "shifted_clock", "CHAOS_CLOCK")
    with server:
        stack = ClockStack(server, server.url, await fresh_database(postgres_url, SHARDS), folder, SHARDS)
        stack.redis_clock = server.shim
        stack.service_clock = Dial(folder / "service_shim", "shifted_clock", "CHAOS_CLOCK")
        yield stack


@contextlib.asynccontextmanager
async def postgres_clock_stage(_: str, folder: Path) -> AsyncIterator[Stack]:
    postgres = ShimmedPostgres(folder / "postgres")
    postgres.shim = Dial(folder / "shim", "shifted_clock", "CHAOS_CLOCK")
    with postgres, EmbeddedRedis(folder / "redis") as server:
        stack = PostgresClockStack(server, server.url, await fresh_database(postgres.admin_url, SHARDS), folder, SHARDS)
        stack.postgres_clock = postgres.shim
        yield stack


@contextlib.asynccontextmanager
async def small_redis_disk_stage(postgres_url: str, folder: Path) -> AsyncIterator[Stack]:
    """Redis writes its file to a disk that nothing else is on."""
    with small_disk(folder / "redis" / "data", "32m"), EmbeddedRedis(folder / "redis") as server:
        yield Stack(server, server.url, await fresh_database(postgres_url, SHARDS), folder, SHARDS)


@contextlib.asynccontextmanager
async def own_postgres_stage(_: str, folder: Path, extra: tuple[str, ...] = FEW_PLACES) -> AsyncIterator[Stack]:
    with EmbeddedPostgres(folder / "postgres", extra=extra) as postgres, EmbeddedRedis(folder / "redis") as server:
        stack = PostgresStack(server, server.url, await fresh_database(postgres.admin_url, SHARDS), folder, SHARDS)
        stack.postgres = postgres
        yield stack


@contextlib.asynccontextmanager
async def small_postgres_disk_stage(_: str, folder: Path) -> AsyncIterator[Stack]:
    """Postgres has a disk of its own, and little of it."""
    small = ("max_wal_size=48MB", "min_wal_size=32MB", "shared_buffers=16MB")
    with small_disk(folder / "postgres", "300m"):
        async with own_postgres_stage(_, folder, small) as stack:
            yield stack
