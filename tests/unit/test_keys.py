"""All keys of a shard lie in one slot, whatever a caller calls its users and Idempotency-Keys."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coupon_svc.domain.shards import key_slot, shard_tag
from coupon_svc.redis.keys import ShardKeys, ToldPosition, parse_position_message, position_message, positions_channel
from coupon_svc.redis.listener import PositionListener

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.text("{}:*[]", max_size=6)


def hashed(key: str) -> str:
    """What Redis takes the slot of: what is between the first { and the first } after it, unless that is nothing."""
    _, opened, rest = key.partition("{")
    tag, closed, _ = rest.partition("}")
    return tag if opened and closed and tag else key


@given(texts, texts)
def test_every_key_of_a_shard_is_in_its_slot(one: str, other: str) -> None:
    keys = ShardKeys(7, 16)
    made = [
        keys.meta,
        keys.events,
        keys.book(one),
        keys.free(one),
        keys.holders(one),
        keys.quarantine(one),
        keys.coupons(3, one),
        keys.lock(one, other),
        keys.idem(3, one, other),
    ]
    assert {key_slot(hashed(key)) for key in made} == {key_slot(shard_tag(7, 16))}
    assert len(set(made)) == len(made)
    assert all(key.startswith(keys.pattern.rstrip("*")) for key in made)


def test_what_is_of_one_tenant_is_of_no_other() -> None:
    keys = ShardKeys(0, 16)
    assert keys.idem(1, "b", "k") != keys.idem(2, "b", "k")
    assert keys.coupons(1, "u") != keys.coupons(2, "u")


def test_shards_share_no_key() -> None:
    assert len({ShardKeys(shard, 16).meta for shard in range(16)}) == 16


def test_each_installation_has_a_channel_of_its_own() -> None:
    assert positions_channel("a") != positions_channel("b")


numbers = st.integers(0, 2**53)


@given(st.lists(st.builds(ToldPosition, numbers, numbers, numbers, st.lists(texts, max_size=3)), max_size=4))
def test_a_message_comes_back_from_its_text_and_tells_of_each_shard(told: list[ToldPosition]) -> None:
    message = position_message(*told)
    assert parse_position_message(message) == told
    heard: list[tuple[object, ...]] = []
    listener = PositionListener("redis://127.0.0.1:1", lambda *one: heard.append(one))
    listener.on_message(["subscribe", "cb:positions:any", 1])
    listener.on_message(["message", "cb:positions:any", message])
    assert heard == told


@pytest.mark.parametrize("text", ["", "{}", "[[1,2,3]]", '[[1,2,"3",[]]]', "[[1,2,3,[4]]]"])
def test_no_other_text_is_a_message(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_position_message(text)
