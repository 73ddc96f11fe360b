"""The random order in which a book's codes are lent: each has a place, and `leased_upto` of its book moves up over them."""

from __future__ import annotations

import os
import struct

ROUND = 1 << 32
PLACES_PER_CODE_MIN = 64
"""Beyond it the codes of a book are spread over more places, if it takes no longer than a piece. Where that is too many
codes, they share places."""
CODES_PER_PLACE_MAX = 16
UNPLACED_FROM = -(1 << 40)
"""Places from here up to -2 are of codes whose upload has not come to its end: nobody sees, lends or counts them yet."""


def random_places(count: int, above: int, upto: int) -> list[int]:
    """Places in (above, upto], each alike likely, from the system's CSPRNG."""
    numbers = struct.unpack(f"<{count}Q", os.urandom(8 * count))
    return [above + 1 + (number * (upto - above) >> 64) for number in numbers]


def spread_factor(places: int, codes: int) -> int:
    """By how much the places of so many codes are to be spread, when they share so few. They do in a book that is topped up
    again and again before it runs dry. 1 where they have room."""
    return 1 if places >= PLACES_PER_CODE_MIN * codes else ROUND // max(1, places)


def places_end(leased_upto: int, places_upto: int, codes: int) -> int:
    """Where the places of new codes end, given that more codes than can be spread have places between these two: further up
    when too many share a place. Those that are there then come before most of the new ones."""
    crowded = (places_upto - leased_upto) * CODES_PER_PLACE_MAX < codes
    return places_upto + ROUND if crowded else places_upto
