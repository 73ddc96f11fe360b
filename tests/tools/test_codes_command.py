"""`coupon-svc codes`: what it sends, prints, leaves behind and ends with."""

from __future__ import annotations

import asyncio
import fcntl
import gzip
import http.server
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from coupon_svc.cli import main
from coupon_svc.ops import codes
from coupon_svc.postgres.keys import SCOPES
from tests.harness import Stack
from tests.http.helpers import NO_SUCH_BOOK, make_book

HEADING = "code,status,user_id,assigned_at,redemptions_used,redemptions_left\r\n"


class Ran(NamedTuple):
    status: int
    out: str
    error: str


Command = Callable[..., Ran]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """`coupon-svc codes …` in this process, with these COUPON_URL and COUPON_KEY."""
    monkeypatch.setattr(codes, "_POLL_S", 0.01)

    def run(url: str, key: str, *args: str) -> Ran:
        monkeypatch.setenv("COUPON_URL", url)
        monkeypatch.setenv("COUPON_KEY", key)
        try:
            status = main(["codes", *args])
        except SystemExit as stopped:
            status = int(stopped.code or 0)
        return Ran(status, *capfd.readouterr())

    return run


def one_line(ran: Ran) -> str:
    """Why the command failed: one line, exit status 1, and nothing on standard output."""
    assert (ran.status, ran.out) == (1, ""), ran
    assert ran.error.startswith("coupon-svc: ")
    assert len(ran.error.splitlines()) == 1, ran.error
    return ran.error


# --- export, from a service


@pytest.fixture
async def book(service: Stack) -> tuple[str, str, list[str]]:
    """A book with 1,200 codes: (its id, a key of its tenant, the codes)."""
    key = await service.key()
    async with httpx.AsyncClient(base_url=service.base_url, headers={"Authorization": f"Bearer {key}"}) as client:
        book_id = await make_book(client, codes=[f"EXPORT-{number:04d}" for number in range(1200)])
        answer = await client.post("/coupons/assign/EXPORT-0007", json={"user_id": "@u"})
        assert answer.status_code == 201
    return book_id, key, [f"EXPORT-{number:04d}" for number in range(1200)]


async def test_an_export_is_there_when_it_is_whole(
    service: Stack, book: tuple[str, str, list[str]], run: Command, tmp_path: Path
) -> None:
    book_id, key, expected = book
    target = tmp_path / "codes.csv"
    target.write_text("what was there before")
    ran = await asyncio.to_thread(run, service.base_url, key, "export", "--book", book_id, "--output", str(target))
    assert (ran.status, ran.out) == (0, "")
    assert ran.error.startswith("1200 codes as of 0")
    lines = target.read_bytes().decode().split("\r\n")
    assert lines[0] + "\r\n" == HEADING
    assert [line.split(",")[0] for line in lines[1:-1]] == expected
    assert lines[8].startswith("EXPORT-0007,assigned,'@u,20")
    assert os.listdir(tmp_path) == ["codes.csv"]


async def test_an_export_goes_to_standard_output_and_may_be_of_one_status(
    service: Stack, book: tuple[str, str, list[str]], run: Command
) -> None:
    ran = await asyncio.to_thread(
        run, service.base_url + "/", book[1], "export", "--book", book[0], "--status", "assigned"
    )
    assert ran.status == 0
    heading, row, end = ran.out.replace("\r\n", "\n").split("\n")
    assert heading + "\r\n" == HEADING
    assert row.startswith("EXPORT-0007,assigned,'@u,")
    assert end == ""
    assert ran.error.startswith("1 codes as of 0")


async def test_what_the_service_refuses_is_told_in_one_line(
    service: Stack, book: tuple[str, str, list[str]], run: Command, tmp_path: Path
) -> None:
    target = str(tmp_path / "codes.csv")

    async def refused(url: str, key: str, book_id: str) -> str:
        return one_line(await asyncio.to_thread(run, url, key, "export", "--book", book_id, "--output", target))

    assert "404 book_not_found, request req_" in await refused(service.base_url, book[1], NO_SUCH_BOOK)
    assert "COUPON_KEY is not a valid key" in await refused(service.base_url, "wrong", book[0])
    scopes = tuple(scope for scope in SCOPES if scope != "codes:read")
    assert "COUPON_KEY lacks the scope codes:read" in await refused(
        service.base_url, await service.key(scopes=scopes), book[0]
    )
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("url", "key", "said"),
    [
        ("", "k", "set COUPON_URL to the address"),
        ("http://127.0.0.1:8080", "", "set COUPON_KEY to an API key"),
        ("127.0.0.1:8080", "k", "COUPON_URL is not an address such as"),
        ("ftp://a", "k", "COUPON_URL is not an address such as"),
        ("http://127.0.0.1:x", "k", "COUPON_URL is not an address such as"),
        ("http://127.0.0.1:8080", "a b", "COUPON_KEY is not an API key"),
        ("http://127.0.0.1:1", "k", "the service at http://127.0.0.1:1 cannot be reached"),
    ],
)
def test_what_is_missing_or_wrong_is_named(run: Command, tmp_path: Path, url: str, key: str, said: str) -> None:
    file = tmp_path / "codes.csv"
    file.write_text("A-1\n")
    for args in (("upload", str(file)), ("export", "--output", str(tmp_path / "out.csv"))):
        message = run(url, key, *args, "--book", "bk").error.splitlines()[-1]
        assert said in message
        assert key not in message or len(key) < 2
    assert os.listdir(tmp_path) == ["codes.csv"]


# --- upload, and what breaks off, against a server of the test's


class Fake:
    """A service that keeps what it was sent. `jobs` are what it answers for its jobs, in their order."""

    def __init__(self) -> None:
        self.sent: list[tuple[dict[str, str], str, bytes]] = []
        self.keys: dict[str, str] = {}
        self.jobs: dict[str, list[dict[str, Any]]] = {}
        self.answers: list[dict[str, Any]] = [job()]
        self.refusals: list[tuple[int, dict[str, Any]]] = []
        self.export = HEADING.encode()
        self.cut = False
        self.hold = threading.Event()
        self.hold.set()
        self.began = threading.Event()


def job(**fields: Any) -> dict[str, Any]:
    return {
        "book_id": "bk",
        "status": "succeeded",
        "progress": 1.0,
        "received": 3,
        "inserted": 3,
        "duplicates": 0,
        "invalid": 0,
        "blank": 0,
        "header": None,
        "warnings": [],
        "rejected": [],
        "rejected_truncated": False,
        "error": None,
        **fields,
    }


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def fake(self) -> Fake:
        return self.server.fake  # type: ignore[attr-defined, no-any-return]

    def do_POST(self) -> None:
        self.fake.began.set()
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.fake.sent.append((dict(self.headers.items()), self.path, body))
        if self.fake.refusals:
            self._json(*self.fake.refusals.pop(0))
            return
        key = self.headers["Idempotency-Key"]
        replayed = key in self.fake.keys
        job_id = self.fake.keys.setdefault(key, f"jb_{len(self.fake.keys)}")
        if not replayed:
            self.fake.jobs[job_id] = [{"job_id": job_id, **one} for one in self.fake.answers]
        first = {"job_id": job_id, **job(status="running", progress=0.0)}
        self._json(202, first, *[("Idempotent-Replayed", "true")] * replayed)

    def do_GET(self) -> None:
        if self.path == "/coupons/bk":  # asked for the bar, of a key that may not
            self._json(403, {"scopes": ["books:read"]})
            return
        if self.path.startswith("/elsewhere/"):
            self.send_error(404)
            return
        self.fake.began.set()
        self.fake.hold.wait(10)
        if self.path.startswith("/coupons/jobs/"):
            answers = self.fake.jobs[self.path.rpartition("/")[2]]
            self._json(200, answers.pop(0) if len(answers) > 1 else answers[0])
        else:
            self.send_response(200)
            self.send_header("Content-Type", "text/csv")
            self.send_header("Coupon-Position", "00:1-1")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"%x\r\n%b\r\n" % (len(self.fake.export), self.fake.export))
            if self.fake.cut:
                self.fake.cut = False
                self.close_connection = True
            else:
                self.wfile.write(b"0\r\n\r\n")

    def _json(self, status: int, body: dict[str, Any], *headers: tuple[str, str]) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        for name, value in (("Content-Length", str(len(content))), *headers):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def fake() -> Iterator[Fake]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        server.fake = made = Fake()  # type: ignore[attr-defined]
        made.url = f"http://127.0.0.1:{server.server_address[1]}"  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield made
        made.hold.set()
        server.shutdown()


def url_of(fake: Fake) -> str:
    return str(fake.url)  # type: ignore[attr-defined]


def test_a_file_is_sent_as_it_is_and_its_report_printed(run: Command, fake: Fake, tmp_path: Path) -> None:
    rejected = [{"row": row, "code": "!", "reason": "invalid", "detail": "too short"} for row in range(2, 14)]
    fake.answers = [
        job(status="running", progress=0.3),
        job(received=15, invalid=12, duplicates=1, header="Code", warnings=["looks broken"], rejected=rejected),
    ]
    file = tmp_path / "codes.CSV"
    file.write_bytes(b"code\r\nA-1\r\n")
    ran = run(url_of(fake), "k", "upload", str(file), "--book", "bk/1")
    assert ran.status == 1, "rows were invalid"
    assert ran.error == "", "there is no terminal"
    lines = ran.out.splitlines()
    assert lines[:5] == [
        "job jb_0 of bk: succeeded",
        "15 received: 3 inserted, 1 duplicates, 12 invalid; 0 blank",
        "the codes are those below the heading Code",
        "warning: looks broken",
        "row 2: !: invalid, too short",
    ]
    assert len(lines) == 4 + 10 + 1
    ((headers, path, body),) = fake.sent
    assert path == "/coupons/codes?book_id=bk%2F1"
    assert body == file.read_bytes()
    assert (headers["Content-Type"], headers["Authorization"]) == ("text/csv", "Bearer k")
    assert "Content-Encoding" not in headers


def test_the_same_file_is_the_same_job_unless_that_has_failed(run: Command, fake: Fake, tmp_path: Path) -> None:
    file = tmp_path / "codes.txt"
    file.write_text("A-1\n")
    fake.answers = [job(status="failed", error={"code": "book_closed"})]
    ran = run(url_of(fake), "k", "upload", str(file), "--book", "bk")
    assert ran.status == 1
    assert '{"code": "book_closed"}' in ran.out
    fake.answers = [job()]
    assert run(url_of(fake), "k", "upload", str(file), "--book", "bk").out.startswith("job jb_1 ")
    again = run(url_of(fake), "k", "upload", str(file), "--book", "bk", "--json")
    assert (again.status, json.loads(again.out)["job_id"]) == (0, "jb_1")
    assert again.error == "this file was sent before: job jb_1\n"
    assert len(fake.keys) == 2
    for other in (("--book", "bk2"), ("--book", "bk", "--type", "csv")):
        run(url_of(fake), "k", "upload", str(file), *other)
    assert len(fake.keys) == 4


@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "gzip"])
def test_standard_input_is_sent_when_it_is_said_what_it_is(fake: Fake, compressed: bool) -> None:
    text = b"".join(b"CODE-%d\n" % number for number in range(50_000))
    sent = gzip.compress(text) if compressed else text
    command = [sys.executable, "-m", "coupon_svc", "codes", "upload", "-", "--book", "bk"]
    environment = {**os.environ, "COUPON_URL": url_of(fake), "COUPON_KEY": "k"}
    done = subprocess.run([*command, "--type", "text"], input=sent, env=environment, capture_output=True, timeout=30)
    assert done.returncode == 0, done.stderr
    ((headers, _, body),) = fake.sent
    assert body == sent
    assert (headers["Content-Type"], headers.get("Content-Encoding")) == ("text/plain", "gzip" if compressed else None)


def test_what_cannot_be_sent_is_told(run: Command, fake: Fake, tmp_path: Path) -> None:
    (tmp_path / "codes.xlsx").write_text("PK")
    said = one_line(run(url_of(fake), "k", "upload", str(tmp_path / "codes.xlsx"), "--book", "bk"))
    assert "--type csv, or --type text" in said
    said = one_line(run(url_of(fake), "k", "upload", str(tmp_path / "none.csv"), "--book", "bk"))
    assert "none.csv cannot be read: No such file or directory" in said
    assert run(url_of(fake), "k", "upload", "a.csv").status == 2
    assert fake.sent == []


def test_what_the_service_says_of_a_file_reads_well(run: Command, fake: Fake, tmp_path: Path) -> None:
    file = tmp_path / "codes.csv"
    file.write_bytes(b"\xff\xfeA\0")
    errors = [{"pointer": "", "detail": "line 1: the file is in UTF-16; save it as UTF-8"}]
    told = {
        "title": "Invalid request",
        "detail": "The file cannot be read.",
        "code": "invalid_request",
        "errors": errors,
    }
    fake.refusals = [(422, told)]
    said = one_line(run(url_of(fake), "k", "upload", str(file), "--book", "bk"))
    assert "Invalid request. The file cannot be read. Line 1: the file is in UTF-16; save it as UTF-8. (422" in said
    file.write_bytes(b"")
    fake.answers = [job(received=0, inserted=0, duplicates=0, invalid=0)]
    assert "the file has no row with a code" in run(url_of(fake), "k", "upload", str(file), "--book", "bk").out


@pytest.mark.parametrize(
    ("action", "ends", "status", "said"),
    [
        ("upload - --type csv", "<&-", 1, "standard input is closed: there is nothing to send."),
        ("upload codes.csv", ">/dev/full", 1, "its report cannot be written: No space left on device."),
        ("upload codes.csv", "| true", 0, ""),
        ("export", ">/dev/full", 1, "No space left on device. What was written is not whole."),
        ("export", "| true", 1, ""),
    ],
)
def test_standard_input_and_output_that_do_not_work_are_told(
    fake: Fake, tmp_path: Path, action: str, ends: str, status: int, said: str
) -> None:
    (tmp_path / "codes.csv").write_text("A-1\n")
    fake.export = HEADING.encode() + 100_000 * b"A-1,available,,,0,1\r\n"
    command = f"set -o pipefail; {sys.executable} -m coupon_svc codes {action} --book bk {ends}"
    environment = {**os.environ, "COUPON_URL": url_of(fake), "COUPON_KEY": "k"}
    ran = subprocess.run(["bash", "-c", command], env=environment, cwd=tmp_path, capture_output=True, timeout=30)
    assert (ran.returncode, ran.stdout) == (status, b"")
    assert ran.stderr.decode().rstrip().endswith(said)
    assert len(ran.stderr.splitlines()) <= 1, ran.stderr


def test_an_address_of_something_else_is_told(run: Command, fake: Fake, tmp_path: Path) -> None:
    said = one_line(
        run(url_of(fake) + "/elsewhere", "k", "export", "--book", "bk", "--output", str(tmp_path / "a.csv"))
    )
    assert f"{url_of(fake)}/elsewhere answers 404, and not as a coupon service does; check COUPON_URL" in said


def test_a_429_or_503_is_tried_again_and_a_refusal_is_not(run: Command, fake: Fake, tmp_path: Path) -> None:
    file = tmp_path / "codes.csv.gz"
    file.write_bytes(gzip.compress(b"A-1\n"))
    errors = [{"pointer": "/book_id", "detail": "give one"}]
    fake.refusals = [
        (503, {"code": "recovering"}),
        (429, {"code": "rate_limited"}),
        (422, {"title": "Invalid", "code": "invalid_request", "errors": errors}),
    ]
    said = one_line(run(url_of(fake), "k", "upload", str(file), "--book", "bk"))
    assert "Invalid." in said
    assert "/book_id: give one. (422 invalid_request, request ?)" in said
    assert len(fake.sent) == 3
    assert len({headers["Idempotency-Key"] for headers, _, _ in fake.sent}) == 1


def test_an_export_that_breaks_off_starts_again_and_leaves_no_part(run: Command, fake: Fake, tmp_path: Path) -> None:
    fake.export, fake.cut = HEADING.encode() + b"A-1,available,,,0,1\r\n", True
    target = tmp_path / "codes.csv"
    ran = run(url_of(fake), "k", "export", "--book", "bk", "--output", str(target))
    assert ran.status == 0
    assert ran.error.splitlines() == [
        "the answer broke off after 1 codes. The export starts again.",
        f"1 codes as of 00:1-1 are in {target}",
    ]
    assert target.read_bytes() == fake.export
    fake.cut = True
    ran = run(url_of(fake), "k", "export", "--book", "bk")
    assert ran.status == 1
    assert "What was written is not whole" in ran.error
    ran = run(url_of(fake), "k", "export", "--book", "bk", "--output", str(tmp_path / "none" / "codes.csv"))
    assert "cannot be written: No such file" in one_line(ran)
    assert os.listdir(tmp_path) == ["codes.csv"]


@pytest.mark.parametrize("action", ["upload", "export"])
def test_ctrl_c_ends_it_with_a_clear_line_and_a_terminal_sees_a_bar(fake: Fake, tmp_path: Path, action: str) -> None:
    file = tmp_path / "codes.csv"
    file.write_text("A-1\n")
    args = ["upload", str(file)] if action == "upload" else ["export", "--output", str(tmp_path / "out.csv")]
    fake.answers = [job(status="running", progress=0.5)]
    fake.hold.clear()
    mine, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "coupon_svc", "codes", *args, "--book", "bk"],
        env={**os.environ, "COUPON_URL": url_of(fake), "COUPON_KEY": "k"},
        stdout=subprocess.PIPE,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # ignored where the tests run in the background
    )
    os.close(theirs)
    assert fake.began.wait(30)
    if action == "upload":
        fake.hold.set()
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    shown = b""
    while block := _read(mine):
        shown += block
    os.close(mine)
    assert (process.returncode, out) == (130, b"")
    last = shown.decode().splitlines()[-1]
    if action == "upload":
        assert "50%" in shown.decode()
        assert last == (
            "coupon-svc: job jb_0 goes on without you. Run the same command again to see what becomes of it."
        )
    else:
        assert last.endswith("out.csv was not written.")
    assert os.listdir(tmp_path) == ["codes.csv"]


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # the other side is closed
        return b""


# --- both, with a service


async def test_an_export_that_is_uploaded_has_the_same_codes(
    service: Stack, book: tuple[str, str, list[str]], run: Command, tmp_path: Path
) -> None:
    book_id, key, expected = book
    file = str(tmp_path / "codes.csv")
    await asyncio.to_thread(run, service.base_url, key, "export", "--book", book_id, "--output", file)
    other = await service.key()
    async with httpx.AsyncClient(base_url=service.base_url, headers={"Authorization": f"Bearer {other}"}) as client:
        other_book = await make_book(client, codes=[])
    ran = await asyncio.to_thread(run, service.base_url, other, "upload", file, "--book", other_book)
    assert (ran.status, ran.error) == (0, "")
    assert "1200 received: 1200 inserted, 0 duplicates, 0 invalid; 0 blank" in ran.out
    assert "below the heading code" in ran.out
    again = await asyncio.to_thread(run, service.base_url, other, "upload", file, "--book", other_book)
    assert again.error.startswith("this file was sent before: job ")
    assert again.out == ran.out
    copy = tmp_path / "copy.csv"
    await asyncio.to_thread(run, service.base_url, other, "export", "--book", other_book, "--output", str(copy))
    assert [line.split(",")[0] for line in copy.read_text().splitlines()[1:]] == expected
    same = await asyncio.to_thread(run, service.base_url, key, "upload", file, "--book", book_id)
    assert "1200 received: 0 inserted, 1200 duplicates, 0 invalid" in same.out


async def test_an_upload_that_the_service_refuses_says_why_and_another_with_its_rows(
    service: Stack, run: Command, tmp_path: Path
) -> None:
    key = await service.key()
    file = tmp_path / "codes.txt"
    file.write_text("A-1\n!\nA-1\n")
    said = one_line(await asyncio.to_thread(run, service.base_url, key, "upload", str(file), "--book", NO_SUCH_BOOK))
    assert "404 book_not_found" in said
    async with httpx.AsyncClient(base_url=service.base_url, headers={"Authorization": f"Bearer {key}"}) as client:
        book_id = await make_book(client, codes=[])
    ran = await asyncio.to_thread(run, service.base_url, key, "upload", str(file), "--book", book_id)
    assert ran.status == 1
    assert "row 2: !: invalid" in ran.out
    assert "row 3: A-1: duplicate_in_upload, as in row 1" in ran.out
