"""The hash over a ledger row: of these bytes and no others, since rows of years ago are compared with it."""

from __future__ import annotations

import pytest

from coupon_svc.domain.chain import CHAIN_START, chain_hash
from coupon_svc.domain.events import Event

EVENT = Event(4, 17, "coupon_assigned", "bk_07book", "SAVE-10", "ann", 1_795_357_061_878, idem="k", fingerprint="f")


def test_the_hash_of_a_row_is_the_one_that_was_always_written() -> None:
    assert (
        chain_hash(CHAIN_START, 7, 4, EVENT.record).hex()
        == "89a53caa22e556dd5d16c7748cf4d7ae060681dc9273a7c2105c4bd300e7e95a"
    )


@pytest.mark.parametrize(
    "other",
    [
        chain_hash(bytes([1]) + bytes(31), 7, 4, EVENT.record),
        chain_hash(CHAIN_START, 8, 4, EVENT.record),
        chain_hash(CHAIN_START, 7, 5, EVENT.record),
        *(
            chain_hash(CHAIN_START, 7, 4, [*EVENT.record[:number], "other", *EVENT.record[number + 1 :]])
            for number in range(len(EVENT.record))
        ),
        chain_hash(CHAIN_START, 7, 4, EVENT._replace(idem="f", fingerprint="k").record),
        chain_hash(CHAIN_START, 7, 4, EVENT._replace(code="SAVE-1", user_id="0ann").record),
        chain_hash(CHAIN_START, 7, 4, EVENT.record[:-1]),
    ],
)
def test_any_other_row_has_another_hash(other: bytes) -> None:
    assert len(other) == 32
    assert other != chain_hash(CHAIN_START, 7, 4, EVENT.record)
