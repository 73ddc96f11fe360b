"""Books whose codes are computed: as any other book to its callers, and with no row for a code that nobody holds."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import asyncpg
import httpx
import pytest

from coupon_svc.domain.codes import parse_pattern
from coupon_svc.domain.computed import PatternCipher, codes_beginning_with
from coupon_svc.domain.master_key import MasterKeys
from coupon_svc.postgres.codes import insert_codes
from coupon_svc.postgres.computed import ranges
from coupon_svc.postgres.computed.ciphers import Ciphers
from coupon_svc.postgres.database import Database
from coupon_svc.postgres.patterns import compute_codes
from coupon_svc.service.budgets import Budget
from coupon_svc.service.code_directory import CodeDirectory
from coupon_svc.service.issued_codes import IssuedCodes, Verdict
from tests.harness import MASTER_KEY, Stack
from tests.http.helpers import assign, make_book, upload

MANY = 1_000_000_000
GENERATE = {"pattern": "SUMMER-####-####", "total": MANY}
PASSED_OVER_OF = """
    SELECT count(*) FROM passed_over JOIN computed_patterns USING (pattern_id) WHERE tenant_id = $1 AND pattern = $2
"""


async def computed_book(client: httpx.AsyncClient, **fields: Any) -> str:
    return await make_book(client, **{"generate": GENERATE, **fields})


async def cipher_of(service: Stack, book_id: str) -> tuple[PatternCipher, int, int]:
    """The cipher of a book's range, and its numbers."""
    (row,) = await service.ledger(
        "SELECT p.*, begins, ends FROM code_ranges JOIN computed_patterns p USING (pattern_id) WHERE book_id = $1",
        book_id,
    )
    return Ciphers(MasterKeys.parse(MASTER_KEY)).of(row), row["begins"], row["ends"]


async def test_a_book_of_a_billion_codes_has_no_rows(client: httpx.AsyncClient, service: Stack) -> None:
    response = await client.post("/coupons", json={"name": "large", "generate": GENERATE})
    assert response.status_code == 201
    book = response.json()
    assert book["codes"] == {"total": MANY, "available": MANY, "assigned": 0, "redeemed": 0, "quarantined": 0}
    assert book["guess_probability"] == pytest.approx(MANY / 30**8)
    codes = [await assign(client, book["book_id"], f"u{n}") for n in range(20)]
    assert len(set(codes)) == 20
    cipher, begins, _ = await cipher_of(service, book["book_id"])
    assert all(begins <= number < begins + 100_000 for number in cipher.numbers_of(codes).values())
    assert await service.ledger("SELECT FROM codes WHERE book_id = $1", book["book_id"]) == []
    for code in codes[:3]:
        assert (await client.get(f"/coupons/codes/{code}")).json()["status"] == "assigned"
        assert (await client.post(f"/coupons/redeem/{code}", json={})).status_code == 201


async def test_a_code_is_assigned_by_its_name_before_its_turn(client: httpx.AsyncClient, service: Stack) -> None:
    book_id = await computed_book(client)
    cipher, _, ends = await cipher_of(service, book_id)
    (code,) = cipher.codes([ends - 1])
    read = (await client.get(f"/coupons/codes/{code}")).json()
    assert (read["status"], read["book_id"]) == ("available", book_id)
    for status in (201, 200):
        response = await client.post(f"/coupons/assign/{code.lower()}", json={"user_id": "u"})
        assert (response.status_code, response.json()["code"]) == (status, code)
    response = await client.post(f"/coupons/assign/{code}", json={"user_id": "other"})
    assert response.json()["code"] == "already_assigned"
    book = (await client.get(f"/coupons/{book_id}")).json()
    assert book["codes"]["available"] == MANY - 1


async def test_a_code_of_the_pattern_that_was_never_issued_is_not_found(
    client: httpx.AsyncClient, service: Stack
) -> None:
    book_id = await computed_book(client)
    cipher, _, ends = await cipher_of(service, book_id)
    (code,) = cipher.codes([ends])
    for response in (
        await client.get(f"/coupons/codes/{code}"),
        await client.post(f"/coupons/assign/{code}", json={"user_id": "u"}),
    ):
        assert (response.status_code, response.json()["code"]) == (404, "code_not_found")
    await client.post("/coupons/codes", json={"book_id": book_id, "generate": {**GENERATE, "total": 200_000}})
    assert (await client.get(f"/coupons/codes/{code}")).json()["status"] == "available"


async def test_an_uploaded_code_that_lies_in_the_pattern_is_never_computed(
    client: httpx.AsyncClient, service: Stack
) -> None:
    book_id = await computed_book(client, generate={**GENERATE, "total": 150_000})
    cipher, _, ends = await cipher_of(service, book_id)
    ahead = cipher.codes([ends, ends + 1, ends + 100_000])
    uploads = await make_book(client, codes=ahead)
    answer = await client.post("/coupons/codes", json={"book_id": book_id, "generate": {**GENERATE, "total": 150_000}})
    assert answer.json()["inserted"] == 150_000
    (row,) = await service.ledger(
        "SELECT max(ends) AS ends, sum(total) AS total FROM code_ranges WHERE book_id = $1", book_id
    )
    assert (row["ends"], row["total"]) == (ends + 150_003, 300_000)
    for code in ahead:
        assert (await client.get(f"/coupons/codes/{code}")).json()["book_id"] == uploads
        response = await client.post(f"/coupons/assign/{code}", json={"user_id": "u"})
        assert (response.status_code, response.json()["book_id"]) == (201, uploads)


async def test_beyond_so_many_uploaded_codes_a_pattern_is_not_computed(
    client: httpx.AsyncClient, service: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The numbers of uploaded codes are noted one by one, so their number has a bound. The codes are stored instead."""
    book_id = await make_book(client, codes=["NOTED-222222", "NOTED-333333", "NOTED-444444"])
    (tenant_id,) = (await service.ledger("SELECT tenant_id FROM books WHERE book_id = $1", book_id))[0]
    ciphers, pattern = Ciphers(MasterKeys.parse(MASTER_KEY)), parse_pattern("NOTED-######", "unambiguous")
    connection = await asyncpg.connect(service.database_url)
    for noted_max, computed, noted in ((2, False, 0), (3, True, 3)):
        monkeypatch.setattr(ranges, "NOTED_MAX", noted_max)
        transaction = connection.transaction()
        await transaction.start()
        assert await ranges.take_range(connection, tenant_id, book_id, pattern, 150_000, ciphers) is computed
        assert await connection.fetchval(PASSED_OVER_OF, tenant_id, pattern.text) == noted
        await transaction.rollback()
    await connection.close()


async def test_a_range_waits_for_an_upload_that_may_have_its_codes(client: httpx.AsyncClient, service: Stack) -> None:
    """Else the upload would add a code whose number the range takes meanwhile."""
    book_id = await computed_book(client, generate={**GENERATE, "total": 150_000})
    cipher, _, ends = await cipher_of(service, book_id)
    (tenant_id,) = (await service.ledger("SELECT tenant_id FROM books WHERE book_id = $1", book_id))[0]
    ciphers = Ciphers(MasterKeys.parse(MASTER_KEY))
    uploader, taker = [await asyncpg.connect(service.database_url) for _ in range(2)]
    uploads = await make_book(client, codes=["OTHER-1"])

    async def take() -> None:
        async with taker.transaction():
            assert await compute_codes(taker, tenant_id, book_id, cipher.pattern, 150_000, ciphers)

    async with uploader.transaction():
        await insert_codes(uploader, tenant_id, uploads, cipher.codes([ends + 7]), ciphers)
        taking = asyncio.create_task(take())
        done, _ = await asyncio.wait([taking], timeout=0.5)
        assert not done
    await taking
    (row,) = await service.ledger("SELECT max(ends) AS ends FROM code_ranges WHERE book_id = $1", book_id)
    assert row["ends"] == ends + 150_001
    for connection in (uploader, taker):
        await connection.close()


async def test_an_upload_and_a_range_over_it_are_seen_together(client: httpx.AsyncClient, service: Stack) -> None:
    """Whatever is done between two statements of a process that reads what was issued."""
    book_id = await computed_book(client, generate={**GENERATE, "total": 150_000})
    cipher, _, ends = await cipher_of(service, book_id)
    (tenant_id,) = (await service.ledger("SELECT tenant_id FROM books WHERE book_id = $1", book_id))[0]
    (code,) = cipher.codes([ends + 7])
    uploads = await make_book(client, codes=["OTHER-1"])

    class Interrupted(Database):
        """The code is uploaded, and a range taken over it, behind the first statement."""

        statements = 0

        async def fetch(self, query: str, *args: Any) -> Any:
            rows = await super().fetch(query, *args)
            self.statements += 1
            if self.statements == 1:
                await upload(client, uploads, [code])
                more = {"book_id": book_id, "generate": {**GENERATE, "total": 150_000}}
                assert (await client.post("/coupons/codes", json=more)).status_code == 200
            return rows

    database = Interrupted(service.database_url, "test")
    issued = IssuedCodes(database, Ciphers(MasterKeys.parse(MASTER_KEY)))
    await issued.refresh([tenant_id])
    assert issued.look(tenant_id, code) is Verdict.NOT_ISSUED
    directory = CodeDirectory(database, issued, Budget(1, 1))
    assert await directory.book_of_code(tenant_id, code, 5) == uploads
    assert await directory.book_of_code(tenant_id, cipher.codes([ends + 8])[0], 5) == book_id
    await database.close()


async def test_a_code_that_a_range_has_is_a_duplicate_when_it_is_uploaded(
    client: httpx.AsyncClient, service: Stack
) -> None:
    book_id = await computed_book(client)
    cipher, begins, ends = await cipher_of(service, book_id)
    codes = cipher.codes([begins, ends - 1])
    other = await make_book(client, codes=["OTHER-1"])
    for into, reason in ((other, "duplicate_in_other_book"), (book_id, "duplicate_in_book")):
        answer = await upload(client, into, codes)
        assert (answer["inserted"], answer["duplicates"]) == (0, 2)
        assert [rejected["reason"] for rejected in answer["rejected"]] == [reason] * 2
    job = await client.post(
        "/coupons/codes",
        params={"book_id": other},
        content="\n".join([*codes, "NEW-1"]),
        headers={"Content-Type": "text/plain"},
    )
    for _ in range(200):
        report = (await client.get(job.headers["Location"])).json()
        if report["status"] != "running":
            break
        await asyncio.sleep(0.05)
    assert (report["status"], report["inserted"], report["duplicates"]) == ("succeeded", 1, 2)


async def test_books_share_the_counter_of_their_pattern(client: httpx.AsyncClient, service: Stack) -> None:
    books = [await computed_book(client, generate={**GENERATE, "total": 200_000}) for _ in range(2)]
    (_, one_begins, one_ends), (_, begins, _) = [await cipher_of(service, book_id) for book_id in books]
    assert (one_begins, one_ends, begins) == (0, 200_000, 200_000)


async def test_codes_uploaded_before_their_pattern_are_passed_over(client: httpx.AsyncClient, service: Stack) -> None:
    old = ["SUMMER-2222-2222", "SUMMER-ZZZZ-2345"]
    uploads = await make_book(client, codes=[*old, "SUMMER-2222-222", "SUMMER-2222-222L"])
    book_id = await computed_book(client)
    (row,) = await service.ledger(
        "SELECT pattern_id, (SELECT count(*) FROM passed_over p WHERE p.pattern_id = r.pattern_id) AS n"
        " FROM code_ranges r WHERE book_id = $1",
        book_id,
    )
    assert row["n"] == 2
    for code in old:
        assert (await client.get(f"/coupons/codes/{code}")).json()["book_id"] == uploads


async def test_a_pattern_that_overlaps_a_computed_one_is_not_computed(client: httpx.AsyncClient) -> None:
    await computed_book(client)
    wanted = {"pattern": "SUMMER-####-#2##", "total": 1_000_001}
    response = await client.post("/coupons", json={"name": "b", "generate": wanted})
    assert (response.status_code, response.json()["errors"][0]["pointer"]) == (422, "/generate/total")


@pytest.mark.chaos
async def test_many_codes_of_a_pattern_that_overlaps_are_stored_and_none_is_a_computed_one(
    client: httpx.AsyncClient, service: Stack
) -> None:
    """Of the codes that are drawn about 150 are the other book's by number: none of them may become a row."""
    computed = await computed_book(client)
    cipher, begins, ends = await cipher_of(service, computed)
    wanted = {"pattern": "SUMMER-####-#2##", "total": 100_001}
    response = await client.post("/coupons", json={"name": "b", "generate": wanted}, timeout=240)
    assert response.status_code == 201, response.text
    book = response.json()
    assert (book["codes"]["total"], book["codes"]["available"]) == (100_001, 100_001)
    rows = await service.ledger("SELECT code FROM codes WHERE book_id = $1 AND place > 0", book["book_id"])
    codes = [row["code"] for row in rows]
    assert len(set(codes)) == 100_001
    numbers = {
        number for at in range(0, len(codes), 500) for number in cipher.numbers_of(codes[at : at + 500]).values()
    }
    assert len(numbers) == 100_001, "each lies in the computed pattern"
    assert not any(begins <= number < ends for number in numbers)
    (row,) = await service.ledger(
        "SELECT count(*) AS n FROM passed_over JOIN code_ranges USING (pattern_id) WHERE book_id = $1", computed
    )
    assert row["n"] == 100_001, "no later range takes one of them"
    assert len({await assign(client, book["book_id"], f"u{number}") for number in range(20)}) == 20


async def test_at_most_half_of_a_pattern_is_computed(client: httpx.AsyncClient) -> None:
    wanted = {"pattern": "######", "alphabet": "digits", "total": 300_000}
    await make_book(client, codes=["111111", "222222"])
    book_id = await make_book(client, generate=wanted)
    preview = (await client.post("/coupons/patterns/preview", json=wanted)).json()
    assert (preview["already_used"], preview["fits"]) == (300_002, False)
    response = await client.post("/coupons/codes", json={"book_id": book_id, "generate": wanted})
    assert (response.status_code, response.json()["code"], response.json()["already_used"]) == (
        422,
        "pattern_capacity",
        300_002,
    )


async def test_keys_at_rest_are_not_readable(client: httpx.AsyncClient, service: Stack) -> None:
    book_id = await computed_book(client)
    (row,) = await service.ledger(
        "SELECT p.* FROM computed_patterns p JOIN code_ranges USING (pattern_id) WHERE book_id = $1", book_id
    )
    seal = f"{row['tenant_id']}\nSUMMER-####-####\n{row['symbols']}"
    key = MasterKeys.parse(MASTER_KEY).open(row["master_key_id"], row["sealed_key"], seal)
    assert len(key) == 32
    assert key not in row["sealed_key"]
    assert base64.b64decode(MASTER_KEY) not in row["sealed_key"]


async def test_a_stored_book_may_get_computed_codes_too(client: httpx.AsyncClient, service: Stack) -> None:
    book_id = await make_book(client, codes=[f"OWN-{n}" for n in range(50)])
    answer = await client.post(
        "/coupons/codes", json={"book_id": book_id, "generate": {"pattern": "A####", "alphabet": "AB", "total": 5}}
    )
    assert answer.status_code == 200
    await client.post("/coupons/codes", json={"book_id": book_id, "generate": {**GENERATE, "total": 100_001}})
    (row,) = await service.ledger("SELECT total, computed_total FROM books WHERE book_id = $1", book_id)
    assert (row["total"], row["computed_total"]) == (100_056, 100_001)
    codes = [await assign(client, book_id, f"u{n}") for n in range(60)]
    assert len(set(codes)) == 60


async def pages_of(client: httpx.AsyncClient, book_id: str, *, pages_max: int = 60, **query: Any) -> list[list[str]]:
    pages, cursor = [], ""
    while cursor is not None:
        parameters = {**query, **({"cursor": cursor} if cursor else {})}
        response = await client.get(f"/coupons/{book_id}/codes", params=parameters)
        assert response.status_code == 200, response.text
        pages.append([read["code"] for read in response.json()["codes"]])
        cursor = response.json()["next_cursor"]
        if len(pages) == pages_max:
            break
    return pages


async def test_computed_codes_are_listed_behind_stored_ones(client: httpx.AsyncClient, service: Stack) -> None:
    book_id = await make_book(client, codes=[f"OWN-{n}" for n in range(5)])
    await client.post("/coupons/codes", json={"book_id": book_id, "generate": {**GENERATE, "total": 100_001}})
    cipher, begins, _ = await cipher_of(service, book_id)
    by_name = cipher.codes([begins + 3])[0]
    assert (await client.post(f"/coupons/assign/{by_name}", json={"user_id": "u"})).status_code == 201
    pages = await pages_of(client, book_id, pages_max=8, limit=7)
    first = [f"OWN-{n}" for n in range(5)] + cipher.codes(range(begins, begins + 60))
    assert [code for page in pages for code in page] == first[:56]
    assert len(pages[0]) == 7
    free = [code for page in await pages_of(client, book_id, pages_max=3, status="available") for code in page]
    assert free == [
        code for code in [f"OWN-{n}" for n in range(5)] + cipher.codes(range(begins, begins + 146)) if code != by_name
    ]
    assert await pages_of(client, book_id, status="assigned") == [[by_name]]
    assert (await pages_of(client, book_id, prefix="OWN-"))[0] == [f"OWN-{n}" for n in range(5)]
    page = (await client.get(f"/coupons/{book_id}/codes?prefix={by_name[:8]}")).json()
    assert len(page["codes"]) == 50, "a thirtieth of all begins so"
    assert await pages_of(client, book_id, prefix="SUMMER-1") == [[]]


async def test_a_prefix_finds_its_codes_wherever_in_a_billion_they_are(
    client: httpx.AsyncClient, service: Stack
) -> None:
    """Where few codes of the pattern begin so, all of these are decoded, and none of the billion is read."""
    book_id = await computed_book(client)
    other = await computed_book(client, generate={**GENERATE, "total": 200_000})
    cipher, begins, ends = await cipher_of(service, book_id)
    code = cipher.codes([ends - 1])[0]
    within = {
        number: found
        for found, number in cipher.numbers_of(codes_beginning_with(cipher.pattern, code[:13])).items()
        if begins <= number < ends
    }
    expected = [within[number] for number in sorted(within)]
    assert len(expected) > 1
    assert (await pages_of(client, book_id, prefix=code[:13], limit=1000))[0] == expected
    pages = await pages_of(client, book_id, prefix=code[:13], limit=len(expected) // 2)
    assert [found for page in pages for found in page] == expected
    assert code not in (await pages_of(client, other, prefix=code[:13]))[0]
    lines = (
        await client.get(f"/coupons/{book_id}/codes?prefix={code}", headers={"Accept": "text/csv"})
    ).text.splitlines()
    assert [line.split(",")[0] for line in lines[1:]] == [code]


async def test_all_computed_codes_are_exported_as_they_are(client: httpx.AsyncClient, service: Stack) -> None:
    uploads = await make_book(client, codes=["SUMMER-2222-2222"])
    book_id = await computed_book(client, generate={**GENERATE, "total": 100_500})
    cipher, begins, ends = await cipher_of(service, book_id)
    held = {await assign(client, book_id, f"u{n}") for n in range(5)}
    lines = (await client.get(f"/coupons/{book_id}/codes", headers={"Accept": "text/csv"})).text.splitlines()
    cells = [line.split(",") for line in lines[1:]]
    passed_over = cipher.number_of("SUMMER-2222-2222")
    numbers = [number for number in range(begins, ends) if number != passed_over]
    assert len(numbers) == len(cells) == 100_500
    assert {cell[0] for cell in cells} == {
        code for at in range(0, len(numbers), 500) for code in cipher.codes(numbers[at : at + 500])
    }
    assert {cell[0] for cell in cells if cell[1] == "assigned"} == held
    lines = (
        await client.get(f"/coupons/{book_id}/codes?status=assigned", headers={"Accept": "text/csv"})
    ).text.splitlines()
    assert len(lines) == 6
    assert uploads
