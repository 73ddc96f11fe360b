"""Postgres is asked once for the codes of a moment, and nobody is left waiting for its answer."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Any

import pytest

from coupon_svc.domain.outcomes import Outcome, Refused
from coupon_svc.postgres.errors import LedgerUnavailable
from coupon_svc.service import code_directory, questions
from coupon_svc.service.budgets import Budget
from coupon_svc.service.code_directory import CodeDirectory
from coupon_svc.service.issued_codes import Verdict

Asked = tuple[int, str]


class Ledger:
    """The codes that Postgres knows, and each statement with what it asked for."""

    def __init__(self) -> None:
        self.books: dict[Asked, str] = {}
        self.statements: list[set[Asked]] = []
        self.error: Exception | None = None
        self.silent = False

    async def find_codes(self, _: Any, asked: Collection[Asked]) -> dict[Asked, str]:
        self.statements.append(set(asked))
        await asyncio.sleep(3600 if self.silent else 0)
        if self.error is not None:
            raise self.error
        return {code: self.books[code] for code in asked if code in self.books}


@pytest.fixture
def ledger(monkeypatch: pytest.MonkeyPatch) -> Ledger:
    ledger = Ledger()
    monkeypatch.setattr(code_directory, "find_codes", ledger.find_codes)
    return ledger


class NothingComputed:
    """`IssuedCodes` of a process that knows no computed pattern."""

    def look(self, *_: Any) -> Verdict:
        return Verdict.ASK

    async def refresh(self, *_: Any) -> None: ...

    def look_behind_rows(self, *_: Any) -> None: ...


@pytest.fixture
def directory(ledger: Ledger) -> CodeDirectory:
    return CodeDirectory(None, NothingComputed(), Budget(1, 1))  # type: ignore[arg-type]  # every question goes through `find_codes`


async def test_a_code_is_asked_for_once_in_its_life(directory: CodeDirectory, ledger: Ledger) -> None:
    ledger.books[1, "A"] = "bk_a"
    assert [await directory.book_of_code(1, "A", 1) for _ in range(3)] == ["bk_a"] * 3
    assert ledger.statements == [{(1, "A")}]


async def test_what_redis_has_told_is_not_asked_for(directory: CodeDirectory, ledger: Ledger) -> None:
    directory.learn_code(1, "A", "bk_a")
    assert await directory.book_of_code(1, "A", 1) == "bk_a"
    assert ledger.statements == []


async def test_the_questions_of_a_moment_are_one_statement(directory: CodeDirectory, ledger: Ledger) -> None:
    ledger.books = {(1, f"C-{number}"): f"bk_{number}" for number in range(50)}
    asked = [directory.book_of_code(1, f"C-{number % 50}", 1) for number in range(100)]
    assert await asyncio.gather(*asked) == [f"bk_{number % 50}" for number in range(100)]
    assert len(ledger.statements) == 1


async def test_a_code_that_nobody_has_is_asked_for_again(directory: CodeDirectory, ledger: Ledger) -> None:
    for _ in range(2):
        with pytest.raises(Refused) as refused:
            await directory.book_of_code(1, "A", 1)
        assert refused.value.outcome is Outcome.CODE_NOT_FOUND
    ledger.books[1, "A"] = "bk_a"
    assert await directory.book_of_code(1, "A", 1) == "bk_a"
    assert len(ledger.statements) == 3


async def test_a_tenants_code_is_no_other_tenants(directory: CodeDirectory, ledger: Ledger) -> None:
    ledger.books[1, "A"] = "bk_a"
    await directory.book_of_code(1, "A", 1)
    with pytest.raises(Refused):
        await directory.book_of_code(2, "A", 1)


@pytest.mark.parametrize("error", [LedgerUnavailable("away"), KeyError("unforeseen")])
async def test_everybody_who_asked_is_told_what_went_wrong(
    directory: CodeDirectory, ledger: Ledger, error: Exception
) -> None:
    ledger.error = error
    asked = [directory.book_of_code(1, code, 1) for code in "ABA"]
    assert await asyncio.gather(*asked, return_exceptions=True) == [error] * 3
    ledger.error, ledger.books[1, "A"] = None, "bk_a"
    assert await directory.book_of_code(1, "A", 1) == "bk_a"


async def test_nobody_waits_longer_than_he_can(directory: CodeDirectory, ledger: Ledger) -> None:
    ledger.silent = True
    with pytest.raises(LedgerUnavailable):
        await directory.book_of_code(1, "A", 0.01)


async def test_too_many_questions_at_a_time_are_refused(
    directory: CodeDirectory, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(questions, "WAITING_MAX", 2)
    ledger.books = {(1, code): "bk" for code in "ABC"}
    told = await asyncio.gather(*(directory.book_of_code(1, code, 1) for code in "ABC"), return_exceptions=True)
    assert told[:2] == ["bk", "bk"]
    assert isinstance(told[2], LedgerUnavailable)
