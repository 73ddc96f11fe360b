"""What callers were answered, held against what the service says now, in its users' lists, its books and its replays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from coupon_svc.invariants.answers import Book, Coupon, History
from coupon_svc.invariants.check import Check


class ServiceCheck(Check):
    """What must hold of what the service says, given what callers were answered."""

    LISTED = "P2", "a coupon that was answered is not in its user's list"
    LISTED_SAME = "P1", "a coupon is listed with another book or user than was answered"
    REDEMPTION = "P2", "a redemption that was answered is not in the user's list"
    REDEMPTION_ASKED = "P5", "a coupon was redeemed, and nobody had asked for it"
    COUPON_ASKED = "P5", "a user holds a coupon that nobody had asked for"
    CODES_PER_USER = "P3", "a user holds more codes than the book allows"
    ASSIGN_AGAIN = "P5", "the answer to an assign sent again with its Idempotency-Key was another"
    REDEEM_AGAIN = "P5", "the answer to a redeem sent again with its Idempotency-Key was another"
    STATES = "P4", "a book's states do not add up to its total"
    TOTAL = "P4", "a book has not as many codes as were made"
    GIVEN = "P2", "a book counts fewer codes given than were answered"
    GIVEN_ASKED = "P5", "a book counts codes given that nobody asked for"
    SPENT = "P2", "a book counts fewer codes spent than were answered"
    SPENT_ASKED = "P5", "a book counts codes spent that nobody redeemed"


class Listed(msgspec.Struct, frozen=True):
    """A coupon in a user's list."""

    code: str
    book_id: str
    user_id: str
    redemptions_used: int


class Counts(msgspec.Struct, frozen=True):
    """How many codes of a book are in each state."""

    total: int
    available: int
    assigned: int
    redeemed: int
    quarantined: int


class ListCompared(NamedTuple):
    """What was found in a user's list: (check, book) -> how often. And the codes that it lacks."""

    found: Counter[tuple[ServiceCheck, str]]
    missing: list[str]


def compare_list(
    history: History, user_id: str, answered: Mapping[str, Coupon], listed: Sequence[Listed]
) -> ListCompared:
    """Hold the coupons that a user was answered, by code, against the user's list."""
    found: Counter[tuple[ServiceCheck, str]] = Counter()
    missing = []
    held = {coupon.code: coupon for coupon in listed if coupon.book_id in history.books}
    for code, mine in answered.items():
        now, told = held.get(code), len(mine.redemptions)
        if now is None:
            missing.append(code)
        elif (now.book_id, now.user_id) != (mine.book_id, user_id):
            found[ServiceCheck.LISTED_SAME, mine.book_id] += 1
        elif now.redemptions_used < told:
            found[ServiceCheck.REDEMPTION, mine.book_id] += 1
        elif now.redemptions_used > told + history.unknown_redeems[code]:
            found[ServiceCheck.REDEMPTION_ASKED, mine.book_id] += 1
    for book_id, number in Counter(coupon.book_id for coupon in held.values()).items():
        most = history.books[book_id].max_codes_per_user
        if number > history.held[book_id, user_id] + history.unknown_assigns[book_id, user_id]:
            found[ServiceCheck.COUPON_ASKED, book_id] += 1
        if most is not None and number > most:
            found[ServiceCheck.CODES_PER_USER, book_id] += 1
    return ListCompared(found, missing)


def compare_counts(
    history: History, book: Book, answered: Mapping[str, Coupon], counts: Counts
) -> Counter[ServiceCheck]:
    """Hold what was answered of a book, by code, against its counts. Returns by how much each is off."""
    most = book.max_redemptions_per_code
    spent = {code for code, coupon in answered.items() if most is not None and len(coupon.redemptions) >= most}
    perhaps = {code for code in history.unknown_redeems if code in answered}
    unknown = sum(number for (book_id, _), number in history.unknown_assigns.items() if book_id == book.book_id)
    states = counts.available + counts.assigned + counts.redeemed + counts.quarantined
    given = counts.assigned + counts.redeemed
    # Lost records of an ack = redis book are in quarantine; how many may be is bounded by it.
    lost_max = counts.quarantined if book.ack == "redis" else 0
    off = Counter({
        ServiceCheck.STATES: abs(states - counts.total),
        ServiceCheck.TOTAL: abs(counts.total - book.total),
        ServiceCheck.GIVEN: len(answered) - given - lost_max,
        ServiceCheck.GIVEN_ASKED: given - len(answered) - unknown,
        ServiceCheck.SPENT: len(spent) - counts.redeemed,
        ServiceCheck.SPENT_ASKED: counts.redeemed - len(spent | perhaps),
    })  # fmt: skip
    return +off  # those above 0


def same_answer(answer: bytes, before: bytes) -> bool:
    """Whether two answers say the same. What was not durable then may be durable now."""

    def told(body: bytes) -> Any:
        try:
            return {name: value for name, value in msgspec.json.decode(body).items() if name != "durable"}
        except (msgspec.DecodeError, AttributeError):
            return None

    return told(answer) is not None and told(answer) == told(before)
