"""How long a recovery waits for what API processes have seen: once in vain, and not for ever after."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from coupon_svc.postgres import processes
from coupon_svc.writer import recover
from coupon_svc.writer.recover import Recoverer


class Silent:
    """API processes that report nothing, and a recoverer that waits for them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        nobody: Any = self
        self.recoverer = Recoverer("wr", nobody, 1)
        self.processes: list[str] = []
        monkeypatch.setattr(processes, "silent_processes", self._silent_processes)
        monkeypatch.setattr(recover, "gone_processes", self._gone_processes)
        monkeypatch.setattr(recover, "REPORTS_WAIT_S", 0.1)
        monkeypatch.setattr(recover, "REPORTS_AGAIN_S", 0.0)

    async def _silent_processes(self, *_: Any) -> list[str]:
        return self.processes

    async def _gone_processes(self, *_: Any) -> list[str]:
        return []

    def terminate(self) -> None:
        """As a connection."""

    async def waits(self, *processes: str) -> bool:
        """Whether a recovery waits for them as long as for one of which nothing is known."""
        self.processes = list(processes)
        connection: Any = self
        begun = asyncio.get_running_loop().time()
        assert await self.recoverer._wait_for_reports(connection, 0, 1) == len(processes)
        return asyncio.get_running_loop().time() - begun >= 0.1


async def test_who_was_waited_for_in_vain_is_waited_for_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    silent = Silent(monkeypatch)
    assert await silent.waits("a")
    assert not await silent.waits("a")
    assert await silent.waits("a", "b")
    monkeypatch.setattr(recover, "SILENCE_REMEMBERED_S", 0.0)
    assert await silent.waits("a")


async def test_of_many_processes_the_latest_alone_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    silent = Silent(monkeypatch)
    monkeypatch.setattr(recover, "REPORTS_WAIT_S", 0.0)
    monkeypatch.setattr(recover, "SILENCE_REMEMBERED_S", 0.0)
    for number in range(100):
        await silent.waits(f"process {number}")
    assert len(silent.recoverer._silent) == 1
