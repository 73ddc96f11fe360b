"""Idempotency-Key, on every POST."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import httpx
import pytest

from tests.harness import Stack
from tests.http.helpers import again, alike, assign, counters, lock, make_book, patch, refused, upload


class Post(NamedTuple):
    """One request that has an effect, and another one for which the same key cannot be used."""

    path: str
    body: dict[str, Any]
    other: dict[str, Any]


async def _create_book(client: httpx.AsyncClient) -> Post:
    return Post("/coupons", {"name": "a", "metadata": {"a": 1, "b": 2}}, {"name": "b"})


async def _upload_codes(client: httpx.AsyncClient) -> Post:
    book = await make_book(client)
    return Post(
        "/coupons/codes", {"book_id": book, "codes": ["A-1", "A-2", "a-1"]}, {"book_id": book, "codes": ["A-3"]}
    )


async def _generate_codes(client: httpx.AsyncClient) -> Post:
    book = await make_book(client)
    generate = {"pattern": "MORE-########", "total": 3}
    return Post("/coupons/codes", {"book_id": book, "generate": generate}, {"book_id": book, "codes": []})


async def _assign_coupon(client: httpx.AsyncClient) -> Post:
    book = await make_book(client)
    return Post("/coupons/assign", {"book_id": book, "user_id": "u"}, {"book_id": book, "user_id": "v"})


async def _assign_coupons(client: httpx.AsyncClient) -> Post:
    book = await make_book(client)
    return Post("/coupons/assignments", {"book_id": book, "user_ids": ["u"]}, {"book_id": book, "user_ids": ["v"]})


async def _assign_code(client: httpx.AsyncClient) -> Post:
    await make_book(client, codes=["ONE-1"])
    return Post("/coupons/assign/ONE-1", {"user_id": "u"}, {"user_id": "v"})


async def _lock_coupon(client: httpx.AsyncClient) -> Post:
    code = await assign(client, await make_book(client))
    return Post(f"/coupons/lock/{code}", {"ttl_seconds": 60}, {"ttl_seconds": 61})


async def _renew_lock(client: httpx.AsyncClient) -> Post:
    code = await assign(client, await make_book(client))
    token = await lock(client, code)
    return Post(f"/coupons/lock/{code}", {"lock_token": token, "ttl_seconds": 60}, {"lock_token": token})


async def _unlock_coupon(client: httpx.AsyncClient) -> Post:
    code = await assign(client, await make_book(client))
    token = await lock(client, code)
    return Post(f"/coupons/unlock/{code}", {"lock_token": token}, {"lock_token": "other"})


async def _redeem_coupon(client: httpx.AsyncClient) -> Post:
    code = await assign(client, await make_book(client, max_redemptions_per_code=None))
    return Post(f"/coupons/redeem/{code}", {"metadata": {"a": 1, "b": 2}}, {"reference": "r"})


async def _assign_code_that_is_ones_own(client: httpx.AsyncClient) -> Post:
    code = await assign(client, await make_book(client))
    return Post(f"/coupons/assign/{code}", {"user_id": "u"}, {"user_id": "v"})


MAKERS = [
    _create_book,
    _upload_codes,
    _generate_codes,
    _assign_coupon,
    _assign_coupons,
    _assign_code,
    _lock_coupon,
    _renew_lock,
    _unlock_coupon,
    _redeem_coupon,
]
ALL = pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__.strip("_"))


@ALL
async def test_the_same_request_is_answered_again_and_another_is_refused(
    client: httpx.AsyncClient, make: Callable[[httpx.AsyncClient], Awaitable[Post]]
) -> None:
    post = await make(client)
    bare, quoted = {"Idempotency-Key": 'a "key" \\'}, {"Idempotency-Key": '"a \\"key\\" \\\\"'}
    first = await client.post(post.path, json=post.body, headers=bare)
    assert first.status_code < 300, first.text
    turned = dict(reversed(post.body.items()))
    assert again(first, await client.post(post.path, json=turned, headers=quoted))
    spelled = "/".join(part.lower() if part.isupper() else part for part in post.path.split("/"))
    assert again(first, await client.post(spelled, json=post.body, headers=bare))
    refused(await client.post(post.path, json=post.other, headers=bare), 422, "idempotency_key_reused")
    refused(await client.post(post.path, json=post.other, headers=quoted), 422, "idempotency_key_reused")
    assert again(first, await client.post(post.path, json=post.body, headers=bare))


async def test_the_first_answer_again_has_its_own_status(client: httpx.AsyncClient) -> None:
    post = await _assign_code_that_is_ones_own(client)
    first = await client.post(post.path, json=post.body, headers={"Idempotency-Key": "k"})
    assert first.status_code == 200
    assert again(first, await client.post(post.path, json=post.body, headers={"Idempotency-Key": "k"}))


@pytest.mark.parametrize("make", [_create_book, _redeem_coupon], ids=["create_book", "redeem_coupon"])
async def test_the_order_of_fields_within_metadata_does_not_matter(
    client: httpx.AsyncClient, make: Callable[[httpx.AsyncClient], Awaitable[Post]]
) -> None:
    post = await make(client)
    first = await client.post(post.path, json=post.body, headers={"Idempotency-Key": "k"})
    turned = {**post.body, "metadata": dict(reversed(post.body["metadata"].items()))}
    assert again(first, await client.post(post.path, json=turned, headers={"Idempotency-Key": "k"}))


@ALL
async def test_a_key_has_one_effect_however_many_send_it_at_once(
    client: httpx.AsyncClient, make: Callable[[httpx.AsyncClient], Awaitable[Post]]
) -> None:
    post = await make(client)
    headers = {"Idempotency-Key": "at once"}
    sent = await asyncio.gather(*(client.post(post.path, json=post.body, headers=headers) for _ in range(8)))
    firsts = [answer for answer in sent if answer.status_code < 300 and "idempotent-replayed" not in answer.headers]
    assert len(firsts) == 1
    for answer in sent:
        if answer.status_code >= 300:
            refused(answer, 409, "idempotency_in_progress")
        elif answer is not firsts[0]:
            assert again(firsts[0], answer)
    assert again(firsts[0], await client.post(post.path, json=post.body, headers=headers))


async def test_creates_with_one_key_make_one_book(client: httpx.AsyncClient) -> None:
    headers = {"Idempotency-Key": "k"}
    await asyncio.gather(*(client.post("/coupons", json={"name": "a"}, headers=headers) for _ in range(8)))
    assert len((await client.get("/coupons")).json()["books"]) == 1


async def test_without_a_key_every_request_has_its_own_effect(client: httpx.AsyncClient) -> None:
    book = await make_book(client)
    assert await assign(client, book) != await assign(client, book)


async def test_refusals_are_judged_anew(client: httpx.AsyncClient) -> None:
    headers = {"Idempotency-Key": "k"}
    book = await make_book(client, codes=[])
    body = {"book_id": book, "user_id": "u"}
    refused(await client.post("/coupons/assign", json=body, headers=headers), 409, "book_exhausted")
    await upload(client, book, ["LATE-1"])
    made = await client.post("/coupons/assign", json=body, headers=headers)
    assert made.json()["code"] == "LATE-1"
    await patch(client, book, status="paused")
    redeem = "/coupons/redeem/LATE-1"
    refused(await client.post(redeem, json={}, headers={"Idempotency-Key": "r"}), 409, "book_paused")
    await patch(client, book, status="active")
    assert (await client.post(redeem, json={}, headers={"Idempotency-Key": "r"})).status_code == 201
    too_many = {"name": "a", "generate": {"pattern": "AAA", "total": 1}}
    refused(await client.post("/coupons", json=too_many, headers={"Idempotency-Key": "c"}), 422, "pattern_capacity")
    assert (await client.post("/coupons", json={"name": "a"}, headers={"Idempotency-Key": "c"})).status_code == 201


async def test_a_replay_comes_before_whether_the_book_is_open(client: httpx.AsyncClient) -> None:
    book = await make_book(client, codes=["R-1", "R-2"], max_codes_per_user=1)
    posts = [
        ("/coupons/assign/R-1", {"user_id": "u"}),
        ("/coupons/lock/R-1", {}),
        ("/coupons/redeem/R-1", {}),
        ("/coupons/assign", {"book_id": book, "user_id": "v"}),
    ]
    firsts: list[httpx.Response] = []
    for number, (path, body) in enumerate(posts):
        if path.startswith("/coupons/redeem"):
            body = {"lock_token": firsts[1].json()["lock_token"]}
            posts[number] = (path, body)
        firsts.append(await client.post(path, json=body, headers={"Idempotency-Key": f"k{number}"}))
        assert firsts[-1].status_code == 201
    await patch(client, book, status="closed")
    for number, (path, body) in enumerate(posts):
        assert again(firsts[number], await client.post(path, json=body, headers={"Idempotency-Key": f"k{number}"}))
        reused = await client.post(path, json={**body, "user_id": "w"}, headers={"Idempotency-Key": f"k{number}"})
        refused(reused, 422, "idempotency_key_reused")


async def test_a_reused_key_is_told_before_a_pattern_that_was_filled_meanwhile(client: httpx.AsyncClient) -> None:
    body = {"name": "a", "generate": {"pattern": "IK-#", "total": 5, "alphabet": "digits"}}
    first = await client.post("/coupons", json=body, headers={"Idempotency-Key": "k"})
    assert first.status_code == 201
    assert again(first, await client.post("/coupons", json=body, headers={"Idempotency-Key": "k"}))


async def test_the_scope_is_the_book(client: httpx.AsyncClient) -> None:
    one, other = await make_book(client, codes=["S-1"]), await make_book(client, codes=["S-2"])
    headers = {"Idempotency-Key": "k"}
    for book in (one, other):
        made = await client.post("/coupons/assign", json={"book_id": book, "user_id": "u"}, headers=headers)
        assert made.status_code == 201
        assert "idempotent-replayed" not in made.headers
    # Within a book it is one key for all verbs, by path and by body.
    refused(await client.post("/coupons/redeem/S-1", headers=headers), 422, "idempotency_key_reused")
    refused(await client.post("/coupons/lock/S-2", headers=headers), 422, "idempotency_key_reused")


@pytest.mark.parametrize(
    ("verb", "body"),
    [("assign", {"user_id": "u"}), ("lock", {}), ("unlock", {"lock_token": "lk_none"}), ("redeem", {"user_id": "u"})],
)
async def test_one_key_for_two_codes_of_a_book_is_used_again(
    client: httpx.AsyncClient, verb: str, body: dict[str, str]
) -> None:
    """The path alone tells them apart."""
    book = await make_book(client, codes=["P-1", "P-2"])
    for _ in ("P-1", "P-2"):
        await assign(client, book)
    headers = {"Idempotency-Key": "k"}
    first = await client.post(f"/coupons/{verb}/P-1", json=body, headers=headers)
    assert first.status_code < 300, first.text
    refused(await client.post(f"/coupons/{verb}/P-2", json=body, headers=headers), 422, "idempotency_key_reused")


async def test_the_scope_of_a_create_is_the_tenant(client: httpx.AsyncClient, service: Stack) -> None:
    async with await service.client() as other:
        made = [await c.post("/coupons", json={"name": "a"}, headers={"Idempotency-Key": "k"}) for c in (client, other)]
    assert [answer.status_code for answer in made] == [201, 201]
    assert made[0].json()["book_id"] != made[1].json()["book_id"]
    assert "idempotent-replayed" not in made[1].headers
    # A book's keys are not the tenant's.
    body = {"book_id": made[0].json()["book_id"], "codes": ["T-1"]}
    assert (await client.post("/coupons/codes", json=body, headers={"Idempotency-Key": "k"})).status_code == 200


async def test_another_tenants_key_is_no_way_to_its_answers(client: httpx.AsyncClient, service: Stack) -> None:
    book = await make_book(client)
    body, headers = {"book_id": book, "user_id": "u"}, {"Idempotency-Key": "k"}
    assert (await client.post("/coupons/assign", json=body, headers=headers)).status_code == 201
    async with await service.client() as other:
        absent = await other.post("/coupons/assign", json={**body, "book_id": "bk_none"}, headers=headers)
        refused(absent, 404, "book_not_found")
        for user_id in ("u", "v"):
            theirs = await other.post("/coupons/assign", json={**body, "user_id": user_id}, headers=headers)
            assert alike(theirs, absent)
        codes = {"book_id": book, "codes": ["T-2"]}
        assert alike(await other.post("/coupons/codes", json=codes, headers=headers), absent)


async def test_a_replay_has_no_second_effect(client: httpx.AsyncClient) -> None:
    book = await make_book(client, max_redemptions_per_code=3)
    code = await assign(client, book)
    for _ in range(3):
        answer = await client.post(f"/coupons/redeem/{code}", headers={"Idempotency-Key": "k"})
        assert (answer.json()["redemptions_used"], answer.json()["redemptions_left"]) == (1, 2)
    for _ in range(3):
        body = {"book_id": book, "user_id": "u"}
        await client.post("/coupons/assign", json=body, headers={"Idempotency-Key": "a"})
    assert (await counters(client, book))["assigned"] == 2


async def test_a_key_may_be_255_characters_bare_or_quoted(client: httpx.AsyncClient) -> None:
    key = "~" * 255
    first = await client.post("/coupons", json={"name": "a"}, headers={"Idempotency-Key": key})
    assert first.status_code == 201
    quoted = {"Idempotency-Key": f'"{key}"'}
    assert again(first, await client.post("/coupons", json={"name": "a"}, headers=quoted))
