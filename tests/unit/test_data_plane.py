"""How one call of a script ends, whatever Redis replies: observed, refused, put in doubt."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import msgspec
import pytest

from coupon_svc.domain.outcomes import Outcome, Refused
from coupon_svc.redis.contract import CallClass
from coupon_svc.redis.data_plane import DataPlane
from coupon_svc.redis.errors import NotSent, OutcomeUnknown, ReplyError
from coupon_svc.redis.scripts import Scripts
from coupon_svc.redis.shard_view import Certificate, ShardView, ViewState
from tests.sent import decided, sections_of

SCRIPTS = Scripts()
BOOK = "bk_000123456789abcdef"
TIP = object()
"""Stands for the tip that was sent with the section."""


def seen_by(plane: DataPlane) -> list[tuple[int, tuple[int, int]]]:
    return [(report.shard, (report.epoch, report.seen_seq)) for report in plane.reports()]


def answered(*replies: list[Any], seq: int = 21, tip: Any = TIP) -> list[Any]:
    """The reply of a call with one section."""
    return [decided(SCRIPTS, seq=seq, tip=tip, replies=list(replies))]


ASSIGNED = answered(["ok", "A-1", "5", "4-21", "redis", ""])


class FakeRedis:
    """A connection whose replies are known, one for each call: each a list, or an error."""

    def __init__(self, *replies: Any) -> None:
        self.replies = list(replies)
        self.sent: list[tuple[Any, ...]] = []

    def submit(self, command: tuple[Any, ...], on_reply: Callable[[Any], object], **_: bool) -> None:
        self.sent.append(command)
        reply = self.replies.pop(0) if self.replies and command[1] != SCRIPTS["doubt_shard"].sha else ["ok"]
        if isinstance(reply, NotSent):
            raise reply
        asyncio.get_running_loop().call_soon(on_reply, self._whole(command, reply))

    def flush(self) -> None:
        """All was sent at once."""

    def _whole(self, command: tuple[Any, ...], reply: Any) -> Any:
        if not isinstance(reply, list) or not isinstance(reply[0], list):
            return reply
        tips = [section.tip for section in sections_of(SCRIPTS, command)]
        told = [[tip if part is TIP else part for part in one] for one, tip in zip(reply, tips, strict=True)]
        return msgspec.json.encode(told).decode()

    def ran(self, name: str) -> list[tuple[Any, ...]]:
        """The commands that ran this script."""
        return [command for command in self.sent if command[1] == SCRIPTS[name].sha]

    def called(self, call: CallClass) -> list[tuple[Any, ...]]:
        """The calls of this class."""
        return [command for command in self.sent if command[1] == SCRIPTS.library.function(call)]


def plane_on(redis: FakeRedis, shards: int = 1) -> DataPlane:
    """A data plane whose shards are open, in epoch 4, and were seen up to seq 20."""
    plane = DataPlane("redis://127.0.0.1:1", shards, SCRIPTS)
    plane.use(redis)  # type: ignore[arg-type]
    for view in plane.views:
        view.certify(Certificate(4, 20, committed=0, backlog_max=100), view.seen)
    return plane


async def assign(plane: DataPlane, shard: int = 0, **more: Any) -> Any:
    parameters = {"tenant_id": 1, "book_id": BOOK, "user_id": "ann", **more}
    return await plane.call("assign_coupon", plane.views[shard], **parameters)


async def read(plane: DataPlane) -> Any:
    return await plane.call("read_book", plane.views[0], tenant_id=1, book_id=BOOK)


async def refused(asked: Awaitable[Any]) -> Outcome:
    with pytest.raises(Refused) as refusal:
        await asked
    return refusal.value.outcome


async def test_a_section_is_sent_with_the_epoch_and_what_was_seen() -> None:
    redis = FakeRedis(ASSIGNED)
    await assign(plane_on(redis))
    (command,) = redis.called(CallClass.GROW)
    assert [(section.epoch, section.seen_seq) for section in sections_of(SCRIPTS, command)] == [("4", "20")]


async def test_what_was_seen_is_known_before_anybody_can_wait_for_it() -> None:
    plane = plane_on(FakeRedis(ASSIGNED))
    await assign(plane)
    assert seen_by(plane) == [(0, (4, 21))]
    plane = plane_on(FakeRedis(answered(["refilling"], seq=27)))
    await assign(plane)
    assert seen_by(plane) == [(0, (4, 27))]


async def test_holders_are_observed_as_well() -> None:
    holders = ["4-1/4-33 1 5 ann", "", "quarantined", "4-30 0 5 bob"]
    plane = plane_on(FakeRedis(answered(["ok", "9", "redis", "", holders, [-2] * 4, "active"])))
    await plane.call("read_codes", plane.views[0], tenant_id=1, book_id=BOOK, codes=["A", "B", "C", "D"])
    assert seen_by(plane) == [(0, (4, 33))]


async def test_a_position_that_is_shown_again_is_observed_as_well() -> None:
    """Above the shard's own it can only be of keys that were put back."""
    plane = plane_on(FakeRedis(answered(["replayed", "A-1", "5", "4-30", "redis", ""])))
    await assign(plane, idempotency_key="k", fingerprint="f")
    assert seen_by(plane) == [(0, (4, 30))]


async def test_what_was_made_is_kept_until_a_message_says_that_the_ledger_has_it() -> None:
    plane = plane_on(FakeRedis())
    for seq in (21, 22):
        plane.views[0].keep(4, seq, f"tip-{seq}", ["1", "", "5", "[]"])
    plane.on_position(0, 4, 21, ["tip-21"])
    assert [entry.seq for report in plane.reports() for entry in report.entries] == [22]


@pytest.mark.parametrize(
    ("reply", "to_assign", "to_read"),
    [
        (NotSent(), Outcome.STORE_UNAVAILABLE, Outcome.STORE_UNAVAILABLE),
        (OutcomeUnknown(), Outcome.OUTCOME_UNKNOWN, Outcome.STORE_UNAVAILABLE),
        (ReplyError("OOM command not allowed"), Outcome.BACKLOG_FULL, Outcome.BACKLOG_FULL),
        (ReplyError("MISCONF cannot write"), Outcome.STORE_UNAVAILABLE, Outcome.STORE_UNAVAILABLE),
        *(
            (ReplyError(f"{word} the server's reason"), Outcome.STORE_UNAVAILABLE, Outcome.STORE_UNAVAILABLE)
            for word in ("LOADING", "BUSY", "NOREPLICAS", "CLUSTERDOWN", "TRYAGAIN")
        ),
        (ReplyError("READONLY"), Outcome.RECOVERING, Outcome.RECOVERING),
        (ReplyError("MASTERDOWN"), Outcome.RECOVERING, Outcome.RECOVERING),
        (ReplyError("ERR user_script:1: a bug"), Outcome.INTERNAL_ERROR, Outcome.INTERNAL_ERROR),
        ([["suspect", "position"]], Outcome.RECOVERING, Outcome.RECOVERING),
        ([["unknown"]], Outcome.OUTCOME_UNKNOWN, Outcome.STORE_UNAVAILABLE),
        (answered(["suspect", "counts"]), Outcome.RECOVERING, Outcome.RECOVERING),
        (answered(["error", "WRONGTYPE"]), Outcome.RECOVERING, Outcome.RECOVERING),
        (answered(["error", "ERR"]), Outcome.INTERNAL_ERROR, Outcome.INTERNAL_ERROR),
        (answered(["nothing", "known"]), Outcome.INTERNAL_ERROR, Outcome.INTERNAL_ERROR),
        (answered(), Outcome.INTERNAL_ERROR, Outcome.INTERNAL_ERROR),
        ([], Outcome.INTERNAL_ERROR, Outcome.INTERNAL_ERROR),
    ],
)
async def test_what_is_no_reply_is_a_refusal(reply: Any, to_assign: Outcome, to_read: Outcome) -> None:
    assert await refused(assign(plane_on(FakeRedis(reply)))) is to_assign
    assert await refused(read(plane_on(FakeRedis(reply)))) is to_read


async def test_no_error_of_redis_is_logged_beyond_its_first_word(caplog: pytest.LogCaptureFixture) -> None:
    await refused(assign(plane_on(FakeRedis(ReplyError("ERR the code SECRET-1")))))
    await refused(assign(plane_on(FakeRedis(answered(["ok", "SECRET-1"])))))
    assert "ERR" in caplog.text
    assert "SECRET" not in caplog.text


@pytest.mark.parametrize(
    ("reply", "seen_seq"),
    [
        (answered(["suspect", "counts"], seq=20), 20),
        ([["suspect", "position"]], 0),
        ([["suspect", "server"]], 0),
        (answered(["error", "WRONGTYPE"]), 0),
    ],
)
async def test_what_speaks_against_a_shard_puts_it_in_doubt_and_shuts_it_here(reply: Any, seen_seq: int) -> None:
    redis = FakeRedis(reply)
    plane = plane_on(redis)
    await refused(read(plane))
    assert [command[-2:] for command in redis.ran("doubt_shard")] == [(4, seen_seq)]
    assert plane.views[0].state is ViewState.SUSPECT


async def test_two_that_find_the_same_put_the_shard_in_doubt_once() -> None:
    redis = FakeRedis(answered(["suspect", "counts"], ["suspect", "counts"], seq=20))
    plane = plane_on(redis)
    assert set(await asyncio.gather(refused(read(plane)), refused(read(plane)))) == {Outcome.RECOVERING}
    assert len(redis.ran("doubt_shard")) == 1


@pytest.mark.parametrize("word", ["READONLY", "MASTERDOWN"])
async def test_a_server_that_has_another_master_shuts_the_shard_here_alone(word: str) -> None:
    redis = FakeRedis(ReplyError(word))
    plane = plane_on(redis)
    await refused(assign(plane))
    assert plane.views[0].state is ViewState.SUSPECT
    assert redis.ran("doubt_shard") == []


async def test_a_shard_whose_script_failed_behind_its_entry_is_shut_here() -> None:
    plane = plane_on(FakeRedis([["unknown"]]))
    await refused(assign(plane))
    assert plane.views[0].state is ViewState.SUSPECT


async def test_nothing_is_sent_while_the_shard_is_not_open() -> None:
    ways: list[tuple[Any, Outcome]] = [
        (ShardView.refuse, Outcome.RECOVERING),
        (ShardView.suspect, Outcome.RECOVERING),
        (lambda view: view.epoch_began(5, 4), Outcome.RECOVERING),
    ]
    for way, outcome in ways:
        redis = FakeRedis()
        plane = plane_on(redis)
        way(plane.views[0])
        assert await refused(assign(plane)) is outcome
        assert redis.sent == []
    assert await refused(assign(DataPlane("redis://127.0.0.1:1", 1, SCRIPTS))) is Outcome.STORE_UNAVAILABLE


@pytest.mark.parametrize(("ask", "outcome"), [(assign, Outcome.OUTCOME_UNKNOWN), (read, Outcome.RECOVERING)])
async def test_a_reply_that_is_read_in_a_newer_epoch_says_nothing(
    ask: Callable[[DataPlane], Coroutine[Any, Any, Any]], outcome: Outcome
) -> None:
    redis = FakeRedis(ASSIGNED if ask is assign else answered(["book_not_loaded"]))
    plane = plane_on(redis)
    asked = asyncio.create_task(refused(ask(plane)))
    for _ in range(3):  # its turn, and the one behind it, in which the call is sent
        await asyncio.sleep(0)
    assert redis.sent
    plane.views[0].certify(Certificate(5, 0, committed=0, backlog_max=100), plane.views[0].seen)
    assert await asked is outcome
    assert seen_by(plane) == [(0, (5, 0))]


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
