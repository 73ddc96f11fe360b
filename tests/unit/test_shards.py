"""A book's id says in which shard it lives, and shards lie evenly in a cluster."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coupon_svc.domain.shards import CLUSTER_SLOTS, book_shard, key_slot, new_book_id, shard_of, shard_tag


def test_a_slot_is_the_cluster_specifications() -> None:
    assert key_slot("123456789") == 0x31C3
    assert key_slot("foo") == 12182
    assert key_slot("") == 0


@pytest.mark.parametrize("shards", [1, 4, 16, 99])
def test_every_shard_lies_in_the_middle_of_its_stripe_of_slots(shards: int) -> None:
    slots = [key_slot(shard_tag(shard, shards)) for shard in range(shards)]
    stripe = CLUSTER_SLOTS / shards
    assert all(shard * stripe < slot < (shard + 1) * stripe for shard, slot in enumerate(slots))
    assert all(after - before > stripe - 34 for before, after in pairwise(slots))


def test_a_tag_begins_with_the_number_of_its_shard() -> None:
    assert [shard_tag(shard, 16)[:2] for shard in (0, 7, 15)] == ["00", "07", "15"]


@given(st.integers(1, 99))
def test_a_new_book_is_in_one_of_the_shards(shards: int) -> None:
    shard = book_shard(new_book_id(shards), shards)
    assert shard is not None
    assert 0 <= shard < shards


def test_new_books_differ_and_are_spread() -> None:
    ids = {new_book_id(4) for _ in range(200)}
    assert len(ids) == 200
    assert {book_shard(book_id, 4) for book_id in ids} == {0, 1, 2, 3}


GOOD = "bk_07" + "q3" * 8


def test_the_shard_of_an_id() -> None:
    assert book_shard(GOOD, 16) == 7
    assert book_shard(GOOD, 8) == 7
    assert book_shard(GOOD, 7) is None, "there is no shard 7 of 7"


@pytest.mark.parametrize(
    "text",
    ["", "bk_07", GOOD[:-1], GOOD + "a", "BK_07" + GOOD[5:], "bk-07" + GOOD[5:], "bk_x7" + GOOD[5:], "bk_-7" + GOOD[5:],
     "bk_ 7" + GOOD[5:], "bk_٠٧" + GOOD[5:], "bk_07" + "q3" * 7 + "}{", "bk_07" + "q3" * 7 + "é1"],
)  # fmt: skip
def test_no_book_can_have_another_id(text: str) -> None:
    assert book_shard(text, 16) is None


@given(st.integers(1, 99))
def test_the_id_of_a_book_names_its_shard(shards: int) -> None:
    book_id = new_book_id(shards)
    assert shard_of(book_id) == book_shard(book_id, shards)
