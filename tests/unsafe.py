"""Runs a part of the service with safeguards taken out: `python -m tests.unsafe SAFEGUARD[+SAFEGUARD…] PART …`.

Nothing in the service knows of this: public functions are replaced and lines of Lua left out, in a process of the test's
own. That happens before the part is imported, so a replaced function is replaced for whoever imports it. A safeguard that
cannot be found any more makes `mypy` or tests/chaos/test_chaos_proves_itself.py fail at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coupon_svc.cli import main
from coupon_svc.domain import bounds, chain, clock
from coupon_svc.domain import events as domain_events
from coupon_svc.domain.outcomes import Refused
from coupon_svc.domain.position import Position
from coupon_svc.postgres import epochs, events, late_events, lending, processes
from coupon_svc.redis import scripts as store_scripts
from coupon_svc.redis import server
from coupon_svc.redis.connection import Connection, Reply
from coupon_svc.redis.keys import parse_position_message
from coupon_svc.redis.scripts import Library, OperationSource, Script
from coupon_svc.redis.waiters import DurabilityWaiters, EntryKey
from coupon_svc.resources import resource_folder

if TYPE_CHECKING:
    from coupon_svc.redis.data_plane import DataPlane


def _without_text(file: str, text: str, instead: str = "") -> None:
    """Load scripts as if `instead` stood where `text` does in the Lua file of this name, and in what is made of it."""
    assert text in (resource_folder("lua") / f"{file}.lua").read_text(), (
        f"{file}.lua: the safeguard is not where it was"
    )
    read_script_before, read_library_before = store_scripts.read_script, store_scripts.read_library

    def read_script(path: Path) -> Script:
        script = read_script_before(path)
        if file != path.stem and not file.startswith("include/"):
            return script
        body = script.body.replace(text, instead)
        return store_scripts.bind_script(script.name, script.first_line, script.contract, body)

    def read_library(path: Path, operations: Sequence[OperationSource]) -> Library:
        body = read_library_before(path, operations).body.replace(text, instead)
        return store_scripts.bind_library(body)

    store_scripts.read_script, store_scripts.read_library = read_script, read_library


def record_epoch() -> None:
    """A record takes a code out of the quarantine, in whatever epoch the code was lent that was lost."""

    async def release(connection: Any, book_id: str, code: str, epoch: int, decision: str) -> bool:
        lost_in = "SELECT epoch FROM quarantine WHERE book_id = $1 AND code = $2"
        epoch = await connection.fetchval(lost_in, book_id, code) or epoch
        return await honest(connection, book_id, code, epoch, decision)

    honest = late_events.release  # type: ignore[attr-defined]
    late_events.release = release  # type: ignore[attr-defined]


def told_position() -> None:
    """Nobody learns from the position messages which positions are taken: they only wake whoever waits for the ledger."""
    waiting: list[DurabilityWaiters] = []

    def waiters(self: DurabilityWaiters, *args: Any, **named: Any) -> None:
        waiting.append(self)
        honest_waiters(self, *args, **named)

    def connection(self: Connection, on_message: Callable[[Reply], None] | None = None, **named: Any) -> None:
        honest_connection(self, on_message and on_message_untold, **named)

    def on_message_untold(message: Reply) -> None:
        if message[0] == "message":
            for told in parse_position_message(message[2]):
                for one in waiting:
                    one.advance(told.shard, told.epoch, told.committed)
                    one.hear(told.tips)

    honest_waiters, honest_connection = DurabilityWaiters.__init__, Connection.__init__
    DurabilityWaiters.__init__, Connection.__init__ = waiters, connection  # type: ignore[method-assign]


def tip() -> None:
    """Whoever made an event waits for its position, whichever entry the ledger has there."""

    async def wait_for_entry(self: DurabilityWaiters, entry: EntryKey, until: float) -> None:
        await self.wait(entry.shard, entry.epoch, entry.seq, until)

    DurabilityWaiters.wait_for_entry = wait_for_entry  # type: ignore[method-assign]


def installation() -> None:
    """Nobody asks whose keys are in Redis."""

    def send(self: Connection, *command: Any) -> Any:
        if command[0] == "HGET" and command[2] == "installation":
            command = (*command[:2], "no_such_field")
        return honest(self, *command)

    honest = Connection.send
    Connection.send = send  # type: ignore[method-assign]
    for name in ("open_shard", "shut_shard"):
        _without_text(name, "kept_installation ~= installation", "false")


def clocks() -> None:
    """Redis's clock is believed, however far it is from Postgres's."""
    compared = (
        'if ledger_ms ~= "" and math.abs(now_ms - tonumber(ledger_ms)) > CLOCKS_APART_MAX_MS then\n'
        '  return {"clock", at_ms}\nend\n'
    )
    _without_text("publish_positions", compared)
    bounds.CLOCKS_APART_MAX_MS = 10**15


def in_touch() -> None:
    """A writer keeps its shards, whether it can reach Redis or not."""
    from coupon_svc.writer import owning

    owning.OUT_OF_TOUCH_S = 10**9


def quarantine() -> None:
    """Codes that somebody may hold go back to be dealt."""

    async def may_have_answered_early(*_: Any) -> bool:
        return False

    processes.may_have_answered_early = may_have_answered_early  # type: ignore[assignment]


def rebuild() -> None:
    """A recovery drops nothing of what Redis holds, whatever that is."""
    from coupon_svc.redis.control import ShardControl

    async def wipe_shard(*_: Any) -> None:
        return None

    ShardControl.wipe_shard = wipe_shard  # type: ignore[method-assign, assignment]


def replay() -> None:
    """An Idempotency-Key that was used before is not looked up."""
    _without_text("operations/assign_coupon", "if answer then\n  return answer\nend\n")


def overlay() -> None:
    """An operation does not see which codes others of its call have taken."""
    _without_text("include/pool", "while code and changed and changed[code] do", "while false do")


def replid() -> None:
    """Scripts do not ask in which history the server is."""
    _without_text("include/fence", "if not is_in_history(replid) then", "if false then")


def lock() -> None:
    """A redeem does not mind that somebody else has the code locked."""
    _without_text("include/lock", 'if held_token and shown_token == "" then', "if false then")


def lease() -> None:
    """Redis is lent codes of which Postgres is not told: the writer alone remembers which."""
    lent: dict[tuple[str, int], int] = {}

    async def lease_block(
        connection: Any, _: str, owned: Any, book_id: str, count: int, __: Any = None
    ) -> lending.Lease:
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
    _without_text("include/fence", "if kept_epoch ~= epoch then", "if false then")


def seen_position() -> None:
    """Neither a script nor the look at Redis once a second compares the position with what was seen."""
    _without_text("include/fence", "if meta.seq < tonumber(seen_seq) then", "if false then")
    planes: list[DataPlane] = []

    async def read_info(connection: Connection) -> dict[str, str]:
        for plane in planes:
            for view in plane.views:
                view.seen_seq = 0
        return await honest(connection)

    honest = server.read_info
    server.read_info = read_info

    from coupon_svc.redis.data_plane import DataPlane

    def init(self: DataPlane, *args: Any, **named: Any) -> None:
        planes.append(self)
        honest_init(self, *args, **named)

    honest_init = DataPlane.__init__
    DataPlane.__init__ = init  # type: ignore[method-assign]


def fenced_load() -> None:
    """Codes are loaded whoever brings them, and in whatever epoch they were lent."""
    _without_text("load_codes", "if refusal then\n  return refusal\nend\nif not redis", "if not redis")


def position() -> None:
    """A commit does not ask whether the ledger is where the batch begins, by its position, tip or hash."""

    async def commit_batches(connection: Any, writer_id: str, batches: Sequence[events.Batch]) -> Any:
        for batch in batches:
            begins = "UPDATE shards SET committed = $3, chain = $4, tip = $5 WHERE shard = $1 AND owner = $2"
            await connection.execute(begins, batch.shard, writer_id, batch.committed, batch.chain, batch.tip)
        return await honest(connection, writer_id, batches)

    honest = events.commit_batches
    events.commit_batches = commit_batches


def position_and_epoch() -> None:
    """Nor whether the batch is of the epoch that the ledger is in. (A batch of another epoch begins where the ledger is
    only when it is the first of its own: so each of the two stands in for the other.)"""

    async def commit_batches(connection: Any, writer_id: str, batches: Sequence[events.Batch]) -> Any:
        enter = "UPDATE shards SET epoch = $3 WHERE shard = $1 AND owner = $2"
        rows = await connection.fetch("SELECT shard, epoch FROM shards")
        for batch in batches:
            await connection.execute(enter, batch.shard, writer_id, batch.epoch)
        outcomes, heads = await honest(connection, writer_id, batches)
        for shard, epoch in rows:
            if shard in heads:
                await connection.execute(enter, shard, writer_id, epoch)
        return outcomes, heads

    position()
    honest = events.commit_batches
    events.commit_batches = commit_batches


def shard_result() -> None:
    """A writer takes every shard of a commit for moved."""

    async def commit_batches(connection: Any, writer_id: str, batches: Sequence[events.Batch]) -> Any:
        outcomes, heads = await honest(connection, writer_id, batches)
        return dict.fromkeys(outcomes, "moved"), heads

    honest = events.commit_batches
    events.commit_batches = commit_batches


class _AnyTip(str):
    """Equal to every tip."""

    __slots__ = ()
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False


def after() -> None:
    """An entry follows whichever the ledger has before it."""

    def parse_entry(position: Position, fields: Sequence[bytes]) -> domain_events.Entry:
        entry = honest(position, fields)
        return entry._replace(after=_AnyTip(entry.after))

    def chain_hash(before: bytes, shard: int, epoch: int, record: Sequence[Any]) -> bytes:
        plain = tuple(str(value) if isinstance(value, _AnyTip) else value for value in record)
        return honest_hash(before, shard, epoch, plain)

    honest, honest_hash = domain_events.parse_entry, chain.chain_hash
    domain_events.parse_entry = parse_entry
    events.chain_hash = chain_hash  # type: ignore[attr-defined]


def own_epoch() -> None:
    """Whoever waits for the ledger takes a position of a newer epoch for his own. (Who made an event waits for its entry: so
    the tip stands in for this, and is out as well.)"""
    tip()

    async def wait(self: DurabilityWaiters, shard: int, epoch: int, seq: int, until: float) -> None:
        try:
            await honest(self, shard, epoch, seq, until)
        except Refused:
            if self.committed(shard)[0] <= epoch:
                raise

    honest = DurabilityWaiters.wait
    DurabilityWaiters.wait = wait  # type: ignore[method-assign]


def registration() -> None:
    """Answers leave before the ledger knows, registered or not: no registration ends, not even one that never began."""
    clock.boot_s = lambda: -1.0


def stop_flag() -> None:
    """A shard that is stopped is opened like any other."""

    async def stopped_because(*_: Any) -> None:
        return None

    epochs.stopped_because = stopped_because  # type: ignore[assignment]


def room() -> None:
    """The backlog has no bound."""
    text = (resource_folder("lua") / "include" / "room.lua").read_text()
    _without_text("include/room", text[text.index("if meta.seq") : text.index("local unseen_ms")])


SAFEGUARDS: dict[str, Callable[[], None]] = {
    safeguard.__name__: safeguard
    for safeguard in (
        record_epoch,
        told_position,
        tip,
        installation,
        clocks,
        in_touch,
        quarantine,
        rebuild,
        replay,
        overlay,
        lease,
        epoch,
        seen_position,
        replid,
        fenced_load,
        position,
        position_and_epoch,
        shard_result,
        after,
        own_epoch,
        registration,
        stop_flag,
        room,
        lock,
    )
}

if __name__ == "__main__":
    for name in sys.argv[1].split("+"):
        SAFEGUARDS[name]()
    sys.exit(main(sys.argv[2:]))
