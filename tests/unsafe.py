"""Runs a part of the service with one safeguard taken out: `python -m tests.unsafe SAFEGUARD PART …`.

Nothing in the service knows of this: methods are replaced and lines of Lua left out here, in a process of the test's own.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from coupon_svc.cli import main
from coupon_svc.postgres import events, lending, recovery
from coupon_svc.redis import control
from coupon_svc.redis import scripts as store_scripts
from coupon_svc.redis.control import OwnerStore
from coupon_svc.redis.data_plane import ShardView, Store
from coupon_svc.redis.positions import Positions
from coupon_svc.redis.scripts import Script
from coupon_svc.resources import resource_folder
from coupon_svc.writer import recover, writer
from coupon_svc.writer.writer import Writer

_read_script = store_scripts.read_script


def _without_lines(name: str, lines: str) -> None:
    """Load scripts as if `lines` did not stand in the file of this name, or in what it includes."""
    read_before = store_scripts.read_script

    def read_script(path: Path) -> Script:
        script = read_before(path)
        if path.stem != name:
            return script
        assert lines in script.source, f"{name}.lua has changed: the safeguard is not where it was"
        return _cut(script, lines)

    store_scripts.read_script = read_script


def _without_text(include: str, text: str, instead: str = "") -> None:
    """Load scripts as if `instead` stood where `text` does in the included file of this name."""
    included = (resource_folder("lua") / "include" / f"{include}.lua").read_text()
    assert text in included, f"{include}.lua has changed: the safeguard is not where it was"

    def read_script(path: Path) -> Script:
        return _cut(_read_script(path), text, instead)

    store_scripts.read_script = read_script


def _cut(script: Script, text: str, instead: str = "") -> Script:
    source = script.source.replace(text, instead)
    return Script(script.name, source, hashlib.sha1(source.encode()).hexdigest())


def record_epoch() -> None:
    """A record takes a code out of the quarantine, in whatever epoch the code was lent that was lost."""

    async def release(connection: Any, book_id: str, code: str, epoch: int, decision: str) -> bool:
        lost_in = "SELECT epoch FROM quarantine WHERE book_id = $1 AND code = $2"
        epoch = await connection.fetchval(lost_in, book_id, code) or epoch
        return await honest(connection, book_id, code, epoch, decision)

    honest = recovery.release
    recovery.release = release


def told_position() -> None:
    """Nobody learns from the position messages which positions are taken."""

    def on_message(self: Store, message: Any) -> None:
        seen = [view.seen_seq for view in self.views]
        honest(self, message)
        for view, seq in zip(self.views, seen, strict=True):
            view.seen_seq = seq

    honest = Store._on_message
    Store._on_message = on_message  # type: ignore[method-assign]


def installation() -> None:
    """Nobody asks whose keys are in Redis."""

    async def require_ours(*_: Any) -> None:
        return None

    OwnerStore._require_ours = require_ours  # type: ignore[method-assign, assignment]
    _without_lines("open_shard", 'if meta[7] and meta[7] ~= ARGV[7] then\n  return {"foreign", meta[7]}\nend\n')
    _without_lines("shut_shard", 'if meta[4] and meta[4] ~= ARGV[3] then\n  return {"foreign", meta[4]}\nend\n')


def clocks() -> None:
    """Redis's clock is believed, however far it is from Postgres's."""
    compared = (
        'if ARGV[9] ~= "" and math.abs(now_ms - tonumber(ARGV[9])) > 60000 then\n  return {"clock", at_ms}\nend\n'
    )
    _without_lines("publish_position", compared)
    writer.CLOCKS_APART_MAX_MS = 10**15  # type: ignore[attr-defined]
    control.CLOCKS_APART_MAX_MS = 10**15


def in_touch() -> None:
    """A writer keeps its shards, whether it can reach Redis or not."""

    def in_touch(_: Writer) -> bool:
        return True

    Writer._in_touch = in_touch  # type: ignore[method-assign, assignment]


def quarantine() -> None:
    """Codes that somebody may hold go back to be dealt."""

    async def nothing_lost(*_: Any) -> bool:
        return True

    recover.Recoverer._nothing_lost = nothing_lost  # type: ignore[method-assign, assignment]


def rebuild() -> None:
    """Redis is kept whatever it holds, if it is not empty."""

    async def agrees(*_: Any) -> bool:
        return True

    async def drain(self: Any, *args: Any) -> tuple[int, bool]:
        reached, _ = await honest(self, *args)
        return reached, True

    honest = recover.Recoverer._drain
    recover.Recoverer._agrees = agrees  # type: ignore[method-assign, assignment]
    recover.Recoverer._drain = drain  # type: ignore[method-assign, assignment]


def replay() -> None:
    """An Idempotency-Key that was used before is not looked up."""
    included = (resource_folder("lua") / "include" / "replay.lua").read_text()
    _without_lines("assign_coupon", included)


def replid() -> None:
    """Scripts do not ask in which history the server is."""
    compared = (
        '\n  or not string.find(redis.call("INFO", "replication"), "master_replid:" .. tostring(meta[6]), 1, true)'
    )
    _without_lines("assign_coupon", compared)


def lock() -> None:
    """A redeem does not mind that somebody else has the code locked."""
    _without_lines("redeem_coupon", 'if held_token and shown_token == "" then\n  return {"locked", held_ms}\nend\n')


def lease() -> None:
    """Redis is lent codes of which Postgres is not told: the writer alone remembers which."""
    lent: dict[tuple[str, int], int] = {}

    async def lease_block(connection: Any, _: str, owned: Any, book_id: str, count: int) -> lending.Lease:
        rows = await connection.fetch(
            "SELECT code, place FROM codes WHERE book_id = $1 AND place > $2 ORDER BY place LIMIT $3",
            book_id,
            lent.get((book_id, owned.epoch), 0),
            count,
        )
        lent[book_id, owned.epoch] = max([lent.get((book_id, owned.epoch), 0), *(row["place"] for row in rows)])
        return lending.Lease([row["code"] for row in rows], 1)

    lending.lease_block = lease_block  # type: ignore[assignment]


def epoch() -> None:
    """Scripts do not compare the epoch."""
    _without_text("fence", "if meta[1] ~= ARGV[1] or not", "if not")


def seen_position() -> None:
    """Neither a script nor the look at Redis once a second compares the position with what was seen."""
    _without_text("fence", " or tonumber(meta[2]) < tonumber(ARGV[2])")

    async def verify(self: Store, connection: Any) -> None:
        for view in self.views:
            view.seen_seq = 0
        await honest(self, connection)

    honest = Store._verify
    Store._verify = verify  # type: ignore[method-assign]


def fenced_load() -> None:
    """Codes are loaded whoever brings them, and in whatever epoch they were lent."""
    _without_lines("load_codes", (resource_folder("lua") / "include" / "owner.lua").read_text())


def position() -> None:
    """A commit does not ask whether the ledger is where the batch begins, by its position or by the hash there."""
    _without_condition(" AND shards.committed = batch.committed")
    _without_condition(" AND shards.chain = batch.chain")


def position_and_epoch() -> None:
    """Nor whether the batch is of the epoch that the ledger is in. (A batch of another epoch begins where the ledger is
    only when it is the first of its own: so each of the two stands in for the other.)"""
    position()
    _without_condition(" AND shards.epoch = batch.epoch")


def own_epoch() -> None:
    """Whoever waits for the ledger takes a position of a newer epoch for his own."""

    def advance(self: Positions, shard: int, epoch: int, seq: int) -> None:
        for wanted, _, _, _, future in self._waiting[shard]:
            if wanted < epoch and not future.done():
                future.set_result(None)
        honest_advance(self, shard, epoch, seq)

    async def wait(self: Positions, shard: int, epoch: int, seq: int) -> None:
        if self.committed(shard)[0] <= epoch:
            await honest_wait(self, shard, epoch, seq)

    honest_advance, honest_wait = Positions.advance, Positions.wait
    Positions.advance, Positions.wait = advance, wait  # type: ignore[method-assign]


def registration() -> None:
    """Answers leave before the ledger knows, registered or not."""

    def may_answer_early(_: Store, view: ShardView, epoch: int) -> bool:
        return epoch >= view.epoch_min

    Store.may_answer_early = may_answer_early  # type: ignore[method-assign, assignment]


def stop_flag() -> None:
    """A shard that is stopped is opened like any other."""

    async def stopped_because(*_: Any) -> None:
        return None

    writer.stopped_because = stopped_because  # type: ignore[attr-defined, assignment]


def room() -> None:
    """The backlog has no bound."""
    text = (resource_folder("lua") / "include" / "room.lua").read_text()
    _without_text("room", text[text.index("if tonumber(meta[2])") : text.index("local unseen_ms")])


def _without_condition(text: str) -> None:
    assert text in events._ADVANCE, "the commit has changed: the safeguard is not where it was"
    events._ADVANCE = events._ADVANCE.replace(text, "")


SAFEGUARDS: dict[str, Callable[[], None]] = {
    safeguard.__name__: safeguard
    for safeguard in (
        record_epoch,
        told_position,
        installation,
        clocks,
        in_touch,
        quarantine,
        rebuild,
        replay,
        lease,
        epoch,
        seen_position,
        replid,
        fenced_load,
        position,
        position_and_epoch,
        own_epoch,
        registration,
        stop_flag,
        room,
        lock,
    )
}

if __name__ == "__main__":
    SAFEGUARDS[sys.argv[1]]()
    sys.exit(main(sys.argv[2:]))
