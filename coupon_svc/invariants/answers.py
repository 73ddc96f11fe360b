"""What callers were answered, and what in it contradicts itself: a promise broken is found when it is broken.

Only answers count. A request without one, or answered `outcome_unknown`, may have had its effect: it is noted as
`unknown`. An effect that nobody was told of is allowed where such a request could have had it.
"""

from __future__ import annotations

from collections import Counter
from random import Random

import msgspec

from coupon_svc.invariants.check import Check

REPLAYS_KEPT_MAX = 2_000
"""Requests with an Idempotency-Key that are kept to be sent once more by the audit."""

DOUBTS_MAX = 1_000


class AnswerCheck(Check):
    """What must hold of answers, told from them alone."""

    ASKED = "P1", "an assign was answered with another book or user than was asked for"
    DURABLE_ASSIGN = "P2", "an assign of an ack = ledger book was answered before it was durable"
    DURABLE_REDEEM = "P2", "a redeem was answered before it was durable"
    ONE_EFFECT = "P5", "one Idempotency-Key had two effects"
    ONE_USER = "P1", "a code was given to two users"
    ONE_ASSIGN = "P1", "a code was assigned twice"
    CODES_PER_USER = "P3", "a user was given more codes than the book allows"
    HOLDER = "P1", "a redemption names another book or user than the assign did"
    ONE_USE = "P3", "one use of a code was redeemed twice"
    USES_MAX = "P3", "a code was redeemed more often than its book allows"
    ONE_LOCK = "P3", "a lock was given while another held it"
    LOCK_EXPIRED = "P3", "a lock that had expired was honoured"


class Book(msgspec.Struct, frozen=True):
    """A book that the load has made, with the rules it asked for."""

    book_id: str
    ack: str
    total: int
    max_codes_per_user: int | None
    max_redemptions_per_code: int | None


# Without gc: there may be millions of these, none in a cycle, and a collector looking at all of them is a stall of ours.
class Assigned(msgspec.Struct, frozen=True, gc=False):
    """An answer to an assign, as far as it is judged."""

    code: str
    book_id: str
    user_id: str
    position: str
    durable: bool


class Redeemed(msgspec.Struct, frozen=True, gc=False):
    """An answer to a redeem, as far as it is judged."""

    redemption_id: str
    code: str
    book_id: str
    user_id: str
    redemptions_used: int
    position: str
    durable: bool


class Coupon(msgspec.Struct, gc=False):
    """A code that was answered as assigned, and its redemptions: which use -> its answer."""

    book_id: str
    user_id: str
    position: str
    durable: bool
    redemptions: dict[int, Redeemed] = {}


class Doubt(msgspec.Struct, frozen=True):
    """What is broken, unless a disaster took the record of one of the codes: then an `ack = redis` book may do so."""

    check: AnswerCheck
    book_id: str
    codes: list[str]


class Replay(msgspec.Struct, frozen=True, gc=False):
    """A request that was answered, and must be answered the same again."""

    verb: str
    path: bytes
    headers: bytes
    request: bytes
    answer: bytes


class History:
    """All that one load was answered."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._replays_seen = 0
        self.books: dict[str, Book] = {}
        self.coupons: dict[str, Coupon] = {}
        self.broken: Counter[tuple[AnswerCheck, str]] = Counter()
        """(check, book) -> how often"""
        self.unknown_assigns: Counter[tuple[str, str]] = Counter()
        """(book, user) -> requests that may have had their effect"""
        self.unknown_redeems: Counter[str] = Counter()
        """by code"""
        self.doubts: list[Doubt] = []
        self.replays: list[Replay] = []
        self.held: Counter[tuple[str, str]] = Counter()
        """(book, user) -> codes answered as theirs"""
        self._assigned_by: dict[tuple[str, str], str] = {}
        """(book, key) -> code"""
        self._redeemed_by: dict[tuple[str, str], str] = {}
        """(book, key) -> redemption"""

    def breaks(self, check: AnswerCheck, book_id: str) -> None:
        """A promise was seen broken."""
        self.broken[check, book_id] += 1

    def assigned(self, book_id: str, user_id: str, answer: Assigned, key: str | None = None) -> None:
        """An assign, or the replay of one, was answered with a code."""
        book = self.books[book_id]
        if (answer.book_id, answer.user_id) != (book_id, user_id):
            self.breaks(AnswerCheck.ASKED, book_id)
            return
        if book.ack == "ledger" and not answer.durable:
            self.breaks(AnswerCheck.DURABLE_ASSIGN, book_id)
        if key is not None:
            first = self._assigned_by.setdefault((book_id, key), answer.code)
            if first != answer.code:
                self._doubt(AnswerCheck.ONE_EFFECT, book_id, codes=[first])
        coupon = self.coupons.get(answer.code)
        if coupon is None:
            self.coupons[answer.code] = Coupon(book_id, user_id, answer.position, answer.durable)
            self.held[book_id, user_id] += 1
            if book.max_codes_per_user is not None and self.held[book_id, user_id] > book.max_codes_per_user:
                self._doubt(AnswerCheck.CODES_PER_USER, book_id, user_id=user_id)
        elif (coupon.book_id, coupon.user_id) != (book_id, user_id):
            self.breaks(AnswerCheck.ONE_USER, book_id)
        elif coupon.position != answer.position:
            self.breaks(AnswerCheck.ONE_ASSIGN, book_id)

    def redeemed(self, answer: Redeemed, key: str | None = None) -> None:
        """A redeem, or the replay of one, was answered."""
        coupon = self.coupons.get(answer.code)
        if coupon is None or (coupon.book_id, coupon.user_id) != (answer.book_id, answer.user_id):
            self.breaks(AnswerCheck.HOLDER, answer.book_id)
            return
        if not answer.durable:
            self.breaks(AnswerCheck.DURABLE_REDEEM, answer.book_id)
        if key is not None:
            first = self._redeemed_by.setdefault((answer.book_id, key), answer.redemption_id)
            if first != answer.redemption_id:
                self.breaks(AnswerCheck.ONE_EFFECT, answer.book_id)
        known = coupon.redemptions.setdefault(answer.redemptions_used, answer)
        if known.redemption_id != answer.redemption_id or known.position != answer.position:
            self.breaks(AnswerCheck.ONE_USE, answer.book_id)
        most = self.books[answer.book_id].max_redemptions_per_code
        if most is not None and answer.redemptions_used > most:
            self.breaks(AnswerCheck.USES_MAX, answer.book_id)

    def keep_for_replay(self, replay: Replay) -> None:
        """Keep a request with its answer; when there are enough, in the place of another, so that all have one chance."""
        self._replays_seen += 1
        if len(self.replays) < REPLAYS_KEPT_MAX:
            self.replays.append(replay)
        elif (place := self._random.randrange(self._replays_seen)) < REPLAYS_KEPT_MAX:
            self.replays[place] = replay

    def _doubt(
        self, check: AnswerCheck, book_id: str, *, codes: list[str] | None = None, user_id: str | None = None
    ) -> None:
        """A promise was seen broken, unless one of the codes, or of the user's, was lost as it may be."""
        if self.books[book_id].ack == "ledger" or len(self.doubts) >= DOUBTS_MAX:
            self.breaks(check, book_id)
            return
        if codes is None:
            mine = (book_id, user_id)
            codes = [code for code, coupon in self.coupons.items() if (coupon.book_id, coupon.user_id) == mine]
        self.doubts.append(Doubt(check, book_id, codes))

    def by_book(self) -> dict[str, dict[str, Coupon]]:
        """The answered coupons of each book, by code."""
        books: dict[str, dict[str, Coupon]] = {book_id: {} for book_id in self.books}
        for code, coupon in self.coupons.items():
            books[coupon.book_id][code] = coupon
        return books

    @property
    def redemptions(self) -> int:
        return sum(len(coupon.redemptions) for coupon in self.coupons.values())

    @property
    def unknown(self) -> int:
        return self.unknown_assigns.total() + self.unknown_redeems.total()
