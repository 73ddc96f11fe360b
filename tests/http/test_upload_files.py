"""POST /coupons/codes, as a file; and the jobs that work files off."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from coupon_svc.domain.upload_files import RECORD_BYTES_MAX
from tests.harness import Stack, until
from tests.http.helpers import NO_SUCH_BOOK, again, alike, assign, counters, make_book, patch, refused

CSV, TEXT = {"Content-Type": "text/csv"}, {"Content-Type": "text/plain; charset=utf-8"}


async def send(
    client: httpx.AsyncClient, book: str, body: bytes | AsyncIterator[bytes], headers: dict[str, str] = CSV
) -> httpx.Response:
    return await client.post("/coupons/codes", params={"book_id": book}, content=body, headers=headers)


async def over(client: httpx.AsyncClient, sent: httpx.Response) -> dict[str, Any]:
    """The job of an upload, once it is over."""
    assert sent.status_code == 202, sent.text

    async def ended() -> dict[str, Any] | None:
        answer = await client.get(sent.headers["location"])
        assert answer.status_code == 200, answer.text
        job: dict[str, Any] = answer.json()
        return None if job["status"] == "running" else job

    job = await until(ended)
    assert job is not None
    return job


async def test_a_file_becomes_a_job_and_its_codes_can_be_assigned(client: httpx.AsyncClient) -> None:
    elsewhere = await make_book(client, codes=["TAKEN-1"])
    book = await make_book(client, codes=["HERE-1"])
    body = b"\xef\xbb\xbfname;Code\r\nx;b-1\r\n;;\r\ny;taken-1\r\nz;B-1\r\n;HERE-1\r\nz;no\r\n"
    sent = await send(client, book, body)
    assert sent.json() == {
        "job_id": sent.json()["job_id"],
        "book_id": book,
        "status": "running",
        "progress": 0.0,
        "received": 5,
        "inserted": 0,
        "duplicates": 0,
        "invalid": 1,
        "blank": 1,
        "header": "Code",
        "warnings": [],
        "rejected": [
            {"row": 7, "code": "no", "reason": "invalid", "detail": "it has 2 characters; a code has 3 to 64"}
        ],
        "rejected_truncated": False,
        "error": None,
        "created_at": sent.json()["created_at"],
        "finished_at": None,
    }
    assert sent.headers["location"] == f"/coupons/jobs/{sent.json()['job_id']}"
    job = await over(client, sent)
    assert (job["status"], job["progress"], job["error"]) == ("succeeded", 1.0, None)
    assert (job["inserted"], job["duplicates"], job["invalid"]) == (1, 3, 1)
    assert job["finished_at"] >= job["created_at"]
    assert [(row["row"], row["code"], row["reason"], row["detail"]) for row in job["rejected"]] == [
        (4, "TAKEN-1", "duplicate_in_other_book", elsewhere),
        (5, "B-1", "duplicate_in_upload", "as in row 2"),
        (6, "HERE-1", "duplicate_in_book", "the book has it already"),
        (7, "no", "invalid", "it has 2 characters; a code has 3 to 64"),
    ]
    assert {await assign(client, book) for _ in range(2)} == {"HERE-1", "B-1"}


async def test_the_same_file_again_inserts_nothing(client: httpx.AsyncClient) -> None:
    """In pieces: a code that stands more often than a piece is long is its own duplicate throughout."""
    book = await make_book(client, codes=[])
    codes = [f"FILE-{number:05}" for number in range(4_500)] + ["FILE-02000"] * 2_500
    body = "\n".join(codes).encode()
    job = await over(client, await send(client, book, body, TEXT))
    assert (job["received"], job["inserted"], job["duplicates"]) == (7_000, 4_500, 2_500)
    assert job["rejected"][0] == {
        "row": 4_501,
        "code": "FILE-02000",
        "reason": "duplicate_in_upload",
        "detail": "as in row 2001",
    }
    assert (len(job["rejected"]), job["rejected_truncated"]) == (100, True)
    job = await over(client, await send(client, book, body, TEXT))
    assert (job["status"], job["inserted"], job["duplicates"]) == ("succeeded", 0, 7_000)
    assert (await counters(client, book))["available"] == 4_500
    rows: list[int] = []
    query: dict[str, Any] = {"limit": 1_000}
    while query.get("cursor", "first"):
        page = (await client.get(f"/coupons/jobs/{job['job_id']}/rejected", params=query)).json()
        rows += [row["row"] for row in page["rejected"]]
        query["cursor"] = page["next_cursor"]
    assert rows == list(range(1, 7_001))
    path = f"/coupons/jobs/{job['job_id']}/rejected"
    whole = await client.get(path, headers={"Accept": "text/csv"})
    assert whole.headers["content-type"] == "text/csv; charset=utf-8; header=present"
    lines = whole.text.split("\r\n")
    assert lines[:2] == ["row,code,reason,detail", "1,FILE-00000,duplicate_in_book,the book has it already"]
    assert lines[-2:] == ["7000,FILE-02000,duplicate_in_upload,as in row 2001", ""]
    assert len(lines) == 7_002
    refused(await client.get(f"{path}?limit=5", headers={"Accept": "text/csv"}), 422, "invalid_request")


async def test_a_compressed_file_is_read_as_it_is(client: httpx.AsyncClient) -> None:
    book = await make_book(client, codes=[])
    packed = gzip.compress(b"GZ-1\n") + gzip.compress(b"GZ-2\n")
    job = await over(client, await send(client, book, packed, {**CSV, "Content-Encoding": "gzip"}))
    assert job["inserted"] == 2


@pytest.mark.parametrize(
    ("headers", "body", "status", "code"),
    [
        ({**CSV, "Content-Encoding": "br"}, b"A-1", 415, "unsupported_media_type"),
        ({"Content-Type": "text/csv; charset=latin1"}, b"A-1", 415, "unsupported_media_type"),
        ({"Content-Type": "text/html"}, b"A-1", 415, "unsupported_media_type"),
        ({**CSV, "Content-Encoding": "gzip"}, gzip.compress(b"A-1\nA-2")[:-1], 422, "invalid_request"),
        ({**CSV, "Content-Encoding": "gzip"}, b"A-1\nA-2", 422, "invalid_request"),
        ({**CSV, "Content-Encoding": "gzip"}, gzip.compress((b" " * 1023 + b"\n") * (1 << 15)), 413, "body_too_large"),
        ({**CSV, "Idempotency-Key": "\u00e4"}, b"A-1", 400, "invalid_idempotency_key"),
        (CSV, b"A-1\nA\xe9-2", 422, "invalid_request"),
        (CSV, "code\nA-1\n".encode("utf-16"), 422, "invalid_request"),
        (TEXT, "A-1\nA-2\n".encode("utf-16-le"), 422, "invalid_request"),
        (CSV, b"PK\x03\x04\x14\x00", 422, "invalid_request"),
        (CSV, b'A-1\n"A-2\nA-3\n', 422, "invalid_request"),
    ],
    ids=[
        "brotli", "charset", "html", "cut-gzip", "no-gzip", "bomb", "key", "latin-1", "utf-16", "utf-16-without-mark",
        "workbook", "quote-never-closed",
    ],
)  # fmt: skip
async def test_a_file_that_cannot_be_read_adds_nothing(
    client: httpx.AsyncClient, service: Stack, headers: dict[str, str], body: bytes, status: int, code: str
) -> None:
    book = await make_book(client, codes=[])
    encoded = {name: value.encode("latin-1") for name, value in headers.items()}
    refused(await send(client, book, body, encoded), status, code)  # type: ignore[arg-type]

    async def emptied() -> bool:
        left = await service.ledger("SELECT FROM jobs WHERE book_id = $1 AND NOT emptied", book)
        return not left

    await until(emptied)
    assert await service.ledger("SELECT FROM codes WHERE book_id = $1", book) == []


async def test_what_people_send_is_taken_as_far_as_it_can_be(client: httpx.AsyncClient) -> None:
    """Each kind of damage in one file: rows that hold no code are told with their line, and cost no other row."""
    book = await make_book(client, codes=[])
    long = b"x" * (RECORD_BYTES_MAX + 1)
    lines = [
        b"\xef\xbb\xbfname|VOUCHER|",
        b"a|ok-1|", b"b|n\0l|", b"|||", b"", b'c|="007"|', b"d|'0077|;;;", long,
        b'"e|\r"|ok-2|', b"f|1E5|", b"g|7.00E+12|", b"h|ok-3",
    ]  # fmt: skip
    job = await over(client, await send(client, book, b"\r\n".join(lines)))
    assert (job["status"], job["header"], job["blank"]) == ("succeeded", "VOUCHER", 2)
    assert [(row["row"], row["reason"]) for row in job["rejected"]] == [(3, "invalid"), (8, "invalid")]
    assert job["rejected"][0]["code"] == "n\ufffdl"
    assert "U+0000" in job["rejected"][0]["detail"]
    assert job["rejected"][1]["detail"] == f"the line is longer than {RECORD_BYTES_MAX} bytes"
    assert len(job["warnings"]) == 1
    listed = (await client.get(f"/coupons/{book}/codes")).json()["codes"]
    assert [code["code"] for code in listed] == ["007", "0077", "1E5", "7.00E+12", "OK-1", "OK-2", "OK-3"]


async def test_the_line_that_cannot_be_read_is_named(client: httpx.AsyncClient) -> None:
    book = await make_book(client, codes=[])
    body = refused(await send(client, book, b"code\nABC\n" + "caf\u00e9-1".encode("latin-1")), 422, "invalid_request")
    assert body["line"] == 3
    assert body["errors"][0]["detail"].startswith("line 3: byte 0xE9 is not UTF-8")


async def test_a_body_that_breaks_off_adds_nothing(client: httpx.AsyncClient, service: Stack) -> None:
    book = await make_book(client, codes=[])
    host, _, port = service.base_url.removeprefix("http://").partition(":")
    _, writer = await asyncio.open_connection(host, int(port))
    head = f"POST /coupons/codes?book_id={book} HTTP/1.1\r\nHost: x\r\nAuthorization: {client.headers['authorization']}\r\n"
    writer.write(f"{head}Content-Type: text/csv\r\nContent-Length: 1000000\r\n\r\n".encode())
    writer.write("".join(f"CUT-{number:06}\n" for number in range(30_000)).encode())
    await writer.drain()

    async def staged() -> bool:
        rows = await service.ledger("SELECT FROM staged_codes JOIN jobs USING (job_no) WHERE book_id = $1", book)
        return bool(rows)

    await until(staged)
    writer.close()

    async def gone() -> bool:
        rows = await service.ledger("SELECT state, error, emptied FROM jobs WHERE book_id = $1", book)
        return [tuple(row) for row in rows] == [("failed", "broken_off", True)]

    await until(gone)
    assert not await staged()
    assert (await counters(client, book))["total"] == 0


async def test_an_idempotency_key_tells_the_same_file_from_another(client: httpx.AsyncClient) -> None:
    book = await make_book(client, codes=[])
    keyed = {**CSV, "Idempotency-Key": "k"}
    first = await send(client, book, b"KEY-1\nKEY-2\n", keyed)
    await over(client, first)
    await patch(client, book, status="closed")
    assert again(first, await send(client, book, b"KEY-1\nKEY-2\n", keyed))
    packed = gzip.compress(b"KEY-1\nKEY-2\n")
    assert again(first, await send(client, book, packed, {**keyed, "Content-Encoding": "gzip"}))
    refused(await send(client, book, b"KEY-1\nKEY-3\n", keyed), 422, "idempotency_key_reused")
    refused(await send(client, book, b"KEY-1\n"), 409, "book_closed")


async def test_a_retry_during_the_first_upload_is_told_so(client: httpx.AsyncClient) -> None:
    book = await make_book(client, codes=[])
    keyed = {**CSV, "Idempotency-Key": "k"}
    arrived, go_on = asyncio.Event(), asyncio.Event()

    async def slowly() -> AsyncIterator[bytes]:
        yield b"SLOW-1\n"
        arrived.set()
        await go_on.wait()

    first = asyncio.create_task(send(client, book, slowly(), keyed))
    await arrived.wait()

    async def in_progress() -> bool:
        other = await send(client, book, b"OTHER-1\n", {**keyed, "Idempotency-Key": "other"})
        assert other.status_code == 202
        return (await send(client, book, b"SLOW-1\n", keyed)).status_code == 409

    await until(in_progress)
    go_on.set()
    assert (await over(client, await first))["inserted"] == 1


async def test_what_is_missing_and_what_is_anothers_are_alike(client: httpx.AsyncClient, service: Stack) -> None:
    book = await make_book(client, codes=[])
    sent = await send(client, book, b"A-1\n")
    job_id = sent.json()["job_id"]
    async with await service.client() as other:
        refusals = [await send(other, book_id, b"A-1\n") for book_id in (book, NO_SUCH_BOOK, "x", "bk_\0")]
        refused(refusals[0], 404, "book_not_found")
        assert all(alike(refusals[0], refusal) for refusal in refusals)
        for path, accept in (("", "*/*"), ("/rejected", "*/*"), ("/rejected", "text/csv")):
            refusals = [
                await other.get(f"/coupons/jobs/{job}{path}", headers={"Accept": accept})
                for job in (job_id, "job_none", "%00")
            ]
            refused(refusals[0], 404, "job_not_found")
            assert all(alike(refusals[0], refusal) for refusal in refusals)


async def test_a_file_needs_its_book_in_the_query_and_a_list_does_not(client: httpx.AsyncClient) -> None:
    book = await make_book(client, codes=[])
    for query in ({}, {"book": book}, {"book_id": book, "x": "1"}):
        sent = await client.post("/coupons/codes", params=query, content=b"A-1", headers=CSV)
        refused(sent, 422, "invalid_request")
    sent = await client.post("/coupons/codes", params={"book_id": book}, json={"book_id": book, "codes": []})
    refused(sent, 422, "invalid_request")
