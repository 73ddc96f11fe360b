"""Positions: what is written is what is read, and nothing else is read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coupon_svc.domain.position import Epoch, Position, Seq, ShardNo, parse_shard_position

positions = st.builds(
    Position,
    st.integers(0, 2**53).map(Epoch),
    st.integers(0, 2**64 - 1).map(Seq),
)


@given(positions)
def test_a_position_comes_back_from_its_text(position: Position) -> None:
    assert Position.parse(str(position)) == position


@given(positions, st.integers(0, 98))
def test_a_position_comes_back_from_its_text_with_a_shard(position: Position, shard: int) -> None:
    assert parse_shard_position(position.in_shard(shard)) == (ShardNo(shard), position)


@given(st.lists(positions, max_size=5))
def test_positions_are_ordered_by_epoch_and_then_by_seq(some: list[Position]) -> None:
    assert sorted(some) == sorted(some, key=lambda position: (position.epoch, position.seq))


def test_the_texts_are_those_of_the_api_and_of_the_stream() -> None:
    position = Position(Epoch(4), Seq(17))
    assert (str(position), position.in_shard(7)) == ("4-17", "07:4-17")
    assert position.redemption_id(7) == "rd_07_4_17"
    assert position.next == Position.parse("4-18")


@pytest.mark.parametrize(
    "text", ["", "-", "4", "4-", "-17", "4-17-1", "4-1/4-17", "+4-17", "4 -17", "4-1_7", "٤-17", "4.0-1"]
)
def test_no_other_text_is_a_position(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        Position.parse(text)


@pytest.mark.parametrize("text", ["", "4-17", ":4-17", "a:4-17", "07:", "07:4", "7:7:4-17"])
def test_no_other_text_is_a_position_in_a_shard(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_shard_position(text)
