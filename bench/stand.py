"""What is measured on: a Valkey, a Postgres and the service's processes, for as long as a block runs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit, urlunsplit

import msgspec

from bench.figures import BenchError
from coupon_svc.dev import leash
from coupon_svc.dev.servers import EmbeddedPostgres, EmbeddedRedis, quoted_tail
from coupon_svc.dev.throwaway import clean_environment
from coupon_svc.load.setup import CODES_A_CALL
from coupon_svc.postgres.database import open_connection
from coupon_svc.postgres.keys import create_key, new_key
from coupon_svc.postgres.migrations import migrate

READY_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 12.0
TENANT = "bench"


class Process:
    """A process of the stand, and the port it serves on (0: none). It ends with this process, however that ends."""

    def __init__(
        self, module: str, arguments: Sequence[str], settings: dict[str, str], log: Path, listen: bool
    ) -> None:
        listener = socket.create_server(("127.0.0.1", 0), backlog=2048) if listen else None
        self.port: int = listener.getsockname()[1] if listener else 0
        self.log = log
        fds = [listener.fileno()] if listener else []
        command = [sys.executable, "-m", module, *arguments, *(f"--fd={fd}" for fd in fds)]
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                leash.leashed(command, signal.SIGTERM),
                env={**clean_environment(), **settings},
                pass_fds=fds,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # the terminal's Ctrl-C is for us alone
            )
        if listener:
            listener.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def stop(self) -> None:
        """End it in order; with SIGKILL when that takes longer than STOP_TIMEOUT_S."""
        if self.running:
            self._process.terminate()
            try:
                self._process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


class Stand:
    """Servers of their own and an API key; processes are started as they are needed, and all end with the block."""

    def __init__(self, shards: int = 16, **settings: str) -> None:
        self.shards = shards
        self._more = settings
        self._running = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as running:
            self.folder = Path(running.enter_context(tempfile.TemporaryDirectory(prefix="coupon-bench-")))
            self.folder.chmod(0o711)  # as root, Postgres runs as another user
            self.redis = running.enter_context(EmbeddedRedis(self.folder / "redis"))
            self.postgres = running.enter_context(EmbeddedPostgres(self.folder / "postgres"))
            self.key = asyncio.run(prepare_database(self.postgres.url, self.shards))
            self._running = running.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._running.close()

    @property
    def settings(self) -> dict[str, str]:
        return {
            "COUPON_REDIS_URL": self.redis.url,
            "COUPON_DATABASE_URL": self.postgres.url,
            "COUPON_SHARDS": str(self.shards),
            **self._more,
        }

    @property
    def stores(self) -> tuple[str, str, int]:
        """The ledger's address, Redis's, and the number of shards."""
        return self.postgres.url, self.redis.admin_url, self.shards

    def writer(self) -> Process:
        return self._start("coupon_svc", ["writer"], self.settings)

    def api(self) -> Process:
        """One API process. Returns before it is ready: see `await_ready`."""
        return self._start("coupon_svc", ["api"], self.settings, listen=True)

    def serve(self, name: str, **settings: str) -> Process:
        """A process of the bench's own: what the service is compared with."""
        return self._start("bench", [f"--serve={name}"], {**self.settings, **settings}, listen=True)

    def other_database(self, name: str) -> str:
        """A second database on the same server, with the newest schema and the same key. Returns its URL."""

        async def make() -> None:
            connection = await open_connection(self.postgres.url, "coupon-bench")
            await connection.execute(f"CREATE DATABASE {name}")
            await connection.close()
            await prepare_database(url, self.shards, self.key)

        url = urlunsplit(urlsplit(self.postgres.url)._replace(path=f"/{name}"))
        asyncio.run(make())
        return url

    def await_ready(self, process: Process) -> None:
        """Wait until an API process answers and its shards are open. Raises BenchError."""
        self._await(process, "/readyz")

    def await_answers(self, process: Process) -> None:
        """Wait until a process answers anything at all. Raises BenchError."""
        self._await(process, "/", any_status=True)

    def make_book(self, api: Process, ack: str, codes: int) -> str:
        """As the function of this name."""
        return make_book(api.port, self.key, ack, codes)

    def make_computed_book(self, api: Process, ack: str, codes: int) -> str:
        """As make_book, of codes that are computed; the processes need a master key."""
        generate = {"pattern": f"C{os.urandom(3).hex()}-########", "total": codes}
        book_id: str = self._post(api, "/coupons", {"name": f"bench {ack}", "ack": ack, "generate": generate})[
            "book_id"
        ]
        return book_id

    def make_empty_book(self, api: Process, ack: str) -> str:
        """A book without a limit per user, and without codes. Returns its id. Raises BenchError."""
        book_id: str = self._post(api, "/coupons", {"name": f"bench {ack}", "ack": ack})["book_id"]
        return book_id

    def add_codes(self, api: Process, book_id: str, codes: int) -> None:
        """As the function of this name."""
        add_codes(api.port, self.key, book_id, codes)

    def _post(self, api: Process, path: str, body: object) -> Any:
        return _post(api.port, self.key, path, body)

    def _await(self, process: Process, path: str, *, any_status: bool = False) -> None:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while True:
            if not process.running:
                raise BenchError(f"a process ended before it was ready{quoted_tail(process.log)}")
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{process.port}{path}", timeout=5):
                    return
            except urllib.error.HTTPError:
                if any_status:
                    return
            except OSError:
                pass
            if time.monotonic() > deadline:
                raise BenchError(f"a process was not ready after {READY_TIMEOUT_S:.0f} s{quoted_tail(process.log)}")
            time.sleep(0.05)

    def _start(self, module: str, arguments: list[str], settings: dict[str, str], listen: bool = False) -> Process:
        process = Process(module, arguments, settings, self.folder / f"{module}-{arguments[0]}.log", listen)
        self._running.callback(process.stop)
        return process


async def prepare_database(url: str, shards: int, key: str | None = None) -> str:
    """Bring a database to the newest schema and store an API key in it. Returns the key."""
    connection = await open_connection(url, "coupon-bench")
    await migrate(connection, shards)
    key = key or new_key()
    await create_key(connection, TENANT, key)
    await connection.close()
    return key


def make_book(port: int, key: str, ack: str, codes: int) -> str:
    """A book without a limit per user, with so many codes. Returns its id. Raises BenchError."""
    pattern = f"{ack[0].upper()}{os.urandom(3).hex()}-########"
    first = min(codes, CODES_A_CALL)
    rules = {"name": f"bench {ack}", "ack": ack, "generate": {"pattern": pattern, "total": first}}
    book_id: str = _post(port, key, "/coupons", rules)["book_id"]
    add_codes(port, key, book_id, codes - first)
    return book_id


def add_codes(port: int, key: str, book_id: str, codes: int) -> None:
    """So many more codes for a book. Raises BenchError."""
    pattern = f"M{os.urandom(3).hex()}-########"
    for begin in range(0, codes, CODES_A_CALL):
        more = {"pattern": pattern, "total": min(CODES_A_CALL, codes - begin)}
        _post(port, key, "/coupons/codes", {"book_id": book_id, "generate": more})


def _post(port: int, key: str, path: str, body: object) -> Any:
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", msgspec.json.encode(body), headers, method="POST"
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return msgspec.json.decode(answer.read())
    except urllib.error.HTTPError as error:
        raise BenchError(f"{path} answered {error.code}: {error.read().decode(errors='replace')}") from None
