"""The life of one coupon over HTTP, end to end; and as README.md shows it."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import httpx

from tests.harness import Stack


async def test_a_coupon_is_assigned_locked_and_redeemed(client: httpx.AsyncClient, service: Stack) -> None:
    book = (await client.post("/coupons", json={"name": "b", "generate": {"pattern": "AB-######", "total": 20}})).json()
    assigned = await client.post("/coupons/assign", json={"book_id": book["book_id"], "user_id": "u"})
    assert assigned.status_code == 201
    code = assigned.json()["code"]
    lock = await client.post(f"/coupons/lock/{code}")
    assert lock.status_code == 201
    redeemed = await client.post(f"/coupons/redeem/{code}", json={"lock_token": lock.json()["lock_token"]})
    assert redeemed.status_code == 201
    rows = await service.ledger("SELECT user_id, uses FROM coupons WHERE code = $1", code)
    assert [tuple(row) for row in rows] == [("u", 1)]


async def test_the_first_coupon_of_the_readme(client: httpx.AsyncClient, service: Stack) -> None:
    """The block as it stands in README.md, with the address and the key of a service, in a plain POSIX shell."""
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    block, printed = (re.search(rf"```{kind}\n(.*?)```", readme, re.DOTALL) for kind in ("sh", "json"))
    assert block
    assert printed
    key = client.headers["Authorization"].removeprefix("Bearer ")
    typed = block[1].replace("http://127.0.0.1:8080", service.base_url).replace("KEY=...", f"KEY={key}")
    shell = await asyncio.create_subprocess_exec(
        "sh", "-eu", "-c", typed, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    told, shown = await asyncio.wait_for(shell.communicate(), 60)
    assert shell.returncode == 0, shown
    answers = [json.loads(line) for line in (shown + told).splitlines()]
    assert [coupon["status"] for coupon in answers[-1]["coupons"]] == ["redeemed"]
    assert [_fields(json.loads(text)) for text in printed[1].split("\n\n")] == [
        _fields(answer) for answer in answers[1:]
    ]


def _fields(answer: dict[str, Any]) -> set[str]:
    """The names of an answer's fields, and of those of the coupons in it."""
    return {*answer, *(name for coupon in answer.get("coupons", ()) for name in coupon)}
