"""A list whose users fare differently: what is told of each, and when the list is refused as a whole."""

from __future__ import annotations

from typing import Any

import pytest

from coupon_svc.domain.outcomes import Outcome, Refused
from coupon_svc.redis.contract import Reply
from coupon_svc.redis.data_plane import DataPlane
from coupon_svc.redis.scripts import Scripts
from coupon_svc.redis.shard_view import ShardView
from coupon_svc.service.assign import LIST_PIECE, AssignCoupons, Assigned, Assigning
from coupon_svc.service.durability import Durability
from coupon_svc.service.idempotency import Idempotency

USERS = [f"u{number}" for number in range(LIST_PIECE + 8)]


class Refusing(DataPlane):
    """Raises for each user what it is told to, and for all others that the book is paused."""

    def __init__(self, raised: dict[str, Exception]) -> None:
        super().__init__("redis://127.0.0.1:1", 1, Scripts())
        self._raised = raised

    async def call(self, name: str, view: ShardView, until: float = 0.0, /, **parameters: Any) -> Reply:
        raise self._raised.get(parameters["user_id"]) or Refused(Outcome.BOOK_PAUSED)


async def outcomes(
    raised: dict[str, Exception], key: str = "list-1", *, gone: bool = False
) -> list[Assigned | Refused]:
    plane, nobody = Refusing(raised), Any
    assigning = Assigning(plane, nobody, nobody, Durability(plane, 5_000), nobody)  # type: ignore[arg-type]
    wanted = AssignCoupons(1, "bk_000123456789abcdef", USERS, Idempotency(key, "f"))
    return await assigning.assign_coupons(wanted, lambda: gone)


@pytest.mark.parametrize("key", ["", "list-1"])
async def test_what_is_the_same_for_all_refuses_the_list(key: str) -> None:
    with pytest.raises(Refused) as refusal:
        await outcomes({}, key)
    assert refusal.value.outcome is Outcome.BOOK_PAUSED


async def test_a_list_of_which_nobody_was_asked_for_is_refused_as_a_whole() -> None:
    with pytest.raises(Refused) as refusal:
        await outcomes({}, gone=True)
    assert refusal.value.outcome is Outcome.STORE_UNAVAILABLE


async def test_who_could_not_be_asked_is_not_told_that_the_book_is_paused() -> None:
    """That would be final, and that user may have a code under this key."""
    *others, last = await outcomes({USERS[-1]: Refused(Outcome.BACKLOG_FULL)})
    assert {one.outcome for one in others if isinstance(one, Refused)} == {Outcome.BOOK_PAUSED}
    assert isinstance(last, Refused)
    assert last.outcome is Outcome.BACKLOG_FULL


async def test_an_error_of_one_user_is_told_with_its_cause_and_of_nobody_else() -> None:
    error = KeyError()
    first, second, *_ = await outcomes({USERS[0]: error})
    assert isinstance(first, Refused)
    assert (first.outcome, first.__cause__) == (Outcome.INTERNAL_ERROR, error)
    assert isinstance(second, Refused)
    assert second.outcome is Outcome.BOOK_PAUSED
