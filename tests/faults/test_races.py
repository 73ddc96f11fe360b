"""Many callers at once on few codes: exactly as many succeed as may, and both stores agree on who."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from coupon_svc.dev.servers import EmbeddedRedis
from tests.audit import Answer, History, audit
from tests.harness import Stack, fresh_database, until

both_acks = pytest.mark.parametrize("ack", ["ledger", "redis"])
with_and_without_keys = pytest.mark.parametrize("keyed", [False, True], ids=["no-keys", "keys"])


@pytest.fixture(scope="module")
async def service(tmp_path_factory: pytest.TempPathFactory, postgres_url: str) -> AsyncIterator[Stack]:
    """A service of these tests' own: they count all that its stores hold."""
    folder = tmp_path_factory.mktemp("races")
    with EmbeddedRedis(folder / "redis") as server:
        stack = Stack(server, server.url, await fresh_database(postgres_url, 4), folder, 4)
        stack.writer()
        stack.api()
        await stack.ready()
        yield stack
        stack.close()


@pytest.fixture(scope="module")
async def told(service: Stack) -> AsyncIterator[list[Answer]]:
    """What all callers of these tests were told; counted in both stores when the last test is over."""
    told: list[Answer] = []
    yield told
    await audit(service, told)


@pytest.fixture
async def history(told: list[Answer], client: httpx.AsyncClient) -> AsyncIterator[History]:
    """What a new tenant's callers see."""
    history = History(client)
    yield history
    assert not [answer for answer in history.answers if answer.status >= 500 or answer.status == 0]
    told += history.answers


def codes(tag: str, count: int) -> list[str]:
    return [f"{tag}-{number:03d}" for number in range(count)]


def words(answers: list[Answer]) -> dict[str, int]:
    return dict(Counter(answer.code for answer in answers))


async def at_once(
    history: History, calls: list[tuple[str, dict[str, Any]]], *, keyed: bool = False, one_key: bool = False
) -> list[Answer]:
    """All calls together: without Idempotency-Keys, each with its own, or all with the same one."""
    keys = ["one" if one_key else f"k{number}" if keyed else None for number in range(len(calls))]
    tasks = [history.post(path, body, key) for (path, body), key in zip(calls, keys, strict=True)]
    return list(await asyncio.gather(*tasks))


async def assigned(history: History, code: str, user_id: str = "holder") -> None:
    assert (await history.post(f"/coupons/assign/{code}", {"user_id": user_id})).ok


@both_acks
@with_and_without_keys
async def test_fifty_users_on_twenty_codes_get_one_each_until_none_is_left(
    history: History, ack: str, keyed: bool
) -> None:
    book_id = await history.new_book(codes("RACE", 20), ack=ack)
    calls = [("/coupons/assign", {"book_id": book_id, "user_id": f"u{number}"}) for number in range(50)]
    answers = await at_once(history, calls, keyed=keyed)
    assert words(answers) == {"ok": 20, "book_exhausted": 30}
    assert {answer.body["code"] for answer in answers if answer.ok} == set(codes("RACE", 20))
    book = (await history.client.get(f"/coupons/{book_id}")).json()
    assert book["codes"] == {"total": 20, "available": 0, "assigned": 20, "redeemed": 0, "quarantined": 0}


@both_acks
@with_and_without_keys
async def test_one_user_twenty_times_gets_no_more_than_the_limit(history: History, ack: str, keyed: bool) -> None:
    book_id = await history.new_book(codes("LIMIT", 30), ack=ack, max_codes_per_user=1)
    answers = await at_once(history, [("/coupons/assign", {"book_id": book_id, "user_id": "u"})] * 20, keyed=keyed)
    assert words(answers) == {"ok": 1, "user_code_limit": 19}


@with_and_without_keys
async def test_twenty_assigns_by_name_give_a_user_no_more_than_the_limit(history: History, keyed: bool) -> None:
    listed = codes("NAMED", 20)
    await history.new_book(listed, max_codes_per_user=3)
    answers = await at_once(history, [(f"/coupons/assign/{code}", {"user_id": "u"}) for code in listed], keyed=keyed)
    assert words(answers) == {"ok": 3, "user_code_limit": 17}


@both_acks
async def test_the_same_key_twenty_times_assigns_once(history: History, ack: str) -> None:
    book_id = await history.new_book(codes("SAME", 30), ack=ack)
    calls = [("/coupons/assign", {"book_id": book_id, "user_id": "u"})] * 20
    answers = await at_once(history, calls, one_key=True)
    assert words(answers) == {"ok": 20}
    assert len({answer.body["code"] for answer in answers}) == 1
    assert sum(not answer.replayed for answer in answers) == 1


@both_acks
@with_and_without_keys
async def test_one_code_by_name_goes_to_one_of_twenty_users(history: History, ack: str, keyed: bool) -> None:
    await history.new_book(codes("WANTED", 3), ack=ack)
    calls = [("/coupons/assign/wanted-001", {"user_id": f"u{number}"}) for number in range(20)]
    answers = await at_once(history, calls, keyed=keyed)
    assert words(answers) == {"ok": 1, "already_assigned": 19}


@with_and_without_keys
async def test_one_code_by_name_is_the_same_for_one_user_however_often(history: History, keyed: bool) -> None:
    await history.new_book(codes("MINE", 3), max_codes_per_user=1)
    answers = await at_once(history, [("/coupons/assign/MINE-001", {"user_id": "u"})] * 20, keyed=keyed)
    assert Counter(answer.status for answer in answers) == {201: 1, 200: 19}
    assert len({answer.body["position"] for answer in answers}) == 1


@both_acks
@with_and_without_keys
async def test_a_single_use_code_is_redeemed_by_one_of_twenty(history: History, ack: str, keyed: bool) -> None:
    await history.new_book(codes("ONCE", 3), ack=ack)
    await assigned(history, "ONCE-001")
    answers = await at_once(history, [("/coupons/redeem/ONCE-001", {})] * 20, keyed=keyed)
    assert words(answers) == {"ok": 1, "already_redeemed": 19}


@with_and_without_keys
async def test_a_code_with_seven_uses_is_redeemed_seven_times(history: History, keyed: bool) -> None:
    await history.new_book(codes("SEVEN", 3), max_redemptions_per_code=7)
    await assigned(history, "SEVEN-001")
    answers = await at_once(history, [("/coupons/redeem/SEVEN-001", {})] * 20, keyed=keyed)
    assert words(answers) == {"ok": 7, "already_redeemed": 13}
    assert sorted(answer.body["redemptions_used"] for answer in answers if answer.ok) == [1, 2, 3, 4, 5, 6, 7]


async def test_the_same_key_twenty_times_redeems_once(history: History) -> None:
    await history.new_book(codes("KEYED", 3), max_redemptions_per_code=None)
    await assigned(history, "KEYED-001")
    answers = await at_once(history, [("/coupons/redeem/KEYED-001", {})] * 20, one_key=True)
    assert words(answers) == {"ok": 20}
    assert {answer.body["redemptions_used"] for answer in answers} == {1}
    assert sum(not answer.replayed for answer in answers) == 1


@with_and_without_keys
async def test_a_code_is_locked_by_one_of_twenty(history: History, keyed: bool) -> None:
    await history.new_book(codes("LOCK", 3))
    await assigned(history, "LOCK-001")
    answers = await at_once(history, [("/coupons/lock/LOCK-001", {})] * 20, keyed=keyed)
    assert words(answers) == {"ok": 1, "locked": 19}


async def test_the_same_key_twenty_times_locks_once_and_shows_all_the_same_token(history: History) -> None:
    await history.new_book(codes("TOKEN", 3))
    await assigned(history, "TOKEN-001")
    answers = await at_once(history, [("/coupons/lock/TOKEN-001", {})] * 20, one_key=True)
    assert words(answers) == {"ok": 20}
    assert len({answer.body["lock_token"] for answer in answers}) == 1


@with_and_without_keys
async def test_a_redeem_and_a_lock_that_race_never_both_have_their_way(history: History, keyed: bool) -> None:
    listed = codes("DUEL", 20)
    await history.new_book(listed)
    await asyncio.gather(*(assigned(history, code) for code in listed))
    calls: list[tuple[str, dict[str, Any]]] = []
    for number, code in enumerate(listed):
        duel: list[tuple[str, dict[str, Any]]] = [(f"/coupons/lock/{code}", {}), (f"/coupons/redeem/{code}", {})]
        calls += duel if number % 2 else reversed(duel)
    answers = await at_once(history, calls, keyed=keyed)
    for code in listed:
        lock, redeem = (
            next(answer for answer in answers if answer.path == f"/coupons/{verb}/{code}")
            for verb in ("lock", "redeem")
        )
        assert (lock.code, redeem.code) in {("ok", "locked"), ("already_redeemed", "ok")}
        if lock.ok:
            token = lock.body["lock_token"]
            assert (await history.post(f"/coupons/redeem/{code}", {"lock_token": token})).ok


@both_acks
async def test_after_a_pause_was_answered_nothing_is_assigned(history: History, service: Stack, ack: str) -> None:
    book_id = await history.new_book(codes("PAUSE", 200), ack=ack)
    loop = asyncio.get_running_loop()
    paused_at = float("inf")
    begun: list[tuple[float, Answer]] = []

    async def customer(number: int) -> None:
        for turn in range(100):
            at = loop.time()
            call = {"book_id": book_id, "user_id": f"u{number}-{turn}"}
            begun.append((at, await history.post("/coupons/assign", call)))
            if at > paused_at:
                return

    customers = [asyncio.create_task(customer(number)) for number in range(10)]

    async def under_way() -> bool:
        return any(answer.ok for _, answer in begun)

    await until(under_way)
    answer = await history.client.patch(f"/coupons/{book_id}", json={"status": "paused"})
    paused_at = loop.time()
    assert answer.status_code == 200
    assert answer.json()["status"] == "paused"
    await asyncio.gather(*customers)
    after = [answer for at, answer in begun if at > paused_at]
    assert words(after) == {"book_paused": len(after)}
    assert len(after) >= 10
    assert any(answer.ok for _, answer in begun)


async def test_overlapping_uploads_insert_each_code_once(history: History, service: Stack) -> None:
    books = [await history.new_book() for _ in range(4)]
    lists = [codes("OVER", 300)[start : start + 150] for start in range(0, 160, 20)]
    uploads = [
        history.client.post("/coupons/codes", json={"book_id": books[number % 4], "codes": listed[:: (-1) ** number]})
        for number, listed in enumerate(lists)
    ]
    answers = [answer.json() for answer in await asyncio.gather(*uploads)]
    union = {code for listed in lists for code in listed}
    assert sum(answer["inserted"] for answer in answers) == len(union)
    assert all(answer["inserted"] + answer["duplicates"] == answer["received"] == 150 for answer in answers)
    rows = await service.ledger("SELECT code FROM codes WHERE book_id = ANY ($1)", books)
    assert sorted(row["code"] for row in rows) == sorted(union)


async def test_generating_from_one_pattern_at_once_fills_half_of_it_and_no_more(
    history: History, service: Stack
) -> None:
    generate = {"pattern": "GEN###", "alphabet": "digits", "total": 100}
    calls = [("/coupons", {"name": "b", "generate": generate}) for _ in range(8)]
    answers = await at_once(history, calls)  # room for 500 of 1000
    assert words(answers) == {"ok": 5, "pattern_capacity": 3}
    books = [answer.body["book_id"] for answer in answers if answer.ok]
    rows = await service.ledger("SELECT count(*), count(DISTINCT code) FROM codes WHERE book_id = ANY ($1)", books)
    assert tuple(rows[0]) == (500, 500)


async def test_the_same_key_twenty_times_makes_one_book(history: History, service: Stack) -> None:
    answers = await at_once(history, [("/coupons", {"name": "one book"})] * 20, one_key=True)
    made = {answer.body["book_id"] for answer in answers if answer.ok}
    assert len(made) == 1
    assert set(words(answers)) <= {"ok", "idempotency_in_progress"}


# BUG: chunks of a generate are not in one order, so two of them (over patterns that overlap) deadlock in Postgres, and
# one is answered 503 store_unavailable.
async def test_generating_from_patterns_that_overlap_is_no_error(history: History, service: Stack) -> None:
    alphabets = ["0123456789", "9876543210"]
    calls = [
        ("/coupons", {"name": "b", "generate": {"pattern": "Z#####", "alphabet": alphabet, "total": 20_000}})
        for alphabet in alphabets
    ]
    answers = await at_once(history, calls)
    assert words(answers) == {"ok": 2}
