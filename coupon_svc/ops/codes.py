"""`coupon-svc codes`: a file of codes into a book, and a book's codes into a file, by the HTTP API.

A client like any other: it knows the address (`COUPON_URL`) and a key (`COUPON_KEY`), and neither Postgres nor Redis.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import ssl
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple, cast
from urllib.parse import quote, urlencode, urlsplit

from tqdm import tqdm

from coupon_svc.domain.errors import CouponError

URL_VARIABLE, KEY_VARIABLE = "COUPON_URL", "COUPON_KEY"
STANDARD = "-"
"""Names standard input or output in place of a file."""
UPLOAD_TYPES = {"csv": "text/csv", "text": "text/plain"}
_TYPE_OF_SUFFIX = {".csv": "csv", ".txt": "text"}
_GZIP_MAGIC = b"\x1f\x8b"
_BLOCK_BYTES = 64 * 1024
_ANSWER_TIMEOUT_S = 120.0
_POLL_S = 0.5
_PATIENCE_S = 60.0
"""How long a service that is away, or says 503, is asked again."""
_TRIES_MAX = 3
"""How often an export to a file is begun."""
_REJECTED_SHOWN = 10
_JOBS_MAX = 20


class CodesError(CouponError):
    """The command was not done; the message says why, and what to do."""


class Interrupted(CouponError):
    """Somebody pressed Ctrl-C; the message says what was done until then."""


class _Away(CodesError):
    """The service could not be reached, or broke off."""


class _TryAgain(_Away):
    """The service answered that another try may succeed."""


class Upload(NamedTuple):
    """A file of codes for a book. `kind` is one of UPLOAD_TYPES, None to tell by the file's name."""

    file: str
    book_id: str
    kind: str | None


class Export(NamedTuple):
    """A book's codes, of one status or of any, for a file."""

    file: str
    book_id: str
    status: str | None


class Refusal(NamedTuple):
    """A problem that the service answered."""

    status: int
    body: Mapping[str, Any]

    def __str__(self) -> str:
        errors = "".join(f" {_error(error)}." for error in self.body.get("errors", ()))
        return (
            f"the service refused: {self.body.get('title', 'no reason')}. {self.body.get('detail', '')}{errors}"
            f" ({self.status} {self.body.get('code', '?')}, request {self.body.get('request_id', '?')})"
        )


def _error(error: Mapping[str, str]) -> str:
    """One of the errors of a problem. Of a file the pointer is empty."""
    pointer, detail = error["pointer"], error["detail"]
    return f"{pointer}: {detail}" if pointer else detail[:1].upper() + detail[1:]


# --- the service


class Service:
    """The API at an address, called with a key. Each call has a connection of its own."""

    def __init__(self, url: str, key: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise CodesError(f"COUPON_URL is not an address such as http://127.0.0.1:8080: {url}")
        if not key.isascii() or not key.isprintable() or " " in key:
            raise CodesError("COUPON_KEY is not an API key: it has characters that no key has.")
        self.url = url.rstrip("/")
        self._secure = parts.scheme == "https"
        self._host, self._path = parts.hostname, parts.path.rstrip("/")
        try:
            self._port = parts.port
        except ValueError:
            raise CodesError(f"COUPON_URL is not an address such as http://127.0.0.1:8080: {url}") from None
        self._headers = {"Authorization": f"Bearer {key}", "User-Agent": "coupon-svc"}

    @classmethod
    def from_environment(cls) -> Service:
        """The service that COUPON_URL and COUPON_KEY name. Raises CodesError."""
        url, key = (os.environ.get(name, "").strip() for name in (URL_VARIABLE, KEY_VARIABLE))
        if not url:
            raise CodesError("set COUPON_URL to the address of the service, e.g. http://127.0.0.1:8080.")
        if not key:
            raise CodesError("set COUPON_KEY to an API key of the service.")
        return cls(url, key)

    @contextmanager
    def ask(
        self, method: str, path: str, headers: Mapping[str, str], body: IO[bytes] | None = None
    ) -> Iterator[http.client.HTTPResponse]:
        """An answer whose head has arrived, of any status; its body can be read within the block. Raises _Away."""
        connection = self._connect()
        answer = None
        try:
            try:
                with suppress(BrokenPipeError, ConnectionResetError):  # it may have answered before it had read all
                    connection.request(method, self._path + path, body, {**self._headers, **headers})
                answer = connection.getresponse()
            except (OSError, http.client.HTTPException) as error:
                raise self._away(error) from None
            yield answer
        finally:
            if answer is not None:
                answer.close()
            connection.close()

    def get(self, path: str) -> dict[str, Any]:
        """An answer in JSON. Raises _Away; CodesError for any other refusal."""
        with self.ask("GET", path, {}) as answer:
            return self.checked(answer)

    def checked(self, answer: http.client.HTTPResponse) -> dict[str, Any]:
        """The body of an answer with status 2xx. Raises _Away; CodesError for any other refusal, and for what does not
        answer as the service does."""
        self.require_ok(answer)
        return self._json(answer)

    def require_ok(self, answer: http.client.HTTPResponse) -> None:
        """Raises as `checked`. The body of a good answer is still to be read."""
        if answer.status < 300:
            return
        refusal = Refusal(answer.status, self._json(answer))
        if answer.status == 401:
            raise CodesError("COUPON_KEY is not a valid key of this service: it is unknown, revoked or expired.")
        if answer.status == 403:
            scopes = " or ".join(refusal.body.get("scopes", ()))
            raise CodesError(f"COUPON_KEY lacks the scope {scopes}.")
        if answer.status in (429, 503):
            raise _TryAgain(str(refusal))
        raise CodesError(str(refusal))

    def _json(self, answer: http.client.HTTPResponse) -> dict[str, Any]:
        try:
            body = json.loads(answer.read())
            if isinstance(body, dict):
                return body
        except (OSError, http.client.HTTPException) as error:
            raise self._away(error) from None
        except ValueError:
            pass
        raise CodesError(f"{self.url} answers {answer.status}, and not as a coupon service does; check COUPON_URL.")

    def _connect(self) -> http.client.HTTPConnection:
        if self._secure:
            context = ssl.create_default_context()
            return http.client.HTTPSConnection(
                self._host, self._port, timeout=_ANSWER_TIMEOUT_S, context=context, blocksize=_BLOCK_BYTES
            )
        return http.client.HTTPConnection(self._host, self._port, timeout=_ANSWER_TIMEOUT_S, blocksize=_BLOCK_BYTES)

    def _away(self, error: Exception) -> _Away:
        reason = str(error) if isinstance(error, OSError) else type(error).__name__
        return _Away(f"the service at {self.url} cannot be reached ({reason}); check COUPON_URL.")


def _patiently(ask: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `ask` returns, asked again while the service is away, for _PATIENCE_S."""
    until = time.monotonic() + _PATIENCE_S
    while True:
        try:
            return ask()
        except _Away:
            if time.monotonic() > until:
                raise
        time.sleep(_POLL_S)


# --- upload


def upload_codes(wanted: Upload, *, as_json: bool = False) -> int:
    """Send a file, wait for its job, and print the report. Returns 0 when every row with a code is a code of the tenant now;
    1 when rows were rejected as invalid, or the job failed. Raises CodesError; Interrupted."""
    service = Service.from_environment()
    with _opened(wanted.file) as file:
        media_type = UPLOAD_TYPES[wanted.kind or _kind_of(wanted.file)]
        job = _send(service, wanted, file, media_type)
    job = _followed(service, job)
    try:
        print(json.dumps(job, indent=2) if as_json else _report(job), flush=True)
    except OSError as error:
        _drop_standard_output()
        if not isinstance(error, BrokenPipeError):  # whoever reads has seen enough
            reason = f"its report cannot be written: {error.strerror}"
            raise CodesError(f"job {job['job_id']} has {job['status']}; {reason}.") from None
    return 1 if job["status"] == "failed" or job["invalid"] else 0


def _kind_of(name: str) -> str:
    path = Path(name.lower())
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    kind = _TYPE_OF_SUFFIX.get(suffix)
    if kind is None:
        what = "standard input" if name == STANDARD else name
        raise CodesError(f"say what {what} is: --type csv, or --type text for one code per line.")
    return kind


@contextmanager
def _opened(name: str) -> Iterator[BinaryIO]:
    """The file, to be read from its beginning as often as needed. Standard input is kept in a temporary file for that."""
    if name != STANDARD:
        try:
            file = open(name, "rb")  # noqa: SIM115  # closed below
        except OSError as error:
            raise CodesError(f"{name} cannot be read: {error.strerror}.") from None
        if not file.seekable():
            with file:
                file = _kept(file)
    else:
        if sys.stdin is None:
            raise CodesError("standard input is closed: there is nothing to send.")
        file = _kept(sys.stdin.buffer)
    with file:
        yield file


def _kept(source: IO[bytes]) -> Any:
    kept = tempfile.TemporaryFile()  # noqa: SIM115  # who asked for it closes it
    try:
        while block := source.read(_BLOCK_BYTES):
            kept.write(block)
    except BaseException:
        kept.close()
        raise
    return kept


def _send(service: Service, wanted: Upload, file: BinaryIO, media_type: str) -> dict[str, Any]:
    """Send the file, and return its job: the one that it has already, if it was sent before and that job has not failed."""
    digest = hashlib.sha256(f"{wanted.book_id}\n{media_type}\n".encode())
    file.seek(0)
    while block := file.read(_BLOCK_BYTES):
        digest.update(block)
    size = file.tell()
    file.seek(0)
    headers = {"Content-Type": media_type, "Content-Length": str(size)}
    if file.read(2) == _GZIP_MAGIC:
        headers["Content-Encoding"] = "gzip"
    path = "/coupons/codes?" + urlencode({"book_id": wanted.book_id})
    # A key is good for one job. Who sends a file again whose job has failed wants another.
    for _ in range(_JOBS_MAX):
        headers["Idempotency-Key"] = f"codes-upload-{digest.hexdigest()}"
        job, replayed = _send_once(service, path, headers, file, size)
        if not replayed:
            return job
        job = _patiently(lambda found=job: service.get(f"/coupons/jobs/{quote(found['job_id'], safe='')}"))  # type: ignore[misc]
        if job["status"] != "failed":
            _say(f"this file was sent before: job {job['job_id']}")
            return job
        digest.update(job["job_id"].encode())
    raise CodesError("this file has failed too often today; see the report of its last job.")


def _send_once(
    service: Service, path: str, headers: Mapping[str, str], file: BinaryIO, size: int
) -> tuple[dict[str, Any], bool]:
    """The job that was answered, and whether that is the answer to an earlier request. Tries again when it is told to."""
    until = time.monotonic() + _PATIENCE_S
    while True:
        file.seek(0)
        with _bar("sending", total=size, unit="B", unit_scale=True) as bar:
            try:
                body = cast(IO[bytes], _Watched(file, bar.update))
                with service.ask("POST", path, headers, body) as answer:
                    return service.checked(answer), answer.headers.get("Idempotent-Replayed") == "true"
            except _TryAgain:
                if time.monotonic() > until:
                    raise
            except KeyboardInterrupt:
                raise Interrupted(
                    "the upload was broken off. Send the same file again to be sure of it: nothing is added twice."
                ) from None
        time.sleep(_POLL_S)


class _Watched:
    """A file that tells how much of it was read."""

    def __init__(self, file: BinaryIO, seen: Callable[[int], object]) -> None:
        self._file = file
        self._seen = seen

    def read(self, size: int = -1) -> bytes:
        block = self._file.read(size)
        self._seen(len(block))
        return block


def _followed(service: Service, job: dict[str, Any]) -> dict[str, Any]:
    """The job when it is over."""
    path = f"/coupons/jobs/{quote(job['job_id'], safe='')}"
    try:
        with _bar("adding", total=1.0, bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}") as bar:
            while True:
                job = _patiently(lambda: service.get(path))
                bar.n = job["progress"]
                bar.refresh()
                if job["status"] != "running":
                    return job
                time.sleep(_POLL_S)
    except KeyboardInterrupt:
        raise Interrupted(
            f"job {job['job_id']} goes on without you. Run the same command again to see what becomes of it."
        ) from None


def _report(job: Mapping[str, Any]) -> str:
    lines = [
        f"job {job['job_id']} of {job['book_id']}: {job['status']}",
        f"{job['received']} received: {job['inserted']} inserted, {job['duplicates']} duplicates, {job['invalid']} invalid;"
        f" {job.get('blank', 0)} blank",
    ]
    if not job["received"]:
        lines.append("the file has no row with a code")
    if job.get("header"):
        lines.append(f"the codes are those below the heading {job['header']}")
    lines += [f"warning: {_text(warning)}" for warning in job.get("warnings", ())]
    if job.get("error"):
        lines.append(f"error: {_text(job['error'])}")
    rejected = job["rejected"]
    lines += [
        f"row {row['row']}: {row['code']}: {row['reason']}" + (f", {row['detail']}" if row["detail"] else "")
        for row in rejected[:_REJECTED_SHOWN]
    ]
    if len(rejected) > _REJECTED_SHOWN or job["rejected_truncated"]:
        lines.append(f"… and more: GET /coupons/jobs/{job['job_id']}/rejected lists all of them")
    return "\n".join(lines)


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


# --- export


def export_codes(wanted: Export) -> int:
    """Write a book's codes as CSV. A file is there when it is whole, and not before. Returns 0. Raises CodesError;
    Interrupted."""
    service = Service.from_environment()
    total = _total(service, wanted.book_id) if wanted.status is None else None
    if wanted.file == STANDARD:
        return _export_to_standard_output(service, wanted, total)
    target = Path(wanted.file)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        for tried in range(1, _TRIES_MAX + 1):
            try:
                with open(part, "wb") as file:
                    position, rows = _copy(service, wanted, file, total)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(part, target)
                break
            except _Away as error:
                if tried == _TRIES_MAX:
                    raise CodesError(f"{error} {wanted.file} was not written.") from None
                _say(f"{error} The export starts again.")
                time.sleep(_POLL_S)
    except OSError as error:
        raise CodesError(f"{wanted.file} cannot be written: {error.strerror}.") from None
    except KeyboardInterrupt:
        raise Interrupted(f"the export was broken off: {wanted.file} was not written.") from None
    finally:
        part.unlink(missing_ok=True)
    _say(f"{rows} codes as of {position} are in {wanted.file}")
    return 0


def _export_to_standard_output(service: Service, wanted: Export, total: int | None) -> int:
    try:
        position, rows = _copy(service, wanted, sys.stdout.buffer, total)
        sys.stdout.buffer.flush()
    except OSError as error:
        _drop_standard_output()
        if isinstance(error, BrokenPipeError):  # whoever reads has seen enough
            return 1
        reason = f"standard output cannot be written: {error.strerror}"
        raise CodesError(f"{reason}. What was written is not whole.") from None
    except _Away as error:
        raise CodesError(f"{error} What was written is not whole.") from None
    except KeyboardInterrupt:
        raise Interrupted("the export was broken off: what was written is not whole.") from None
    _say(f"{rows} codes as of {position}")
    return 0


def _copy(service: Service, wanted: Export, file: IO[bytes], total: int | None) -> tuple[str, int]:
    """Copy the whole answer. Returns the position it tells, and how many codes there were. Raises _Away when it is short."""
    query = {"status": wanted.status} if wanted.status else {}
    path = f"/coupons/{quote(wanted.book_id, safe='')}/codes?{urlencode(query)}"
    with service.ask("GET", path, {"Accept": "text/csv"}) as answer:
        service.require_ok(answer)
        if not answer.headers.get("Content-Type", "").startswith("text/csv"):
            raise CodesError(f"{service.url} answers no CSV; check COUPON_URL, and the version of the service.")
        lines = 0
        with _bar("codes", total=total, unit=" codes", unit_scale=True) as bar:
            while block := _block(answer, lines):
                file.write(block)
                before, lines = lines, lines + block.count(b"\n")
                bar.update(max(lines - 1, 0) - max(before - 1, 0))
        return answer.headers.get("Coupon-Position", "?"), max(lines - 1, 0)


def _block(answer: http.client.HTTPResponse, lines: int) -> bytes:
    """The next bytes of the answer. Raises _Away when it breaks off, behind so many lines."""
    try:
        return answer.read1(_BLOCK_BYTES)
    except (OSError, http.client.HTTPException):
        raise _Away(f"the answer broke off after {max(lines - 1, 0)} codes.") from None


def _total(service: Service, book_id: str) -> int | None:
    """How many codes the book has, for the bar; None where the key may not know."""
    with suppress(CodesError, KeyError, TypeError):
        return int(service.get(f"/coupons/{quote(book_id, safe='')}")["codes"]["total"])
    return None


# --- what is shown


def _drop_standard_output() -> None:
    """Python would write what is left of it once more when it ends, and complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _bar(what: str, **options: Any) -> Any:
    """A progress bar on standard error, where that is a terminal."""
    return tqdm(desc=what, file=sys.stderr, disable=None, leave=False, mininterval=0.2, **options)


def _say(text: str) -> None:
    print(text, file=sys.stderr)
