"""What callers do: a scenario's journey is what one of them does from its arrival to its end.

A journey returns whether it went well with the service: False when it was refused for a while (429, 5xx) or had no answer.
All its choices come from the seed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from random import Random

from coupon_svc.invariants.answers import AnswerCheck, Assigned, Book
from coupon_svc.load.caller import Caller, path_of
from coupon_svc.load.plan import Plan

LOCK_TTL_S = 1
_LOCK_ENDED_S = 1.2
_ATTEMPTS_MAX = 30
_ATTEMPT_PAUSE_S = 0.05
_REMEMBERED_MAX = 1_000


class Scenario:
    """The flash sale, and what all have in common: everybody wants a code of one book, some of them twice."""

    max_codes_per_user: int | None = 1
    max_redemptions_per_code: int | None = 1

    def __init__(self, plan: Plan, caller: Caller, books: list[Book], run_id: str) -> None:
        self._caller = caller
        self._books = books
        self._random = Random(plan.seed)
        self._run_id = run_id
        self._arrived = 0

    @property
    def finished(self) -> bool:
        """Whether nobody is left who could arrive."""
        return False

    async def journey(self, due: float) -> bool:
        """One caller, who was due to arrive at this moment of the loop's clock."""
        again = self._arrived and self._random.random() < 0.05
        user = self._user(self._random.randrange(self._arrived)) if again else self._new_user()
        answer = await self._caller.assign(self._random.choice(self._books).book_id, user, due=due)
        return not answer.pushed_back

    def _new_user(self) -> str:
        self._arrived += 1
        return self._user(self._arrived - 1)

    def _user(self, number: int) -> str:
        return f"load-{self._run_id}-{number}"


class Checkout(Scenario):
    """Assign, lock, redeem. Some leave after the assign, some with the lock held, some come back when it has expired; some
    click twice."""

    async def journey(self, due: float) -> bool:
        caller, user, dice = self._caller, self._new_user(), self._random.random()
        second_click = self._random.random() < 0.05
        assigned = await caller.assign(self._random.choice(self._books).book_id, user, f"assign-{user}", due)
        if assigned.value is None:
            return not assigned.pushed_back
        if dice < 0.10:  # leaves
            return True
        coupon: Assigned = assigned.value
        short = dice < 0.15
        locked = await caller.lock(coupon, LOCK_TTL_S if short else 120)
        if locked.value is None:
            return not locked.pushed_back
        token: str = locked.value.lock_token
        if second_click and not short and (await caller.lock(coupon, 120)).value is not None:
            caller.history.breaks(AnswerCheck.ONE_LOCK, coupon.book_id)
        if dice < 0.15:  # pays too late
            await asyncio.sleep(_LOCK_ENDED_S)
            late = await caller.redeem(coupon, token, f"late-{user}")
            if late.value is not None:
                caller.history.breaks(AnswerCheck.LOCK_EXPIRED, coupon.book_id)
            return not (await caller.redeem(coupon, None, f"redeem-{user}")).pushed_back
        if dice < 0.25:  # leaves while holding the lock
            return True
        if dice < 0.30:  # the card is declined
            return not (await caller.unlock(coupon.code, token)).pushed_back
        redeemed = await caller.redeem(coupon, token, f"redeem-{user}")
        if second_click:
            await caller.redeem(coupon, token, f"again-{user}")
        return not redeemed.pushed_back


class Retries(Scenario):
    """Callers whose answers get lost. Each assigns three times at once with one Idempotency-Key, then twice more. Then it
    redeems three times at once, and once more."""

    async def journey(self, due: float) -> bool:
        caller, user = self._caller, self._new_user()
        book_id = self._random.choice(self._books).book_id
        key = f"assign-{user}"
        answers = [*await asyncio.gather(*(caller.assign(book_id, user, key, due) for _ in range(3)))]
        answers += [await caller.assign(book_id, user, key) for _ in range(2)]
        coupon = next((answer.value for answer in answers if answer.value is not None), None)
        if coupon is None:
            return not answers[-1].pushed_back
        key = f"redeem-{user}"
        await asyncio.gather(*(caller.redeem(coupon, None, key) for _ in range(3)))
        return not (await caller.redeem(coupon, None, key)).pushed_back


class Mixed(Scenario):
    """Many books, a few of them much liked; callers assign, redeem, and look at what is theirs."""

    max_codes_per_user = None
    max_redemptions_per_code = 3

    def __init__(self, plan: Plan, caller: Caller, books: list[Book], run_id: str) -> None:
        super().__init__(plan, caller, books, run_id)
        self._weights = [1 / rank for rank in range(1, len(books) + 1)]
        self._coupons: list[Assigned] = []

    async def journey(self, due: float) -> bool:
        dice = self._random.random()
        if dice < 0.55 or not self._coupons:
            return await self._assign(due)
        coupon = self._random.choice(self._coupons)
        if dice < 0.70:
            locked = await self._caller.lock(coupon, LOCK_TTL_S, due)
            if locked.value is None:
                return not locked.pushed_back
            return not (await self._caller.redeem(coupon, locked.value.lock_token)).pushed_back
        if dice < 0.80:
            return not (await self._caller.assign_code(coupon, due)).pushed_back
        verb, path = {
            0: ("list_coupons", b"/users/%b/coupons" % path_of(coupon.user_id)),
            1: ("read_code", b"/coupons/codes/" + path_of(coupon.code)),
            2: ("read_book", b"/coupons/" + coupon.book_id.encode()),
        }[self._random.choices((0, 1, 2), (2, 1, 1))[0]]
        return (await self._caller.read(verb, path, due)).status == 200

    async def _assign(self, due: float) -> bool:
        returning = self._coupons and self._random.random() < 0.3
        user = self._random.choice(self._coupons).user_id if returning else self._new_user()
        book = self._random.choices(self._books, self._weights)[0]
        answer = await self._caller.assign(book.book_id, user, due=due)
        if answer.value is not None:
            if len(self._coupons) < _REMEMBERED_MAX:
                self._coupons.append(answer.value)
            else:
                self._coupons[self._random.randrange(_REMEMBERED_MAX)] = answer.value
        return not answer.pushed_back


class Campaign(Scenario):
    """Everybody on a list gets one code: each is asked for until the answer is definite, with one Idempotency-Key."""

    def __init__(self, plan: Plan, caller: Caller, books: list[Book], run_id: str) -> None:
        super().__init__(plan, caller, books, run_id)
        self._list: Iterator[str] | None = iter(plan.users) if plan.users is not None else None
        self.left = len(plan.users) if plan.users is not None else plan.books * plan.codes
        """Users of the list whose turn has not come."""
        self.wanted = 0
        self.served = 0

    @property
    def finished(self) -> bool:
        return self.left == 0

    async def journey(self, due: float) -> bool:
        if self.left == 0:
            return True
        self.left -= 1
        self.wanted += 1
        user = next(self._list) if self._list is not None else self._new_user()
        book_id = self._books[(self.wanted - 1) % len(self._books)].book_id
        key, since = f"campaign-{self._run_id}-{self.wanted}", due
        for _ in range(_ATTEMPTS_MAX):
            answer = await self._caller.assign(book_id, user, key, since)
            if answer.value is not None:
                self.served += 1
                return True
            if not answer.pushed_back and answer.outcome != "idempotency_in_progress":
                return True
            await asyncio.sleep(min(1.0, answer.retry_after_s) or _ATTEMPT_PAUSE_S)
            since = asyncio.get_running_loop().time()
        return False


_KINDS: dict[str, type[Scenario]] = {
    "flash-sale": Scenario,
    "checkout": Checkout,
    "retries": Retries,
    "mixed": Mixed,
    "campaign": Campaign,
}


def scenario_class(name: str) -> type[Scenario]:
    """The scenario of this name, one of plan.SCENARIOS."""
    return _KINDS[name]
