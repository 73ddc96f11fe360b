"""A Postgres that answers and commits nothing is not there: who would wait for it is refused before a code is popped."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable

import asyncpg

from tests.harness import Stack, until

MakeStack = Callable[[], Awaitable[Stack]]


async def test_while_a_table_is_locked_assigns_are_refused_and_no_process_is_ready(make_stack: MakeStack) -> None:
    stack = await make_stack()
    stack.writer()
    stack.api(COUPON_LEDGER_WAIT_MS="1000")
    await stack.ready()
    async with await stack.client() as http:
        rules = {"name": "b", "generate": {"pattern": "Q-########", "total": 1000}}
        book_id = (await http.post("/coupons", json=rules)).json()["book_id"]
        words: Counter[str] = Counter()

        async def assign(number: int) -> str:
            answer = await http.post("/coupons/assign", json={"book_id": book_id, "user_id": f"u{number}"})
            word = "ok" if answer.status_code == 201 else str(answer.json()["code"])
            words[word] += 1
            return word

        assert await assign(0) == "ok"
        await stack.drained()
        locker = await asyncpg.connect(stack.database_url)
        transaction = locker.transaction()
        await transaction.start()
        await locker.execute("LOCK TABLE entries IN SHARE MODE")  # as CREATE INDEX does
        assert await assign(1) == "outcome_unknown"  # it was made, and waits

        async def refused() -> bool:
            return await assign(2) == "ledger_behind"

        await until(refused, 15)

        async def unready() -> bool:
            answer = await http.get("/readyz")
            return answer.status_code == 503 and answer.json()["code"] == "ledger_behind"

        await until(unready)
        words.clear()
        for number in range(20):
            await assign(10 + number)
            await asyncio.sleep(0.1)
        assert words == {"ledger_behind": 20}, "a code was popped for what cannot be committed"
        await transaction.rollback()
        await locker.close()

        async def deals() -> bool:
            return await assign(50) == "ok"

        await until(deals)
        await stack.ready()
