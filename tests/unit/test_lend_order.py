"""The places of codes: in which order they are lent is drawn, and late uploads are mixed in."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from coupon_svc.postgres.lend_order import (
    CODES_PER_PLACE_MAX,
    PLACES_PER_CODE_MIN,
    ROUND,
    places_end,
    random_places,
    spread_factor,
)
from coupon_svc.postgres.lending import computed_share


@given(st.integers(0, 2**40), st.integers(1, 2**40), st.integers(0, 20))
def test_places_are_above_what_is_lent_and_up_to_the_end(above: int, room: int, count: int) -> None:
    places = random_places(count, above, above + room)
    assert len(places) == count
    assert all(above < place <= above + room for place in places)


def test_the_ends_of_the_room_are_drawn_too() -> None:
    assert set(random_places(200, 10, 12)) == {11, 12}


def test_every_part_of_the_room_is_alike_likely() -> None:
    """Each quarter of 4,000 places has 1,000, give or take seven standard deviations."""
    quarters = [0] * 4
    for place in random_places(4000, 0, ROUND):
        quarters[(place - 1) * 4 // ROUND] += 1
    assert all(abs(number - 1000) < 200 for number in quarters), quarters


def test_a_few_codes_are_spread_before_they_crowd() -> None:
    assert spread_factor(PLACES_PER_CODE_MIN * 100, 100) == 1
    assert spread_factor(PLACES_PER_CODE_MIN * 100 - 1, 100) == ROUND // (PLACES_PER_CODE_MIN * 100 - 1)
    assert spread_factor(0, 1) == ROUND


def test_many_codes_share_places_before_new_ones_get_a_round_of_their_own() -> None:
    assert places_end(0, ROUND, ROUND * CODES_PER_PLACE_MAX) == ROUND
    assert places_end(0, ROUND, ROUND * CODES_PER_PLACE_MAX + 1) == 2 * ROUND
    assert places_end((1 << 32) - 1_000, 1 << 32, 16_001) == 1 << 33


@given(st.integers(0, 200), st.integers(0, 300), st.integers(0, 300))
def test_a_share_takes_no_more_of_either_kind_than_is_left(count: int, stored: int, computed: int) -> None:
    share = computed_share(count, stored, computed)
    assert 0 <= share <= computed
    assert min(count, stored + computed) - share <= stored


def test_computed_codes_are_drawn_as_if_all_had_been_shuffled_together() -> None:
    """Of 2,000 codes, a quarter of them computed, 400 have 100 that are, give or take seven standard deviations."""
    drawn = [computed_share(400, 1_500, 500) for _ in range(50)]
    assert len(set(drawn)) > 1
    assert abs(sum(drawn) / len(drawn) - 100) < 8
