"""What Postgres said of an API key is believed for a while, and longer while Postgres is away."""

from __future__ import annotations

import asyncio
import hashlib

import pytest

from coupon_svc.domain.api_keys import ApiKey
from coupon_svc.domain.clock import now_ms
from coupon_svc.domain.outcomes import Outcome, Refused
from coupon_svc.http.auth import KEPT_WHILE_AWAY_MS, UNKNOWN_KEPT_MS, KeyRing
from coupon_svc.postgres.errors import LedgerUnavailable

KEPT_MS = 5_000
GOOD = ApiKey("key_1", 7, "acme", frozenset({"books:read"}), "", None, revoked=False)


class Ledger:
    """Knows one key, answers when it is asked, and counts how often."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.row: ApiKey | None = GOOD
        self.away = False
        self.asked = 0
        self.now_ms = 1_000_000
        monkeypatch.setattr("time.monotonic_ns", lambda: self.now_ms * 1_000_000)

    async def find_key(self, key_hash: bytes) -> ApiKey | None:
        self.asked += 1
        await asyncio.sleep(0)
        if self.away:
            raise LedgerUnavailable
        return self.row if key_hash == hashlib.sha256(b"good").digest() else None


@pytest.fixture
def ledger(monkeypatch: pytest.MonkeyPatch) -> Ledger:
    return Ledger(monkeypatch)


@pytest.fixture
def ring(ledger: Ledger) -> KeyRing:
    return KeyRing(ledger.find_key, KEPT_MS)


async def outcome_of(ring: KeyRing, authorization: bytes = b"Bearer good") -> str:
    """ "good", or the outcome of the refusal."""
    try:
        assert await ring.authenticate(authorization) == GOOD
    except Refused as refused:
        return refused.outcome
    return "good"


@pytest.mark.parametrize("authorization", [b"Bearer good", b"bearer  good ", b"BEARER good"])
async def test_a_good_key_is_who_calls(ring: KeyRing, authorization: bytes) -> None:
    assert await outcome_of(ring, authorization) == "good"


@pytest.mark.parametrize("authorization", [b"", b"good", b"Bearer", b"Bearer ", b"Basic good", b"Bearer other"])
async def test_anything_else_is_refused(ring: KeyRing, authorization: bytes) -> None:
    assert await outcome_of(ring, authorization) == Outcome.UNAUTHENTICATED


@pytest.mark.parametrize(
    "row",
    [None, GOOD._replace(revoked=True), GOOD._replace(expires_at_ms=now_ms())],
    ids=["gone", "revoked", "expired"],
)
async def test_a_key_that_is_over_is_refused_soon(ring: KeyRing, ledger: Ledger, row: ApiKey | None) -> None:
    assert await outcome_of(ring) == "good"
    ledger.row = row
    ledger.now_ms += KEPT_MS
    assert await outcome_of(ring) == "good", "it is believed so long"
    ledger.now_ms += 1
    assert await outcome_of(ring) == Outcome.UNAUTHENTICATED


async def test_postgres_is_asked_once_for_many_requests_of_a_moment(ring: KeyRing, ledger: Ledger) -> None:
    assert set(await asyncio.gather(*(outcome_of(ring) for _ in range(50)))) == {"good"}
    assert ledger.asked == 1
    await outcome_of(ring)
    assert ledger.asked == 1


async def test_an_unknown_key_is_asked_for_again_after_a_second(ring: KeyRing, ledger: Ledger) -> None:
    ledger.row = None
    assert await outcome_of(ring) == Outcome.UNAUTHENTICATED
    ledger.row = GOOD
    assert await outcome_of(ring) == Outcome.UNAUTHENTICATED
    ledger.now_ms += UNKNOWN_KEPT_MS + 1
    assert await outcome_of(ring) == "good"


async def test_a_key_that_was_good_goes_on_while_postgres_is_away_and_no_other(ring: KeyRing, ledger: Ledger) -> None:
    assert await outcome_of(ring) == "good"
    ledger.away = True
    ledger.now_ms += KEPT_WHILE_AWAY_MS - 1
    assert await outcome_of(ring) == "good"
    assert await outcome_of(ring, b"Bearer other") == Outcome.STORE_UNAVAILABLE
    ledger.now_ms += 1
    assert await outcome_of(ring) == Outcome.STORE_UNAVAILABLE


async def test_keys_that_nobody_has_push_no_good_one_out(
    ring: KeyRing, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coupon_svc.http.auth.KEYS_KEPT_MAX", 3)
    assert await outcome_of(ring) == "good"
    for number in range(10):
        await outcome_of(ring, b"Bearer made-up-%d" % number)
    asked = ledger.asked
    assert await outcome_of(ring) == "good"
    assert ledger.asked == asked
