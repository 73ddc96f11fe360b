"""One load from its first book to its verdict, against a service that runs."""

from __future__ import annotations

import asyncio
import secrets
import ssl
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from random import Random
from typing import Any, TextIO
from urllib.parse import urlsplit

import msgspec

from coupon_svc.invariants.answers import Book, History
from coupon_svc.load.audit import ServiceAudit, Verdict
from coupon_svc.load.caller import Caller
from coupon_svc.load.client import Connections
from coupon_svc.load.drive import Arrivals, closed_loop, open_loop
from coupon_svc.load.histogram import ERROR, Histogram
from coupon_svc.load.plan import LoadError, Plan
from coupon_svc.load.processes import machine
from coupon_svc.load.recorder import Recorder
from coupon_svc.load.scenarios import Campaign, Scenario, scenario_class
from coupon_svc.load.setup import close_books, make_books, require_service
from coupon_svc.load.stores import Stores, audit_stores
from coupon_svc.load.watch import Sample, Watch

_SLOW_REQUEST_S = 120.0  # making a hundred thousand codes takes a while
_AUDIT_CONNECTIONS = 32
_DRAINED_WAIT_S = 30.0
_PERCENTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999}


class Result(msgspec.Struct):
    """What is reported, for people and for machines; `docs/load.md` describes it. It holds no key."""

    version: str
    run_id: str
    began_at: str
    settings: dict[str, Any]
    machine: dict[str, Any]
    ended: str
    """time, nobody_left or interrupted"""
    seconds: float
    answers: int
    per_second: float
    good_per_second: float
    outcomes: dict[str, dict[str, int]]
    latency_ms: dict[str, dict[str, float]]
    latency_error: float
    arrivals: Arrivals
    cpu: dict[str, float]
    """parts of one processor over the load; `load` is the load's own process"""
    drained_after_s: float | None
    """how long after the last answer the ledger had everything; None: not known"""
    series: list[Sample]
    remarks: list[str]
    audit: Verdict


class Load:
    """A load is prepared, played, and audited, once, in this order."""

    def __init__(
        self,
        plan: Plan,
        url: str,
        key: str,
        *,
        pids: Mapping[str, list[int]] | None = None,
        stores: Stores | None = None,
        output: TextIO = sys.stderr,
    ) -> None:
        self.plan = plan
        self.stop = asyncio.Event()
        """Set it, and the load ends early."""
        self._url, self._key, self._pids, self._stores, self._output = url, key, pids or {}, stores, output
        self.run_id = secrets.token_hex(4)
        self.history = History(Random(plan.seed))
        self._recorder = Recorder()
        self._books: list[Book] = []
        self._interrupted = False

    def interrupt(self) -> None:
        """End early, as Ctrl-C does: what was answered is audited all the same."""
        self._interrupted = True
        self.stop.set()

    async def prepare(self) -> None:
        """See that the service is there, and make the books. Raises LoadError."""
        async with self._connections(2, _SLOW_REQUEST_S) as connections:
            await require_service(connections, self._url)
            self._books = await make_books(connections, self._key, self.plan, self.run_id)
        self.history.books = {book.book_id: book for book in self._books}

    async def play(self) -> Result:
        """Play the scenario to its end. The result's audit is still empty. Raises LoadError."""
        plan, began_at = self.plan, datetime.now(UTC)
        async with self._connections(plan.connections) as connections, self._connections(1) as watching:
            if not await connections.open():
                raise LoadError(
                    f"not all of the {plan.connections} connections can be made; try fewer --connections, or see `ulimit -n`"
                )
            caller = Caller(connections, self._key, self._recorder, self.history)
            scenario = scenario_class(plan.scenario)(plan, caller, self._books, self.run_id)
            redis_bytes = self._stores.redis_bytes if self._stores is not None else None
            watch = Watch(self._recorder, watching, self._pids, redis_bytes, plan.duration_s, self._output)
            watch.start()
            sampling = asyncio.create_task(watch.run())
            timer = asyncio.get_running_loop().call_later(plan.duration_s, self.stop.set)
            try:
                if plan.rate is None:
                    arrivals = await closed_loop(scenario, plan.connections, self.stop)
                else:
                    arrivals = await open_loop(scenario, plan.rate, connections, self.stop)
            finally:
                timer.cancel()
                sampling.cancel()
                await asyncio.gather(sampling, return_exceptions=True)
            last = await watch.sample()
            watch.end_line()
            used = watch.cpu_now()
            cpu = {part: round((used[part] - watch.cpu_before[part]) / last.at_s, 3) for part in used}
            drained = await _drained(watch)
        recorder = self._recorder
        return Result(
            version=version("coupon-svc"),
            run_id=self.run_id,
            began_at=began_at.isoformat(timespec="seconds"),
            settings=_settings(plan),
            machine=machine(),
            ended=self._how_ended(scenario),
            seconds=last.at_s,
            answers=recorder.answers,
            per_second=round(recorder.answers / last.at_s, 1),
            good_per_second=round(recorder.good / last.at_s, 1),
            outcomes=_by_verb(recorder),
            latency_ms={"all": _percentiles(recorder.overall())}
            | {verb: _percentiles(histogram) for verb, histogram in sorted(recorder.latencies.items())},
            latency_error=round(ERROR, 4),
            arrivals=arrivals,
            cpu=cpu,
            drained_after_s=drained,
            series=watch.samples,
            remarks=_remarks(plan, arrivals, scenario, cpu),
            audit=Verdict(),
        )

    async def audit(self) -> Verdict:
        """Hold every answer against service and stores, then close the books. Nothing is raised."""
        async with self._connections(_AUDIT_CONNECTIONS, _SLOW_REQUEST_S) as connections:
            verdict = await ServiceAudit(connections, self._key, self.history, Random(self.plan.seed)).audit()
            if self._stores is not None:
                stored = await audit_stores(self._stores, self.history)
                verdict.checked |= stored.checked
                verdict.broken += stored.broken
                verdict.unchecked += stored.unchecked
                verdict.notes += [note for note in stored.notes if note not in verdict.notes]
            else:
                verdict.notes.append("Redis and the ledger were not looked at: see --audit-stores")
            if left := await close_books(connections, self._key, self._books):
                verdict.notes.append(f"{left} books of the load could not be closed")
        return verdict

    def _how_ended(self, scenario: Scenario) -> str:
        if self._interrupted:
            return "interrupted"
        return "nobody_left" if scenario.finished else "time"

    @asynccontextmanager
    async def _connections(self, count: int, reply_timeout_s: float | None = None) -> AsyncIterator[Connections]:
        parts = urlsplit(self._url)
        context = ssl.create_default_context() if parts.scheme == "https" else None
        port = parts.port or (443 if context else 80)
        assert parts.hostname is not None
        timeout = {} if reply_timeout_s is None else {"reply_timeout_s": reply_timeout_s}
        connections = Connections(parts.hostname, port, count, ssl_context=context, **timeout)
        try:
            yield connections
        finally:
            connections.close()


async def _drained(watch: Watch) -> float | None:
    """Seconds until the ledger has what was answered; None when that is not told, or takes longer than _DRAINED_WAIT_S."""
    now = asyncio.get_running_loop().time
    began = now()
    while now() - began < _DRAINED_WAIT_S:
        lag = await watch.lag_events()
        if lag is None:
            return None
        if lag == 0:
            return round(now() - began, 2)
        await asyncio.sleep(0.05)
    return None


def _settings(plan: Plan) -> dict[str, Any]:
    settings = msgspec.structs.asdict(plan)
    settings["users"] = len(plan.users) if plan.users is not None else None
    return settings


def _by_verb(recorder: Recorder) -> dict[str, dict[str, int]]:
    by_verb: dict[str, dict[str, int]] = {}
    for (verb, outcome), number in sorted(recorder.outcomes.items()):
        by_verb.setdefault(verb, {})[outcome] = number
    return by_verb


def _percentiles(histogram: Histogram) -> dict[str, float]:
    figures = {name: round(histogram.percentile(part) * 1000, 3) for name, part in _PERCENTILES.items()}
    return figures | {"max": round(histogram.greatest * 1000, 3)}


def _remarks(plan: Plan, arrivals: Arrivals, scenario: Scenario, cpu: Mapping[str, float]) -> list[str]:
    """What a reader of the figures must know."""
    remarks = []
    if plan.rate is not None:
        remarks += _rate_remarks(plan, arrivals)
    if cpu["load"] > 0.85:
        remarks.append(
            f"the load itself took {cpu['load']:.0%} of a core: it may have been the limit; run a second one beside it"
        )
    if arrivals.unfinished:
        remarks.append(
            f"{arrivals.unfinished:,} callers were still waiting when the load was over; they count as unanswered"
        )
    if isinstance(scenario, Campaign):
        unserved = scenario.wanted - scenario.served
        if unserved or (scenario.left and plan.users is not None):
            remarks.append(
                f"{scenario.served:,} users have their code; {unserved:,} were refused or not answered, and the turn of"
                f" {scenario.left:,} did not come"
            )
    return remarks


def _rate_remarks(plan: Plan, arrivals: Arrivals) -> list[str]:
    remarks = []
    if arrivals.turned_away or arrivals.waited_in_line_max >= plan.connections:
        remarks.append(
            f"could not keep up with {plan.rate:,.0f} arrivals a second: up to {arrivals.waited_in_line_max:,} waited for"
            f" one of the {plan.connections} connections and {arrivals.turned_away:,} were turned away; see the latencies"
        )
    if arrivals.late > arrivals.due / 100:
        remarks.append(
            f"{arrivals.late:,} of {arrivals.due:,} callers were sent off late: this machine was too busy; the latencies"
            " count from when they were due"
        )
    return remarks
