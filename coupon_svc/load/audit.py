"""What the service says after a load, held against what it had answered before."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from random import Random
from typing import TypeVar

import msgspec

from coupon_svc.domain.errors import CouponError
from coupon_svc.invariants.answers import Coupon, History
from coupon_svc.invariants.service import Counts, Listed, ServiceCheck, compare_counts, compare_list, same_answer
from coupon_svc.load.caller import JSON_HEADER, PUSHED_BACK, outcome_of, path_of
from coupon_svc.load.client import Connections, Reply

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


class _Page(msgspec.Struct, frozen=True):
    coupons: list[Listed]
    next_cursor: str | None


class _BookNow(msgspec.Struct, frozen=True):
    codes: Counts


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
        of_user: dict[str, dict[str, Coupon]] = {}
        for code, coupon in self._history.coupons.items():
            of_user.setdefault(coupon.user_id, {})[code] = coupon
        for _, user_id in self._history.unknown_assigns:
            of_user.setdefault(user_id, {})
        users = list(of_user)
        if len(users) > USERS_READ_MAX:
            users = self._random.sample(users, USERS_READ_MAX)
        await self._at_once(users, lambda user: self._user(user, of_user[user]))
        self.verdict.checked[f"lists of a user's coupons, of {len(of_user):,} users"] = len(users)

    async def _user(self, user_id: str, answered: dict[str, Coupon]) -> None:
        compared = compare_list(self._history, user_id, answered, await self._coupons(user_id))
        for (check, book_id), number in compared.found.items():
            self.verdict.find(check, number, book_id)
        for code in compared.missing:
            if answered[code].redemptions or not await self._lost(code):
                self.verdict.find(ServiceCheck.LISTED, 1, answered[code].book_id)

    async def _coupons(self, user_id: str) -> list[Listed]:
        coupons: list[Listed] = []
        cursor = b""
        while True:
            path = b"/users/%b/coupons?limit=1000%b" % (path_of(user_id), cursor)
            page = await self._read(path, _Page)
            coupons += page.coupons
            if page.next_cursor is None:
                return coupons
            cursor = b"&cursor=" + path_of(page.next_cursor)

    # -- what a disaster may take -------------------------------------------------------------------------------------

    async def _doubts(self) -> None:
        """What is broken, unless a disaster took the record of one of these codes."""
        for doubt in self._history.doubts:
            lost = [await self._lost(code) for code in doubt.codes]
            self.verdict.find(doubt.check, 0 if any(lost) else 1, doubt.book_id)

    async def _lost(self, code: str) -> bool:
        """Whether the loss of an assign's record is allowed: its book does not wait for the ledger, and nobody else gets the
        code."""
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
            if reply.status < 300 and same_answer(reply.body, kept.answer):
                return
            before = msgspec.json.decode(kept.answer)
            if kept.verb == "redeem" or not await self._lost(before["code"]):
                check = ServiceCheck.ASSIGN_AGAIN if kept.verb == "assign" else ServiceCheck.REDEEM_AGAIN
                self.verdict.find(check, 1, before["book_id"])

        await self._at_once(range(len(self._history.replays)), again)
        self.verdict.checked["requests with an Idempotency-Key, sent once more"] = len(self._history.replays)

    # -- books --------------------------------------------------------------------------------------------------------

    async def _counts(self) -> None:
        history = self._history
        for book_id, answered in history.by_book().items():
            counts = (await self._read(b"/coupons/" + book_id.encode(), _BookNow)).codes
            for check, number in compare_counts(history, history.books[book_id], answered, counts).items():
                self.verdict.find(check, number, book_id)
        self.verdict.checked["books' counts"] = len(history.books)

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
