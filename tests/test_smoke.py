"""The life of one coupon over HTTP, end to end; and as README.md shows it."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

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
    block = re.search(r"```sh\n(.*?)```", (Path(__file__).parent.parent / "README.md").read_text(), re.DOTALL)
    assert block
    key = client.headers["Authorization"].removeprefix("Bearer ")
    typed = block[1].replace("http://127.0.0.1:8080", service.base_url).replace("KEY=...", f"KEY={key}")
    shell = await asyncio.create_subprocess_exec(
        "sh", "-eu", "-c", typed, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    told, shown = await asyncio.wait_for(shell.communicate(), 60)
    assert shell.returncode == 0, shown
    _, listed = told.decode().splitlines()
    assert [coupon["status"] for coupon in json.loads(listed)["coupons"]] == ["redeemed"]
    assert shown.count(b"book_id") == 3, "the answers that a field is taken of are shown, too"
