"""Entries of the streams into the ledger: they, what follows from them, and the shards' positions, in one statement."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, cast

import asyncpg
import msgspec

from coupon_svc.domain.chain import CHAIN_START, chain_hash
from coupon_svc.domain.codes import normalise_code
from coupon_svc.domain.events import COUPON_ASSIGNED, COUPON_REDEEMED, Entry, Event
from coupon_svc.domain.position import Position

DATA_ERRORS = (
    asyncpg.DataError,  # 22, and what asyncpg itself cannot encode
    asyncpg.IntegrityConstraintViolationError,  # 23
    asyncpg.ProgramLimitExceededError,  # 54
)
"""Errors that are the fault of a row, not of the server: trying again changes nothing."""


def contradicts(error: Exception) -> bool:
    """Whether one of DATA_ERRORS says that an event contradicts the ledger: it repeats what may happen only once, or gives
    a code to somebody else. Any other is about the event alone."""
    return isinstance(error, asyncpg.UniqueViolationError)


CommitOutcome = Literal["moved", "edited", "lost"]
"""What became of a shard in a commit: the ledger has its entries; its last hash or tip is another than the writer's; or it
has another owner, epoch or position."""

_SHARD = ("int", "bigint", "bigint", "bigint", "text", "bytea", "bigint", "text", "bytea")
_ENTRY = ("int", "bigint", "bigint", "int", "text", "text", "bigint", "boolean", "bytea", "bytea")
_ASSIGNED = ("int", "text", "text", "text", "bigint", "bigint", "bigint")
_REDEEMED = ("int", "text", "text", "int", "text", "bigint", "text", "text", "bigint", "bigint")
_DEAD = ("int", "bigint", "bigint", "bytea", "text", "text", "text")
"""The types of the columns in the parameters of `commit_entries` and `write_entries` (sql/0012_entries.sql)."""


def _call(function: str, *types: str) -> str:
    """A call of the function. Its parameters travel as texts, arrays as `array_literal` spells them: asyncpg takes longer to
    encode an array than to do all the rest of a commit."""
    spelled = ("bytea[]" if kind == "bytea[]" else f"text::{kind}" for kind in types)
    return f"SELECT * FROM {function}({', '.join(f'${at}::{kind}' for at, kind in enumerate(spelled, 1))})"


def array_literal(kind: str, values: Sequence[Any]) -> str:
    """Numbers or texts of one of the types above as PostgreSQL reads an array (its manual, 8.15.6). A text may be None."""
    if not values:
        return "{}"
    if kind == "text":
        return _text_array(values)
    return "{" + ",".join(map(str, values)) + "}"


def _text_array(values: Sequence[str | None]) -> str:
    if None not in values:
        joined = '","'.join(cast(Sequence[str], values))
        if "\\" not in joined and joined.count('"') == 2 * len(values) - 2:
            return '{"' + joined + '"}'
    return "{" + ",".join(map(_quoted, values)) + "}"


def _quoted(value: str | None) -> str:
    return "NULL" if value is None else '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


_ROWS = [f"{kind}[]" for kind in (*_ENTRY, *_ASSIGNED, *_REDEEMED, *_DEAD)]
_COMMIT = _call("commit_entries", "text", *(f"{kind}[]" for kind in _SHARD), *_ROWS)
_WRITE = _call("write_entries", "int[]", *_ROWS)


class DeadLetter(NamedTuple):
    """An event that the ledger cannot take: its fields as JSON, the reason, and its code where that can be told. It changes
    no entry: the ledger has that as it stood in the stream."""

    seq: int
    fields: bytes
    reason: str
    book_id: str | None = None
    code: str | None = None


def dead_letter(event: Event, reason: str) -> DeadLetter:
    """An event that the ledger cannot take, with its book and code unless it is they that are wrong with it."""
    known = event.book_id.isascii() and event.book_id.isprintable() and normalise_code(event.code) == event.code
    book_id, code = (event.book_id, event.code) if known else (None, None)
    return DeadLetter(event.seq, msgspec.json.encode(event.record), reason, book_id, code)


def garbled_letter(position: Position, fields: Sequence[bytes], reason: str) -> DeadLetter:
    """A stream entry that is none of ours, with its book and code where they can be told."""
    texts = [field.decode(errors="replace") for field in fields]
    values = dict(zip(texts[::2], texts[1::2], strict=False))
    letter = dead_letter(Event(*position, "", values.get("book", ""), values.get("code", ""), "", 0), reason)
    return letter._replace(fields=msgspec.json.encode(texts))


def unread_letters(entry: Entry, reason: str) -> list[DeadLetter]:
    """One for each event of an entry whose events cannot be read."""
    return [DeadLetter(seq, entry.body, reason) for seq in entry.seqs]


class Batch(NamedTuple):
    """Entries of one shard that follow the ledger's position `committed` without a hole, up to `upto`.

    `events` are those of the entries, without the ones that stand in `dead` with the reason why the ledger cannot take them.
    `tip` and `chain` are the tip and the hash of the entry before the first.
    """

    shard: int
    epoch: int
    generation: int
    committed: int
    upto: int
    entries: Sequence[Entry]
    events: Sequence[Event]
    dead: Sequence[DeadLetter] = ()
    tip: str = ""
    chain: bytes = CHAIN_START

    @property
    def last_tip(self) -> str:
        return self.entries[-1].tip if self.entries else self.tip


class Rows:
    """The columns of what is to be written, as `write_entries` takes them."""

    def __init__(self) -> None:
        self._entries: list[tuple[Any, ...]] = []
        self._assigned: list[tuple[Any, ...]] = []
        self._redeemed: list[tuple[Any, ...]] = []
        self._dead: list[tuple[Any, ...]] = []

    def add(self, batch: Batch) -> bytes:
        """Add what a batch brings. Returns the hash of its last entry."""
        shard, head = batch.shard, batch.chain
        keyed = {event.seq for event in batch.events if event.idem is not None}
        # Of some events nothing follows, and their entry may have other keys.
        unsure = bool(batch.dead) or not batch.events
        for entry in batch.entries:
            epoch, seq, n, after, tip, at_ms, body = entry
            head = chain_hash(head, shard, epoch, (seq, n, after, tip, at_ms, body))
            may_be_keyed = unsure or seq in keyed or not keyed.isdisjoint(entry.seqs)
            self._entries.append((shard, epoch, seq, n, after, tip, at_ms, may_be_keyed, body, head))
        self.add_events(shard, batch.events)
        self._dead += [(shard, batch.epoch, *letter) for letter in batch.dead]
        return head

    def add_events(self, shard: int, events: Sequence[Event]) -> None:
        """Add what follows from events."""
        for e in events:
            if e.event == COUPON_ASSIGNED:
                self._assigned.append((shard, e.book_id, e.code, e.user_id, e.at_ms, e.epoch, e.seq))
            elif e.event == COUPON_REDEEMED:
                self._redeemed.append(
                    (shard, e.book_id, e.code, e.uses, e.user_id, e.at_ms, e.reference, e.metadata, e.epoch, e.seq)
                )

    @property
    def columns(self) -> list[str | Sequence[bytes]]:
        """The arrays of all rows."""
        columns: list[str | Sequence[bytes]] = []
        for rows, types in (
            (self._entries, _ENTRY),
            (self._assigned, _ASSIGNED),
            (self._redeemed, _REDEEMED),
            (self._dead, _DEAD),
        ):
            columns += _columns(types, rows)
        return columns


def _columns(types: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> list[str | Sequence[bytes]]:
    columns = zip(*rows, strict=True) if rows else [()] * len(types)
    return [
        column if kind == "bytea" else array_literal(kind, column) for kind, column in zip(types, columns, strict=True)
    ]


async def prepare_commits(connection: asyncpg.Connection) -> None:
    """Have a session plan the statements of its commits once. Left to itself, Postgres plans some of them anew each time,
    since it takes a plan for one row to be cheaper than one for any number of rows."""
    await connection.execute("SET plan_cache_mode = force_generic_plan")


async def commit_batches(
    connection: asyncpg.Connection, writer_id: str, batches: Sequence[Batch]
) -> tuple[dict[int, CommitOutcome], dict[int, bytes]]:
    """Commit the batches of several shards with one statement: each shard moves, or not, by itself.

    Returns what became of each shard, and the hash of each one's last entry. Raises one of DATA_ERRORS when a row that
    follows from an event cannot be stored: then nothing was.
    """
    rows, heads = Rows(), {}
    for batch in batches:
        heads[batch.shard] = rows.add(batch)
    of_shards = [
        (b.shard, b.epoch, b.generation, b.committed, b.tip, b.chain, b.upto, b.last_tip, heads[b.shard])
        for b in batches
    ]
    found = await connection.fetch(_COMMIT, writer_id, *_columns(_SHARD, of_shards), *rows.columns)
    return {row["of_shard"]: row["outcome"] for row in found}, heads


async def write_batch(connection: asyncpg.Connection, batch: Batch) -> bytes:
    """The entries of a batch and what follows from them, without a look at positions: that is the caller's to do, within
    whose transaction it is. Returns the hash of the last entry. Raises one of DATA_ERRORS."""
    rows = Rows()
    head = rows.add(batch)
    await connection.execute(_WRITE, array_literal("int", [batch.shard]), *rows.columns)
    return head


async def write_events(connection: asyncpg.Connection, shard: int, events: Sequence[Event]) -> None:
    """What follows from events that stand in no entry: those that came late."""
    rows = Rows()
    rows.add_events(shard, events)
    await connection.execute(_WRITE, array_literal("int", [shard]), *rows.columns)


async def first_data_error(connection: asyncpg.Connection, writer_id: str, batch: Batch) -> Exception | None:
    """Try a batch and undo it: what the ledger would say to it, or None when it would take it."""
    transaction = connection.transaction()
    await transaction.start()
    try:
        await commit_batches(connection, writer_id, [batch])
    except DATA_ERRORS as error:
        refusal: Exception = error
        return refusal
    finally:
        await transaction.rollback()
    return None
