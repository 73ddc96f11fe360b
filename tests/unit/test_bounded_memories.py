"""Memories of a process have a bound. What was pushed out is asked for again, and answered as before."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from time import perf_counter
from typing import Any

import pytest

from coupon_svc.domain.api_keys import ApiKey
from coupon_svc.domain.clock import _whole_second, rfc3339
from coupon_svc.domain.codes import Pattern
from coupon_svc.domain.computed import KEY_BYTES, PatternCipher
from coupon_svc.domain.outcomes import Outcome, Refused
from coupon_svc.http import auth
from coupon_svc.http.auth import KeyRing
from coupon_svc.postgres.computed import ciphers
from coupon_svc.postgres.computed.ciphers import Ciphers
from coupon_svc.service import code_directory
from coupon_svc.service.budgets import Budget
from coupon_svc.service.code_directory import CodeDirectory
from coupon_svc.service.issued_codes import Verdict

KEPT_MAX = 3
FULL = 50_000


class Memory:
    """A memory of numbered things. `asked` has each number for which it had to ask somebody."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[int] = []

    async def answer(self, number: int) -> object:
        raise NotImplementedError

    def right(self, number: int) -> object:
        raise NotImplementedError


class Keys(Memory):
    """A good key of each number."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(monkeypatch)
        monkeypatch.setattr(auth, "KEYS_KEPT_MAX", KEPT_MAX)
        self._numbers = {hashlib.sha256(b"key-%d" % number).digest(): number for number in range(100)}
        self._ring = KeyRing(self._find_key, 5_000)

    async def answer(self, number: int) -> object:
        return await self._ring.authenticate(b"Bearer key-%d" % number)

    def right(self, number: int) -> object:
        return ApiKey(f"key_{number}", number, "acme", frozenset(), "", None, revoked=False)

    async def _find_key(self, key_hash: bytes) -> ApiKey | None:
        number = self._numbers[key_hash]
        self.asked.append(number)
        found = self.right(number)
        return found if isinstance(found, ApiKey) else None


class UnknownKeys(Keys):
    """No key of any number."""

    async def answer(self, number: int) -> object:
        try:
            return await super().answer(number)
        except Refused as refused:
            return refused.outcome

    def right(self, number: int) -> object:
        return Outcome.UNAUTHENTICATED


class Codes(Memory):
    """A code of each number, in a book of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(monkeypatch)
        monkeypatch.setattr(code_directory, "CODES_KEPT_MAX", KEPT_MAX)
        monkeypatch.setattr(code_directory, "find_codes", self._find_codes)
        surroundings: Any = self
        self._directory = CodeDirectory(surroundings, surroundings, Budget(1, 1))

    async def answer(self, number: int) -> object:
        return await self._directory.book_of_code(1, str(number), 1)

    def right(self, number: int) -> object:
        return f"bk_{number}"

    def look(self, *_: Any) -> Verdict:
        """As `IssuedCodes`: no code is computed."""
        return Verdict.ASK

    async def _find_codes(self, _: Any, asked: Any) -> dict[tuple[int, str], str]:
        self.asked += [int(code) for _, code in asked]
        return {(tenant_id, code): f"bk_{code}" for tenant_id, code in asked}


class PatternCiphers(Memory):
    """The first code of the pattern of each number."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(monkeypatch)
        monkeypatch.setattr(ciphers, "CIPHERS_KEPT_MAX", KEPT_MAX)
        master_keys: Any = self
        self._ciphers = Ciphers(master_keys)

    def open(self, _: str, sealed: int, of: str) -> bytes:
        """As `MasterKeys`."""
        self.asked.append(sealed)
        return bytes([sealed]) * KEY_BYTES

    async def answer(self, number: int) -> object:
        row: Any = {
            "pattern_id": number,
            "tenant_id": 1,
            "pattern": "A-######",
            "symbols": "0123456789",
            "sealed_key": number,
            "master_key_id": "mk",
        }
        return self._ciphers.of(row).codes([0])

    def right(self, number: int) -> object:
        return PatternCipher(Pattern("A-######", "0123456789"), bytes([number]) * KEY_BYTES).codes([0])


@pytest.mark.parametrize("memory_of", [Keys, UnknownKeys, Codes, PatternCiphers])
async def test_the_oldest_is_pushed_out_and_asked_for_again(
    memory_of: Callable[[pytest.MonkeyPatch], Memory], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.monotonic_ns", lambda: 10**15)
    memory = memory_of(monkeypatch)
    numbers = range(KEPT_MAX + 2)
    for number in numbers:
        assert await memory.answer(number) == memory.right(number)
    for number in reversed(numbers[2:]):
        assert await memory.answer(number) == memory.right(number)
    assert memory.asked == list(numbers), "the newest are kept"
    for number in numbers[:2]:
        assert await memory.answer(number) == memory.right(number)
    assert memory.asked == [*numbers, *numbers[:2]], "the others are asked for again"


def test_few_seconds_are_kept_as_text() -> None:
    for _ in range(2):
        for second in range(200):
            assert rfc3339(second * 1_000) == f"1970-01-01T00:{second // 60:02}:{second % 60:02}.000Z"
    assert _whole_second.cache_info().currsize == 64


def test_a_full_memory_learns_as_fast_as_one_with_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dict whose first items are taken out again and again took 0.1 ms for each code: twice what an assign costs."""
    monkeypatch.setattr(code_directory, "CODES_KEPT_MAX", FULL)
    unused: Any = None
    directory = CodeDirectory(unused, unused, Budget(1, 1))

    def learning_s(first: int) -> float:
        begun = perf_counter()
        for number in range(first, first + FULL // 2):
            directory.learn_code(1, str(number), "bk_1")
        return perf_counter() - begun

    with_room = min(learning_s(0), learning_s(FULL // 2))
    assert learning_s(FULL) < 10 * with_room
    assert directory.known_book(1, str(FULL)) == "bk_1"
    assert directory.known_book(1, "0") is None
