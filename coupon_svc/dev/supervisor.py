"""`coupon-svc dev`: the whole service on one machine, every part kept alive until Ctrl-C.

One process starts Valkey, Postgres, the writer and the API processes as its children. Then it sleeps until a child dies or a
signal comes. All children are on a leash (see leash): they end when it is killed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import http.client
import json
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from coupon_svc.config import MASTER_KEY
from coupon_svc.dev import leash
from coupon_svc.dev.servers import (
    EmbeddedPostgres,
    EmbeddedRedis,
    EmbeddedServer,
    ServerError,
    StartCancelledError,
    describe_status,
    quoted_tail,
    require_packages,
    rotate_log,
    write_private,
)
from coupon_svc.dev.tour import tour
from coupon_svc.domain.errors import CouponError
from coupon_svc.domain.master_key import new_master_key

SERVICE_COMMAND = (sys.executable, "-m", "coupon_svc")

_LIVED_WELL_SECONDS = 10.0
"""A part that lived so long before it died is started again at once; one that did not waits ever longer."""
_BACKOFF_SECONDS_MAX = 5.0
_DEATHS_BEFORE_READY_MAX = 5
_HINT_SECONDS = 15.0

# Seconds after the order to stop at which a part still there is killed; within the promised ten.
_API_KILLED_AT, _WRITER_KILLED_AT, _POSTGRES_KILLED_AT, _REDIS_KILLED_AT = 2.5, 4.5, 7.0, 8.5


class DevError(CouponError):
    """The service cannot be started here; the message says why and what to do."""


@dataclass
class _Part:
    """A process to keep alive. `start` returns when the part can be used, or (API, writer) at once."""

    name: str
    log: Path
    start: Callable[[], subprocess.Popen[bytes]]
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    deaths: int = 0
    obituary: str = ""
    """How it died, from then until it was restarted."""
    due: float = 0.0

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def settled(self) -> bool:
        """Whether it runs, and is not just between two of its deaths."""
        return self.running and (self.deaths == 0 or time.monotonic() - self.started >= 1.0)

    def launch(self) -> None:
        self.started = time.monotonic()  # of the attempt, should it fail
        self.process = self.start()
        self.started = time.monotonic()
        self.obituary = ""

    def note_death(self, how: str) -> None:
        now = time.monotonic()
        self.deaths = 1 if now - self.started >= _LIVED_WELL_SECONDS else self.deaths + 1
        self.due = now if self.deaths == 1 else now + min(_BACKOFF_SECONDS_MAX, 0.1 * 2**self.deaths)
        self.obituary = how


class Supervisor:
    """The parts, from the first start to the last stop. Used once."""

    def __init__(
        self,
        host: str,
        port: int,
        data_dir: Path,
        workers: int,
        api_key: str | None = None,
        command: Sequence[str] = SERVICE_COMMAND,
    ) -> None:
        """`command` is what stands before `api`, `writer`, `migrate` and `keys`; tests give another."""
        self._host, self._port, self._workers = host, port, workers
        self._api_key = api_key
        self._command = command
        self._data_dir = data_dir.absolute()
        self._dev_json = self._data_dir / "dev.json"
        self._pids_file = self._data_dir / "pids.json"
        self._logs = self._data_dir / "logs"
        self._redis = EmbeddedRedis(self._data_dir / "redis", log=self._logs / "valkey.log")
        self._postgres = EmbeddedPostgres(self._data_dir / "postgres", log=self._logs / "postgres.log")
        self._servers: list[_Part] = []
        self._writers: list[_Part] = []
        self._apis: list[_Part] = []
        self._urls_given = ("", "")
        self._listener: socket.socket | None = None
        self._stopping = False
        self._ready = False
        self._began = time.monotonic()

    def run(self) -> int:
        """Returns the exit status: 0 after SIGTERM, SIGINT or SIGHUP, 1 when it could not start."""
        try:
            with self._woken_by_signals() as self._wakeup, self._locked():
                try:
                    self._start_everything()
                    self._keep_everything_alive()
                finally:
                    self._stop_everything()
        except StartCancelledError:
            pass
        except (DevError, ServerError, OSError) as error:
            print(f"coupon-svc dev: {error}", file=sys.stderr)
            return 1
        return 0

    # -- starting -----------------------------------------------------------------------------------------------------

    def _start_everything(self) -> None:
        require_packages()
        self._dev_json.unlink(missing_ok=True)
        self._end_leftovers()
        self._listener = _listen(self._host, self._port)
        self._logs.mkdir(mode=0o711, exist_ok=True)
        for name in ("setup", "writer", "api"):
            rotate_log(self._logs / f"{name}.log")
        _say(f"coupon-svc dev: data and logs in {self._data_dir}")
        self._start_server(self._redis)
        self._start_server(self._postgres)
        self._urls_given = (self._redis.url, self._postgres.url)
        with _progress("migrating"):
            self._set_up(["migrate"])
            self._set_up(["keys", "import", "--tenant", "dev"], stdin=self._key())
        self._start_service(self._writers, "writer", ["writer"])
        fd = self._listener.fileno()
        for number in range(1, self._workers + 1):
            name = "api" if self._workers == 1 else f"api {number}"
            self._start_service(self._apis, name, ["api", "--fd", str(fd)], (fd,))

    def _start_server(self, server: EmbeddedServer) -> None:
        def start() -> subprocess.Popen[bytes]:
            server.start(cancelled=lambda: self._stopping)
            assert server.process is not None
            return server.process

        part = _Part(server.name, server.log, start)
        with _progress(f"starting {server.name}"):
            part.launch()
        self._servers.append(part)

    def _start_service(self, parts: list[_Part], name: str, arguments: list[str], fds: tuple[int, ...] = ()) -> None:
        log = self._logs / f"{arguments[0]}.log"
        part = _Part(name, log, lambda: self._spawn(arguments, log, fds))
        _say(f"  starting the {name}")
        part.launch()
        parts.append(part)
        self._note_pids()

    def _spawn(
        self, arguments: list[str], log: Path, fds: tuple[int, ...] = (), stdin: int = subprocess.DEVNULL
    ) -> subprocess.Popen[bytes]:
        """A session of its own keeps the terminal's Ctrl-C from it: the order of the stop is ours to choose."""
        with log.open("ab") as output:
            return subprocess.Popen(
                leash.leashed([*self._command, *arguments], signal.SIGTERM),
                stdin=stdin,
                stdout=output,
                stderr=output,
                env=self._environment(),
                pass_fds=fds,
                start_new_session=True,
            )

    def _environment(self) -> dict[str, str]:
        """What is meant for another Postgres stays out. Ours speaks no TLS; told so, asyncpg looks for no certificates in
        a home that it may be forbidden to read."""
        given = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
        urls = {"COUPON_REDIS_URL": self._redis.url, "COUPON_DATABASE_URL": self._postgres.url}
        key = {MASTER_KEY: os.environ.get(MASTER_KEY) or self._master_key()}
        return {**given, **urls, **key, "PGSSLMODE": "disable", "PYTHONUNBUFFERED": "1", "COUPON_DRAIN_MS": "0"}

    def _set_up(self, arguments: list[str], stdin: str = "") -> None:
        """Runs a command of the service to its end."""
        log = self._logs / "setup.log"
        start = log.stat().st_size if log.exists() else 0
        process = self._spawn(arguments, log, stdin=subprocess.PIPE)
        try:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError), process.stdin:
                process.stdin.write(stdin.encode())
            while process.poll() is None:
                self._check_stopping()
                self._sleep(1.0)
        finally:
            process.kill()
            process.wait()
        if process.returncode != 0:
            how = describe_status(process.returncode)
            raise DevError(f"`coupon-svc {' '.join(arguments)}` failed ({how}){quoted_tail(log, start)}")

    def _key(self) -> str:
        """The key given, or the one made at the first start: what the tour showed goes on working."""
        kept = self._data_dir / "api_key"
        if self._api_key is None:
            if not kept.exists():
                write_private(kept, f"cbk_dev_{secrets.token_urlsafe(24)}")
            self._api_key = kept.read_text().strip()
        return self._api_key

    def _master_key(self) -> str:
        """The master key of this data directory, made at the first start: without it no computed code can be told."""
        kept = self._data_dir / "master_key"
        if not kept.exists():
            write_private(kept, new_master_key())
        return kept.read_text().strip()

    # -- running ------------------------------------------------------------------------------------------------------

    def _keep_everything_alive(self) -> None:
        hint_at = time.monotonic() + _HINT_SECONDS
        while not self._stopping:
            for part in self._parts:
                self._revive(part)
            if not self._ready:
                answer = self._probe()
                if answer == "200" and all(part.settled for part in self._parts):
                    self._announce()
                elif time.monotonic() >= hint_at:
                    _say(f"  not ready yet: /readyz answers {answer}; logs are in {self._logs}")
                    hint_at += _HINT_SECONDS
            self._sleep(self._until_next_due())

    def _revive(self, part: _Part) -> None:
        if part.running or self._stopping:
            return
        if not part.obituary:
            assert part.process is not None
            part.note_death(describe_status(part.process.returncode))
            if not self._ready and part.deaths >= _DEATHS_BEFORE_READY_MAX:
                raise DevError(f"{part.name} died {part.deaths} times, {part.obituary}{quoted_tail(part.log)}")
        if time.monotonic() < part.due:
            return
        how = part.obituary
        try:
            part.launch()
        except StartCancelledError:
            return
        except (ServerError, OSError) as error:
            part.note_death(how)
            _say(f"! {part.name} died ({how}) and could not be restarted: {error}")
            return
        _say(f"! {part.name} died ({how}), restarted as pid {part.process.pid if part.process else '-'}")
        self._note_pids()
        self._follow_new_urls()
        if self._ready:
            self._write_dev_json()

    def _follow_new_urls(self) -> None:
        """A server whose port was taken while it was down has moved: who knows the old address must start anew."""
        urls = (self._redis.url, self._postgres.url)
        if urls != self._urls_given:
            for part in (*self._writers, *self._apis):
                if part.process is not None:
                    part.process.terminate()
            self._urls_given = urls

    def _until_next_due(self) -> float | None:
        """Seconds to sleep; None: until a signal (of a child's death, too)."""
        now = time.monotonic()
        waits = [part.due - now for part in self._parts if part.obituary]
        if not self._ready:
            waits.append(0.1)
        return max(0.01, min(waits)) if waits else None

    def _probe(self) -> str:
        """What /readyz says: the status, or why there is none."""
        assert self._listener is not None
        host, port = _reachable(self._listener)
        connection = http.client.HTTPConnection(host, port, timeout=1.0)
        try:
            connection.request("GET", "/readyz")
            return str(connection.getresponse().status)
        except (OSError, http.client.HTTPException) as error:
            return f"nothing ({error or type(error).__name__})"
        finally:
            connection.close()

    def _announce(self) -> None:
        self._ready = True
        self._write_dev_json()
        key = self._key()
        _say(f"\nReady after {time.monotonic() - self._began:.1f} s: {self._base_url}   (described at /docs)")
        _say(f"API key (tenant dev, all scopes): {key}\n\nA short tour, to paste into another terminal:\n")
        _say(tour(self._base_url, key))
        _say(f"Ctrl-C stops everything; the data stay in {self._data_dir}.")

    @property
    def _base_url(self) -> str:
        assert self._listener is not None
        host, port = _reachable(self._listener)
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    @property
    def _parts(self) -> list[_Part]:
        return [*self._servers, *self._writers, *self._apis]

    def _write_dev_json(self) -> None:
        redis, postgres, writer, *api = [part.process.pid if part.process else None for part in self._parts]
        told = {
            "base_url": self._base_url,
            "api_key": self._key(),
            "redis_url": self._redis.admin_url,
            "database_url": self._postgres.url,
            "pids": {"redis": redis, "postgres": postgres, "writer": writer, "api": api},
        }
        write_private(self._dev_json, json.dumps(told, indent=2) + "\n")

    # -- stopping -----------------------------------------------------------------------------------------------------

    def _stop_everything(self) -> None:
        """Callers first, then what they call. Everything has ended when this returns, by force where it must be."""
        self._stopping = True
        began = time.monotonic()
        self._dev_json.unlink(missing_ok=True)
        if self._listener is not None:
            self._listener.close()
        if self._ready:
            _say("\nstopping …")
        _end(self._apis, began + _API_KILLED_AT)
        _end(self._writers, began + _WRITER_KILLED_AT)
        self._postgres.stop(max(0.1, began + _POSTGRES_KILLED_AT - time.monotonic()))
        self._redis.stop(max(0.1, began + _REDIS_KILLED_AT - time.monotonic()))
        self._pids_file.unlink(missing_ok=True)
        if self._ready:
            _say(f"stopped; the data are in {self._data_dir}")

    # -- leftovers of a supervisor that was killed --------------------------------------------------------------------

    def _note_pids(self) -> None:
        running = [part.process.pid for part in (*self._writers, *self._apis) if part.process]
        write_private(self._pids_file, json.dumps({pid: leash.started_at(pid) for pid in running}))

    def _end_leftovers(self) -> None:
        """API and writer processes that a killed supervisor left: the leash ends them, but that takes a moment.

        They may still hold the port. (The servers see to their own.)
        """
        try:
            noted: dict[str, str | None] = json.loads(self._pids_file.read_text())
        except (FileNotFoundError, ValueError):
            return

        def living() -> list[int]:
            return [int(pid) for pid, started in noted.items() if started and leash.started_at(int(pid)) == started]

        for number in (signal.SIGTERM, signal.SIGKILL):
            leash.send(living(), number)
            if leash.wait_until(lambda: not living(), timeout=5.0):
                break
        self._pids_file.unlink()

    # -- the process itself -------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Holds the directory for this process. The kernel lets go of it when the process ends, however it ends."""
        try:
            self._data_dir.mkdir(mode=0o711, parents=True, exist_ok=True)
            descriptor = os.open(self._data_dir / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise DevError(f"cannot use {self._data_dir} for data: {error.strerror}; give another --data-dir") from None
        with os.fdopen(descriptor, "r+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = lock.read().strip() or "unknown"
                other = f"another `coupon-svc dev` (pid {holder}) runs on {self._data_dir}"
                raise DevError(f"{other}; stop it, or give another --data-dir") from None
            lock.truncate(0)
            lock.write(f"{os.getpid()}\n")
            lock.flush()
            yield

    @contextlib.contextmanager
    def _woken_by_signals(self) -> Iterator[socket.socket]:
        """Yields a socket that becomes readable at every signal; the orders to stop set `_stopping`, too."""

        def stop(number: int, frame: FrameType | None) -> None:
            self._stopping = True

        handlers = {signal.SIGTERM: stop, signal.SIGINT: stop, signal.SIGCHLD: lambda *_: None}
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup has it
            handlers[signal.SIGHUP] = stop
        reader, writer = socket.socketpair()
        with reader, writer:
            reader.setblocking(False)
            writer.setblocking(False)
            former_fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
            former = {number: signal.signal(number, handler) for number, handler in handlers.items()}
            try:
                yield reader
            finally:
                for number, handler in former.items():
                    signal.signal(number, handler)
                signal.set_wakeup_fd(former_fd)

    def _sleep(self, seconds: float | None) -> None:
        """Until a signal comes, or for `seconds`."""
        if select.select([self._wakeup], [], [], seconds)[0]:
            with contextlib.suppress(BlockingIOError):
                self._wakeup.recv(4096)

    def _check_stopping(self) -> None:
        if self._stopping:
            raise StartCancelledError("told to stop")


def run_dev(
    host: str = "127.0.0.1",
    port: int = 8080,
    data_dir: Path = Path(".data"),
    workers: int = 1,
    api_key: str | None = None,
) -> int:
    """The whole service, until SIGTERM or Ctrl-C; returns the exit status. Only the main thread can call it."""
    return Supervisor(host, port, data_dir, workers, api_key).run()


def _listen(host: str, port: int) -> socket.socket:
    """The one socket that all API processes share: while one of them is restarted, callers wait and lose nothing."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=1024)
    except socket.gaierror as error:
        raise DevError(f"no address for the host {host!r}: {error.strerror}") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise DevError(f"port {port} of {host} is taken by another program; give another --port") from None
        raise DevError(f"cannot listen on port {port} of {host}: {os.strerror(error.errno or 0)}") from None
    except OverflowError:
        raise DevError(f"--port must be between 0 and 65535, not {port}") from None


def _reachable(listener: socket.socket) -> tuple[str, int]:
    """An address of the listener that one can connect to from here, which 0.0.0.0 is not everywhere."""
    host, port = listener.getsockname()[:2]
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port


def _end(parts: Sequence[_Part], deadline: float) -> None:
    """SIGTERM to all of them, SIGKILL to those still there at the deadline."""
    processes = [part.process for part in parts if part.process is not None]
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def _progress(what: str) -> Iterator[None]:
    began = time.monotonic()
    _say(f"  {what} … ", end="")
    try:
        yield
    except BaseException:
        _say("")
        raise
    _say(f"ready ({time.monotonic() - began:.1f} s)")


def _say(text: str, end: str = "\n") -> None:
    """Prints; a terminal that went away, or a pipe nobody reads, is no reason to stop."""
    try:
        print(text, end=end, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
