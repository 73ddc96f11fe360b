"""What a user id may be, in bodies and in paths alike: everybody who can be assigned a code can be asked for."""

from __future__ import annotations

import json
from urllib.parse import quote

import httpx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from coupon_svc.domain.outcomes import Refused
from coupon_svc.http.inputs import check_user_id
from tests.harness import Stack
from tests.http.helpers import make_book, refused
from tests.http.test_fast_path import Answered, Wire, dial

ODD = " .\u00a0\u3000\u2028\u200b\ufeff\ufffd\t\n\0\x7f\x85/%+?#&;=:|\\\"'{}~éE🎉日\u0301\u202eA"
REFUSED = [
    *(".", "..", " ", "a ", " a", "\u00a0a", "a\u3000", "a\u2028", "\u2003", "a\t", "a\n", "a\0b", "\x1f", "\x7f"),
    *("\x85", "\ufffd", "a\ufffdb", "x" * 129, "🎉" * 129),
]
TAKEN = ["...", ".a", "a.", "..a", "a b", "%2E%2E", "%", "\u200b", "e\u0301", "é", "../coupons", "a/../b", "🎉" * 128]


async def listed(wire: Wire, authorization: str, target: str) -> Answered:
    """The list of a user as the request line names it: clients resolve dots in it, the service must not."""
    head = f"GET /users/{target}/coupons HTTP/1.1\r\nHost: test\r\nAuthorization: {authorization}\r\n\r\n"
    wire.writer.write(head.encode())
    return await wire.answer()


async def both(client: httpx.AsyncClient, service: Stack, book_id: str, user_id: str) -> tuple[int, Answered]:
    """Assign to a user, then list what he holds: the status of the first and the second as a whole."""
    made = await client.post("/coupons/assign", json={"book_id": book_id, "user_id": user_id})
    wire = await dial(service.base_url)
    answer = await listed(wire, client.headers["authorization"], quote(user_id, safe=""))
    wire.writer.close()
    if made.status_code == 201:
        assert made.json()["user_id"] == user_id
        held = {(coupon["user_id"], coupon["code"]) for coupon in json.loads(answer.body)["coupons"]}
        assert (user_id, made.json()["code"]) in held
        assert {user for user, _ in held} == {user_id}
    return made.status_code, answer


@pytest.mark.parametrize("user_id", REFUSED, ids=ascii)
async def test_an_id_that_is_refused_in_a_body_is_refused_in_a_path(
    client: httpx.AsyncClient, service: Stack, user_id: str
) -> None:
    for verb in ("assign", "assign/A-1", "lock/A-1", "redeem/A-1"):
        body = {"user_id": user_id} | ({"book_id": "bk_x"} if verb == "assign" else {})
        refused(await client.post(f"/coupons/{verb}", json=body), 422, "invalid_request")
    status, answer = await both(client, service, "bk_x", user_id)
    assert (status, answer.status) == (422, 422)
    assert json.loads(answer.body)["errors"][0]["pointer"] == "/user_id"


@pytest.mark.parametrize("user_id", TAKEN, ids=ascii)
async def test_an_odd_id_is_assigned_and_listed(client: httpx.AsyncClient, service: Stack, user_id: str) -> None:
    status, answer = await both(client, service, await make_book(client), user_id)
    assert (status, answer.status) == (201, 200)


async def test_bytes_that_are_no_utf_8_name_nobody(client: httpx.AsyncClient, service: Stack) -> None:
    wire = await dial(service.base_url)
    for target in ("%FF", "a%C3", "%ED%A0%80"):
        assert (await listed(wire, client.headers["authorization"], target)).status == 422
    wire.writer.close()


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(user_id=st.text(st.sampled_from(ODD) | st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8))
async def test_who_is_assigned_a_code_is_listed_with_it(
    client: httpx.AsyncClient, service: Stack, user_id: str
) -> None:
    if not hasattr(client, "book_id"):
        client.book_id = await make_book(client, generate={"pattern": "########", "total": 200})  # type: ignore[attr-defined]
    status, answer = await both(client, service, client.book_id, user_id)  # type: ignore[attr-defined]
    assert (status, answer.status) in ((201, 200), (422, 422))


@given(st.text(st.sampled_from(ODD) | st.characters(exclude_categories=["Cs"]), max_size=6))
@example("a" * 129)
def test_an_id_is_refused_for_what_the_contract_names_and_nothing_else(user_id: str) -> None:
    good = (
        1 <= len(user_id) <= 128
        and user_id == user_id.strip()
        and user_id not in (".", "..")
        and not any(
            character == "\ufffd" or ord(character) < 0x20 or 0x7F <= ord(character) < 0xA0 for character in user_id
        )
    )
    try:
        check_user_id(user_id)
    except Refused:
        assert not good
    else:
        assert good
