"""Which API processes live: a row that is not renewed for long enough is counted as gone."""

from __future__ import annotations

import asyncio
import logging
import time

from coupon_svc.postgres.database import LedgerConnection, LedgerSession
from coupon_svc.postgres.errors import LedgerUnavailable
from coupon_svc.postgres.liveness import Watch
from coupon_svc.postgres.processes import PROCESS_TTL_S, count_as_gone, forget_processes, gone_processes, process_beats

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
STATEMENTS_TIMEOUT_S = 3.0


class Watching:
    """Looks at the rows of API processes, apart from the other loops: a lock on those rows holds up nothing else."""

    def __init__(self, session: LedgerSession) -> None:
        self.session = session
        self._processes = Watch(PROCESS_TTL_S)
        self.gone: list[str] = []
        """API processes that are gone, as of the last look."""

    async def run(self) -> None:
        """Look once a second, until cancelled."""
        while True:
            try:
                async with self.session.work(STATEMENTS_TIMEOUT_S) as connection:
                    await self._look(connection)
            except LedgerUnavailable as error:
                log.warning("postgres cannot be used: %s", error)
            await asyncio.sleep(LOOK_EVERY_S)

    async def _look(self, connection: LedgerConnection) -> None:
        asked_at = time.monotonic()
        beats = await process_beats(connection)
        for process_id, beat in self._processes.look(beats, asked_at, time.monotonic()):
            if await count_as_gone(connection, process_id, beat):
                log.warning("API process %s is gone", process_id)
        if self.gone:
            await forget_processes(connection)
        self.gone = await gone_processes(connection)
