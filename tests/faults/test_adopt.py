"""A ledger that went back stops its shards, loudly and once. `coupon-svc adopt` makes them go on without a restart, and no
code that Redis shows as somebody's is dealt to somebody else."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Awaitable, Callable

import httpx
import pytest

from coupon_svc.domain.chain import CHAIN_START
from coupon_svc.redis.keys import ShardKeys
from coupon_svc.writer.persist import HEAD_CHANGED
from tests.backup import Backup
from tests.forked import run_command
from tests.harness import Part, Stack, until

MakeStack = Callable[..., Awaitable[Stack]]


def command(stack: Stack, *args: str) -> subprocess.CompletedProcess[str]:
    return run_command(*args, **stack.environment)


async def adopt(stack: Stack, *args: str) -> subprocess.CompletedProcess[str]:
    return await asyncio.to_thread(command, stack, "adopt", *args)


class Shop:
    """One book of either kind, and who was told which code is theirs."""

    def __init__(self, stack: Stack, http: httpx.AsyncClient) -> None:
        self.stack = stack
        self.http = http
        self.books: dict[str, str] = {}
        self.given: dict[str, str] = {}

    async def open(self) -> None:
        for ack in ("ledger", "redis"):
            rules = {"name": ack, "ack": ack, "generate": {"pattern": "##########", "total": 60}}
            self.books[ack] = (await self.http.post("/coupons", json=rules)).json()["book_id"]

    async def sell(self, name: str, number: int) -> list[str]:
        codes = []
        for ack, book_id in self.books.items():
            for turn in range(number):
                user = f"{name}-{ack}-{turn}"
                answer = await self.http.post("/coupons/assign", json={"book_id": book_id, "user_id": user})
                assert answer.status_code == 201, answer.text
                code = answer.json()["code"]
                assert self.given.setdefault(code, user) == user, "P1: the code is somebody else's"
                codes.append(code)
        return codes

    async def sells(self) -> bool:
        rules = {"book_id": self.books["ledger"], "user_id": f"probe-{len(self.given)}"}
        answer = await self.http.post("/coupons/assign", json=rules)
        if answer.status_code == 201:
            user = rules["user_id"]
            assert self.given.setdefault(answer.json()["code"], user) == user, "P1: the code is somebody else's"
        return answer.status_code == 201

    async def stopped(self) -> str | None:
        (row,) = await self.stack.ledger("SELECT stopped FROM shards")
        reason: str | None = row["stopped"]
        return reason

    async def everybody_keeps_theirs(self) -> None:
        """Nobody else is given a code, though all that there are be dealt."""
        for ack, book_id in self.books.items():
            for turn in range(60):
                answer = await self.http.post(
                    "/coupons/assign", json={"book_id": book_id, "user_id": f"rest-{ack}-{turn}"}
                )
                if answer.status_code == 409:
                    break
                assert answer.status_code == 201, answer.text
                user = f"rest-{ack}-{turn}"
                assert self.given.setdefault(answer.json()["code"], user) == user, "P1: the code is somebody else's"


async def started(make_stack: MakeStack, shards: int = 1) -> tuple[Stack, Part]:
    stack = await make_stack(shards)
    stack.patient = True
    writer = stack.writer(COUPON_LEASE_CODES_MIN="10")
    stack.api()
    await stack.ready()
    return stack, writer


async def test_a_backup_from_before_the_last_restart_stops_the_shard_and_is_adopted(make_stack: MakeStack) -> None:
    """Redis remembers a newer owner than the ledger has ever had. Nothing of that raises an epoch, again and again."""
    stack, writer = await started(make_stack)
    backup = Backup(stack)
    async with await stack.client("shop") as http:
        shop = Shop(stack, http)
        await shop.open()
        await shop.sell("before", 3)
        await stack.drained()
        await backup.take()
        for _ in range(2):  # each start is a new generation
            writer.stop()
            writer = stack.writer(COUPON_LEASE_CODES_MIN="10")
            await until(shop.sells)
        late = await shop.sell("after", 3)
        await stack.drained()
        writer.stop()
        redis = stack.redis()
        meta = await redis.hgetall(ShardKeys(0, stack.shards).meta)
        await backup.put_back()
        before = await stack.ledger("SELECT epoch FROM shards ORDER BY shard")
        stack.writer(COUPON_LEASE_CODES_MIN="10")

        reason = str(await until(shop.stopped))
        assert f"generation {meta['generation']!s} " in reason
        assert await redis.hget(ShardKeys(0, stack.shards).meta, "epoch") == "recovering", "nobody decides there"
        assert await stack.ledger("SELECT epoch FROM shards ORDER BY shard") == before, "no epoch was begun"
        assert "has another owner" not in (stack.folder / "writer.log").read_text()

        shown = await adopt(stack)
        assert (shown.returncode, "--yes" in shown.stderr) == (1, True), "nobody was asked"
        assert await shop.stopped()
        done = await adopt(stack, "--yes")
        assert done.returncode == 0, done.stderr
        assert reason in done.stdout
        await until(shop.sells, what="the writer should go on without a restart")
        assert not await stack.ledger("SELECT FROM shards WHERE stopped IS NOT NULL")
        await shop.everybody_keeps_theirs()
        rows = await stack.ledger("SELECT code, user_id FROM coupons WHERE code = ANY ($1)", late)
        assert {row["code"] for row in rows} == set(late), "their events were in the stream"
        assert {row["code"]: row["user_id"] for row in rows}.items() <= shop.given.items()
        await redis.aclose()


async def test_what_is_gone_from_the_stream_stays_in_quarantine(make_stack: MakeStack) -> None:
    """The ledger lacks what it had of the epoch that Redis is in; an adopted shard is not stopped for that again."""
    stack, writer = await started(make_stack)
    backup = Backup(stack)
    async with await stack.client("shop") as http:
        shop = Shop(stack, http)
        await shop.open()
        await shop.sell("before", 2)
        await stack.drained()
        await backup.take()
        late = await shop.sell("after", 4)
        await stack.drained()
        writer.stop()
        redis = stack.redis()
        keys = ShardKeys(0, stack.shards)
        seq = int(str(await redis.hget(keys.meta, "seq")))
        epoch = int(str(await redis.hget(keys.meta, "epoch")))
        await redis.xtrim(keys.events, minid=f"{epoch}-{seq}", approximate=False)  # as after a minute
        await redis.xadd(keys.events, {"by": "hand"}, id="1800000000000-0")
        await backup.put_back()
        await stack.ledger("UPDATE shards SET generation = 100")  # else that is what is found first
        stack.writer(COUPON_LEASE_CODES_MIN="10")
        assert "it went back" in str(await until(shop.stopped))
        done = await adopt(stack, "--yes", "--shard", "0")
        assert done.returncode == 0, done.stderr
        await until(shop.sells, what="the writer should go on without a restart")
        assert await shop.stopped() is None
        await shop.everybody_keeps_theirs()
        rows = await stack.ledger("SELECT code FROM quarantine WHERE code = ANY ($1)", late)
        assert len(rows) == len(late) - 1, "all but the one whose event is still there"
        (row,) = await stack.ledger("SELECT epoch FROM shards")
        assert row["epoch"] < 100, "an entry by hand says nothing about epochs"
        await redis.aclose()


async def test_where_only_the_last_hash_was_changed_nothing_is_lost(make_stack: MakeStack) -> None:
    stack, _ = await started(make_stack)
    async with await stack.client("shop") as http:
        shop = Shop(stack, http)
        await shop.open()
        sold = await shop.sell("before", 3)
        await stack.drained()
        await stack.ledger("UPDATE shards SET chain = $1", CHAIN_START)
        await http.post("/coupons/assign", json={"book_id": shop.books["redis"], "user_id": "unlucky"})
        assert await until(shop.stopped) == HEAD_CHANGED
        done = await adopt(stack, "--yes")
        assert done.returncode == 0, done.stderr
        assert "Only the last hash" in done.stdout
        await until(shop.sells, what="the writer should go on without a restart")
        held = await stack.ledger("SELECT count(*) AS number FROM coupons WHERE code = ANY ($1)", sold)
        assert held == [(len(sold),)]
        assert await stack.ledger("SELECT FROM quarantine") == []
        verified = await asyncio.to_thread(command, stack, "verify")
        assert verified.returncode == 0, verified.stdout


async def test_adopt_says_what_it_cannot_do(make_stack: MakeStack) -> None:
    stack, writer = await started(make_stack, 2)
    writer.stop()
    for args, words in (
        (["--yes"], "no shard is stopped"),
        (["--yes", "--shard", "1"], "shard 1 is not stopped"),
        (["--yes", "--shard", "99"], "there is no shard 99"),
    ):
        refused = await adopt(stack, *args)
        assert (refused.returncode, words in refused.stderr) == (1, True), refused.stderr
    await stack.ledger("UPDATE shards SET stopped = 'a person looks' WHERE shard = 1")
    stack.redis_url = "redis://127.0.0.1:1"
    refused = await adopt(stack, "--yes")
    assert (refused.returncode, "Redis cannot be used" in refused.stderr) == (1, True), refused.stderr
    assert await stack.ledger("SELECT stopped FROM shards WHERE shard = 1") == [("a person looks",)]


@pytest.mark.parametrize("word", ["quarantine", "restored", "epoch", "lost"])
def test_its_help_explains_what_it_does(word: str) -> None:
    shown = run_command("adopt", "--help")
    assert word in shown.stdout
