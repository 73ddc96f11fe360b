"""What a server and the metas of its shards say is believed as a whole, or not at all."""

from __future__ import annotations

import math

import pytest

from coupon_svc.redis.meta import FORMAT, meta_of
from coupon_svc.redis.server import Identity
from coupon_svc.redis.shard_view import Certificate
from coupon_svc.redis.verification import ServerReading

CERTIFIED = {
    "epoch": "4", "seq": "21", "committed": "17", "backlog_max": "100", "format": FORMAT, "run": "run-1", "replid": "repl-1",
    "tip": "", "ledger_at_ms": "9000", "owner_at_ms": "8000",
}  # fmt: skip


def read(**changes: str | None) -> ServerReading:
    """One shard, certified but for the changes, in a server whose clock is at 10 s."""
    metas = [meta_of({**CERTIFIED, **changes})]
    return ServerReading(Identity("run-1", "repl-1"), refuses_writes=False, now_ms=10_000, metas=[*metas, None])


def test_the_meta_of_the_server_that_was_asked_certifies_the_shard() -> None:
    assert read().certificate(0) == Certificate(4, 21, committed=17, backlog_max=100)


@pytest.mark.parametrize("field", ["epoch", "seq", "committed", "backlog_max", "format", "run", "replid", "tip"])
def test_a_field_that_is_missing_certifies_nothing(field: str) -> None:
    assert read(**{field: None}).certificate(0) is None


@pytest.mark.parametrize(
    ("field", "text"), [("run", "run-2"), ("replid", "repl-2"), ("format", "1"), ("epoch", "doubt")]
)
def test_another_server_or_format_or_a_shut_shard_certifies_nothing(field: str, text: str) -> None:
    assert read(**{field: text}).certificate(0) is None


def test_ledger_and_owner_were_seen_when_the_meta_says_so() -> None:
    assert (read().ledger_unseen_s(0), read().owner_unheard_s(0)) == (1, 2)
    assert read(ledger_at_ms="11000").ledger_unseen_s(0) == 0, "by a clock that was ahead"
    for away in ("0", None):
        assert read(ledger_at_ms=away).ledger_unseen_s(0) == math.inf
    assert read(owner_at_ms=None).owner_unheard_s(0) == math.inf


def test_where_no_meta_lies_nothing_is_certified_and_nobody_was_seen() -> None:
    reading = read()
    assert (reading.certificate(1), reading.ledger_unseen_s(1), reading.owner_unheard_s(1)) == (
        None,
        math.inf,
        math.inf,
    )
