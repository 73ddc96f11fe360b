"""Books with computed codes keep the promises: through crashes, losses, a ledger that went back, and keys that change."""

from __future__ import annotations

import asyncio
import secrets
import subprocess
from collections.abc import Awaitable, Callable
from functools import partial
from random import Random
from typing import Any

import asyncpg
import httpx
import pytest

from coupon_svc.config import load_settings
from coupon_svc.domain.master_key import MasterKeys, new_master_key
from coupon_svc.invariants import stores
from coupon_svc.invariants.answers import History
from coupon_svc.invariants.stores import RedisCheck, Report
from coupon_svc.load.stores import audit_stores, open_stores
from coupon_svc.postgres.computed.ciphers import Ciphers
from tests.backup import Backup
from tests.forked import run_command
from tests.harness import MASTER_KEY, Stack, until
from tests.test_verify import found_in, report_of

MakeStack = Callable[..., Awaitable[Stack]]
SMALL_BLOCKS = {"COUPON_LEASE_CODES_MIN": "20", "COUPON_LEASE_CODES_MAX": "40"}
GENERATE = {"pattern": "C-########", "total": 1_000_000}


def command(stack: Stack, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run_command(*args, **{**stack.environment, **environment})


class Shop:
    """Computed books of either kind, and who was told which code is theirs."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.books: list[str] = []
        self.given: dict[str, str] = {}

    async def open(self, *acks: str) -> None:
        self.stack.patient = True
        async with await self.stack.client("shop") as http:
            for ack in acks:
                asked = {"name": ack, "ack": ack, "generate": GENERATE}
                make = partial(http.post, "/coupons", json=asked, headers={"Idempotency-Key": secrets.token_hex(8)})
                while (answer := await make()).status_code == 503:
                    continue  # the codes are not there before the next writer has brought them
                assert answer.status_code in (200, 201), answer.text
                self.books.append(answer.json()["book_id"])

    async def sell(self, name: str, number: int, *, named: bool = False) -> list[str]:
        """So many codes of each book; with `named`, one more is asked for by its name. Nobody else has any of them."""
        codes = []
        async with await self.stack.client("shop") as http:
            for book_id in self.books:
                paths = ["/coupons/assign"] * number
                if named:  # first, so that the block that comes next has to pass over it
                    paths.insert(0, f"/coupons/assign/{await self.code_ahead(book_id)}")
                for turn, path in enumerate(paths):
                    user = f"{name}-{book_id}-{turn}"
                    body = {"user_id": user} if named and not turn else {"book_id": book_id, "user_id": user}
                    code = await self.given_code(http, path, body)
                    assert self.given.setdefault(code, user) == user, "P1: the code is somebody else's"
                    codes.append(code)
        return codes

    async def given_code(self, http: httpx.AsyncClient, path: str, body: dict[str, str]) -> str:
        """The code that one request gives. It is repeated while its outcome is unknown: the writer may just be killed."""
        for _ in range(5):
            answer = await http.post(path, json=body, headers={"Idempotency-Key": body["user_id"]})
            if answer.status_code != 503 or answer.json()["code"] != "outcome_unknown":
                break
        assert answer.status_code == 201, answer.text
        code: str = answer.json()["code"]
        return code

    async def code_ahead(self, book_id: str) -> str:
        """A code of the book that is to be lent with the next block."""
        (row,) = await self.stack.ledger(
            "SELECT p.*, lent_upto FROM code_ranges JOIN computed_patterns p USING (pattern_id) WHERE book_id = $1",
            book_id,
        )
        return Ciphers(MasterKeys.parse(MASTER_KEY)).of(row).codes([row["lent_upto"] + 3])[0]

    async def counters(self, book_id: str) -> dict[str, int]:
        async with await self.stack.client("shop") as http:
            answer = await http.get(f"/coupons/{book_id}")
            assert answer.status_code == 200, answer.text
            codes: dict[str, int] = answer.json()["codes"]
            return codes

    async def everybody_has_theirs(self) -> None:
        async with await self.stack.client("shop") as http:
            for code, user in self.given.items():
                assert (await http.get(f"/coupons/codes/{code}")).json()["user_id"] == user


async def started(make_stack: MakeStack, *acks: str, sold: int, named: bool = False) -> tuple[Stack, Shop]:
    """A running stack, and a shop that has opened a book of each kind of answer and sold so many codes of each."""
    stack = await make_stack()
    stack.patient = True
    stack.writer(**SMALL_BLOCKS)
    stack.api()
    await stack.ready()
    shop = Shop(stack)
    await shop.open(*acks)
    await shop.sell("before", sold, named=named)
    await stack.drained()
    return stack, shop


async def verified(stack: Stack) -> Report:
    await stack.drained()
    report = await report_of(stack)
    assert report.holds, report.findings or report.unchecked
    return report


@pytest.mark.chaos
@pytest.mark.parametrize("dies_at", ["lend.leased", "lend.brought", "lend.lone_brought"])
async def test_a_writer_that_dies_while_it_lends_loses_no_number(make_stack: MakeStack, dies_at: str) -> None:
    stack = await make_stack()
    writer = stack.writer(dies_at=dies_at, **SMALL_BLOCKS)
    stack.api()
    await stack.ready()
    shop = Shop(stack)
    opened = asyncio.create_task(shop.open("ledger", "redis"))
    sold: asyncio.Task[Any] | None = None
    if dies_at == "lend.lone_brought":
        await opened
        sold = asyncio.create_task(shop.sell("first", 1, named=True))
    await writer.died()
    stack.writer(**SMALL_BLOCKS)
    await opened
    await (sold or shop.sell("first", 1, named=True))
    await shop.sell("more", 45)
    await shop.everybody_has_theirs()
    report = await verified(stack)
    assert report.computed_books == 2


async def test_a_redis_that_lost_everything_is_given_what_nobody_holds(make_stack: MakeStack) -> None:
    """Codes that were lent and not assigned come back as rows; in a book that answers early nobody knows, where the one
    process that answered is silent."""
    stack, shop = await started(make_stack, "ledger", "redis", sold=30, named=True)
    (api,) = (part for part in stack.parts if part.base_url)
    api.kill()
    async with stack.redis() as redis:
        await redis.flushall()
    stack.api()
    await stack.ready()
    await shop.sell("after", 45, named=True)
    await shop.everybody_has_theirs()
    await verified(stack)
    ledger, early = [await shop.counters(book_id) for book_id in shop.books]
    assert (ledger["assigned"], ledger["quarantined"]) == (77, 0)
    assert early["quarantined"] > 0
    rows = await stack.ledger("SELECT book_id, count(*) AS n FROM codes WHERE computed AND place = -1 GROUP BY book_id")
    assert [(row["book_id"], row["n"]) for row in rows] == [(shop.books[1], early["quarantined"])]

    async def the_killed_process_is_forgotten() -> bool:
        return len(await stack.ledger("SELECT process_id FROM api_processes")) == 1

    await until(
        the_killed_process_is_forgotten, 30
    )  # while it is silent, codes that are released are quarantined again
    released = command(stack, "quarantine", "release", shop.books[1], "--deal-again")
    assert released.returncode == 0, released.stderr

    async def released_codes_are_free() -> bool:
        return (await shop.counters(shop.books[1]))["quarantined"] == 0

    await until(released_codes_are_free, 30)
    await shop.sell("released", 60)
    await verified(stack)


@pytest.mark.chaos
async def test_after_a_restore_no_code_that_redis_shows_is_issued_again(make_stack: MakeStack) -> None:
    stack, shop = await started(make_stack, "ledger", sold=3)
    backup = Backup(stack)
    await backup.take()
    await shop.sell("lost", 70, named=True)
    await shop.open("ledger")  # takes numbers of which the backup knows nothing
    (newer,) = await stack.ledger("SELECT max(ends) AS ends FROM code_ranges")
    writer = stack.parts[0]
    for turn in range(2):  # each start is a new generation
        writer.stop()
        writer = stack.writer(**SMALL_BLOCKS)
        await shop.sell(f"turn{turn}", 1)
    await stack.drained()
    writer.stop()
    await backup.put_back()
    stack.writer(**SMALL_BLOCKS)

    async def stopped() -> bool:
        return await stack.ledger("SELECT FROM shards WHERE stopped IS NOT NULL") != []

    await until(stopped, 30)
    adopted = await asyncio.to_thread(command, stack, "adopt", "--yes")
    assert adopted.returncode == 0, adopted.stderr
    await stack.ready()
    del shop.books[1:]
    await shop.sell("after", 100)
    await shop.open("ledger")
    (row,) = await stack.ledger("SELECT begins FROM code_ranges WHERE book_id = $1", shop.books[1])
    assert row["begins"] >= newer["ends"]
    await verified(stack)


async def test_a_missing_or_wrong_master_key_is_named_at_start_and_nothing_is_lost(make_stack: MakeStack) -> None:
    stack, shop = await started(make_stack, "ledger", sold=25)
    for part in stack.parts:
        part.stop()
    (row,) = await stack.ledger("SELECT master_key_id FROM computed_patterns")
    for key, words in (("", "COUPON_MASTER_KEY is not set"), (new_master_key(), "COUPON_MASTER_KEY is another one")):
        writer, api = stack.writer(COUPON_MASTER_KEY=key), stack.api(COUPON_MASTER_KEY=key)

        async def named(words: str = words, writer: Any = writer, api: Any = api) -> bool:
            return bool(writer.said(words) and api.said(words) and api.said(row["master_key_id"]))

        await until(named)
        async with httpx.AsyncClient(base_url=stack.base_url) as http:
            assert (await http.get("/readyz")).status_code == 503
        assert not api.said(key) or not key
        writer.kill()
        api.kill()
    broken = command(stack, "writer", COUPON_MASTER_KEY="short")
    assert (broken.returncode, "COUPON_MASTER_KEY is not a master key" in broken.stderr) == (1, True)
    stack.writer(**SMALL_BLOCKS)
    stack.api()
    await stack.ready()
    await shop.sell("after", 30)
    await shop.everybody_has_theirs()
    await verified(stack)


async def test_a_writer_that_lacks_the_key_keeps_its_shards_open(make_stack: MakeStack) -> None:
    """It was started before there were computed books, and so not refused."""
    stack = await make_stack(1)
    writer = stack.writer(COUPON_MASTER_KEY="")
    stack.api()
    await stack.ready()
    async with await stack.client("shop") as http:
        books: dict[str, str] = {}
        for name, wanted in (("computed", GENERATE), ("stored", {**GENERATE, "total": 5})):
            answer = await http.post("/coupons", json={"name": name, "generate": wanted})
            books[name] = answer.json()["book_id"]
        answer = await http.post("/coupons/assign", json={"book_id": books["computed"], "user_id": "u"})
        assert (answer.status_code, answer.json()["code"]) == (503, "refilling")
        assert writer.said("COUPON_MASTER_KEY is not set")
        answer = await http.post("/coupons/assign", json={"book_id": books["stored"], "user_id": "u"})
        assert answer.status_code == 201, "another book of its shard"
        writer.stop()
        stack.writer()

        async def sells() -> bool:
            answer = await http.post("/coupons/assign", json={"book_id": books["computed"], "user_id": "u"})
            return answer.status_code == 201

        await until(sells, 30)


async def test_the_master_key_is_changed_by_command(make_stack: MakeStack) -> None:
    stack, shop = await started(make_stack, "ledger", sold=3)
    new = new_master_key()
    refused = command(stack, "master-key", "rotate", COUPON_MASTER_KEY=new)
    assert refused.returncode != 0
    assert "COUPON_MASTER_KEY is another one" in refused.stderr
    rotated = command(stack, "master-key", "rotate", COUPON_MASTER_KEY=f"{new},{MASTER_KEY}")
    assert rotated.stdout.startswith("1 patterns' keys"), rotated.stderr
    await stack.drained()
    for part in stack.parts:
        part.stop()
    stack.writer(COUPON_MASTER_KEY=new)
    stack.api(COUPON_MASTER_KEY=new)
    await stack.ready()
    async with await stack.client("shop") as http:
        for code, user in shop.given.items():
            assert (await http.get(f"/coupons/codes/{code}")).json()["user_id"] == user
    settings = load_settings({**stack.environment, "COUPON_MASTER_KEY": new})
    assert settings.master_key.first != MasterKeys.parse(MASTER_KEY).first


async def test_verify_sees_codes_that_are_none_of_the_range(
    make_stack: MakeStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "ARRIVAL_WAIT_S", 0.3)
    stack, shop = await started(make_stack, "ledger", sold=2)
    code = next(iter(shop.given))
    await verified(stack)
    for part in stack.parts:
        part.stop()
    ledger = await asyncpg.connect(stack.database_url)
    await ledger.execute("UPDATE code_ranges SET accounted_upto = lent_upto")
    assert RedisCheck.NUMBERS in found_in(await report_of(stack))
    await ledger.execute("UPDATE code_ranges SET accounted_upto = begins")
    await ledger.execute("UPDATE coupons SET code = 'C-22222222' WHERE code = $1", code)
    assert RedisCheck.COMPUTED_LENT in found_in(await report_of(stack))
    await ledger.close()
    assert "only COUPON_MASTER_KEY tells" in command(stack, "verify", COUPON_MASTER_KEY="").stdout
    for master_key in (MASTER_KEY, ""):  # and so it is with the audit of a load
        async with open_stores(load_settings({**stack.environment, "COUPON_MASTER_KEY": master_key})) as opened:
            verdict = await audit_stores(opened, History(Random(1)))
        assert (RedisCheck.COMPUTED_LENT in {broken.what for broken in verdict.broken}) is bool(master_key)
        assert ("only COUPON_MASTER_KEY tells" in " ".join(verdict.notes)) is not bool(master_key)
