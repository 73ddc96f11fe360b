"""What a state of the model is made of: one shard, one book, and who works on them. All of it immutable and small."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")

GONE, DOUBT, RECOVERING = 0, -1, -2
"""What `meta.epoch` may be instead of an epoch: there is no meta, `doubt`, `recovering`."""

Position = tuple[int, int]
Term = tuple[int, int]
"""(epoch, generation) with which an owner writes."""
Identity = tuple[int, int]
"""(run_id, replid) of a Redis."""
Tip = int
"""What names an entry: epoch and seq of its last event, and which of the entries it is that were ever made there, as the
digits of one number. The service draws it at random; here it is the lowest that nobody remembers, so that histories without
a fork are not told apart by it."""

NO_TIP: Tip = 0
"""Before the first entry of an epoch; of an entry in the old format; of an event that is no entry's."""
UNTIED: Tip = -1
"""Of an event whose call is not at its end."""


class Event(NamedTuple):
    """An event of the stream. `verb` is `assign` or `redeem`; `key` the Idempotency-Key of the request, 0 without one.

    Events that one call made share `tip`: they are one entry. `after` is the tip of the entry before.
    """

    epoch: int
    seq: int
    verb: str
    code: int
    user: int
    key: int
    after: Tip = NO_TIP
    tip: Tip = NO_TIP

    @property
    def position(self) -> Position:
        return self.epoch, self.seq


class Holder(NamedTuple):
    """A code in somebody's hands, as Redis has it: `last` is its newest event; `assigned` the one that gave it away."""

    code: int
    assigned: Event
    last: Event


class Node(NamedTuple):
    """A Redis: who it is, the shard's meta, and the shard's keys."""

    run: int
    replid: int
    epoch: int
    was: int
    generation: int
    attempt: int
    """The epoch that the recovery which shut the shard is to bring."""
    seq: int
    committed: int
    certified: Identity
    book: bool
    lent: int
    free: frozenset[int]
    holders: frozenset[Holder]
    quarantine: frozenset[int]
    idem: frozenset[Event]
    """Idempotency records; the event is the answer, its `key` the key."""
    stream: tuple[Event, ...]
    tip: Tip = NO_TIP
    format: int = 2
    """Of the entries that may be made; 1 was certified by an older version."""

    @property
    def identity(self) -> Identity:
        return self.run, self.replid


class Ledger(NamedTuple):
    """Postgres. `lent` are the codes whose place is at or below the mark, held ones too."""

    epoch: int
    committed: int
    generation: int
    owner: int
    certified: int
    settled: int
    stopped: bool
    lent: frozenset[int]
    quarantine: frozenset[tuple[int, int]]
    """(code, epoch in which it was lent)."""
    lone: frozenset[int]
    events: frozenset[Event]
    dead: frozenset[tuple[int, int, int]]
    """(epoch, seq, code); code -1 where it is not known."""
    reports: frozenset[tuple[int, int, int]]
    """(process, epoch, highest seq seen)."""
    settling: int
    """The epoch whose books are being settled one after the other, 0 for none."""
    nothing_lost: bool
    """The verdict under which they are settled."""
    records: frozenset[Event] = frozenset()
    """What the reports say was made or shown, and the ledger lacks."""


class Process(NamedTuple):
    """An API process and its view of the shard."""

    node: int
    open: bool
    epoch: int
    seen: int
    epoch_min: int
    early: bool
    """Registered, and so soon after that it may answer before the ledger knows."""
    row: bool
    """It has a row in api_processes, be it a fresh one or one that has ended. Without one it has not started yet."""
    heard: int = 0
    """The position of its epoch that it has heard of, where messages take a while."""
    deaf: int = 0
    """What was told before it listened."""
    old: bool = False
    """It is of an older version: makes entries in the old format, and takes a shard of the new one for uncertified."""
    records: frozenset[Event] = frozenset()
    """What it has made or shown and the ledger lacked."""


class Batch(NamedTuple):
    """Events read and not committed yet, or (`done`) committed and their position not told yet."""

    term: Term
    committed: int
    upto: int
    events: tuple[Event, ...]
    done: bool


class Load(NamedTuple):
    """Codes on their way into a pool, and the term in which they were lent. `kind`: block, lone, outstanding; unlent when
    the lease is to follow."""

    term: Term
    codes: frozenset[int]
    kind: str


class Recovery(NamedTuple):
    """A recovery under way: the last step that is done, and what it knows."""

    done: str
    term: Term
    live: int
    identity: Identity
    meta: tuple[int, int, int, int]
    """Epoch, was, seq and committed as they stood before the shard was shut."""
    reached: int = 0
    stands: bool = False
    keep: bool = False


class Writer(NamedTuple):
    """A writer process: what it believes of the shard, and what it has in hand."""

    node: int
    term: Term
    committed: int
    opened_on: Identity | None
    wants_recovery: bool = False
    batch: Batch | None = None
    load: Load | None = None
    recovery: Recovery | None = None


class Ask(NamedTuple):
    """What a user is about. `phase`: idle; sent (decided, and the reply on its way); waiting; unknown; or shown (the receipt
    brought the record back to the ledger, and not to Redis yet). `verb` is "" at the end."""

    verb: str
    phase: str = "idle"
    tries: int = 0
    process: int = 0
    epoch: int = 0
    """In which the request was sent."""
    event: Event | None = None
    """What is to be answered."""
    until: Event | None = None
    """What must be durable before: the newest event of the same code."""
    made: bool = False
    """This very request made the event."""


class Wire(NamedTuple):
    """A script that was sent, and is executed when nobody waits for its reply any more."""

    step: str
    node: int
    term: Term
    identity: Identity
    load: Load | None = None


class State(NamedTuple):
    ledger: Ledger
    nodes: tuple[Node, ...]
    current: int
    """The node that new connections lead to."""
    copy: Node | None
    """An old copy of a node: a file, or a replica that lags."""
    processes: tuple[Process, ...]
    writers: tuple[Writer, ...]
    asks: tuple[Ask, ...]
    told: tuple[int, ...]
    """By epoch, the highest position that was ever told to those who wait."""
    answers: frozenset[tuple[str, int, int, int, Position]]
    """(verb, code, user, key, position) as told to callers."""
    overruled: frozenset[tuple[int, int]]
    """(code, epoch): an operator dealt the code again; assignments of that epoch and of older ones count no more."""
    wire: Wire | None
    faults: int
    lapses: int
    broken: str
    """The promise that this state breaks, "" for none."""
    lies: frozenset[Tip] = frozenset()
    """Tips that a message named though the ledger lacks their entries."""


class Bounds(NamedTuple):
    """How far the walk goes. What is 0, False or not listed does not happen."""

    mode: str = "ledger"
    codes: int = 1
    users: int = 2
    epochs: int = 2
    faults: int = 1
    processes: int = 1
    writers: int = 1
    takeovers: int = 0
    tries: int = 2
    """How often a user sends a request."""
    redeems: int = 0
    """How many redemptions the holder of a code asks for, each with a key of its own."""
    named: bool = False
    """The last user names the code it wants."""
    receipts: bool = False
    """Who is told that a code is in quarantine, and was answered it, shows the receipt."""
    limit: bool = False
    """One code a user; requests carry no Idempotency-Key then."""
    lapses: int = 0
    """How many API processes die, or lose their registration."""
    joins: bool = False
    """The last API process starts at any moment, and knows nothing yet."""
    messages: bool = False
    """A message about a position reaches each process at a moment of its own."""
    anonymous: bool = False
    """A redeem names the code and no user; then it is the ledger that is watched, and P6 is not."""
    delays: bool = False
    """One script of an owner is executed late, when its sender has given it up."""
    calls: bool = False
    """Two requests at one API process may be decided by one call. All codes are lent at once then."""
    twins: bool = False
    """All requests are of one user, and have one Idempotency-Key."""
    reports: bool = False
    """Reports carry the records of what was answered early, and a recovery waits for those of all processes that live."""
    upgrade: bool = False
    """The first epoch is an older version's, and so is the first API process."""
    kinds: frozenset[str] = frozenset()
    """Which faults there are."""
    order: tuple[str, ...] = ()
    """Or which faults there are, one after the other: for histories of several disasters."""
    off: frozenset[str] = frozenset()
    """Safeguards that are taken out."""


def _faster(kind: Any) -> Any:
    """`_replace` of a kind of tuple at half the price: a walk does little else."""
    places = {name: place for place, name in enumerate(kind._fields)}

    def _replace(self: Any, **changes: Any) -> Any:
        values = list(self)
        for name, value in changes.items():
            values[places[name]] = value
        return tuple.__new__(kind, values)

    return _replace


for _kind in (Event, Holder, Node, Ledger, Process, Batch, Load, Recovery, Writer, Ask, Wire, State):
    _kind._replace = _faster(_kind)  # type: ignore[method-assign]


def replaced(items: tuple[T, ...], place: int, item: T) -> tuple[T, ...]:
    """The tuple with another item in that place."""
    return (*items[:place], item, *items[place + 1 :])


def held(ledger: Ledger) -> dict[int, Event]:
    """The assignment of each code that the ledger has one of."""
    return {event.code: event for event in ledger.events if event.verb == "assign"}


def last_seq(ledger: Ledger, epoch: int) -> int:
    """The seq up to which the ledger knows an epoch."""
    seqs = [event.seq for event in ledger.events if event.epoch == epoch]
    return max([*seqs, *(seq for of, seq, _ in ledger.dead if of == epoch), 0])


def quarantined(ledger: Ledger) -> frozenset[int]:
    """The codes that are in quarantine, whatever the epoch."""
    return frozenset(code for code, _ in ledger.quarantine)


def tip_at(ledger: Ledger, position: Position) -> Tip:
    """The tip of the ledger's entry whose last event is at a position."""
    return next((event.tip for event in ledger.events if event.position == position), NO_TIP)


def same_event(event: Event, other: Event) -> bool:
    """Whether two at one position are one event. What a receipt or an old entry brought has no tip, and no key."""
    return event[:5] == other[:5] and (event.tip == other.tip or NO_TIP in (event.tip, other.tip))


def new_tip(state: State, epoch: int, seq: int) -> Tip:
    """A tip that nobody remembers, for an entry that ends at this position."""
    tip = epoch * 1000 + seq * 10
    if not state.faults and state.copy is None:
        return tip
    nodes = state.nodes if state.copy is None else (*state.nodes, state.copy)
    events: set[Event | None] = {*state.ledger.events, *state.ledger.records}
    for node in nodes:
        events.update(node.stream, node.idem, *(holder[1:] for holder in node.holders))
    events.update(*(ask[5:7] for ask in state.asks), *(process.records for process in state.processes))
    events.update(*(writer.batch.events for writer in state.writers if writer.batch))
    known = {tip for event in events if event for tip in (event.after, event.tip)}
    known.update(node.tip for node in nodes)
    while tip in known:
        tip += 1
    return tip


def live_epoch(ledger: Ledger) -> int:
    """The epoch in which Redis decided last, and which is not over for the ledger; 0 for none."""
    return ledger.certified if ledger.certified > ledger.settled else 0


def in_ledger(ledger: Ledger) -> frozenset[Holder]:
    """The holders as the ledger knows them."""
    spent = {event.code: event for event in ledger.events if event.verb == "redeem"}
    return frozenset(Holder(code, event, spent.get(code, event)) for code, event in held(ledger).items())


EMPTY = Node(
    0, 0, GONE, 0, 0, 0, 0, 0, (-1, -1), False, 0,
    frozenset(), frozenset(), frozenset(), frozenset(), (),
)  # fmt: skip


def first_state(bounds: Bounds) -> State:
    """A book that was brought, a certified Redis in epoch 1 with one code in the pool, writer 0 its owner."""
    nothing: frozenset[int] = frozenset()
    node = EMPTY._replace(epoch=1, generation=1, attempt=1, certified=(0, 0), book=True, lent=1, free=frozenset({0}))
    nobody: frozenset[tuple[int, int]] = frozenset()
    ledger = Ledger(
        1, 0, 1, 0, 1, 0, False, frozenset({0}), nobody, nothing, frozenset(), frozenset(), frozenset(), 0, False
    )
    processes = [Process(0, True, 1, 0, 1, True, True)] * bounds.processes
    if bounds.calls:
        codes = frozenset(range(bounds.codes))
        node, ledger = node._replace(lent=bounds.codes, free=codes), ledger._replace(lent=codes)
    if bounds.upgrade:
        node = node._replace(format=1)
        processes = [Process(0, place == 0, 1, 0, 1, True, True, old=place == 0) for place in range(bounds.processes)]
    if bounds.joins:
        processes[-1] = Process(-1, False, 0, 0, 0, False, False)
    writers = [Writer(0, (1, 1), 0, (0, 0))] + [Writer(0, (0, 0), 0, None)] * (bounds.writers - 1)
    if bounds.upgrade:
        writers[0] = Writer(0, (1, 1), 0, None)
    ask = Ask("assign")
    return State(
        ledger, (node,), 0, None, tuple(processes), tuple(writers), (ask,) * bounds.users,
        (0,) * (bounds.epochs + 1), frozenset(), frozenset(), None, 0, 0, "",
    )  # fmt: skip
