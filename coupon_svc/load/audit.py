"""What the service says after a load, held against what it had answered before."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from random import Random
from typing import Any, TypeVar

import msgspec

from coupon_svc.domain.errors import CouponError
from coupon_svc.load.caller import JSON_HEADER, PUSHED_BACK, outcome_of, path_of
from coupon_svc.load.client import Connections, Reply
from coupon_svc.load.history import Book, History

USERS_READ_MAX = 5_000
LOST_NOTE = "records of an ack = redis book were lost in a disaster; their codes are quarantined, as promised"
_AT_ONCE = 32
_PATIENCE_S = 10.0
_ATTEMPT_PAUSE_S = 0.25

T = TypeVar("T")


class Broken(msgspec.Struct, frozen=True):
    """A promise that does not hold, and how often. It names a book, never a code, a user or a key."""

    what: str
    number: int
    book_id: str | None = None


class Verdict(msgspec.Struct):
    """What was held against what, and what was found."""

    checked: dict[str, int] = {}
    """what -> how many"""
    broken: list[Broken] = []
    unchecked: list[str] = []
    """what could not be looked at, and why"""
    notes: list[str] = []
    """what is allowed, and worth knowing"""

    @property
    def holds(self) -> bool:
        return not self.broken

    def find(self, what: str, number: int, book_id: str | None = None) -> None:
        """Note that a promise is broken so many times more; 0 is none."""
        for place, known in enumerate(self.broken):
            if (known.what, known.book_id) == (what, book_id):
                self.broken[place] = Broken(what, known.number + number, book_id)
                return
        if number:
            self.broken.append(Broken(what, number, book_id))

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


class _Held(msgspec.Struct, frozen=True):
    code: str
    book_id: str
    user_id: str
    status: str
    redemptions_used: int


class _Page(msgspec.Struct, frozen=True):
    coupons: list[_Held]
    next_cursor: str | None


class _Counts(msgspec.Struct, frozen=True):
    total: int
    available: int
    assigned: int
    redeemed: int
    quarantined: int


class _BookNow(msgspec.Struct, frozen=True):
    codes: _Counts


class _CodeNow(msgspec.Struct, frozen=True):
    status: str


class _Away(CouponError):
    """The service does not answer for now; the message is the outcome."""


class ServiceAudit:
    """Reads the service as its users do."""

    def __init__(self, connections: Connections, key: str, history: History, random: Random) -> None:
        self._connections = connections
        self._headers = b"authorization: Bearer %b\r\n" % key.encode()
        self._history = history
        self._random = random
        self.verdict = Verdict()

    async def audit(self) -> Verdict:
        """Look at everything; what cannot be read is named in the verdict, and nothing is raised."""
        for (what, book_id), number in sorted(self._history.broken.items()):
            self.verdict.find(what, number, book_id)
        self.verdict.checked["answers with a code, against each other"] = len(self._history.coupons)
        self.verdict.checked["answers with a redemption, against each other"] = self._history.redemptions
        for check in (self._doubts, self._users, self._replays, self._counts):
            try:
                await check()
            except _Away as away:
                self.verdict.unchecked.append(f"the service does not answer ({away}); the audit is not complete")
                return self.verdict
        return self.verdict

    # -- users' coupons -----------------------------------------------------------------------------------------------

    async def _users(self) -> None:
        of_user: dict[str, dict[str, int]] = {}
        for code, coupon in self._history.coupons.items():
            of_user.setdefault(coupon.user_id, {})[code] = len(coupon.redemptions)
        for _, user_id in self._history.unknown_assigns:
            of_user.setdefault(user_id, {})
        users = list(of_user)
        if len(users) > USERS_READ_MAX:
            users = self._random.sample(users, USERS_READ_MAX)
        await self._at_once(users, lambda user: self._user(user, of_user[user]))
        self.verdict.checked[f"lists of a user's coupons, of {len(of_user):,} users"] = len(users)

    async def _user(self, user_id: str, answered: dict[str, int]) -> None:
        history = self._history
        held = {coupon.code: coupon for coupon in await self._coupons(user_id) if coupon.book_id in history.books}
        for code, redemptions in answered.items():
            mine = history.coupons[code]
            now = held.get(code)
            if now is None:
                await self._missing(code)
            elif (now.book_id, now.user_id) != (mine.book_id, user_id):
                self.verdict.find("a coupon is listed with another book or user than was answered", 1, mine.book_id)
            elif now.redemptions_used < redemptions:
                self.verdict.find("a redemption that was answered is not in the user's list", 1, mine.book_id)
            elif now.redemptions_used > redemptions + history.unknown_redeems[code]:
                self.verdict.find("a coupon was redeemed, and nobody had asked for it", 1, mine.book_id)
        for book_id, book in history.books.items():
            number = sum(coupon.book_id == book_id for coupon in held.values())
            told = history.held[book_id, user_id]
            if number > told + history.unknown_assigns[book_id, user_id]:
                self.verdict.find("a user holds a coupon that nobody had asked for", 1, book_id)
            if book.max_codes_per_user is not None and number > book.max_codes_per_user:
                self.verdict.find("a user holds more codes than the book allows", 1, book_id)

    async def _coupons(self, user_id: str) -> list[_Held]:
        coupons: list[_Held] = []
        cursor = b""
        while True:
            path = b"/users/%b/coupons?limit=1000%b" % (path_of(user_id), cursor)
            page = await self._read(path, _Page)
            coupons += page.coupons
            if page.next_cursor is None:
                return coupons
            cursor = b"&cursor=" + path_of(page.next_cursor)

    async def _missing(self, code: str) -> None:
        """A coupon that was answered is not in its user's list."""
        coupon = self._history.coupons[code]
        if coupon.redemptions or not await self._lost(code):
            self.verdict.find("a coupon that was answered is not in its user's list", 1, coupon.book_id)

    # -- what a disaster may take -------------------------------------------------------------------------------------

    async def _doubts(self) -> None:
        """What is broken, unless a disaster took the record of one of these codes."""
        for doubt in self._history.doubts:
            lost = [await self._lost(code) for code in doubt.codes]
            self.verdict.find(doubt.what, 0 if any(lost) else 1, doubt.book_id)

    async def _lost(self, code: str) -> bool:
        """Whether the record of an assign was lost in a way that is allowed: its book does not wait for the ledger, and the
        code is dealt to nobody else."""
        coupon = self._history.coupons[code]
        if coupon.durable or self._history.books[coupon.book_id].ack != "redis":
            return False
        if (await self._read(b"/coupons/codes/" + path_of(code), _CodeNow)).status != "quarantined":
            return False
        self.verdict.note(LOST_NOTE)
        return True

    # -- replays ------------------------------------------------------------------------------------------------------

    async def _replays(self) -> None:
        """The same Idempotency-Key still gives the same answer."""

        async def again(number: int) -> None:
            kept = self._history.replays[number]
            headers = self._headers + JSON_HEADER + kept.headers
            reply = await self._patiently(lambda: self._connections.send(b"POST", kept.path, headers, kept.request))
            if reply.status == 0 or reply.status >= 500:
                raise _Away(outcome_of(reply))
            if reply.status < 300 and _same(reply.body, kept.answer):
                return
            before = msgspec.json.decode(kept.answer)
            if kept.verb == "redeem" or not await self._lost(before["code"]):
                article = "an" if kept.verb == "assign" else "a"
                what = f"the answer to {article} {kept.verb} sent again with its Idempotency-Key was another"
                self.verdict.find(what, 1, before["book_id"])

        await self._at_once(range(len(self._history.replays)), again)
        self.verdict.checked["requests with an Idempotency-Key, sent once more"] = len(self._history.replays)

    # -- books --------------------------------------------------------------------------------------------------------

    async def _counts(self) -> None:
        history = self._history
        for book_id, book in history.books.items():
            codes = (await self._read(b"/coupons/" + book_id.encode(), _BookNow)).codes
            self._judge_counts(book, codes)
        self.verdict.checked["books' counts"] = len(history.books)

    def _judge_counts(self, book: Book, codes: _Counts) -> None:
        history, most = self._history, book.max_redemptions_per_code
        coupons = {code: coupon for code, coupon in history.coupons.items() if coupon.book_id == book.book_id}
        spent = {code for code, coupon in coupons.items() if most is not None and len(coupon.redemptions) >= most}
        unknown = sum(number for (book_id, _), number in history.unknown_assigns.items() if book_id == book.book_id)
        perhaps = {code for code in history.unknown_redeems if code in coupons}
        states = codes.available + codes.assigned + codes.redeemed + codes.quarantined
        self.verdict.find("a book's states do not add up to its total", abs(states - codes.total), book.book_id)
        self.verdict.find("a book has not as many codes as were made", abs(codes.total - book.total), book.book_id)
        given = codes.assigned + codes.redeemed
        # Lost records of an ack = redis book are in quarantine; how many may be is bounded by it.
        missing = max(0, len(coupons) - given - (codes.quarantined if book.ack == "redis" else 0))
        self.verdict.find("a book counts fewer codes given than were answered", missing, book.book_id)
        self.verdict.find(
            "a book counts codes given that nobody asked for", max(0, given - len(coupons) - unknown), book.book_id
        )
        self.verdict.find(
            "a book counts fewer codes spent than were answered", max(0, len(spent) - codes.redeemed), book.book_id
        )
        extra = max(0, codes.redeemed - len(spent | perhaps))
        self.verdict.find("a book counts codes spent that nobody redeemed", extra, book.book_id)

    # -- asking -------------------------------------------------------------------------------------------------------

    async def _read(self, path: bytes, kind: type[T]) -> T:
        """Raises _Away when the service has not answered after _PATIENCE_S, or not in the form that it should."""
        reply = await self._patiently(lambda: self._connections.send(b"GET", path, self._headers))
        if reply.status != 200:
            raise _Away(outcome_of(reply))
        try:
            return msgspec.json.decode(reply.body, type=kind)
        except msgspec.DecodeError:
            raise _Away("unreadable_answer") from None

    async def _patiently(self, ask: Callable[[], Awaitable[Reply]]) -> Reply:
        now = asyncio.get_running_loop().time
        deadline = now() + _PATIENCE_S
        while True:
            reply = await ask()
            again = reply.status in PUSHED_BACK or outcome_of(reply) == "idempotency_in_progress"
            if not again or now() > deadline:
                return reply
            await asyncio.sleep(_ATTEMPT_PAUSE_S)

    async def _at_once(self, things: Sequence[T], check: Callable[[T], Awaitable[None]]) -> None:
        """Check all of them, some at a time. Raises the first _Away."""
        left = iter(things)

        async def some() -> None:
            for thing in left:
                await check(thing)

        await asyncio.gather(*(some() for _ in range(_AT_ONCE)))


def _same(answer: bytes, before: bytes) -> bool:
    """Whether two answers say the same. What was not durable then may be durable now."""

    def told(body: bytes) -> Any:
        try:
            return {name: value for name, value in msgspec.json.decode(body).items() if name != "durable"}
        except (msgspec.DecodeError, AttributeError):
            return None

    return told(answer) is not None and told(answer) == told(before)
