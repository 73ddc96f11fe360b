"""Sends operations to Redis in calls, and gives each caller the reply of its own.

A call is whatever has come since the last one. Nobody waits for a call to fill: with one request at a time it carries one
operation, and is sent at once. Three classes of operations are sent apart, because Redis judges a whole function by its
flags: where it takes no write, reads go on, and where it has no memory, kept promises do, too.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from time import monotonic
from typing import Any, NamedTuple, cast

import hiredis

from coupon_svc.domain.errors import error_location
from coupon_svc.domain.holding import Holding
from coupon_svc.domain.outcomes import Outcome, Refused
from coupon_svc.hot import Withdrawn
from coupon_svc.redis.call_queue import CALL_WEIGHT_MAX, CallQueue, PendingOperation
from coupon_svc.redis.calls import (
    MADE_EVENT,
    EntryId,
    KeyTable,
    Section,
    bind_operation,
    call_command,
    section_replies,
)
from coupon_svc.redis.connection import Connection
from coupon_svc.redis.contract import CallClass, Command, Reply
from coupon_svc.redis.errors import NotSent, OutcomeUnknown, ReplyError
from coupon_svc.redis.scripts import Scripts
from coupon_svc.redis.shard_view import ShardView, ViewState

log = logging.getLogger(__name__)

UNDER_WAY_MAX = 2
"""Calls of a class that are under way at once: Redis runs one while the next is on the wire. With 1 ms on the way and
requests at random moments, a third gains nothing, and with only one the median wait is a quarter longer."""
ALONE = 4
"""After so many calls of one operation the next operation waits for no other. Two that always come together are sent apart
once, and share their calls from then on."""
UNREACHED_SEQ = 1 << 63
"""Higher than the seq of any shard."""
QUEUED_S = 4.0
"""How long an operation may wait to be sent. A full queue of one tenant is sent in it at 2,500 per second."""

_UNAVAILABLE_WORDS = frozenset({"LOADING", "BUSY", "MISCONF", "NOREPLICAS", "CLUSTERDOWN", "TRYAGAIN"})
"""First words of error replies that say nothing against the shard: nothing was done."""


class Plane(NamedTuple):
    """What the dispatcher has of the data plane."""

    connection: Callable[[], Connection | None]
    """The verified connection, if there is one."""
    load_again: Callable[[], Awaitable[None]]
    """Verify a server that does not know our scripts, and make them known to it. Raises nothing."""
    doubt: Callable[[ShardView, str], None]
    """Let nobody decide anything in the shard, for a reason as in the reply `suspect`, and shut it here."""
    suspect: Callable[[ShardView], None]
    """Shut the shard here; Redis has it in doubt already, or has another master."""


class _Sent(Section):
    """A section of a call under way."""

    __slots__ = ("epoch", "operations", "view")

    def __init__(self, keys: KeyTable, view: ShardView) -> None:
        super().__init__(keys, view.keys, view.epoch, view.seen_seq)
        self.view = view
        self.epoch = view.epoch
        self.operations: list[PendingOperation] = []


class _Call(NamedTuple):
    lane: _Lane
    connection: Connection
    sections: list[_Sent]
    last: bool
    """It is not sent again when Redis does not know the function."""

    @property
    def operations(self) -> list[PendingOperation]:
        return [operation for section in self.sections for operation in section.operations]

    @property
    def lost(self) -> Outcome:
        """What a caller is told whose operation was sent, and of which nothing is known."""
        return Outcome.STORE_UNAVAILABLE if self.lane.call_class is CallClass.READ else Outcome.OUTCOME_UNKNOWN


class _Lane:
    """One class of operations on its way."""

    def __init__(self, call_class: CallClass, function: str) -> None:
        self.call_class = call_class
        self.function = function
        self.queue = CallQueue()
        self.under_way = 0
        self.alone = 0
        """How many calls in a row have carried one operation, and none came while they were under way."""


class Dispatcher:
    """Its methods but `run` return at once."""

    def __init__(self, scripts: Scripts, plane: Plane) -> None:
        self._plane = plane
        self._operations = {name: bind_operation(one.contract) for name, one in scripts.operations.items()}
        self._lanes = {one: _Lane(one, scripts.library.function(one)) for one in CallClass}
        self._flush_due = False
        self._loading: set[asyncio.Task[None]] = set()
        self._answered_by: Connection | None = None
        self._answered: dict[int, EntryId] = {}
        """Shard -> its last entry in the last reply on the connection `_answered_by`."""

    async def run(self, name: str, view: ShardView, parameters: dict[str, Any], until: float = math.inf) -> Reply:
        """The reply of one operation. Raises Refused, as `DataPlane.call`; store_unavailable for one that was withdrawn."""
        if self._plane.connection() is None:
            raise Refused(Outcome.STORE_UNAVAILABLE)
        if view.state is not ViewState.OPEN:
            raise Refused(Outcome.RECOVERING)
        operation = self._operations[name]
        lane = self._lanes[operation.call_class]
        deadline = monotonic() + QUEUED_S
        pending = PendingOperation(operation, view, parameters, until if until < deadline else deadline)
        if lane.under_way or lane.queue:
            lane.alone = 0
        if lane.alone >= ALONE:
            self._send(lane, [pending])
            self._write()
        elif lane.queue.put(pending):
            self._wake()
        else:
            raise Refused(Outcome.STORE_UNAVAILABLE)
        try:
            reply = await pending.reply
        except asyncio.CancelledError:
            lane.queue.remove(pending)
            raise
        except Withdrawn:
            lane.queue.remove(pending)
            raise Refused(Outcome.STORE_UNAVAILABLE) from None
        if pending.epoch != view.epoch:  # it was over before we came to read the reply, which says nothing any more
            raise Refused(Outcome.RECOVERING if lane.call_class is CallClass.READ else Outcome.OUTCOME_UNKNOWN)
        return reply

    def refuse_late(self) -> None:
        """Refuse what was not sent in time: nothing was done."""
        now = monotonic()
        for lane in self._lanes.values():
            for pending in lane.queue.take_late(now):
                _refuse(pending, Outcome.STORE_UNAVAILABLE)

    # --- sending

    def _wake(self) -> None:
        """Send what is queued when this turn of the event loop is over: whoever comes within it shares the call."""
        if not self._flush_due:
            self._flush_due = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_due = False
        for lane in self._lanes.values():
            if lane.queue and lane.under_way < UNDER_WAY_MAX:
                self._send(lane, lane.queue.take())
                if lane.queue and lane.under_way < UNDER_WAY_MAX:
                    self._wake()
        self._write()

    def _write(self) -> None:
        connection = self._plane.connection()
        if connection is not None:
            connection.flush()

    def _send(self, lane: _Lane, operations: Sequence[PendingOperation], *, last: bool = False) -> None:
        """Make a call of the operations. Those that may not be sent are refused."""
        connection = self._plane.connection()
        if connection is None:
            _refuse_all(operations, Outcome.STORE_UNAVAILABLE)
            return
        now = monotonic()
        ready = []
        for pending in operations:
            if pending.reply.done():
                continue
            if pending.deadline <= now:
                _refuse(pending, Outcome.STORE_UNAVAILABLE)
            elif pending.view.state is not ViewState.OPEN:
                _refuse(pending, Outcome.RECOVERING)
            else:
                ready.append(pending)
        if not ready:
            return
        try:
            sections, command = _pack(lane.function, ready)
            on_reply = partial(self._on_reply, _Call(lane, connection, sections, last))
            connection.submit(command, on_reply, will_flush=True)
        except NotSent:
            _refuse_all(ready, Outcome.STORE_UNAVAILABLE)
            return
        except Exception as error:  # one of them has what cannot be sent: the others must not suffer from it
            sound = [pending for pending in ready if _can_be_packed(pending)]
            if len(sound) == len(ready):
                log.error("a call cannot be sent: %s at %s", type(error).__name__, error_location(error))
                _refuse_all(ready, Outcome.INTERNAL_ERROR)
            else:
                self._send(lane, sound, last=last)
            return
        lane.under_way += 1
        lane.alone = lane.alone + 1 if len(ready) == 1 else 0

    # --- reading replies

    def _on_reply(self, call: _Call, raw: Any) -> None:
        """The reply is read before anything else is sent: the next call is checked by what it tells."""
        call.lane.under_way -= 1
        try:
            if isinstance(raw, OutcomeUnknown):
                _refuse_all(call.operations, call.lost)
                return
            if isinstance(raw, ReplyError):
                self._read_error(call, raw)
                return
            try:
                replies = section_replies(raw)
            except Exception as error:  # whatever it is: nobody may wait for ever
                log.error("the reply of a call: %s", type(error).__name__)
                _refuse_all(call.operations, call.lost)
                return
            for number, section in enumerate(call.sections):
                try:
                    self._read_section(call, section, replies[number])
                except Exception as error:  # whatever it is: nobody may wait for ever
                    log.error("the reply of a call, in shard %02d: %s", section.view.shard, type(error).__name__)
                    _refuse_all(section.operations, Outcome.INTERNAL_ERROR)
        finally:
            # Enough operations wait for a whole call: it is sent now. This turn may first read thousands of other requests.
            if len(call.lane.queue) >= CALL_WEIGHT_MAX:
                self._flush()
            elif call.lane.queue:
                self._wake()

    def _read_section(self, call: _Call, section: _Sent, raw: list[Any]) -> None:
        view = section.view
        if raw[0] == "suspect":
            self._plane.doubt(view, raw[1])
            _refuse_all(section.operations, Outcome.RECOVERING)
        elif raw[0] == "unknown":
            self._plane.suspect(view)
            _refuse_all(section.operations, call.lost)
        else:
            # In the order of the header of lua/call.lua: a ReplyReader would cost two calls.
            _, seq, tip, replies, *content = raw
            last = begins = EntryId(section.epoch, int(seq), tip)
            if content:
                number, after, *_ = content[0]
                begins = EntryId(section.epoch, last.seq - int(number), after)
            if not self._has_grown(call.connection, view.shard, begins, last):
                self._plane.doubt(view, "position")
                _refuse_all(section.operations, call.lost)
                return
            view.observe(last.epoch, last.seq)
            made = last if tip == section.tip else None  # else the section made no event, and this is another's entry
            if content:
                view.keep(last.epoch, last.seq, tip, content[0])
            for pending, reply in zip(section.operations, replies, strict=True):
                self._read_operation(pending, reply, made)

    def _has_grown(self, connection: Connection, shard: int, begins: EntryId, last: EntryId) -> bool:
        """Whether a section began where the shard was when the last reply came on this connection, or further. Two calls
        under way were sent with what was seen before both: keys that were put back between them show here alone, however
        much the second has made on top of them. So does another entry at a position that was seen before. After that,
        nothing that the shard says in this epoch is believed."""
        if connection is not self._answered_by:
            self._answered_by = connection
            self._answered.clear()
        before = self._answered.get(shard)
        if before is not None and before.epoch == last.epoch and begins != before and begins.seq <= before.seq:
            self._answered[shard] = EntryId(last.epoch, UNREACHED_SEQ, "")
            return False
        self._answered[shard] = last
        return True

    def _read_operation(self, pending: PendingOperation, raw: list[Any], made: EntryId | None) -> None:
        view, operation = pending.view, pending.operation
        outcome = raw[0]
        if outcome == "error":
            if raw[1] == "WRONGTYPE":
                self._plane.doubt(view, "type")  # a call that only reads could not do so itself
                _refuse(pending, Outcome.RECOVERING)
            else:
                log.error("%s failed in shard %02d: %s", operation.name, view.shard, raw[1])
                _refuse(pending, Outcome.INTERNAL_ERROR)
            return
        try:
            reply = operation.reply(raw, made)
        except Exception as error:
            log.error("a reply of %s in shard %02d: %s", operation.name, view.shard, type(error).__name__)
            _refuse(pending, Outcome.INTERNAL_ERROR)
            return
        if outcome == "suspect":
            self._plane.doubt(view, reply.why)
            _refuse(pending, Outcome.RECOVERING)
            return
        if made is None and operation.makes_event and outcome in MADE_EVENT:
            self._plane.doubt(view, "entry")  # an event was made, and the shard's last entry is not that of this call
            _refuse(pending, Outcome.OUTCOME_UNKNOWN)
            return
        if outcome in operation.with_position:
            _, last = reply.position
            view.observe(*last)
        elif outcome in operation.with_holders:
            for holding in reply.holders:
                if isinstance(holding, Holding):
                    view.observe(*holding.last)
        # All that is left of the request runs within, and may come to run again (coupon_svc/hot.py).
        pending.reply.set_result(reply)

    def _read_error(self, call: _Call, error: ReplyError) -> None:
        """Redis refused the call as a whole."""
        word = error.word
        if error.not_loaded and not call.last:
            call.lane.under_way += 1
            task = asyncio.create_task(self._send_again(call))
            self._loading.add(task)
            task.add_done_callback(self._loading.discard)
            return
        if word in ("READONLY", "MASTERDOWN"):
            for section in call.sections:
                self._plane.suspect(section.view)
        if word == "OOM":
            outcome = Outcome.BACKLOG_FULL
        elif error.not_loaded or word in ("READONLY", "MASTERDOWN"):
            outcome = Outcome.RECOVERING
        elif word in _UNAVAILABLE_WORDS:
            outcome = Outcome.STORE_UNAVAILABLE
        else:
            log.error("a call of class %s failed: %s", call.lane.call_class, word)
            # An operation cannot raise it, so it comes from before a section's first write. Other sections may be done.
            begun = len(call.sections) > 1 and call.lane.call_class is not CallClass.READ
            outcome = Outcome.OUTCOME_UNKNOWN if begun else Outcome.INTERNAL_ERROR
        _refuse_all(call.operations, outcome)

    async def _send_again(self, call: _Call) -> None:
        """The server did not know the function, and so did nothing."""
        try:
            await self._plane.load_again()
        finally:
            call.lane.under_way -= 1
            self._send(call.lane, call.operations, last=True)
            self._write()


def _pack(function: str, operations: Sequence[PendingOperation]) -> tuple[list[_Sent], Command]:
    """The sections of a call, one for each shard, and its command."""
    keys: KeyTable = {}
    sections: dict[int, _Sent] = {}
    for pending in operations:
        view = pending.view
        section = sections.get(view.shard)
        if section is None:
            section = sections[view.shard] = _Sent(keys, view)
        section.add(pending.operation.pack(keys, view.keys.prefix, **pending.parameters))
        section.operations.append(pending)
        pending.epoch = view.epoch
        pending.reply.withdrawable = False
    return list(sections.values()), call_command(function, keys, sections.values())


def _can_be_packed(pending: PendingOperation) -> bool:
    """Whether the operation can be sent. One that cannot is refused."""
    try:
        _, command = _pack("", [pending])
        hiredis.pack_command(cast(Any, command))
    except Exception as error:
        log.error("%s cannot be sent: %s", pending.operation.name, type(error).__name__)
        _refuse(pending, Outcome.INTERNAL_ERROR)
        return False
    return True


def _refuse(pending: PendingOperation, outcome: Outcome) -> None:
    pending.reply.set_exception(Refused(outcome))


def _refuse_all(operations: Sequence[PendingOperation], outcome: Outcome) -> None:
    for pending in operations:
        _refuse(pending, outcome)
