"""Each check of what callers were answered finds its own damage, without a service."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from coupon_svc.invariants.answers import AnswerCheck, Assigned, Book, History, Redeemed
from coupon_svc.invariants.kept import BookRows, KeptCheck, compare
from coupon_svc.invariants.service import Counts, Listed, ServiceCheck, compare_counts, compare_list, same_answer
from coupon_svc.load.scenarios import Checkout

BOOK = "bk_00" + "a" * 16


def history(ack: str = "ledger", most: int | None = 1) -> History:
    """One book with a limit of `most` codes a user, and one use a code."""
    made = History(Random(1))
    made.books[BOOK] = Book(BOOK, ack, 10, most, 1)
    return made


def assigned(code: str, user: str, position: str = "00:1-1", durable: bool = True) -> Assigned:
    return Assigned(code, BOOK, user, position, durable)


def redeemed(code: str, user: str, used: int = 1, number: str = "r1", durable: bool = True) -> Redeemed:
    return Redeemed(number, code, BOOK, user, used, "00:1-9", durable)


# -- answers against each other

Told = tuple[str, Assigned | Redeemed]
U, V = "u", "v"
IN_ANSWERS: dict[AnswerCheck, list[Told]] = {
    AnswerCheck.ONE_USER: [(U, assigned("A", U)), (V, assigned("A", V))],
    AnswerCheck.ONE_ASSIGN: [(U, assigned("A", U)), (U, assigned("A", U, "00:1-2"))],
    AnswerCheck.CODES_PER_USER: [(U, assigned("A", U)), (U, assigned("B", U))],
    AnswerCheck.ASKED: [(U, assigned("A", V))],
    AnswerCheck.DURABLE_ASSIGN: [(U, assigned("A", U, durable=False))],
    AnswerCheck.ONE_USE: [(U, assigned("A", U)), (U, redeemed("A", U)), (U, redeemed("A", U, number="r2"))],
    AnswerCheck.USES_MAX: [(U, assigned("A", U)), (U, redeemed("A", U)), (U, redeemed("A", U, 2, "r2"))],
    AnswerCheck.HOLDER: [(U, assigned("A", U)), (V, redeemed("A", V))],
    AnswerCheck.DURABLE_REDEEM: [(U, assigned("A", U)), (U, redeemed("A", U, durable=False))],
}
"""What is found, and the answers that it is found in, with the last of them."""
ELSEWHERE = {AnswerCheck.ONE_EFFECT, AnswerCheck.ONE_LOCK, AnswerCheck.LOCK_EXPIRED}
"""Tests of their own, below."""


@pytest.mark.parametrize("check", IN_ANSWERS)
def test_answers_that_contradict_each_other_are_found(check: AnswerCheck) -> None:
    seen = history()
    for user, answer in IN_ANSWERS[check]:
        assert not seen.broken
        if isinstance(answer, Assigned):
            seen.assigned(BOOK, user, answer)
        else:
            seen.redeemed(answer)
    assert {found for found, _ in seen.broken} == {check}


def test_one_key_with_two_effects_is_found() -> None:
    seen = history(most=None)
    seen.assigned(BOOK, U, assigned("A", U), "key")
    seen.assigned(BOOK, U, assigned("A", U), "key")
    assert not seen.broken
    seen.assigned(BOOK, U, assigned("B", U, "00:1-2"), "key")
    assert {found for found, _ in seen.broken} == {AnswerCheck.ONE_EFFECT}


class Grants:
    """A service that grants whatever is asked, and a journey's dice."""

    def __init__(self, *dice: float) -> None:
        self.history = history()
        self.random = iter(dice).__next__

    def choice(self, books: list[Book]) -> Book:
        return books[0]

    async def _granted(self, *_: Any) -> Any:
        return type(
            "Answer", (), {"value": type("Value", (), {"lock_token": "t", "book_id": BOOK}), "pushed_back": False}
        )

    assign = lock = redeem = _granted


@pytest.mark.parametrize(
    ("dice", "check"), [((0.5, 0.01), AnswerCheck.ONE_LOCK), ((0.12, 0.9), AnswerCheck.LOCK_EXPIRED)]
)
async def test_a_lock_that_does_not_hold_is_found(
    monkeypatch: pytest.MonkeyPatch, dice: tuple[float, float], check: AnswerCheck
) -> None:
    monkeypatch.setattr("coupon_svc.load.scenarios._LOCK_ENDED_S", 0)
    service: Any = Grants(*dice)
    journey = Checkout.__new__(Checkout)
    monkeypatch.setattr(journey, "_new_user", lambda: U)
    for name, value in (("_caller", service), ("_random", service), ("_books", [service.history.books[BOOK]])):
        monkeypatch.setattr(journey, name, value, raising=False)
    await journey.journey(0.0)
    assert {found for found, _ in service.history.broken} == {check}


# -- answers against the ledger, and against what the service says


def played(ack: str = "ledger") -> History:
    """Users u and v were answered a code each; u redeemed hers."""
    seen = history(ack)
    seen.assigned(BOOK, U, assigned("A", U, "00:1-1", ack == "ledger"))
    seen.assigned(BOOK, V, assigned("B", V, "00:1-2", ack == "ledger"))
    seen.redeemed(redeemed("A", U))
    assert not seen.broken
    return seen


class Ledger:
    """The rows that belong to what was played, to be damaged."""

    def __init__(self) -> None:
        self.coupons = {"A": row("A", U, 1), "B": row("B", V, 2)}
        self.redemptions = [row("A", U, 9, uses=1)]
        self.events = [
            row("A", U, 1, event="coupon_assigned", idem="k1"), row("B", V, 2, event="coupon_assigned", idem="k2"),
            row("A", U, 9, event="coupon_redeemed", idem="k1"),
        ]  # fmt: skip
        self.quarantined: set[str] = set()

    def rows(self) -> BookRows:
        return BookRows(self.coupons, self.quarantined, self.redemptions, self.events)


def row(code: str, user: str, seq: int, **more: Any) -> dict[str, Any]:
    return {"shard": 0, "epoch": 1, "seq": seq, "code": code, "user_id": user, **more}


IN_LEDGER: dict[KeptCheck, Callable[[Ledger], Any]] = {
    KeptCheck.COUPON: lambda ledger: ledger.coupons.pop("B"),
    KeptCheck.USER: lambda ledger: ledger.coupons["B"].update(user_id="thief"),
    KeptCheck.POSITION: lambda ledger: ledger.coupons["B"].update(seq=7),
    KeptCheck.CODES_PER_USER: lambda ledger: ledger.coupons.update(C=row("C", U, 3)),
    KeptCheck.COUPON_ASKED: lambda ledger: ledger.coupons.update(C=row("C", "nobody", 3)),
    KeptCheck.REDEMPTION: lambda ledger: ledger.redemptions.clear(),
    KeptCheck.REDEMPTION_SAME: lambda ledger: ledger.redemptions[0].update(user_id="thief"),
    KeptCheck.USES_MAX: lambda ledger: ledger.redemptions.append(row("A", U, 10, uses=2)),
    KeptCheck.REDEMPTION_ASKED: lambda ledger: ledger.redemptions.append(row("B", V, 10, uses=1)),
    KeptCheck.EVENT: lambda ledger: ledger.events.pop(1),
    KeptCheck.ONE_EFFECT: lambda ledger: ledger.events[1].update(idem="k1"),
}


def kept(seen: History, ledger: Ledger, **allowed: set[str]) -> tuple[set[KeptCheck], int]:
    compared = compare(seen, seen.books[BOOK], seen.coupons, ledger.rows(), **allowed)
    return {check for check, number in compared.found.items() if number}, compared.lost


@pytest.mark.parametrize("check", IN_LEDGER)
def test_damage_in_the_ledger_is_found(check: KeptCheck) -> None:
    ledger = Ledger()
    assert kept(played(), ledger) == (set(), 0)
    IN_LEDGER[check](ledger)
    assert check in kept(played(), ledger)[0]


def test_a_record_may_be_lost_from_an_ack_redis_book_alone_and_into_the_quarantine() -> None:
    ledger = Ledger()
    del ledger.coupons["B"], ledger.events[1]
    assert kept(played("redis"), ledger) == ({KeptCheck.QUARANTINED}, 0)
    ledger.quarantined.add("B")
    assert kept(played("redis"), ledger) == (set(), 1)
    assert KeptCheck.COUPON in kept(played("ledger"), ledger)[0]
    assert kept(played("ledger"), ledger, given_up={"B"}) == (set(), 1)


def test_a_record_that_was_lost_and_came_back_is_no_surplus() -> None:
    ledger = Ledger()
    ledger.coupons["C"] = row("C", U, 3)
    ledger.events.append(row("C", U, 3, event="coupon_assigned", idem="k1"))
    assert kept(played(), ledger, uncounted={"C"}) == (set(), 0)
    assert kept(played(), ledger)[0] == {
        KeptCheck.CODES_PER_USER, KeptCheck.COUPON_ASKED, KeptCheck.ONE_EFFECT
    }  # fmt: skip


def test_what_was_left_unknown_may_have_happened() -> None:
    ledger, seen = Ledger(), played()
    ledger.coupons["C"] = row("C", "w", 3)
    ledger.redemptions.append(row("B", V, 10, uses=1))
    seen.unknown_assigns[BOOK, "w"] += 1
    seen.unknown_redeems["B"] += 1
    assert kept(seen, ledger) == (set(), 0)


LIST = [Listed("A", BOOK, U, 1)]
IN_LIST: dict[ServiceCheck, list[Listed]] = {
    ServiceCheck.LISTED_SAME: [Listed("A", BOOK, V, 1)],
    ServiceCheck.REDEMPTION: [Listed("A", BOOK, U, 0)],
    ServiceCheck.REDEMPTION_ASKED: [Listed("A", BOOK, U, 2)],
    ServiceCheck.COUPON_ASKED: [*LIST, Listed("C", BOOK, U, 0)],
    ServiceCheck.CODES_PER_USER: [*LIST, Listed("C", BOOK, U, 0)],
}
COUNTS = Counts(total=10, available=8, assigned=1, redeemed=1, quarantined=0)
IN_COUNTS: dict[ServiceCheck, Counts] = {
    ServiceCheck.STATES: Counts(10, 7, 1, 1, 0),
    ServiceCheck.TOTAL: Counts(9, 7, 1, 1, 0),
    ServiceCheck.GIVEN: Counts(10, 9, 0, 1, 0),
    ServiceCheck.GIVEN_ASKED: Counts(10, 7, 2, 1, 0),
    ServiceCheck.SPENT: Counts(10, 8, 2, 0, 0),
    ServiceCheck.SPENT_ASKED: Counts(10, 8, 0, 2, 0),
}
OF_REPLAYS = {ServiceCheck.ASSIGN_AGAIN, ServiceCheck.REDEEM_AGAIN}
"""Their damage is done in tests/tools/test_load.py, where a service is asked again."""


@pytest.mark.parametrize("check", IN_LIST)
def test_damage_in_a_users_list_is_found(check: ServiceCheck) -> None:
    seen, answered = played(), {"A": played().coupons["A"]}
    assert compare_list(seen, U, answered, LIST) == ({}, [])
    found, missing = compare_list(seen, U, answered, IN_LIST[check])
    assert ((check, BOOK) in found, missing) == (True, [])


def test_a_coupon_that_is_not_listed_is_missing() -> None:
    seen = played()
    assert compare_list(seen, U, {"A": seen.coupons["A"]}, []).missing == ["A"]


@pytest.mark.parametrize("check", IN_COUNTS)
def test_damage_in_a_books_counts_is_found(check: ServiceCheck) -> None:
    seen = played()
    assert compare_counts(seen, seen.books[BOOK], seen.coupons, COUNTS) == {}
    assert check in compare_counts(seen, seen.books[BOOK], seen.coupons, IN_COUNTS[check])


def test_an_answer_that_differs_is_another_unless_it_has_become_durable() -> None:
    assert same_answer(b'{"code": "A", "durable": true}', b'{"code": "A", "durable": false}')
    assert not same_answer(b'{"code": "B"}', b'{"code": "A"}')
    assert not same_answer(b"", b"")


def test_every_check_has_its_damage() -> None:
    assert set(AnswerCheck) == IN_ANSWERS.keys() | ELSEWHERE
    assert set(KeptCheck) == IN_LEDGER.keys() | {KeptCheck.QUARANTINED}
    assert set(ServiceCheck) == IN_LIST.keys() | IN_COUNTS.keys() | OF_REPLAYS | {ServiceCheck.LISTED}
