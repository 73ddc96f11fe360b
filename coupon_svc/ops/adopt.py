"""Takes the ledger for the truth in shards that are stopped, so that their writers recover them: `coupon-svc adopt`.

A shard is stopped when Redis and the ledger contradict each other, mostly since Postgres was restored from a backup. What
Redis knows beyond the ledger cannot be made good; but no code that it shows as somebody's may be dealt to somebody else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from coupon_svc.config import Settings
from coupon_svc.domain.errors import CouponError
from coupon_svc.domain.holding import Holding
from coupon_svc.domain.position import Epoch, Position, Seq
from coupon_svc.postgres.computed.ciphers import Ciphers, check_master_key
from coupon_svc.postgres.computed.ranges import move_counters
from coupon_svc.postgres.computed.rows import give_rows
from coupon_svc.postgres.database import PATIENT_S, LedgerConnection, LedgerRow, one_row, open_connection
from coupon_svc.postgres.epochs import EPOCH_CHANNEL, last_seq
from coupon_svc.postgres.migrations import check_installation, known_migrations
from coupon_svc.redis.control import ShardControl, Term
from coupon_svc.redis.errors import ShardNotUsable, StoreError
from coupon_svc.redis.meta import ShardMeta
from coupon_svc.redis.scripts import Scripts

SKIP_CODES = 1_000_000_000
"""So many numbers of each pattern are never issued: more than were taken since the backup."""
EPOCH_PLAUSIBLE_MAX = 1_000_000_000
"""An epoch begins with each recovery. An entry of a higher one, e.g. by `XADD *`, was put into the stream by hand."""

_LAST_HASH = """
    SELECT chain FROM (SELECT epoch, seq, chain FROM old_events WHERE shard = $1 AND chain IS NOT NULL
                       UNION ALL SELECT epoch, seq, chain FROM entries WHERE shard = $1
                       UNION ALL SELECT epoch, seq, chain FROM dead_letters WHERE shard = $1 AND chain IS NOT NULL) AS rows
    ORDER BY epoch DESC, seq DESC LIMIT 1
"""
_STOPPED = """
    SELECT shard, stopped, generation, epoch, certified_epoch, chain FROM shards
    WHERE stopped IS NOT NULL AND ($1::int IS NULL OR shard = $1) ORDER BY shard
"""
_NOT_ASSIGNED = """
    SELECT code FROM unnest($2::text[]) AS code
    WHERE NOT EXISTS (SELECT FROM coupons WHERE coupons.book_id = $1 AND coupons.code = code.code)
"""
# Of the codes that Redis shows as somebody's, those without a record, and whether the ledger knows that they were lent.
_SHOWN = """
    SELECT code, place <= $4 AS lent FROM codes WHERE tenant_id = $2 AND code = ANY ($3) AND book_id = $1 AND place >= 0
      AND NOT EXISTS (SELECT FROM coupons WHERE coupons.book_id = $1 AND coupons.code = codes.code)
"""
_QUARANTINE = """
    INSERT INTO quarantine (book_id, code, shard, epoch) SELECT $1, code, $2, epoch FROM unnest($3::text[], $4::bigint[])
        AS held_back (code, epoch)
"""
# With $5 the last epoch is over, and it is judged that records of it were lost.
_GO_ON = """
    UPDATE shards SET stopped = NULL, epoch = $2, committed = 0, generation = $3, chain = coalesce($4, chain),
           rebuild = rebuild OR $5, settled_epoch = CASE WHEN $5 THEN certified_epoch ELSE settled_epoch END,
           settling_epoch = CASE WHEN $5 THEN certified_epoch ELSE settling_epoch END, settling_lost = settling_lost OR $5
    WHERE shard = $1
"""


class AdoptError(CouponError):
    """Nothing was changed; the message says why."""


class Stopped(NamedTuple):
    """A shard that is stopped, as the ledger has it and as Redis has it."""

    shard: int
    reason: str
    generation: int
    epoch: int
    certified_epoch: int
    last_seq: int
    """Of the certified epoch."""
    meta: ShardMeta
    newest_entry: Position | None
    last_hash: bytes | None
    """Of the last row, when the shard's chain does not end with it."""
    held: dict[str, dict[str, int]]
    """By book, each code that Redis shows as somebody's and the ledger does not, with the epoch in which it was assigned."""

    @property
    def behind(self) -> bool:
        """Whether Redis knows of more than the ledger."""
        told = self.meta.committed or 0 if self.certified_epoch in (self.meta.epoch, self.meta.was) else 0
        known = (self.meta.generation or 0, self.meta.newest_epoch, told)
        return any(
            there > here for there, here in zip(known, (self.generation, self.epoch, self.last_seq), strict=True)
        )

    @property
    def only_hash(self) -> bool:
        """Whether nothing is wrong but the last hash: then the recovery may go on with what Redis has."""
        return self.last_hash is not None and not self.behind

    def next_epoch(self) -> int:
        """Above everything that either store knows."""
        entry = self.newest_entry.epoch if self.newest_entry else 0
        return 1 + max(self.epoch, self.meta.newest_epoch, entry)

    def next_generation(self) -> int:
        return 1 + max(self.generation, self.meta.generation or 0)

    def __str__(self) -> str:
        ledger = Position(Epoch(self.certified_epoch), Seq(self.last_seq))
        redis = Position(Epoch(self.meta.epoch or self.meta.was or 0), Seq(self.meta.seq or 0))
        rows = (
            ("", "the ledger", "Redis"),
            ("generation", self.generation, self.meta.generation or "none"),
            ("epoch", self.epoch, self.meta.newest_epoch or "none"),
            ("last event", str(ledger), "none" if self.meta.seq is None else str(redis)),
        )
        lines = [f"shard {self.shard:02d} is stopped: {self.reason}"]
        lines += [f"  {name:<12}{here:>14}{there:>16}".rstrip() for name, here, there in rows]
        if self.only_hash:
            lines.append("  Only the last hash of its chain is not that of its last row. It is set to that row's.")
        else:
            number = sum(map(len, self.held.values()))
            lines.append(f"  {number} codes that Redis shows as somebody's and the ledger does not go into quarantine,")
            lines.append(
                "  and so do all codes that were lent and have no record, of books that answer early (ack = redis)."
            )
        return "\n".join(lines)


async def adopt(
    settings: Settings, shard: int | None, confirm: Callable[[list[Stopped]], bool], skip_codes: int = SKIP_CODES
) -> list[tuple[int, int]]:
    """Have the writers recover shards that are stopped (all without a number) from the ledger as it is.

    `confirm` is shown what is found, and says whether to go on. Returns (shard, codes quarantined) of each; nothing when
    `confirm` said no. Where the ledger may have gone back, each pattern of computed codes passes over its next `skip_codes`
    numbers. Raises AdoptError, LedgerUnavailable, DatabaseUnfit.
    """
    ciphers = Ciphers(settings.master_key)
    connection = await open_connection(settings.database_url, "coupon-cli", PATIENT_S)
    stored = await connection.fetchval("SELECT shards FROM settings")
    store = ShardControl(
        settings.redis_url, stored, Scripts(), await check_installation(connection, stored, known_migrations())
    )
    try:
        if shard is not None and not 0 <= shard < stored:
            raise AdoptError(f"there is no shard {shard}: this installation has {stored}, from 0 to {stored - 1}.")
        rows = await connection.fetch(_STOPPED, shard)
        if not rows:
            raise AdoptError("no shard is stopped." if shard is None else f"shard {shard} is not stopped.")
        await check_master_key(connection, ciphers.keys)
        found = [await _look(connection, store, row) for row in rows]
        if not confirm(found):
            return []
        if not all(one.only_hash for one in found):
            await move_counters(connection, skip_codes)
        return [(one.shard, await _go_on(connection, one, ciphers)) for one in found]
    except (StoreError, ShardNotUsable) as error:
        raise AdoptError(f"Redis cannot be used ({error}); check COUPON_REDIS_URL.") from None
    finally:
        store.close()
        connection.terminate()


async def _look(connection: LedgerConnection, store: ShardControl, row: LedgerRow) -> Stopped:
    """Both sides of a shard. It is shut in Redis first, so that what is found there stays so. Raises StoreError."""
    number = row["shard"]
    meta = await store.read_meta(number)
    epoch, generation = max(row["epoch"], meta.newest_epoch), max(row["generation"], meta.generation or 0)
    await store.shut_shard(Term(number, epoch, generation))
    last_hash = await connection.fetchval(_LAST_HASH, number)
    held: dict[str, dict[str, int]] = {}
    for book in await connection.fetch("SELECT book_id FROM books WHERE shard = $1", number):
        book_id = book["book_id"]
        async for page in store.holders(number, book_id):
            epochs = {code: _epoch_of(holder, row["certified_epoch"]) for code, holder in page}
            for lacking in await connection.fetch(_NOT_ASSIGNED, book_id, list(epochs)):
                held.setdefault(book_id, {})[lacking["code"]] = epochs[lacking["code"]]
    return Stopped(
        number,
        row["stopped"],
        row["generation"],
        row["epoch"],
        row["certified_epoch"],
        await last_seq(connection, number, row["certified_epoch"]),
        meta,
        await store.newest_entry(number, EPOCH_PLAUSIBLE_MAX),
        last_hash if last_hash not in (None, row["chain"]) else None,
        held,
    )


def _epoch_of(holder: str, otherwise: int) -> int:
    """The epoch in which a code was assigned, by what Redis keeps of its holder: `3-17 0 1795358937476 alice`."""
    try:
        epoch = Holding.parse(holder).assigned.epoch
    except ValueError:
        return otherwise
    return epoch if epoch < 10**15 else otherwise


async def _go_on(connection: LedgerConnection, found: Stopped, ciphers: Ciphers) -> int:
    """One transaction: nothing of the shard is left to be settled, and its writer may recover it. Returns how many codes
    went into quarantine."""
    held_back = 0
    async with connection.transaction():
        again = await one_row(connection, "SELECT stopped FROM shards WHERE shard = $1 FOR UPDATE", found.shard)
        if again["stopped"] is None:
            raise AdoptError(f"shard {found.shard} is not stopped any more: somebody else has adopted it.")
        if not found.only_hash:
            books = await connection.fetch(
                "SELECT book_id, tenant_id, leased_upto FROM books WHERE shard = $1 ORDER BY book_id FOR UPDATE",
                found.shard,
            )
            for book in books:
                held_back += await _hold_back(connection, found, book, ciphers)
        await connection.execute(
            _GO_ON, found.shard, found.next_epoch(), found.next_generation(), found.last_hash, not found.only_hash
        )
        await connection.execute("SELECT pg_notify($1, $2)", EPOCH_CHANNEL, str(found.shard))
    return held_back


async def _hold_back(connection: LedgerConnection, found: Stopped, book: LedgerRow, ciphers: Ciphers) -> int:
    """Into quarantine with the codes of a book that Redis shows as somebody's, whether or not the ledger knows that they
    were lent. Returns how many."""
    held = found.held.get(book["book_id"], {})
    await give_rows(connection, book["tenant_id"], book["book_id"], list(held), ciphers)
    rows = await connection.fetch(_SHOWN, book["book_id"], book["tenant_id"], list(held), book["leased_upto"])
    codes, lent = [row["code"] for row in rows], sum(row["lent"] for row in rows)
    await connection.execute(
        "UPDATE codes SET place = -1 WHERE tenant_id = $1 AND code = ANY ($2)", book["tenant_id"], codes
    )
    await connection.execute(_QUARANTINE, book["book_id"], found.shard, codes, [held[code] for code in codes])
    await connection.execute(
        "UPDATE books SET lent = lent - $2, accounted = least(accounted, lent - $2), quarantined = quarantined + $3"
        " WHERE book_id = $1",
        book["book_id"],
        lent,
        len(codes),
    )
    return len(codes)
