"""Operations are sent in calls, and each caller gets the reply of its own, whatever becomes of the others."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from coupon_svc.domain.outcomes import Outcome, Refused
from coupon_svc.hot import drive
from coupon_svc.redis import call_queue, dispatcher
from coupon_svc.redis.call_queue import CALL_WEIGHT_MAX
from coupon_svc.redis.calls import EntryId
from coupon_svc.redis.contract import CallClass, Reply
from coupon_svc.redis.dispatcher import ALONE, UNDER_WAY_MAX, Dispatcher, Plane
from coupon_svc.redis.errors import NotSent, OutcomeUnknown, ReplyError
from coupon_svc.redis.keys import ShardKeys
from coupon_svc.redis.scripts import Scripts
from coupon_svc.redis.shard_view import Certificate, ShardView
from tests.sent import decided, sections_of

SCRIPTS = Scripts()
CLASSES = {SCRIPTS.library.function(one): str(one) for one in CallClass}
BOOK = "bk_000123456789abcdef"


SEQS = itertools.count(1_000)


class Call:
    """A call that was sent, and how it is answered."""

    def __init__(self, command: tuple[Any, ...], on_reply: Callable[[Any], object]) -> None:
        self.call_class = CLASSES[command[1]]
        self.keys = command[3 : 3 + command[2]]
        self.sections = sections_of(SCRIPTS, command)
        self._on_reply = on_reply

    def answer(self, reply: Any) -> None:
        """What Redis sends: the sections' replies as JSON, or something else as it is."""
        self._on_reply(msgspec.json.encode(reply).decode() if isinstance(reply, list) else reply)

    @property
    def users(self) -> list[str]:
        """Those of assign_coupon."""
        return [operation[9] for section in self.sections for operation in section.operations]

    def serve(self, seq: int | None = None) -> None:
        """Every operation is decided, and every section makes an event: the last is at `seq`, or further than any before."""
        seq = next(SEQS) if seq is None else seq
        self.answer(
            [
                decided(SCRIPTS, seq=seq, tip=section.tip, replies=[reply_to(one) for one in section.operations])
                for section in self.sections
            ]
        )


def reply_to(operation: list[Any]) -> list[Any]:
    name = operation[0]
    if name == "assign_coupon":
        return ["ok", f"code of {operation[9]}", "5", "4-21", "redis", ""]
    return {"read_book": ["book_not_found"], "unlock_coupon": ["ok"]}[name]


class Service:
    """A dispatcher, the shards that it serves, and a connection on which nothing is answered by itself."""

    def __init__(self, shards: int = 2) -> None:
        self.calls: list[Call] = []
        self.broken: Exception | None = None
        self.doubted: list[tuple[int, str]] = []
        self.suspected: list[int] = []
        self.loads = 0
        self.connection: Any = self
        self.views = [ShardView(shard, ShardKeys(shard, shards)) for shard in range(shards)]
        for view in self.views:
            view.certify(Certificate(4, 20, committed=0, backlog_max=100), view.seen)
        plane = Plane(
            lambda: self.connection, self.load_again, self.doubt, lambda view: self.suspected.append(view.shard)
        )
        self.dispatcher = Dispatcher(SCRIPTS, plane)

    def submit(self, command: tuple[Any, ...], on_reply: Callable[[Any], object], **_: bool) -> None:
        if self.broken:
            raise self.broken
        self.calls.append(Call(command, on_reply))

    def flush(self) -> None:
        """All was sent at once."""

    async def load_again(self) -> None:
        self.loads += 1

    def doubt(self, view: ShardView, why: str) -> None:
        self.doubted.append((view.shard, why))
        view.suspect()

    def assign(self, user: str, tenant: int = 1, shard: int = 0) -> asyncio.Task[Reply]:
        parameters = {"tenant_id": tenant, "book_id": BOOK, "user_id": user}
        return self._run("assign_coupon", shard, parameters)

    def read(self, shard: int = 0) -> asyncio.Task[Reply]:
        return self._run("read_book", shard, {"tenant_id": 1, "book_id": BOOK})

    def unlock(self) -> asyncio.Task[Reply]:
        parameters = {"tenant_id": 1, "book_id": BOOK, "code": "A", "lock_token": "t", "idempotency_key": ""}
        return self._run("unlock_coupon", 0, parameters)

    def _run(self, name: str, shard: int, parameters: dict[str, Any]) -> asyncio.Task[Reply]:
        return asyncio.create_task(self.dispatcher.run(name, self.views[shard], parameters))


@pytest.fixture
async def service() -> Service:
    return Service()


async def turns(number: int = 4) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


async def outcome(task: asyncio.Task[Reply]) -> Outcome:
    with pytest.raises(Refused) as refusal:
        await task
    return refusal.value.outcome


# --- what goes together


async def test_what_comes_in_one_turn_is_one_call_with_a_section_for_each_shard(service: Service) -> None:
    asked = [service.assign("ann"), service.assign("bob", shard=1), service.assign("cid")]
    await turns()
    (call,) = service.calls
    assert [[one[9] for one in section.operations] for section in call.sections] == [["ann", "cid"], ["bob"]]
    assert len({section.tip for section in call.sections}) == 2
    assert len(call.keys) == len(set(call.keys))
    assert [call.keys[section.meta - 1] for section in call.sections] == [view.keys.meta for view in service.views]
    call.serve()
    assert [(await one).code for one in asked] == ["code of ann", "code of bob", "code of cid"]


async def test_each_class_has_a_call_of_its_own(service: Service) -> None:
    asked = [service.read(), service.assign("ann"), service.unlock(), service.read(1)]
    await turns()
    assert [(call.call_class, len(call.sections)) for call in service.calls] == [("read", 2), ("grow", 1), ("keep", 1)]
    for call in service.calls:
        call.serve()
    assert [(await one).outcome for one in asked] == ["book_not_found", "ok", "ok", "book_not_found"]


async def test_what_comes_while_two_calls_are_under_way_goes_with_the_next(service: Service) -> None:
    for number in range(UNDER_WAY_MAX + 3):
        service.assign(f"user {number}")
        await turns()
    assert [call.users for call in service.calls] == [["user 0"], ["user 1"]]
    read = service.read()  # a class waits for none of another
    await turns()
    assert service.calls[2].call_class == "read"
    service.calls[0].serve()
    await turns()
    assert service.calls[3].users == ["user 2", "user 3", "user 4"]
    read.cancel()


async def test_a_turn_makes_one_call_of_a_class(service: Service) -> None:
    made: list[int] = []
    for number in range(600):
        service.assign(f"user {number}")
    for _ in range(6):
        await asyncio.sleep(0)
        made.append(len(service.calls))
    assert sorted(set(made)) == [0, 1, 2]
    assert [len(call.users) for call in service.calls] == [256, 256]


async def test_a_thousand_of_one_tenant_do_not_delay_another_by_more_than_a_call(service: Service) -> None:
    for number in range(1_000):
        service.assign(f"user {number}")
    await turns()
    late = service.assign("late", tenant=2)
    await turns()
    service.calls[0].serve()
    await turns()
    assert "late" in service.calls[UNDER_WAY_MAX].users
    service.calls[UNDER_WAY_MAX].serve()
    assert (await late).code == "code of late"


async def test_the_next_call_is_sent_with_the_reply_where_many_wait(service: Service) -> None:
    """A turn of the event loop takes in as many requests as come meanwhile: under a flood that may be thousands."""
    for number in range((UNDER_WAY_MAX + 1) * CALL_WEIGHT_MAX):
        service.assign(f"user {number}")
    await turns()
    service.calls[0].serve(seq=77)
    assert len(service.calls) == UNDER_WAY_MAX + 1
    assert service.calls[-1].sections[0].seen_seq == "77", "keys that were put back would not show"


async def test_a_driven_caller_goes_on_within_the_reply(service: Service) -> None:
    parameters = {"tenant_id": 1, "book_id": BOOK, "user_id": "ann"}
    done: list[Any] = []
    drive(service.dispatcher.run("assign_coupon", service.views[0], parameters), done.append)
    await turns()
    service.calls[0].serve()
    assert [reply.code for reply in done] == ["code of ann"]


async def test_who_comes_alone_again_is_sent_without_a_turn(service: Service) -> None:
    def start(user: str) -> None:
        parameters = {"tenant_id": 1, "book_id": BOOK, "user_id": user}
        drive(service.dispatcher.run("assign_coupon", service.views[0], parameters), lambda _: None)

    def users() -> list[list[str]]:
        return [call.users for call in service.calls]

    for number in range(ALONE):
        start("ann")
        assert len(service.calls) == number  # nobody knows yet whether others come
        await turns()
        service.calls[number].serve()
    start("ann")
    assert users() == [["ann"]] * (ALONE + 1)
    start("bob")  # while a call is under way there is time to share the next
    start("cid")
    assert len(service.calls) == ALONE + 1
    await turns()
    assert users()[ALONE + 1 :] == [["bob", "cid"]]
    for call in service.calls[ALONE:]:
        call.serve()
    start("dan")
    assert len(service.calls) == ALONE + 2


async def test_a_pair_that_always_comes_together_is_torn_apart_once(service: Service) -> None:
    for _ in range(ALONE):
        asked = service.assign("ann")
        await turns()
        service.calls[-1].serve()
        await asked
    sizes = []
    for _ in range(3):
        served = len(service.calls)
        pair = service.assign("ann"), service.assign("bob")
        await turns()
        sizes.append([len(call.users) for call in service.calls[served:]])
        for call in service.calls[served:]:
            call.serve()
        await asyncio.gather(*pair)
    assert sizes == [[1, 1], [2], [2]]


# --- what a reply tells


async def test_a_caller_is_told_the_entry_of_its_event(service: Service) -> None:
    asked = service.assign("ann")
    await turns()
    service.calls[0].serve(seq=21)
    assert (await asked).entry == EntryId(4, 21, service.calls[0].sections[0].tip)
    assert service.views[0].seen == (4, 21)


async def test_an_event_in_an_entry_that_is_not_this_call_s_puts_the_shard_in_doubt(service: Service) -> None:
    asked = service.assign("ann")
    await turns()
    service.calls[0].answer(
        [decided(SCRIPTS, seq=21, tip="another", replies=[reply_to(service.calls[0].sections[0].operations[0])])]
    )
    assert await outcome(asked) is Outcome.OUTCOME_UNKNOWN
    assert service.doubted == [(0, "entry")]


async def test_positions_on_one_connection_only_grow(service: Service) -> None:
    """Both calls were sent when seq 20 was seen: only the order of their replies shows that keys were put back between."""
    first = service.assign("ann")
    await turns()
    second = service.assign("bob")
    await turns()
    service.calls[0].serve(seq=22)
    assert (await first).outcome == "ok"
    service.calls[1].serve(seq=21)
    assert await outcome(second) is Outcome.OUTCOME_UNKNOWN
    assert service.doubted == [(0, "position")]


@pytest.mark.parametrize("ends", [21, 24])
async def test_keys_that_were_put_back_show_where_an_entry_begins(service: Service, ends: int) -> None:
    """However much the second call made on top of them. Nor is what was made behind that believed."""
    asked = []
    for user in ("ann", "bob", "cid"):
        asked.append(service.assign(user))
        await turns()

    def answer(number: int, begins: int, ends: int, after: str) -> None:
        (section,) = service.calls[number].sections
        replies = [reply_to(one) for one in section.operations]
        entry = [str(ends - begins), after, "5", "[]"]
        service.calls[number].answer([decided(SCRIPTS, seq=ends, tip=section.tip, replies=replies, entry=entry)])

    answer(0, 21, 22, "before")
    await turns()
    answer(1, 20, ends, "before")
    answer(2, ends, ends + 2, service.calls[1].sections[0].tip)
    assert (await asked[0]).outcome == "ok"
    assert [await outcome(one) for one in asked[1:]] == [Outcome.OUTCOME_UNKNOWN] * 2


async def test_another_entry_at_a_position_that_was_seen_is_no_growth(service: Service) -> None:
    asked = service.assign("ann")
    await turns()
    service.calls[0].serve(seq=21)
    assert (await asked).outcome == "ok"
    same = service.read()
    await turns()
    other = service.assign("bob")
    await turns()
    service.calls[1].answer(
        [decided(SCRIPTS, seq=21, tip=service.calls[0].sections[0].tip, replies=[["book_not_found"]])]
    )
    service.calls[2].answer([decided(SCRIPTS, seq=21, tip="another", replies=[["refilling"]])])
    assert (await same).outcome == "book_not_found"
    assert await outcome(other) is Outcome.OUTCOME_UNKNOWN
    assert service.doubted == [(0, "position")]


async def test_another_connection_or_epoch_begins_anew(service: Service) -> None:
    ways: list[Callable[[], None]] = [
        lambda: setattr(service, "connection", Connection(service)),
        lambda: enter(service, 5),
    ]
    for again in ways:
        asked = service.assign("ann")
        await turns()
        service.calls[-1].serve(seq=25)
        await asked
        again()
        asked = service.assign("bob")
        await turns()
        service.calls[-1].serve(seq=23)
        assert (await asked).outcome == "ok"
    assert service.doubted == []


class Connection:
    """Another one to the same server."""

    def __init__(self, service: Service) -> None:
        self.submit, self.flush = service.submit, service.flush


def enter(service: Service, epoch: int) -> None:
    service.views[0].certify(Certificate(epoch, 0, committed=0, backlog_max=100), service.views[0].seen)


# --- one shard's trouble, or one operation's, is no other's


async def test_a_section_that_was_refused_says_nothing_about_the_others(service: Service) -> None:
    bad, good = service.assign("ann"), service.assign("bob", shard=1)
    await turns()
    section = service.calls[0].sections[1]
    service.calls[0].answer(
        [["suspect", "epoch"], decided(SCRIPTS, seq=21, tip=section.tip, replies=[reply_to(section.operations[0])])]
    )
    assert await outcome(bad) is Outcome.RECOVERING
    assert (await good).code == "code of bob"
    assert service.doubted == [(0, "epoch")]


@pytest.mark.parametrize("reply", ['[["ok"', "[" * 10_000])
async def test_a_reply_that_is_not_understood_leaves_nobody_waiting(service: Service, reply: str) -> None:
    waiting = service.assign("ann")
    await turns()
    service.calls[0].answer(reply)
    assert await outcome(waiting) is Outcome.OUTCOME_UNKNOWN


async def test_a_section_of_which_nothing_is_known_leaves_the_others(service: Service) -> None:
    bad, good = service.assign("ann"), service.assign("bob", shard=1)
    await turns()
    section = service.calls[0].sections[1]
    service.calls[0].answer(
        [["unknown"], decided(SCRIPTS, seq=21, tip=section.tip, replies=[reply_to(section.operations[0])])]
    )
    assert await outcome(bad) is Outcome.OUTCOME_UNKNOWN
    assert (await good).code == "code of bob"
    assert service.suspected == [0]


async def test_an_operation_that_failed_leaves_the_others(service: Service) -> None:
    bad, good = service.assign("ann"), service.assign("bob")
    await turns()
    section = service.calls[0].sections[0]
    service.calls[0].answer(
        [decided(SCRIPTS, seq=21, tip=section.tip, replies=[["error", "ERR"], reply_to(section.operations[1])])]
    )
    assert await outcome(bad) is Outcome.INTERNAL_ERROR
    assert (await good).code == "code of bob"
    assert service.doubted == []


async def test_what_cannot_be_sent_leaves_the_others(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    bad, good = service.assign("half of a pair \ud800"), service.assign("bob")
    worse = service._run("assign_coupon", 0, {"tenant_id": 1, "book_id": BOOK, "user": "no such parameter"})
    await turns()
    assert await outcome(bad) is Outcome.INTERNAL_ERROR
    assert await outcome(worse) is Outcome.INTERNAL_ERROR
    service.calls[0].serve()
    assert (await good).code == "code of bob"
    assert "assign_coupon cannot be sent: UnicodeEncodeError" in caplog.text
    assert "pair" not in caplog.text


async def test_a_call_that_failed_between_two_shards_may_have_been_done(service: Service) -> None:
    asked = [service.assign("ann"), service.assign("bob", shard=1), service.read(), service.read(1)]
    await turns()
    for call in service.calls:
        call.answer(ReplyError("ERR a bug"))
    told = [await outcome(one) for one in asked]
    assert told == [Outcome.OUTCOME_UNKNOWN] * 2 + [Outcome.INTERNAL_ERROR] * 2


@pytest.mark.parametrize("raw", [[], [["ok"]], [["ok", 21, "t", []]], [[]], ["ok"], None, [["ok", 21, "t", [[]]]]])
async def test_nobody_waits_for_ever_for_a_reply_that_is_none(service: Service, raw: Any) -> None:
    asked = service.assign("ann")
    await turns()
    service.calls[0].answer(raw)
    assert await outcome(asked) is Outcome.INTERNAL_ERROR


# --- what is not sent, and what is lost


async def test_what_was_not_sent_in_time_is_refused_and_never_sent(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatcher, "QUEUED_S", 0.0)
    late = service.assign("ann")
    await turns()
    assert await outcome(late) is Outcome.STORE_UNAVAILABLE
    assert service.calls == []


async def test_an_operation_is_not_sent_when_the_time_of_its_request_is_over(service: Service) -> None:
    parameters = {"tenant_id": 1, "book_id": BOOK, "user_id": "ann"}
    late = asyncio.create_task(
        service.dispatcher.run("assign_coupon", service.views[0], parameters, until=time.monotonic())
    )
    await turns()
    assert service.calls == []
    assert await outcome(late) is Outcome.STORE_UNAVAILABLE


async def test_what_waits_behind_calls_without_an_answer_is_refused_when_its_time_is_over(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    under_way = []
    for number in range(UNDER_WAY_MAX):
        under_way.append(service.assign(f"user {number}"))
        await turns()
    monkeypatch.setattr(dispatcher, "QUEUED_S", 0.01)
    late = service.assign("late")
    await turns()
    service.dispatcher.refuse_late()
    assert not late.done()
    await asyncio.sleep(0.02)
    service.dispatcher.refuse_late()
    assert await outcome(late) is Outcome.STORE_UNAVAILABLE
    for call in service.calls:
        call.serve()
    assert [(await one).outcome for one in under_way] == ["ok"] * UNDER_WAY_MAX
    assert len(service.calls) == UNDER_WAY_MAX


async def test_a_full_queue_refuses_at_once(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_queue, "QUEUED_MAX", 0)
    assert await outcome(service.assign("ann")) is Outcome.STORE_UNAVAILABLE


async def test_who_is_gone_before_the_call_has_nothing_done(service: Service) -> None:
    gone, stays = service.assign("gone"), service.assign("stays")
    await asyncio.sleep(0)
    gone.cancel()
    await turns()
    assert service.calls[0].users == ["stays"]
    service.calls[0].serve()
    assert (await stays).outcome == "ok"


async def test_who_is_gone_leaves_its_place(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_queue, "QUEUED_MAX", 1)
    for number in range(UNDER_WAY_MAX):
        service.assign(f"user {number}")
        await turns()
    gone = service.assign("gone")
    await turns()
    assert await outcome(service.assign("nowhere")) is Outcome.STORE_UNAVAILABLE
    gone.cancel()
    await turns()
    service.assign("there is a place")
    await turns()
    service.calls[0].serve()
    await turns()
    assert service.calls[UNDER_WAY_MAX].users == ["there is a place"]


async def test_who_withdraws_before_the_call_leaves_its_place_and_after_it_is_waited_for(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(call_queue, "QUEUED_MAX", 2)
    told: list[Any] = []

    async def run(user: str) -> Any:
        try:
            parameters = {"tenant_id": 1, "book_id": BOOK, "user_id": user}
            return (await service.dispatcher.run("assign_coupon", service.views[0], parameters)).outcome
        except Refused as refusal:
            return refusal.outcome

    gone = drive(run("gone"), told.append)
    sent = drive(run("sent"), told.append)
    gone.withdraw()
    assert told == [Outcome.STORE_UNAVAILABLE], "nothing was done for it"
    drive(run("there is a place"), told.append)
    await turns()
    sent.withdraw()
    assert service.calls[0].users == ["sent", "there is a place"]
    service.calls[0].serve()
    assert told[1:] == ["ok", "ok"]


async def test_who_is_gone_while_the_call_is_under_way_leaves_the_others(service: Service) -> None:
    gone, stays = service.assign("gone"), service.assign("stays")
    await turns()
    gone.cancel()
    await turns()
    service.calls[0].serve()
    assert (await stays).outcome == "ok"
    assert gone.cancelled()


async def test_a_connection_that_breaks_leaves_in_doubt_only_what_was_sent(service: Service) -> None:
    sent = [service.assign("ann"), service.read()]
    await turns()
    sent.append(service.assign("bob"))
    await turns()
    waits = service.assign("cid")
    await turns()
    service.connection = None
    for call in service.calls:
        call.answer(OutcomeUnknown("it broke"))
    assert await outcome(waits) is Outcome.STORE_UNAVAILABLE
    told = [await outcome(one) for one in sent]
    assert told == [Outcome.OUTCOME_UNKNOWN, Outcome.STORE_UNAVAILABLE, Outcome.OUTCOME_UNKNOWN]


async def test_a_connection_that_takes_nothing_leaves_nothing_in_doubt(service: Service) -> None:
    service.broken = NotSent("too much is under way")
    assert await outcome(service.assign("ann")) is Outcome.STORE_UNAVAILABLE
    service.broken = None
    asked = service.assign("bob")
    await turns()
    service.calls[0].serve()
    assert (await asked).outcome == "ok"


async def test_a_shard_that_was_shut_while_an_operation_waited_gets_none(service: Service) -> None:
    refused, asked = service.assign("ann"), service.assign("bob", shard=1)
    await asyncio.sleep(0)
    service.views[0].refuse()
    await turns()
    assert await outcome(refused) is Outcome.RECOVERING
    assert service.calls[0].users == ["bob"]
    service.calls[0].serve()
    assert (await asked).outcome == "ok"


# --- a server that does not know the script


async def test_a_function_that_is_not_there_is_loaded_and_the_call_sent_once_more(service: Service) -> None:
    asked = service.assign("ann")
    await turns()
    service.calls[0].answer(ReplyError("ERR Function not found"))
    await turns()
    assert service.loads == 1
    service.calls[1].serve()
    assert (await asked).outcome == "ok"


async def test_a_function_that_cannot_be_loaded_is_not_asked_for_again(service: Service) -> None:
    asked = service.assign("ann")
    await turns()
    service.calls[0].answer(ReplyError("ERR Function not found"))
    await turns()
    service.calls[1].answer(ReplyError("ERR Function not found"))
    assert await outcome(asked) is Outcome.RECOVERING
    assert service.loads == 1
    later = service.assign("bob")
    await turns()
    service.calls[2].serve()
    assert (await later).outcome == "ok"
