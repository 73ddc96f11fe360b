"""How one call of a script ends, whatever Redis replies: observed, refused, put in doubt."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from coupon_svc.domain.outcomes import Outcome, Refused
from coupon_svc.redis.data_plane import DataPlane
from coupon_svc.redis.errors import NotSent, OutcomeUnknown, ReplyError
from coupon_svc.redis.scripts import Scripts
from coupon_svc.redis.shard_view import Certificate, ShardView, ViewState

SCRIPTS = Scripts()
BOOK = "bk_000123456789abcdef"
ASSIGNED = ["ok", "A-1", "5", "4-21", "redis", ""]


class FakeRedis:
    """A connection whose replies are known: each a list, or an error."""

    def __init__(self, *replies: Any) -> None:
        self.replies = [list(reply) if isinstance(reply, list) else reply for reply in replies]
        self.sent: list[tuple[Any, ...]] = []

    def send(self, *command: Any) -> asyncio.Future[Any]:
        self.sent.append(command)
        reply = self.replies.pop(0) if self.replies else ["ok"]
        if isinstance(reply, NotSent):
            raise reply
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        answer: Any = future.set_exception if isinstance(reply, OutcomeUnknown) else future.set_result
        loop.call_soon(answer, reply)
        return future

    def ran(self, name: str) -> list[tuple[Any, ...]]:
        """The commands that ran this script."""
        return [command for command in self.sent if command[1] == SCRIPTS[name].sha]


def plane_on(redis: FakeRedis) -> DataPlane:
    """A data plane with one open shard, in epoch 4, that was seen up to seq 20."""
    plane = DataPlane("redis://127.0.0.1:1", 1, SCRIPTS)
    plane._connection = redis  # type: ignore[assignment]
    plane.views[0].certify(Certificate(4, 20, committed=0, backlog_max=100), plane.views[0].seen)
    return plane


async def assign(plane: DataPlane, **more: Any) -> Any:
    return await plane.call("assign_coupon", plane.views[0], tenant_id=1, book_id=BOOK, user_id="ann", **more)


async def refused(plane: DataPlane, **more: Any) -> Outcome:
    with pytest.raises(Refused) as refusal:
        await assign(plane, **more)
    return refusal.value.outcome


async def test_a_script_is_sent_with_the_epoch_and_what_was_seen() -> None:
    redis = FakeRedis(ASSIGNED)
    await assign(plane_on(redis))
    (command,) = redis.ran("assign_coupon")
    keys = int(command[2])
    assert command[3 + keys : 3 + keys + 2] == (4, 20)


async def test_a_position_is_observed_before_anybody_can_wait_for_it() -> None:
    plane = plane_on(FakeRedis(ASSIGNED))
    await assign(plane)
    assert plane.seen() == [(0, (4, 21))]


async def test_holders_are_observed_as_well() -> None:
    holders = ["4-1/4-33 1 5 ann", "", "quarantined", "4-30 0 5 bob"]
    plane = plane_on(FakeRedis(["ok", "9", "redis", "", holders, [-2] * 4, "active"]))
    await plane.call(
        "read_codes", plane.views[0], read_only=True, tenant_id=1, book_id=BOOK, codes=["A", "B", "C", "D"]
    )
    assert plane.seen() == [(0, (4, 33))]


@pytest.mark.parametrize(
    ("reply", "read_only", "outcome"),
    [
        (NotSent(), False, Outcome.STORE_UNAVAILABLE),
        (OutcomeUnknown(), False, Outcome.OUTCOME_UNKNOWN),
        (OutcomeUnknown(), True, Outcome.STORE_UNAVAILABLE),
        (ReplyError("OOM command not allowed"), False, Outcome.BACKLOG_FULL),
        (ReplyError("MISCONF cannot write"), False, Outcome.STORE_UNAVAILABLE),
        (ReplyError("LOADING"), False, Outcome.STORE_UNAVAILABLE),
        (ReplyError("READONLY"), False, Outcome.RECOVERING),
        (ReplyError("MASTERDOWN"), False, Outcome.RECOVERING),
        (ReplyError("WRONGTYPE"), False, Outcome.INTERNAL_ERROR),
        (ReplyError("ERR user_script:1: a bug"), False, Outcome.INTERNAL_ERROR),
        (["suspect", "counts"], False, Outcome.RECOVERING),
        (["suspect", "position"], False, Outcome.RECOVERING),
    ],
)
async def test_what_is_no_reply_is_a_refusal(reply: Any, read_only: bool, outcome: Outcome) -> None:
    assert await refused(plane_on(FakeRedis(reply)), read_only=read_only) is outcome


async def test_no_error_of_redis_is_logged_beyond_its_first_word(caplog: pytest.LogCaptureFixture) -> None:
    await refused(plane_on(FakeRedis(ReplyError("ERR the code SECRET-1"))))
    assert "ERR" in caplog.text
    assert "SECRET" not in caplog.text


@pytest.mark.parametrize(("why", "seen_seq"), [("counts", 20), ("position", 0), ("server", 0)])
async def test_a_suspect_reply_puts_the_shard_in_doubt_and_shuts_it_here(why: str, seen_seq: int) -> None:
    redis = FakeRedis(["suspect", why])
    plane = plane_on(redis)
    await refused(plane)
    assert [command[-2:] for command in redis.ran("doubt_shard")] == [(4, seen_seq)]
    assert plane.views[0].state is ViewState.SUSPECT


async def test_nothing_is_sent_while_the_shard_is_not_open() -> None:
    ways: list[tuple[Any, Outcome]] = [
        (ShardView.refuse, Outcome.RECOVERING),
        (ShardView.suspect, Outcome.RECOVERING),
        (lambda view: view.begin_epoch(5, 4), Outcome.RECOVERING),
    ]
    for way, outcome in ways:
        redis = FakeRedis()
        plane = plane_on(redis)
        way(plane.views[0])
        assert await refused(plane) is outcome
        assert redis.sent == []
    assert await refused(DataPlane("redis://127.0.0.1:1", 1, SCRIPTS)) is Outcome.STORE_UNAVAILABLE


@pytest.mark.parametrize(("read_only", "outcome"), [(False, Outcome.OUTCOME_UNKNOWN), (True, Outcome.RECOVERING)])
async def test_a_reply_that_is_read_in_a_newer_epoch_says_nothing(read_only: bool, outcome: Outcome) -> None:
    redis = FakeRedis(ASSIGNED)
    plane = plane_on(redis)
    asked = asyncio.create_task(refused(plane, read_only=read_only))
    await asyncio.sleep(0)
    plane.views[0].certify(Certificate(5, 0, committed=0, backlog_max=100), plane.views[0].seen)
    assert await asked is outcome
    assert plane.seen() == [(0, (5, 0))]


async def test_a_book_id_names_its_shard() -> None:
    plane = DataPlane("redis://127.0.0.1:1", 12, SCRIPTS)
    assert plane.view_of_book("bk_110123456789abcdef").shard == 11
    for book_id in (
        "bk_120123456789abcdef",
        "bk_1x0123456789abcdef",
        "bk_110123456789abcde",
        "bk_110123456789abcdé",
        "",
    ):
        with pytest.raises(Refused) as refusal:
            plane.view_of_book(book_id)
        assert refusal.value.outcome is Outcome.BOOK_NOT_FOUND
