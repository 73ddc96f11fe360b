"""The way of a shard's owner to Redis. Every write is a script that compares first: epoch and generation or, in a recovery,
that this very recovery has shut the shard.

It is not the control plane, which is requests that go to Postgres first."""

from __future__ import annotations

import asyncio
import secrets
from array import array
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from coupon_svc.domain.holding import Holding
from coupon_svc.domain.position import Position
from coupon_svc.redis.codec import StreamEntry
from coupon_svc.redis.connection import Connection, connect
from coupon_svc.redis.connection import Reply as RawReply
from coupon_svc.redis.contract import Reply
from coupon_svc.redis.errors import (
    ClocksApart,
    CountsDiffer,
    ForeignRedis,
    NotSent,
    OutOfMemory,
    ReplyError,
    ShardNotUsable,
    StoreError,
    WrongKeyType,
    shard_not_usable,
)
from coupon_svc.redis.keys import ShardKeys, ToldPosition, position_message, positions_channel
from coupon_svc.redis.meta import Recovery, ShardMeta, meta_of
from coupon_svc.redis.runner import run_script
from coupon_svc.redis.scripts import Scripts
from coupon_svc.redis.server import Identity, load_scripts, read_identity

CODES_PER_CALL_MAX = KEYS_PER_CALL_MAX = 500
LedgerSeen = Literal["committed", "seen", "away"]
"""How the ledger was met just now: by a commit, by a statement that wrote nothing, or not at all."""
CONNECT_AGAIN_S = 0.2
"""How long nobody tries to connect again after an attempt failed. The writer's loops share the connection, and each of them
would try by itself."""


class Term(NamedTuple):
    """What an owner writes with: its shard, the epoch, and its generation as the owner."""

    shard: int
    epoch: int
    generation: int

    @property
    def recovery(self) -> str:
        """Names the recovery that makes this epoch."""
        return str(Recovery(self.generation, self.epoch))


class Published(NamedTuple):
    """What is told of one shard: the ledger has its events up to `committed`. `tip` is that of the entry there, and `tips`
    are those of the entries that came last; events below `trim_seq` are dropped from the stream."""

    term: Term
    committed: int
    tip: str
    tips: Sequence[str] = ()
    trim_seq: int = 0


def _require_types(error: ReplyError) -> None:
    """Raises WrongKeyType when a key of a shard has a type that is not ours: nothing is wrong with the server then."""
    if error.word == "WRONGTYPE":
        raise WrongKeyType("a key has another type")


class ShardControl:
    """Connections that are all given up on the first trouble: one for scripts, one that waits for entries of the streams,
    and one that reads them otherwise."""

    def __init__(self, url: str, shards: int, scripts: Scripts, installation: str = "") -> None:
        self._url = url
        self._scripts = scripts
        self.installation = installation
        """Whose shards these are: the id that Postgres drew once. To be known before anything is written."""
        self._keys = [ShardKeys(shard, shards) for shard in range(shards)]
        self._connection: Connection | None = None
        self._reader: Connection | None = None
        self._bytes: Connection | None = None
        self._connecting, self._connecting_bytes = asyncio.Lock(), asyncio.Lock()
        self._failure: StoreError | None = None
        """Why the last attempt to connect failed."""
        self._next_attempt_at = 0.0
        """By the event loop's clock, in seconds."""
        self.identity: Identity | None = None

    async def refresh_identity(self) -> Identity:
        """Ask again who is at the other end: a change of master shows on a live connection only so. Raises StoreError."""
        await self.connect()
        connection = self._connection
        assert connection is not None
        try:
            self.identity = identity = await read_identity(connection)
            await self._require_ours(connection)
        except StoreError:
            self.close()
            raise
        return identity

    async def connect(self) -> Identity:
        """Make sure there is a connection, and return who is at its other end. Raises StoreError."""
        async with self._connecting:
            if self.identity is None or self._connection is None or self._connection.closed.done():
                self.close()
                if self._failure is not None and asyncio.get_running_loop().time() < self._next_attempt_at:
                    raise type(self._failure)(str(self._failure))
                connection = None
                try:
                    connection = await connect(self._url, "coupon-writer")
                    identity = await read_identity(connection)
                    await self._require_ours(connection)
                    await load_scripts(connection, self._scripts)
                except StoreError as error:
                    if connection is not None:
                        connection.abort()
                    self._failure = error
                    self._next_attempt_at = asyncio.get_running_loop().time() + CONNECT_AGAIN_S
                    raise
                self.identity = identity
                self._connection = connection
            return self.identity

    async def _require_ours(self, connection: Connection) -> None:
        """Raises ForeignRedis when the shards in this Redis are another installation's. One whose meta alone says so was
        changed by hand, and is refused by itself."""
        asked = [connection.send("HGET", keys.meta, "installation") for keys in self._keys]
        found = {reply for reply in [await one for one in asked] if isinstance(reply, str)}
        if found and self.installation not in found:
            raise ForeignRedis(_foreign(sorted(found)[0], self.installation))

    def close(self) -> None:
        """Give all connections up."""
        for connection in (self._connection, self._reader, self._bytes):
            if connection is not None:
                connection.abort()
        self._connection = self._reader = self._bytes = self.identity = None

    def _close_reader(self) -> None:
        if self._reader is not None:
            self._reader.abort()
        self._reader = None

    # --- writing

    async def open_shard(self, term: Term, committed: int, tip: str, backlog_max: int) -> int:
        """Take over a shard that is certified on this Redis. Returns its seq. `tip` is that of the entry that the ledger has
        at `committed`. Raises StoreError, ShardNotUsable."""
        identity = await self.connect()
        reply = await self._own(
            "open_shard", term, run_id=identity.run_id, replid=identity.replid, backlog_max=backlog_max,
            committed=committed, tip=tip, installation=self.installation,
        )  # fmt: skip
        return int(reply.seq)

    async def publish_positions(
        self, published: Sequence[Published], ledger: LedgerSeen, ledger_ms: int | None = None
    ) -> list[int | ShardNotUsable]:
        """Tell how far the ledger is in some shards. Returns for each its seq, or what is amiss with it.

        `ledger_ms` is Postgres's clock. Raises StoreError; ClocksApart, and nothing was written.
        """
        identity = await self.connect()
        message = ""
        if ledger != "away":
            message = position_message(
                *(ToldPosition(one.term.shard, one.term.epoch, one.committed, list(one.tips)) for one in published)
            )
        reply = await self._run_script(
            "publish_positions", meta=[self._keys[one.term.shard].meta for one in published],
            events=[self._keys[one.term.shard].events for one in published], ledger=ledger,
            channel=positions_channel(self.installation), message=message, ledger_ms="" if ledger_ms is None else ledger_ms,
            run_id=identity.run_id, installation=self.installation, epochs=[one.term.epoch for one in published],
            generations=[one.term.generation for one in published], committed=[one.committed for one in published],
            tips=[one.tip for one in published], trim_seqs=[one.trim_seq for one in published],
        )  # fmt: skip
        if reply.outcome == "clock":
            assert ledger_ms is not None
            raise ClocksApart(clocks_apart(int(reply.now_ms) - ledger_ms))
        return [_seq_of(verdict) for verdict in reply.verdicts]

    async def clock_ms(self) -> int:
        """Redis's clock, in Unix milliseconds. Raises StoreError."""
        seconds, microseconds = await self._ask("TIME")
        return int(seconds) * 1000 + int(microseconds) // 1000

    async def put_book(self, term: Term, book_id: str, version: int, rules: Mapping[str, str], *, known: bool) -> None:
        """Bring a book's rules, unless Redis has newer ones. Raises StoreError, ShardNotUsable; CountsDiffer
        when a known book is gone."""
        reply = await self._own(
            "put_book", term, book=self._keys[term.shard].book(book_id), version=version, known="known" if known else "",
            rules=_flat(rules),
        )  # fmt: skip
        if reply.outcome == "gone":
            raise CountsDiffer(f"book {book_id} is gone")

    async def load_codes(self, term: Term, book_id: str, codes: Sequence[str], kept_back: int) -> int:
        """Put lent codes into the pool, skipping those that are in it or held. Returns how many are in the pool then.

        `kept_back`: how many codes of the book are still to come after these.

        Raises StoreError (send it again), OutOfMemory, ShardNotUsable.
        """
        keys = self._keys[term.shard]
        in_pool = 0
        for start in range(0, len(codes) or 1, CODES_PER_CALL_MAX):
            some = codes[start : start + CODES_PER_CALL_MAX]
            reply = await self._own(
                "load_codes", term, book=keys.book(book_id), free=keys.free(book_id), holders=keys.holders(book_id),
                kept_back=kept_back + max(0, len(codes) - start - CODES_PER_CALL_MAX), scores=_random_scores(len(some)),
                codes=some,
            )  # fmt: skip
            if reply.outcome != "ok":
                raise CountsDiffer(f"book {book_id} is gone")
            in_pool = int(reply.in_pool)
        return in_pool

    async def _own(self, name: str, term: Term, **named: object) -> Reply:
        """Run a script of the owner of a shard that decides. Raises StoreError, ShardNotUsable."""
        return await self._run(name, term.shard, epoch=term.epoch, generation=term.generation, **named)

    async def _run(self, name: str, shard: int, **named: object) -> Reply:
        """Run a script; `named` are its keys, but for the meta, and its arguments. Raises StoreError, ShardNotUsable."""
        return await self._run_script(name, meta=self._keys[shard].meta, **named)

    async def _run_script(self, name: str, **named: object) -> Reply:
        """Run a script; `named` are its keys and its arguments. Raises StoreError, ShardNotUsable."""
        script = self._scripts[name]
        command = script.pack(**named)
        try:
            await self.connect()
            reply = await run_script(script, lambda: (self._connected(), command), self._reconnect)
        except (OutOfMemory, ReplyError):
            raise
        except StoreError:
            self.close()
            raise
        if reply.outcome == "foreign":
            raise ForeignRedis(_foreign(reply.installation, self.installation))
        return reply

    def _connected(self) -> Connection:
        if self._connection is None:
            raise NotSent("there is no connection")
        return self._connection

    async def _reconnect(self) -> None:
        """Verify the server and load the scripts, both of which only connecting does."""
        self.close()
        await self.connect()

    # --- recovering: these name the recovery that shut the shard; no epoch is in force

    async def shut_shard(self, term: Term) -> None:
        """No script decides anything in the shard from now on. Raises StoreError, ForeignRedis, Fenced."""
        await self._run(
            "shut_shard",
            term.shard,
            generation=term.generation,
            epoch=term.epoch,
            recovery=term.recovery,
            installation=self.installation,
        )

    async def tell_position(self, shard: int, epoch: int, committed: int) -> None:
        """Tell those who wait how far the ledger got, without a certified shard. Raises StoreError."""
        message = position_message(ToldPosition(shard, epoch, committed, []))
        await self._ask("PUBLISH", positions_channel(self.installation), message)

    async def wipe_shard(self, term: Term) -> None:
        """Drop every key of the shard but its meta. Raises StoreError, ShardNotUsable."""
        keys = self._keys[term.shard]
        cursor = "0"
        while True:
            cursor, found = await self._ask("SCAN", cursor, "MATCH", keys.pattern, "COUNT", 2000)
            doomed = [key for key in found if key != keys.meta]
            for start in range(0, len(doomed), KEYS_PER_CALL_MAX):
                some = doomed[start : start + KEYS_PER_CALL_MAX]
                await self._run("wipe_keys", term.shard, doomed=some, recovery=term.recovery)
            if cursor == "0":
                return

    async def restore_book(
        self, term: Term, book_id: str, fields: Mapping[str, str], quarantined: Sequence[str]
    ) -> None:
        """A book with an empty pool, and its quarantine. Raises StoreError, ShardNotUsable."""
        keys = self._keys[term.shard]
        rules = _flat(fields)
        for start in range(0, len(quarantined) or 1, CODES_PER_CALL_MAX):
            await self._run(
                "restore_book", term.shard, book=keys.book(book_id), free=keys.free(book_id),
                quarantine=keys.quarantine(book_id), recovery=term.recovery, rules=rules,
                quarantined=quarantined[start : start + CODES_PER_CALL_MAX],
            )  # fmt: skip
            rules = []  # the first call empties what was there

    async def restore_coupons(
        self, term: Term, tenant_id: int, book_id: str, coupons: Sequence[tuple[str, Holding]]
    ) -> None:
        """Coupons of a book, each as its code and who holds it, at most 500. Raises StoreError, ShardNotUsable."""
        keys = self._keys[term.shard]
        await self._run(
            "restore_coupons", term.shard, holders=keys.holders(book_id),
            coupons=[keys.coupons(tenant_id, holding.user_id) for _, holding in coupons], recovery=term.recovery,
            book_id=book_id, codes=[code for code, _ in coupons], holdings=[holding.format() for _, holding in coupons],
        )  # fmt: skip

    async def restore_idem(
        self, term: Term, tenant_id: int, book_id: str, records: Sequence[tuple[str, str, int]]
    ) -> None:
        """Idempotency records, each as (key, JSON, ttl in ms), at most 500. Raises StoreError, ShardNotUsable."""
        keys = self._keys[term.shard]
        await self._run(
            "restore_idem", term.shard, idem=[keys.idem(tenant_id, book_id, key) for key, _, _ in records],
            recovery=term.recovery, records=[record for _, record, _ in records],
            ttls_ms=[ttl_ms for _, _, ttl_ms in records],
        )  # fmt: skip

    async def certify_shard(self, term: Term, identity: Identity, backlog_max: int) -> None:
        """This Redis agrees with the ledger: it decides from now on, in the term's epoch. `identity` is that of the server
        which was shut; should there be another by now, nobody will take it for certified.

        Raises StoreError, ShardNotUsable.
        """
        await self._run(
            "certify_shard", term.shard, events=self._keys[term.shard].events, recovery=term.recovery, epoch=term.epoch,
            run_id=identity.run_id, replid=identity.replid, backlog_max=backlog_max,
        )  # fmt: skip

    # --- reading

    async def read_meta(self, shard: int) -> ShardMeta:
        """The shard's meta as it is, whoever wrote it; an empty one where the key has another type. Raises StoreError."""
        try:
            flat = await self._ask("HGETALL", self._keys[shard].meta)
        except WrongKeyType:
            flat = []
        return meta_of(dict(zip(flat[::2], flat[1::2], strict=True)))

    async def stream_after(self, shard: int, after: Position, count: int) -> list[StreamEntry]:
        """Up to `count` entries that follow a position, without waiting. Raises StoreError, WrongKeyType."""
        entries = await self._ask_bytes("XRANGE", self._keys[shard].events, f"({after}", "+", "COUNT", count)
        return [StreamEntry.of(entry) for entry in entries]

    async def entry_at(self, shard: int, position: Position) -> StreamEntry | None:
        """The stream's entry at a position; None when there is none. Raises StoreError, WrongKeyType."""
        entries = await self._ask_bytes("XRANGE", self._keys[shard].events, str(position), str(position))
        return StreamEntry.of(entries[0]) if entries else None

    async def newest_entry(self, shard: int, below_epoch: int) -> Position | None:
        """The position of the last entry of the stream in an epoch below this one. Raises StoreError, WrongKeyType."""
        entries = await self._ask_bytes("XREVRANGE", self._keys[shard].events, f"({below_epoch}-0", "-", "COUNT", 1)
        return StreamEntry.of(entries[0]).position if entries else None

    async def holders(self, shard: int, book_id: str) -> AsyncIterator[list[tuple[str, str]]]:
        """Every code of a book that somebody holds in Redis, with what is kept of it, some at a time; a code may come
        twice. Raises StoreError, WrongKeyType."""
        cursor = "0"
        while True:
            cursor, flat = await self._ask("HSCAN", self._keys[shard].holders(book_id), cursor, "COUNT", 1000)
            yield list(zip(flat[::2], flat[1::2], strict=True))
            if cursor == "0":
                return

    async def pool_counts(self, shard: int, book_id: str) -> tuple[int, int, int]:
        """(codes in the pool, codes held, codes ever brought) of a book in Redis. Raises StoreError, WrongKeyType."""
        keys = self._keys[shard]
        return (
            int(await self._ask("ZCARD", keys.free(book_id))),
            int(await self._ask("HLEN", keys.holders(book_id))),
            _count(await self._ask("HGET", keys.book(book_id), "lent")),
        )

    async def _ask(self, *command: str | int) -> RawReply:
        await self.connect()
        assert self._connection is not None
        return await self._ask_on(self._connection, *command)

    async def _ask_bytes(self, *command: str | int) -> RawReply:
        """As `_ask`; the reply holds bytes."""
        await self.connect()
        async with self._connecting_bytes:
            if self._bytes is None or self._bytes.closed.done():
                self._bytes = await connect(self._url, "coupon-writer-entries", as_bytes=True)
        return await self._ask_on(self._bytes, *command)

    async def _ask_on(self, connection: Connection, *command: str | int) -> RawReply:
        try:
            return await connection.ask(*command)
        except ReplyError as error:
            _require_types(error)
            self.close()
            raise StoreError(f"{command[0]}: {error.word}") from None  # its whole text may name a key
        except StoreError:
            self.close()
            raise

    async def lent_counts(self, shard: int, book_ids: Sequence[str]) -> list[int | None]:
        """How many codes of each book were ever brought to Redis; None for a book that it does not have as this version
        keeps it. Raises StoreError, WrongKeyType."""
        keys, counts = self._keys[shard], []
        for start in range(0, len(book_ids), KEYS_PER_CALL_MAX):
            some = book_ids[start : start + KEYS_PER_CALL_MAX]
            counts += await asyncio.gather(
                *(self._ask("HMGET", keys.book(book_id), "lent", "partly_redeemed") for book_id in some)
            )
        return [None if lent is None or partly_redeemed is None else _count(lent) for lent, partly_redeemed in counts]

    async def read_events(
        self, after: Mapping[int, Position], block_ms: int, count: int
    ) -> dict[int, list[StreamEntry]]:
        """Up to `count` entries of each shard's stream that follow a position, waiting up to `block_ms` for the first: less
        than a connection may be silent. A shard without any is left out.

        Raises StoreError; WrongKeyType when one of the keys is no stream.
        """
        try:
            if self._reader is None or self._reader.closed.done():
                self._reader = await connect(self._url, "coupon-writer-reader", as_bytes=True)
            by_stream = {self._keys[shard].events.encode(): shard for shard in after}
            reply = await self._reader.ask(
                "XREAD", "COUNT", count, "BLOCK", block_ms, "STREAMS", *by_stream, *map(str, after.values())
            )
        except ReplyError as error:
            _require_types(error)
            self._close_reader()
            raise StoreError(f"XREAD: {error.word}") from None  # its whole text may name a key
        except StoreError:
            self._close_reader()
            raise
        return {by_stream[stream]: [StreamEntry.of(entry) for entry in entries] for stream, entries in reply or ()}


def _random_scores(number: int) -> list[int]:
    """Scores of 53 bits from the system's CSPRNG, all drawn at once."""
    return [word >> 11 for word in array("Q", secrets.token_bytes(8 * number))]


def _flat(fields: Mapping[str, str]) -> list[str]:
    """Field, value, field, value, …"""
    return [part for pair in fields.items() for part in pair]


def _seq_of(verdict: Sequence[Any]) -> int | ShardNotUsable:
    """The shard's seq in what was said of it, or what is amiss with it."""
    try:
        word, said = verdict
        return int(said) if word == "ok" else shard_not_usable("publish_positions", said)
    except (ValueError, TypeError):
        return shard_not_usable("publish_positions", "meta")


def _foreign(theirs: str, ours: str) -> str:
    return (
        f"this Redis holds the coupons of installation {theirs}, and the database is of installation {ours}: check"
        " COUPON_REDIS_URL and COUPON_DATABASE_URL"
    )


def clocks_apart(apart_ms: int) -> str:
    """What is said of clocks that differ by so much."""
    which = "ahead of" if apart_ms > 0 else "behind"
    return f"Redis's clock is {abs(apart_ms) // 1000} s {which} Postgres's: set them right"


def _count(text: str | None) -> int:
    """A counter of a book, -1 for one that is missing or torn: it agrees with nothing."""
    return int(text) if text is not None and text.isascii() and text.isdigit() else -1
