"""`coupon-svc load` against real servers: every scenario is played and holds, and what is broken is found."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest

from coupon_svc.cli import main
from coupon_svc.config import load_settings
from coupon_svc.invariants.answers import Assigned, Coupon, History
from coupon_svc.invariants.kept import KeptCheck
from coupon_svc.load.audit import LOST_NOTE, ServiceAudit, Verdict
from coupon_svc.load.caller import Caller
from coupon_svc.load.client import Connections
from coupon_svc.load.drive import open_loop
from coupon_svc.load.histogram import ERROR, Histogram
from coupon_svc.load.plan import SCENARIOS, LoadError, make_plan
from coupon_svc.load.recorder import Recorder
from coupon_svc.load.run import Load, Result
from coupon_svc.load.scenarios import Scenario
from coupon_svc.load.stores import open_stores
from coupon_svc.load.watch import Watch
from tests.conftest import SHARDS
from tests.harness import Stack, running_stack


@pytest.fixture(scope="module")
async def stack(tmp_path_factory: pytest.TempPathFactory, postgres_url: str) -> AsyncIterator[Stack]:
    """A service that is loaded and tampered with; each test leaves its stores as they should be."""
    async with running_stack(tmp_path_factory.mktemp("load"), postgres_url, SHARDS) as stack:
        yield stack


@pytest.fixture(scope="module")
async def key(stack: Stack) -> str:
    return await stack.key("load")


class Played:
    """A load after its end, before its audit."""

    def __init__(self, load: Load, result: Result) -> None:
        self.load, self.result, self.history = load, result, load.history

    @property
    def book_id(self) -> str:
        return next(iter(self.history.books))


Play = Callable[..., Any]


@pytest.fixture
async def play(stack: Stack, key: str) -> AsyncIterator[Play]:
    """Plays a load of about a third of a second; `during` runs beside it."""
    async with open_stores(load_settings(stack.environment)) as stores:

        async def run(scenario: str = "flash-sale", during: Any = None, **settings: Any) -> Played:
            given = {"duration_s": 0.3, "books": 1, "codes": 300, "connections": 8, **settings}
            plan = make_plan(scenario=scenario, url=stack.base_url, **given)
            load = Load(plan, stack.base_url, key, stores=stores, output=io.StringIO())
            await load.prepare()
            beside = asyncio.create_task(during()) if during else None
            result = await load.play()
            if beside is not None:
                await beside
            return Played(load, result)

        yield run


def found(verdict: Verdict) -> set[str]:
    return {broken.what for broken in verdict.broken}


# -- scenarios --------------------------------------------------------------------------------------------------------

REACHED = {
    "flash-sale": {("assign", "ok"), ("assign", "user_code_limit")},
    "checkout": {
        ("redeem", "ok"),
        ("lock", "locked"),
        ("unlock", "ok"),
        ("redeem", "already_redeemed"),
        ("redeem", "lock_not_held"),  # the late payer's, whose lock's end is waited for, beyond the load's, too
    },
    "retries": {("assign", "ok"), ("assign", "replayed"), ("redeem", "ok"), ("redeem", "replayed")},
    "mixed": {("assign", "ok"), ("assign_code", "ok"), ("redeem", "ok"), ("list_coupons", "ok"), ("read_book", "ok")},
    "campaign": {("assign", "ok")},
}


@pytest.mark.parametrize("scenario", SCENARIOS)
async def test_a_scenario_is_played_and_its_audit_holds(play: Play, scenario: str) -> None:
    settings = {"ack": "both", "books": 3} if scenario == "mixed" else {}
    played = await play(scenario, duration_s=0.5, **settings)
    reached = {(verb, outcome) for verb, outcomes in played.result.outcomes.items() for outcome in outcomes}
    assert reached >= REACHED[scenario]
    assert played.result.answers == sum(sum(outcomes.values()) for outcomes in played.result.outcomes.values())
    verdict = await played.load.audit()
    assert (verdict.broken, verdict.unchecked, verdict.notes) == ([], [], [])
    assert verdict.checked["answers with a code, against the ledger"] == len(played.history.coupons) > 10
    if scenario in ("checkout", "retries", "mixed"):
        assert verdict.checked["answers with a redemption, against the ledger"] > 5


async def test_a_sold_out_sale_holds(play: Play) -> None:
    played = await play(codes=20)
    assert played.result.outcomes["assign"]["book_exhausted"] > 0
    assert (await played.load.audit()).holds


async def test_a_campaign_gives_everybody_on_its_list_one_code_and_ends(play: Play, tmp_path: Path) -> None:
    listed = tmp_path / "users"
    listed.write_text("".join(f"jörg/{number}@x.y\n" for number in range(60)) * 2)
    played = await play("campaign", users=listed, codes=None, duration_s=None)
    assert (played.result.ended, played.result.remarks) == ("nobody_left", [])
    assert sorted(coupon.user_id for coupon in played.history.coupons.values()) == sorted(
        f"jörg/{number}@x.y" for number in range(60)
    )
    assert (await played.load.audit()).holds


async def test_the_books_are_closed_at_the_end(play: Play, stack: Stack) -> None:
    played = await play(duration_s=0.1)
    await played.load.audit()
    assert [
        row["status"] for row in await stack.ledger("SELECT status FROM books WHERE book_id = $1", played.book_id)
    ] == ["closed"]


# -- open loop --------------------------------------------------------------------------------------------------------


async def stalled(stack: Stack) -> None:
    """The API stands still for half a second."""
    api = stack.parts[1]
    await asyncio.sleep(0.4)
    api.signal(signal.SIGSTOP)
    try:
        await asyncio.sleep(0.5)
    finally:
        api.signal(signal.SIGCONT)


async def test_a_stall_is_seen_by_all_who_were_due_meanwhile(play: Play, stack: Stack) -> None:
    """In the open loop: a third of the callers of 1.5 s were due in a stall of 0.5 s."""
    played = await play(rate=200.0, connections=4, duration_s=1.5, during=lambda: stalled(stack))
    latency = played.result.latency_ms["all"]
    assert latency["p90"] > 150
    assert latency["p99"] > 350
    assert 270 <= played.result.arrivals.due < 600  # as many more as the end was late
    assert any("could not keep up" in remark for remark in played.result.remarks)
    assert (await played.load.audit()).holds


async def test_who_is_sent_off_late_was_due_before() -> None:
    """This process stalls, not the service: nobody's latency may begin when the stall is over."""
    waits: list[float] = []

    class Stalling(Scenario):
        def __init__(self) -> None:
            self.came = 0

        async def journey(self, due: float) -> bool:
            waits.append(asyncio.get_running_loop().time() - due)
            self.came += 1
            if self.came == 20:
                time.sleep(0.3)  # noqa: ASYNC251
            return True

    connections, stop = Connections("127.0.0.1", 1, 1), asyncio.Event()
    asyncio.get_running_loop().call_later(0.8, stop.set)
    arrivals = await open_loop(Stalling(), 200.0, connections, stop)
    connections.close()
    assert arrivals.started == len(waits) == arrivals.due
    assert max(waits) > 0.25
    assert sum(wait > 0.1 for wait in waits) >= 30  # 40 of them were due in 0.2 of the 0.3 s
    assert arrivals.late >= 30


async def test_latency_counts_from_when_a_call_was_due() -> None:
    connections, recorder = Connections("127.0.0.1", 1, 1), Recorder()
    caller = Caller(connections, "key", recorder, History(Random(1)))
    now = asyncio.get_running_loop().time()
    assert (await caller.assign("bk", "u", due=now - 3)).outcome == "connection_refused"
    connections.close()
    assert 3 <= recorder.close_window(1.0).latency.greatest < 10
    assert recorder.answers == 0


def test_percentiles_are_as_exact_as_is_said() -> None:
    random, histogram = Random(1), Histogram()
    times = sorted(random.lognormvariate(-6, 2) for _ in range(20_000))
    for seconds in times:
        histogram.add(seconds)
    for part in (0.5, 0.9, 0.99, 0.999):
        assert histogram.percentile(part) == pytest.approx(times[int(part * len(times)) - 1], rel=ERROR * 1.01)
    assert histogram.percentile(1.0) == pytest.approx(times[-1], rel=ERROR)
    assert histogram.greatest == times[-1]
    assert Histogram().percentile(0.5) == 0


async def test_a_rate_that_cannot_be_kept_is_said(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coupon_svc.load.drive.DRAIN_S", 0.3)
    played = await play(rate=10_000.0, connections=2, duration_s=0.2, codes=2_000)
    assert any("could not keep up with 10,000 arrivals a second" in remark for remark in played.result.remarks)
    assert played.result.outcomes["assign"]["no_answer_at_the_end"] == played.result.arrivals.unfinished > 0
    assert played.result.answers == played.result.arrivals.started - played.result.arrivals.unfinished
    assert (await played.load.audit()).holds


async def test_a_watch_ends_though_its_cancellation_was_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As redis-py does now and then, which made a load in some hundreds hang."""
    monkeypatch.setattr("coupon_svc.load.watch.INTERVAL_S", 0.01)
    asked = asyncio.Event()

    async def swallowing() -> int:
        asked.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(5)
        return 1

    connections = Connections("127.0.0.1", 1, 1)
    watch = Watch(Recorder(), connections, {}, swallowing, 1.0, io.StringIO())
    watch.start()
    task = asyncio.create_task(watch.run())
    await asked.wait()
    task.cancel()
    _, running = await asyncio.wait({task}, timeout=2)
    task.cancel()
    connections.close()
    assert not running


# -- what is broken is found ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
async def over(stack: Stack, key: str) -> AsyncIterator[Played]:
    """A load that was played and holds, to be falsified."""
    async with open_stores(load_settings(stack.environment)) as stores:
        plan = make_plan(scenario="retries", url=stack.base_url, duration_s=0.5, books=1, codes=300, connections=4)
        load = Load(plan, stack.base_url, key, stores=stores, output=io.StringIO())
        await load.prepare()
        played = Played(load, await load.play())
        assert (await load.audit()).broken == []
        yield played


@pytest.fixture
def falsified(over: Played, monkeypatch: pytest.MonkeyPatch) -> Iterator[Played]:
    """The load with a history that can be changed, and an audit that waits for nothing."""
    monkeypatch.setattr("coupon_svc.load.stores.ARRIVAL_WAIT_S", 0.1)
    monkeypatch.setattr("coupon_svc.invariants.stores.ARRIVAL_WAIT_S", 0.1)
    true = over.history
    over.load.history = over.history = copy.deepcopy(true)
    yield over
    over.load.history = over.history = true


async def test_a_code_that_was_given_to_two_users_is_found(falsified: Played) -> None:
    code, coupon = next(iter(falsified.history.coupons.items()))
    answer = Assigned(code, coupon.book_id, "somebody-else", coupon.position, True)
    falsified.history.assigned(coupon.book_id, "somebody-else", answer)
    verdict = await falsified.load.audit()
    assert found(verdict) == {"a code was given to two users"}
    assert not verdict.holds


async def test_an_answer_that_is_recorded_for_another_is_found_everywhere(falsified: Played) -> None:
    code, coupon = next(iter(falsified.history.coupons.items()))
    falsified.history.coupons[code] = Coupon(coupon.book_id, "somebody-else", coupon.position, True)
    assert found(await falsified.load.audit()) == {
        "a coupon that was answered is not in its user's list",
        "a coupon is another user's in the ledger than was answered",
        "a book counts codes spent that nobody redeemed",
        "a redemption is in the ledger that nobody had asked for",
    }


async def test_rows_that_are_missing_from_the_ledger_are_found(falsified: Played, stack: Stack) -> None:
    code = next(code for code, coupon in falsified.history.coupons.items() if coupon.redemptions)
    of_code = dict.fromkeys(("coupons", "redemptions"), f"code = '{code}'")
    of_code["entries"] = f"convert_from(events, 'UTF8') LIKE '%{code}%'"
    for table, condition in of_code.items():
        await stack.ledger(f"CREATE TABLE kept_{table} AS SELECT * FROM {table} WHERE {condition}")
        await stack.ledger(f"DELETE FROM {table} WHERE {condition}")
    try:
        verdict = await falsified.load.audit()
    finally:
        for table in of_code:
            await stack.ledger(f"INSERT INTO {table} SELECT * FROM kept_{table}")
            await stack.ledger(f"DROP TABLE kept_{table}")
    assert found(verdict) >= {KeptCheck.EVENT, KeptCheck.COUPON, KeptCheck.REDEMPTION}


async def test_a_coupon_that_is_anothers_in_redis_is_found(falsified: Played, stack: Stack) -> None:
    code, coupon = next(iter(falsified.history.coupons.items()))
    redis: Any = stack.redis()
    (name,) = [name async for name in redis.scan_iter(f"cb:*holders:{coupon.book_id}")]
    value = await redis.hget(name, code)
    await redis.hset(name, code, value.replace(coupon.user_id, "a-thief"))
    try:
        verdict = await falsified.load.audit()
    finally:
        await redis.hset(name, code, value)
        await redis.aclose()
    assert found(verdict) >= {
        "a coupon of the ledger is not in Redis, or another's there",
        "a coupon is listed with another book or user than was answered",
    }


async def test_a_replay_that_differs_is_found(falsified: Played) -> None:
    replays = falsified.history.replays
    for verb in ("assign", "redeem"):
        place = next(place for place, replay in enumerate(replays) if replay.verb == verb)
        told = json.loads(replays[place].answer) | {"position": "00:1-999999"}
        replays[place] = msgspec.structs.replace(replays[place], answer=json.dumps(told).encode())
    assert found(await falsified.load.audit()) == {
        "the answer to an assign sent again with its Idempotency-Key was another",
        "the answer to a redeem sent again with its Idempotency-Key was another",
    }


async def test_a_service_that_goes_away_leaves_the_audit_incomplete(
    falsified: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coupon_svc.load.audit._PATIENCE_S", 0.5)
    monkeypatch.setattr(falsified.load, "_url", "http://127.0.0.1:1")
    verdict = await falsified.load.audit()
    assert verdict.unchecked == ["the service does not answer (connection_refused); the audit is not complete"]


async def test_a_record_that_a_disaster_may_take_is_told_apart_from_one_that_is_lost(play: Play, stack: Stack) -> None:
    """Two codes for a user who may have one: right only in an ack = redis book whose lost code is in quarantine."""
    for ack, quarantined, broken in (
        ("redis", True, set()),
        ("redis", False, {"a user was given more codes than the book allows"}),
    ):
        played = await play(ack=ack, duration_s=0.1)
        coupon = next(coupon for coupon in played.history.coupons.values() if not coupon.durable)
        other = Assigned("OTHER", coupon.book_id, coupon.user_id, "00:9-9", False)
        played.history.assigned(coupon.book_id, coupon.user_id, other)
        assert len(played.history.doubts) == 1
        asked = ServiceWith("quarantined" if quarantined else "assigned")
        assert await asked.judge(played.history) == (broken, [LOST_NOTE] if quarantined else [])


class ServiceWith:
    """The audit's doubts, with a service for which every code is in one state."""

    def __init__(self, status: str) -> None:
        self._status = status

    async def judge(self, seen: History) -> tuple[set[str], list[str]]:
        audit = ServiceAudit(None, "key", seen, Random(1))  # type: ignore[arg-type]

        async def read(path: bytes, kind: Any) -> Any:
            return kind(self._status)

        audit._read = read  # type: ignore[method-assign]
        await audit._doubts()
        return found(audit.verdict), audit.verdict.notes


# -- the command ------------------------------------------------------------------------------------------------------

FEW = ("--rate", "200", "--codes", "2000")
"""Callers that keep no processor busy: without a rate, as many as can be served come."""


class Command:
    """`coupon-svc load` at the stack's service, in a process of its own."""

    def __init__(self, stack: Stack, key: str, *args: str, **environ: str) -> None:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("COUPON_")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "coupon_svc", "load", *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**clean, "COUPON_LOAD_KEY": key, **environ},
        )

    async def ended(self) -> tuple[int, str, str]:
        out, error = await asyncio.to_thread(self.process.communicate, timeout=60)
        return self.process.returncode, out, error


async def test_the_command_plays_audits_and_reports(stack: Stack, key: str, tmp_path: Path) -> None:
    page, data = tmp_path / "load.html", tmp_path / "load.json"
    at = ["--url", stack.base_url, "--duration", "1.2", *FEW, "--scenario", "retries", "--audit-stores"]
    command = Command(stack, key, *at, "--html", str(page), "--json", str(data), **stack.environment)
    status, out, error = await command.ended()
    assert status == 0, (out, error)
    assert out.count("The promises held.") == 1
    assert re.search(r"^ +1 s +[\d,]+/s  p50 ", error, re.MULTILINE)

    told = json.loads(data.read_text())
    assert told["audit"]["holds"] is True
    assert told["settings"]["scenario"] == "retries"
    assert told["version"]
    assert told["machine"]["processors"] > 0
    assert told["outcomes"]["assign"]["replayed"] > told["outcomes"]["assign"]["ok"] > 0
    assert set(told["latency_ms"]["all"]) == {"p50", "p90", "p99", "p99.9", "max"}
    assert told["cpu"]["load"] > 0
    assert len(told["series"]) >= 2
    assert all(sample["redis_bytes"] > 0 and sample["lag_events"] is not None for sample in told["series"])

    html = page.read_text()
    assert html.count("<svg") == 5
    assert "The promises held." in html
    assert re.findall(r"""(?:src|href|url|@import|xmlns)\s*[=(]""", html) == []
    assert set(re.findall(r"https?://[^\s<\"]+", html)) <= {stack.base_url}
    assert key not in html + data.read_text() + out + error


async def test_a_broken_promise_is_exit_status_1(stack: Stack, key: str) -> None:
    """Somebody else takes codes from under the load: the book counts more given than the load was answered."""
    command = Command(stack, key, "--url", stack.base_url, "--duration", "2", *FEW)
    async with await stack.client("load") as client:
        while True:
            books = (await client.get("/coupons")).json()["books"]
            if books and books[0]["name"].startswith("load ") and books[0]["status"] == "active":
                break
            await asyncio.sleep(0.05)
        taken = await client.post("/coupons/assign", json={"book_id": books[0]["book_id"], "user_id": "a thief"})
        assert taken.status_code == 201
    status, out, _ = await command.ended()
    assert status == 1
    assert "BROKEN: book bk_" in out
    assert "a book counts codes given that nobody asked for (1)" in out
    assert out.rstrip().endswith("A promise is broken.")


async def test_ctrl_c_ends_early_audits_and_reports(stack: Stack, key: str) -> None:
    command = Command(stack, key, "--url", stack.base_url, "--duration", "60", *FEW)
    assert command.process.stderr is not None
    await asyncio.to_thread(command.process.stderr.readline)  # the first second has passed
    command.process.send_signal(signal.SIGINT)
    status, out, error = await command.ended()
    assert status == 0, (out, error)
    assert "ending early" in error
    assert "s, interrupted" in out
    assert "The promises held." in out


async def test_a_second_ctrl_c_stops_at_once(stack: Stack, key: str) -> None:
    command = Command(stack, key, "--url", stack.base_url, "--duration", "60", *FEW)
    assert command.process.stderr is not None
    await asyncio.to_thread(command.process.stderr.readline)
    stack.parts[1].signal(signal.SIGSTOP)  # lest the audit be over before the second
    try:
        command.process.send_signal(signal.SIGINT)
        while "ending early" not in await asyncio.to_thread(command.process.stderr.readline):
            pass
        command.process.send_signal(signal.SIGINT)
        status, out, error = await command.ended()
    finally:
        stack.parts[1].signal(signal.SIGCONT)
    assert (status, "promises" in out) == (130, False)
    assert error.rstrip().endswith("coupon-svc load: stopped; nothing was audited")


@pytest.fixture(scope="module")
async def keys(stack: Stack, key: str) -> dict[str, str]:
    return {"good": key, "reads": await stack.key("load", ("books:read",))}


@pytest.mark.parametrize(
    ("key_given", "args", "said"),
    [
        ("ck_wrong", [], "does not know this key"),
        ("", [], "give --key, or set COUPON_LOAD_KEY"),
        ("two words", [], "check --key"),
        ("reads", [], "may not make books; the load needs one with all scopes"),
        (
            "good",
            ["--url", "http://127.0.0.1:1"],
            "nothing answers at http://127.0.0.1:1 (connection refused); check --url",
        ),
        ("good", ["--url", "http://nowhere.invalid"], "nothing answers at"),
        ("good", ["--audit-stores"], "COUPON_REDIS_URL is not set"),
        ("good", ["--json", "/nowhere/x.json"], "cannot write /nowhere/x.json"),
    ],
)
def test_what_cannot_be_done_is_exit_status_2_and_says_what_to_do(
    stack: Stack,
    keys: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    key_given: str,
    args: list[str],
    said: str,
) -> None:
    for name in ("COUPON_REDIS_URL", "COUPON_DATABASE_URL"):
        monkeypatch.delenv(name, raising=False)
    given = keys.get(key_given, key_given)
    monkeypatch.setenv("COUPON_LOAD_KEY", given)
    where = [] if "--url" in args else ["--url", stack.base_url]
    status = main(["load", *where, *args])
    out, error = capsys.readouterr()
    assert (status, said in error) == (2, True), error
    assert len(error.splitlines()) == 1
    assert not given or given not in out + error


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"url": "http://user:secret@h"}, "must hold no user and no password"),
        ({"url": "ftp://h"}, "the service's root"),
        ({"url": "http://h/coupons"}, "the service's root"),
        ({"url": "http://h:x"}, "--url is no address"),
        ({"url": "http://h", "workers": 2}, "--workers is for the load's own service"),
        ({"audit_stores": True}, "--audit-stores goes with --url"),
        ({"users": Path("/nowhere")}, "cannot read the users of /nowhere: No such file"),
        ({"books": 1000, "codes": 10_000_000}, "are too many"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(LoadError, match=re.escape(said)) as refused:
        make_plan(**settings)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("content", "scenario", "codes", "said"),
    [
        ("", "campaign", None, "names no users"),
        ("a\n", "mixed", None, "add --scenario campaign"),
        ("a\nb\n", "campaign", 1, "2 users want a code and there are 1"),
        ("x" * 129, "campaign", None, "is no user id"),
    ],
)
def test_a_list_of_users_that_is_none_is_refused(
    tmp_path: Path, content: str, scenario: str, codes: int | None, said: str
) -> None:
    (tmp_path / "users").write_text(content)
    with pytest.raises(LoadError, match=re.escape(said)):
        make_plan(scenario=scenario, users=tmp_path / "users", codes=codes)
