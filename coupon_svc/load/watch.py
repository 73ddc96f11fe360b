"""Looks at load and service once a second while they run: what the report's charts are made of, and the progress line."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Awaitable, Callable, Mapping
from typing import TextIO

import msgspec

from coupon_svc.load.client import Connections
from coupon_svc.load.processes import cpu_s, own_cpu_s
from coupon_svc.load.recorder import Recorder, Window

INTERVAL_S = 1.0
_LINE_EVERY_S = 1.0
_LONG_S = 60.0
_LINE_EVERY_WHEN_LONG_S = 10.0
_BACKLOG = re.compile(rb'^coupon_shard_backlog_events\{process="(\d+)",shard="(\d+)"\} (\d+)$', re.MULTILINE)


class Sample(msgspec.Struct, frozen=True):
    """One moment of the load, `at_s` seconds after it began; figures are of the time since the sample before.

    `cpu` holds parts of one processor. `lag_events` and `redis_bytes` are None where they cannot be known.
    """

    at_s: float
    per_second: float
    good_per_second: float
    p50_ms: float
    p99_ms: float
    max_ms: float
    lag_events: int | None
    redis_bytes: int | None
    cpu: dict[str, float]


class Watch:
    """Takes samples until it is cancelled."""

    def __init__(
        self,
        recorder: Recorder,
        connections: Connections,
        pids: Mapping[str, list[int]],
        redis_bytes: Callable[[], Awaitable[int]] | None,
        duration_s: float,
        output: TextIO = sys.stderr,
    ) -> None:
        """`connections` are the watch's own: it must not stand in line behind the load."""
        self._recorder = recorder
        self._connections = connections
        self._pids = pids
        self._redis_bytes = redis_bytes
        self._duration_s = duration_s
        self._output = output
        self._live = output.isatty()
        self._printed_at_s = 0.0
        self._cpu: dict[str, float] = {}
        self._at_s = 0.0
        self._began = 0.0
        self.samples: list[Sample] = []
        self.cpu_before: dict[str, float] = {}

    def start(self) -> None:
        """The load begins now."""
        self._began = asyncio.get_running_loop().time()
        self._cpu = self.cpu_before = self.cpu_now()

    async def run(self) -> None:
        """Sample once a second."""
        now, task = asyncio.get_running_loop().time, asyncio.current_task()
        assert task is not None
        tick = 1
        # redis-py sends through `asyncio.wait_for`, which may swallow a cancellation before Python 3.12 (cpython #86296).
        while not task.cancelling():
            await asyncio.sleep(max(0.0, self._began + tick * INTERVAL_S - now()))
            await self.sample()
            tick += 1

    async def sample(self) -> Sample:
        """Take a sample now."""
        lag = await self.lag_events()
        memory = await self._memory()
        at_s = asyncio.get_running_loop().time() - self._began
        window = self._recorder.close_window(at_s)
        cpu, passed = self.cpu_now(), max(1e-9, at_s - self._at_s)
        sample = Sample(
            at_s=round(at_s, 3),
            per_second=round(window.per_second, 1),
            good_per_second=round(window.good / passed, 1),
            p50_ms=_ms(window.latency.percentile(0.5)),
            p99_ms=_ms(window.latency.percentile(0.99)),
            max_ms=_ms(window.latency.greatest),
            lag_events=lag,
            redis_bytes=memory,
            cpu={part: round((cpu[part] - self._cpu[part]) / passed, 3) for part in cpu},
        )
        self._cpu, self._at_s = cpu, at_s
        self.samples.append(sample)
        self._tell(sample, window)
        return sample

    def cpu_now(self) -> dict[str, float]:
        """Seconds of processor time used so far, by part; `load` is this process."""
        return {"load": own_cpu_s(), **(cpu_s(self._pids) if self._pids else {})}

    async def lag_events(self) -> int | None:
        """Events that the ledger has not yet, as the API process that answers sees it; None when it is not told."""
        try:
            async with asyncio.timeout(INTERVAL_S):
                reply = await self._connections.send(b"GET", b"/metrics")
        except TimeoutError:
            return None
        found = _BACKLOG.findall(reply.body)
        return sum(int(number) for _, _, number in found) if reply.status == 200 and found else None

    async def _memory(self) -> int | None:
        if self._redis_bytes is None:
            return None
        try:
            async with asyncio.timeout(INTERVAL_S):
                return await self._redis_bytes()
        except (TimeoutError, OSError):
            return None

    def _tell(self, sample: Sample, window: Window) -> None:
        every = _LINE_EVERY_WHEN_LONG_S if self._duration_s > _LONG_S and not self._live else _LINE_EVERY_S
        if sample.at_s - self._printed_at_s < every - 0.1:
            return
        self._printed_at_s = sample.at_s
        refused = f"  not done {1 - window.good / window.answers:.0%}" if window.answers > window.good else ""
        lag = f"  writer behind by {sample.lag_events:,}" if sample.lag_events is not None else ""
        line = (
            f"{sample.at_s:5.0f} s  {sample.per_second:7,.0f}/s  p50 {sample.p50_ms:.1f} ms  p99 {sample.p99_ms:.1f} ms"
            f"{lag}{refused}  load {sample.cpu['load']:.0%} of a core"
        )
        self._output.write(f"\r{line:100}" if self._live else f"{line}\n")
        self._output.flush()

    def end_line(self) -> None:
        """What is printed next shall not stand in the progress line."""
        if self._live and self.samples:
            self._output.write("\n")


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
