"""`coupon-svc verify`: shows from Redis and Postgres alone that the promises hold, shard by shard, while the service runs.

What is checked, and which promise it shows (docs/guarantees.md):

* the ledger by itself: positions without a hole (P2), every code assigned once and to the user its event names (P1), uses
  as many as redemptions and never more than the book allows (P3), every code in one state and the sum right (P4);
* the ledger's history (coupon_svc/ops/history.py): no row was edited, removed, added or moved since it was written (P2);
* Redis against the ledger: who holds what is the same in both (P1, P2), what is free is nobody's (P1, P4), every coupon is
  in its user's list (P2), the counts add up (P4).

While the service runs, Redis is ahead of the ledger by the events under way. What it has and the ledger has not must be
among them, and must have arrived in the ledger a moment later.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Collection, Mapping
from functools import partial
from pathlib import Path

import asyncpg
import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError

from coupon_svc.config import Settings
from coupon_svc.domain.books import Book
from coupon_svc.domain.holding import Holding, ListedCoupon
from coupon_svc.ops.history import Head, walk_history
from coupon_svc.postgres.books import books_of_shard
from coupon_svc.postgres.computed.ciphers import Ciphers, has_master_key
from coupon_svc.postgres.computed.lending import accounted_codes
from coupon_svc.postgres.computed.rows import lent_by_number
from coupon_svc.postgres.database import PATIENT_S, LedgerConnection, open_connection
from coupon_svc.postgres.errors import LedgerUnavailable
from coupon_svc.postgres.rebuild_source import coupons_of_book
from coupon_svc.redis.keys import ShardKeys

ARRIVAL_WAIT_S = 10.0
CHUNK = 500
SHOWN_MAX = 20

LEDGER_CHECKS = {
    "a position is missing or doubled": """
        SELECT count(*) FROM (
            SELECT epoch, max(seq) AS last, sum(n) AS number FROM (
                SELECT epoch, seq, n FROM entries WHERE shard = $1
                UNION ALL SELECT epoch, seq, 1 FROM old_events o WHERE shard = $1 AND (chain IS NOT NULL OR NOT EXISTS (
                    SELECT FROM late_events l WHERE recorded AND (l.shard, l.epoch, l.seq) = (o.shard, o.epoch, o.seq)))
                UNION ALL SELECT epoch, seq, 1 FROM dead_letters d WHERE shard = $1 AND NOT EXISTS (
                    SELECT FROM (SELECT seq, n FROM entries e WHERE e.shard = $1 AND e.epoch = d.epoch AND e.seq >= d.seq
                                 ORDER BY seq LIMIT 1) AS around WHERE around.seq - around.n < d.seq)) p
            GROUP BY epoch) e WHERE last <> number""",
    "an entry does not follow the one before it": """
        SELECT count(*) FROM (
            SELECT after, seq - n AS before, lag(tip, 1, '') OVER stream AS tip, lag(seq, 1, 0::bigint) OVER stream AS seq
            FROM entries WHERE shard = $1 WINDOW stream AS (PARTITION BY epoch ORDER BY seq)) e
        WHERE before = seq AND after <> tip""",
    "an entry's events cannot be read, or are not as many as it says": """
        SELECT count(*) FROM entries e WHERE shard = $1 AND n <> (
            SELECT count(*) FROM events_of_entry(e.seq, e.n, e.events)) AND NOT EXISTS (
            SELECT FROM dead_letters d WHERE d.shard = $1 AND d.epoch = e.epoch AND d.seq = e.seq)""",
    "a late event is not the same in both places that have it": """
        SELECT count(*) FROM late_events l JOIN old_events e USING (shard, epoch, seq)
        WHERE l.shard = $1 AND recorded AND (e.chain IS NOT NULL
            OR (e.event, e.book_id, e.code, e.user_id, e.at_ms) <> (l.event, l.book_id, l.code, l.user_id, l.at_ms)
            OR (l.chain IS NOT NULL AND (e.uses, e.reference, e.metadata, e.idem, e.fingerprint)
                IS DISTINCT FROM (l.uses, l.reference, l.metadata, l.idem, l.fingerprint)))""",
    "the ledger's position is not where its events end": """
        SELECT count(*) FROM (SELECT epoch, committed AS seq, tip FROM shards WHERE shard = $1
                              UNION ALL SELECT epoch, seq, tip FROM epochs WHERE shard = $1) ends
        LEFT JOIN LATERAL (SELECT seq, tip FROM entries e WHERE e.shard = $1 AND e.epoch = ends.epoch
                           ORDER BY seq DESC LIMIT 1) last_entry ON true
        WHERE ends.seq <> coalesce(greatest(last_entry.seq,
            (SELECT max(seq) FROM old_events o WHERE o.shard = $1 AND o.epoch = ends.epoch AND (
                chain IS NOT NULL OR NOT EXISTS (SELECT FROM late_events l WHERE recorded
                                                 AND (l.shard, l.epoch, l.seq) = (o.shard, o.epoch, o.seq)))),
            (SELECT max(seq) FROM dead_letters d WHERE d.shard = $1 AND d.epoch = ends.epoch)), 0)
        OR (last_entry.seq = ends.seq AND ends.tip <> last_entry.tip)""",
    "a code was assigned twice, or its coupon is not what its event says": """
        SELECT count(*) FROM (SELECT * FROM events WHERE shard = $1 AND event = 'coupon_assigned') e
        FULL JOIN (SELECT coupons.* FROM coupons JOIN books USING (book_id) WHERE shard = $1) c
            ON c.book_id = e.book_id AND c.code = e.code AND c.user_id = e.user_id AND (c.epoch, c.seq) = (e.epoch, e.seq)
        WHERE c.code IS NULL OR e.code IS NULL""",
    "a coupon was confirmed to somebody who does not have it": """
        SELECT count(*) FROM (SELECT * FROM events WHERE shard = $1 AND event = 'coupon_confirmed') e
        LEFT JOIN coupons c ON c.book_id = e.book_id AND c.code = e.code AND c.user_id = e.user_id WHERE c.code IS NULL""",
    "a coupon's uses are not its redemptions": """
        SELECT count(*) FROM (SELECT coupons.* FROM coupons JOIN books USING (book_id) WHERE shard = $1) c
        LEFT JOIN (SELECT book_id, code, count(*) AS number, max(uses) AS uses, min(user_id) AS first_user,
                          max(user_id) AS last_user FROM redemptions GROUP BY book_id, code) r USING (book_id, code)
        WHERE c.uses <> coalesce(r.number, 0) OR c.uses <> coalesce(r.uses, 0)
           OR (r.number > 0 AND (r.first_user <> c.user_id OR r.last_user <> c.user_id))""",
    "a redemption has no coupon": """
        SELECT count(*) FROM redemptions r JOIN books USING (book_id) WHERE shard = $1
        AND NOT EXISTS (SELECT FROM coupons c WHERE c.book_id = r.book_id AND c.code = r.code)""",
    "a code was redeemed more often than its book allows": """
        SELECT count(*) FROM coupons JOIN books USING (book_id)
        WHERE shard = $1 AND uses > max_redemptions_per_code""",
    "a book's counts are not those of its codes": """
        SELECT count(*) FROM books LEFT JOIN (
            SELECT book_id, count(*) FILTER (WHERE place >= -1 AND NOT computed) AS total,
                   count(*) FILTER (WHERE place = -1) AS quarantined,
                   count(*) FILTER (WHERE place BETWEEN 0 AND leased_upto AND NOT computed)
                   - count(*) FILTER (WHERE place NOT BETWEEN 0 AND leased_upto AND computed) AS lent
            FROM codes JOIN books USING (book_id) WHERE shard = $1 GROUP BY book_id) c USING (book_id)
        LEFT JOIN (SELECT book_id, sum(total) AS total, sum(unlent) AS unlent FROM code_ranges GROUP BY book_id) r
            USING (book_id)
        WHERE shard = $1 AND (books.total, books.lent, books.quarantined, computed_total, computed_unlent)
              <> (coalesce(c.total, 0) + coalesce(r.total, 0), coalesce(c.lent, 0) + coalesce(r.total - r.unlent, 0),
                  coalesce(c.quarantined, 0), coalesce(r.total, 0), coalesce(r.unlent, 0))""",
    "a range's counts are not those of its numbers": """
        SELECT count(*) FROM code_ranges r JOIN books USING (book_id), LATERAL (
            SELECT count(*) FILTER (WHERE NOT named) AS uploaded,
                   count(*) FILTER (WHERE NOT named AND number < lent_upto) AS uploaded_below,
                   count(*) FILTER (WHERE named AND number >= lent_upto) AS named_above
            FROM passed_over p WHERE p.pattern_id = r.pattern_id AND number >= begins AND number < ends) p
        WHERE shard = $1 AND (r.total <> ends - begins - uploaded
                              OR r.total - r.unlent <> lent_upto - begins - uploaded_below + named_above)""",
    "two ranges have a number in common, or one is above its pattern's counter": """
        SELECT count(*) FROM (
            SELECT book_id, begins, ends, taken, lag(ends) OVER (PARTITION BY pattern_id ORDER BY begins) AS before
            FROM code_ranges JOIN computed_patterns USING (pattern_id)) r JOIN books USING (book_id)
        WHERE shard = $1 AND (before > begins OR ends > taken)""",
    "codes have no place in their book, and no upload is at work on it": """
        SELECT coalesce(sum(c.number), 0)::bigint FROM books, LATERAL (
            SELECT count(*) AS number FROM codes WHERE codes.book_id = books.book_id AND place < -1) c
        WHERE shard = $1 AND NOT EXISTS (SELECT FROM uploads WHERE uploads.book_id = books.book_id)""",
    "a code in somebody's hands was not lent": """
        SELECT count(*) FROM coupons JOIN books USING (book_id)
        LEFT JOIN codes ON codes.tenant_id = books.tenant_id AND codes.code = coupons.code
        WHERE shard = $1 AND CASE WHEN codes.code IS NULL THEN computed_total = 0
                                  ELSE codes.place NOT BETWEEN 0 AND leased_upto END""",
    "a code that was lent is neither assigned nor known to be outstanding": """
        SELECT count(*) FROM books JOIN codes USING (book_id) WHERE shard = $1 AND place BETWEEN 0 AND accounted_upto
        AND NOT EXISTS (SELECT FROM coupons c WHERE c.book_id = books.book_id AND c.code = codes.code)
        AND NOT EXISTS (SELECT FROM outstanding_codes o WHERE o.book_id = books.book_id AND o.code = codes.code)
        AND NOT EXISTS (SELECT FROM lone_leases l WHERE l.book_id = books.book_id AND l.code = codes.code)""",
    "the quarantine's list is not what its codes say": """
        SELECT count(*) FROM (SELECT book_id, code FROM quarantine WHERE shard = $1) q
        FULL JOIN (SELECT book_id, code FROM codes JOIN books USING (book_id) WHERE shard = $1 AND place = -1) c
            USING (book_id, code) WHERE q.book_id IS NULL OR c.book_id IS NULL""",
}


_HAS_RANGES = "SELECT EXISTS (SELECT FROM code_ranges WHERE book_id = $1)"
_WITHOUT_ROW = """
    SELECT code FROM unnest($2::text[]) AS code
    WHERE NOT EXISTS (SELECT FROM codes c WHERE c.tenant_id = $1 AND c.code = code.code)
"""
_NEITHER_HELD_NOR_STORED = """
    SELECT count(*) FROM unnest($3::text[]) AS code
    WHERE NOT EXISTS (SELECT FROM coupons c WHERE c.book_id = $1 AND c.code = code.code)
      AND NOT EXISTS (SELECT FROM codes c WHERE c.tenant_id = $2 AND c.code = code.code)
"""


class Finding(msgspec.Struct, frozen=True):
    """One thing that is not as it should be. It names books and numbers, never a code, a user or a key."""

    shard: int
    what: str
    number: int
    book_id: str | None = None


class Report(msgspec.Struct):
    """What was looked at, and what was found."""

    shards: int = 0
    books: int = 0
    codes_held: int = 0
    codes_free: int = 0
    under_way: int = 0
    computed_books: int = 0
    without_key: int = 0
    """Books with computed codes of which nobody could tell whether each is of its range: the master key was not given."""
    unchecked: list[str] = []
    findings: list[Finding] = []
    heads: list[Head] = []

    @property
    def holds(self) -> bool:
        return not self.findings and not self.unchecked


class Verifier:
    """Verifies with reads alone: it changes nothing in either store."""

    def __init__(
        self,
        settings: Settings,
        connection: LedgerConnection,
        redis: Redis,
        *,
        show_progress: bool,
        earlier: Mapping[int, Head] | None = None,
    ) -> None:
        self._settings = settings
        self._connection = connection
        self._redis = redis
        self._show_progress = show_progress
        self._earlier = earlier or {}
        self.report = Report()
        self._ciphers = Ciphers(settings.master_key)
        self._has_key = False

    async def verify(self) -> Report:
        """Look at every shard. Raises LedgerUnavailable, RedisError."""
        self._has_key = await has_master_key(self._connection, self._ciphers.keys)
        for shard in range(self._settings.shards):
            self._progress(shard)
            for what, statement in LEDGER_CHECKS.items():
                self._find(shard, what, await self._connection.fetchval(statement, shard))
            history = await walk_history(
                self._connection, shard, self._earlier.get(shard), partial(self._progress, shard)
            )
            for what, number in history.findings:
                self._find(shard, what, number)
            self.report.heads.append(history.head)
            await self._verify_redis(shard)
            self.report.shards += 1
        self._progress(self._settings.shards)
        return self.report

    async def _verify_redis(self, shard: int) -> None:
        keys = ShardKeys(shard, self._settings.shards)
        meta = await self._redis.hgetall(keys.meta)
        epoch = await self._connection.fetchval("SELECT epoch FROM shards WHERE shard = $1", shard)
        if meta.get("epoch") != str(epoch):
            self.report.unchecked.append(
                f"shard {shard:02d} is not certified in Redis: it is being recovered, or stopped"
            )
            return
        for book in await books_of_shard(self._connection, shard):
            await self._verify_book(shard, keys, book, epoch)
            self.report.books += 1

    async def _verify_book(self, shard: int, keys: ShardKeys, book: Book, epoch: int) -> None:
        ledger = await self._ledger_coupons(book)
        counted = await self._redemptions(keys, book.book_id)
        held = {code: Holding.parse(text) async for code, text in self._scan_hash(keys.holders(book.book_id))}
        uses = sum(holder.uses for holder in held.values())
        wrong = max(counted - uses, uses - await self._redemptions(keys, book.book_id), 0)
        self._find(shard, "a book counts other redemptions than its coupons have", wrong, book)
        missing = [code for code, (user, uses) in ledger.items() if not _same(held.get(code), user, uses)]
        self._find(shard, "a coupon of the ledger is not in Redis, or another's there", len(missing), book)
        ahead = {code: holder for code, holder in held.items() if code not in ledger or ledger[code][1] < holder.uses}
        old = sum(1 for holder in ahead.values() if holder.last.epoch != epoch)
        self._find(shard, "a coupon of an older epoch is in Redis and not in the ledger", old, book)
        self.report.under_way += len(ahead)
        if ahead and not old:
            lost = await self._not_arrived(shard, book, ahead)
            self._find(shard, "an event was made and has not arrived in the ledger", lost, book)
        free = {code async for code in self._scan_zset(keys.free(book.book_id))}
        self._find(shard, "a code is free that somebody holds", len(free & ledger.keys()), book)
        self._find(shard, "a coupon is not in its user's list", await self._unlisted(keys, book, held), book)
        self._find(shard, "a free code was not lent", await self._unlent(book, list(free)), book)
        await self._verify_computed(shard, book, list(ledger))
        in_pool, in_hands, lent = await self._counts(keys, book.book_id)
        if in_pool + in_hands != lent:
            self._find(shard, "codes are missing from Redis", abs(lent - in_pool - in_hands), book)
        self.report.codes_held += len(held)
        self.report.codes_free += len(free)

    async def _ledger_coupons(self, book: Book) -> dict[str, tuple[str, int]]:
        ledger: dict[str, tuple[str, int]] = {}
        rows = await coupons_of_book(self._connection, book.book_id)
        while rows:
            ledger.update((row["code"], (row["user_id"], row["uses"])) for row in rows)
            rows = await coupons_of_book(self._connection, book.book_id, rows[-1]["code"])
        return ledger

    async def _not_arrived(self, shard: int, book: Book, ahead: dict[str, Holding]) -> int:
        """How many of the coupons that were only in Redis are still not in the ledger a moment later."""
        deadline = asyncio.get_running_loop().time() + ARRIVAL_WAIT_S
        while True:
            rows = await self._connection.fetch(
                "SELECT code, user_id, uses FROM coupons WHERE book_id = $1 AND code = ANY ($2)",
                book.book_id,
                list(ahead),
            )
            arrived = {row["code"]: (row["user_id"], row["uses"]) for row in rows}
            wrong = [
                code
                for code, holder in ahead.items()
                if code not in arrived or arrived[code][0] != holder.user_id or arrived[code][1] < holder.uses
            ]
            if not wrong or asyncio.get_running_loop().time() >= deadline:
                return len(wrong)
            await asyncio.sleep(0.2)

    async def _unlisted(self, keys: ShardKeys, book: Book, held: dict[str, Holding]) -> int:
        unlisted = 0
        codes = list(held.items())
        for start in range(0, len(codes), CHUNK):
            pipe = self._redis.pipeline(transaction=False)
            for code, holder in codes[start : start + CHUNK]:
                pipe.zscore(keys.coupons(book.tenant_id, holder.user_id), ListedCoupon(book.book_id, code).format())
            unlisted += sum(1 for score in await pipe.execute() if score is None)
        return unlisted

    async def _unlent(self, book: Book, free: list[str]) -> int:
        rows = await self._connection.fetch(
            "SELECT free.code, codes.code IS NOT NULL AS stored FROM unnest($2::text[]) AS free (code)"
            " LEFT JOIN codes ON codes.tenant_id = $3 AND codes.code = free.code"
            " WHERE codes.code IS NULL OR codes.book_id <> $1"
            " OR place NOT BETWEEN 0 AND (SELECT leased_upto FROM books WHERE book_id = $1)",
            book.book_id,
            free,
            book.tenant_id,
        )
        without_row = [row["code"] for row in rows if not row["stored"]]
        return len(rows) - len(await self._lent_by_number(book, without_row))

    async def _lent_by_number(self, book: Book, codes: list[str]) -> Collection[str]:
        """Those of the codes that are computed ones of the book, and lent. Without the master key: all, where the book has
        computed codes."""
        if not codes or not await self._connection.fetchval(_HAS_RANGES, book.book_id):
            return ()
        if not self._has_key:
            return codes
        return await lent_by_number(self._connection, book.tenant_id, book.book_id, codes, self._ciphers)

    async def _verify_computed(self, shard: int, book: Book, held: list[str]) -> None:
        """What only the master key can tell of a book with computed codes."""
        if not await self._connection.fetchval(_HAS_RANGES, book.book_id):
            return
        self.report.computed_books += 1
        if not self._has_key:
            self.report.without_key += 1
            return
        rows = await self._connection.fetch(_WITHOUT_ROW, book.tenant_id, held)
        without_row = [row["code"] for row in rows]
        lent = await self._lent_by_number(book, without_row)
        self._find(shard, "a computed code in somebody's hands was not lent", len(without_row) - len(lent), book)
        unknown = 0
        async for codes in accounted_codes(self._connection, book.book_id, self._ciphers):
            unknown += await self._connection.fetchval(_NEITHER_HELD_NOR_STORED, book.book_id, book.tenant_id, codes)
        self._find(shard, "a number that was lent has neither a coupon nor a row", unknown, book)

    async def _counts(self, keys: ShardKeys, book_id: str) -> tuple[int, int, int]:
        pipe = self._redis.pipeline(transaction=True)  # one moment
        pipe.zcard(keys.free(book_id))
        pipe.hlen(keys.holders(book_id))
        pipe.hget(keys.book(book_id), "lent")
        in_pool, in_hands, lent = await pipe.execute()
        return in_pool, in_hands, int(lent if lent is not None else -1)

    async def _redemptions(self, keys: ShardKeys, book_id: str) -> int:
        counts = await self._redis.hmget(keys.book(book_id), "redeemed", "partly_redeemed")
        return sum(int(count or 0) for count in counts)

    async def _scan_hash(self, key: str) -> AsyncIterator[tuple[str, str]]:
        async for field, value in self._redis.hscan_iter(key, count=CHUNK):
            yield field, value

    async def _scan_zset(self, key: str) -> AsyncIterator[str]:
        async for member, _ in self._redis.zscan_iter(key, count=CHUNK):
            yield member

    def _find(self, shard: int, what: str, number: int, book: Book | None = None) -> None:
        if number:
            self.report.findings.append(Finding(shard, what, number, book.book_id if book else None))

    def _progress(self, done: int, rows: int = 0) -> None:
        if self._show_progress:
            total = self._settings.shards
            bar = "#" * (30 * done // total)
            at = f", {rows} rows of the next" if rows else ""
            end = "\n" if done == total else ""
            print(f"\r\033[K[{bar:30}] {done}/{total} shards{at}", end=end, file=sys.stderr, flush=True)


def _same(holder: Holding | None, user_id: str, uses: int) -> bool:
    return holder is not None and holder.user_id == user_id and holder.uses >= uses


def read_heads(path: Path) -> dict[int, Head]:
    """The heads of an earlier report in JSON, by shard. Raises OSError; msgspec.DecodeError when it is no such report."""
    return {head.shard: head for head in msgspec.json.decode(path.read_bytes(), type=_Heads).heads}


class _Heads(msgspec.Struct):
    heads: list[Head]


def run_verify(settings: Settings, *, as_json: bool, heads: Path | None = None) -> int:
    """Print the report and return the exit status: 0 the promises hold, 1 they do not, 2 it could not be told.

    `heads` is an earlier report in JSON: the ledger's history must run through what it says of its heads.
    """
    try:
        earlier = read_heads(heads) if heads else {}
    except (OSError, msgspec.DecodeError) as error:
        print(f"coupon-svc verify: {heads} is no earlier report in JSON ({error}); nothing is shown.", file=sys.stderr)
        return 2

    async def run() -> Report:
        connection = await open_connection(settings.database_url, "coupon-verify", PATIENT_S)
        redis = Redis.from_url(settings.redis_url, decode_responses=True)
        try:
            show = sys.stderr.isatty()
            return await Verifier(settings, connection, redis, show_progress=show, earlier=earlier).verify()
        finally:
            await redis.aclose()
            connection.terminate()

    try:
        report = asyncio.run(run())
    except (LedgerUnavailable, asyncpg.PostgresError, asyncpg.InterfaceError, RedisError, OSError) as error:
        print(f"coupon-svc verify: a store cannot be read ({type(error).__name__}); nothing is shown.", file=sys.stderr)
        return 2
    if as_json:
        print(msgspec.json.encode({"holds": report.holds, **msgspec.structs.asdict(report)}).decode())
    else:
        _print(report)
    return 0 if report.holds else 1 if report.findings else 2


def _print(report: Report) -> None:
    print(
        f"{report.shards} shards, {report.books} books: {report.codes_held} codes held, {report.codes_free} free in Redis,"
        f" {report.under_way} were on their way to the ledger."
    )
    ends = [f"{head.position} {head.chain}" for head in report.heads if head.position]
    for end in ends:
        print(f"ends at      {end}")
    unhashed = sum(head.unhashed for head in report.heads)
    if unhashed:
        print(f"{unhashed} rows of the ledger are from before its hash chain; whether they were edited cannot be told.")
    if report.computed_books:
        print(f"The codes of {report.computed_books} books are computed.")
    if report.without_key:
        print(
            f"{report.without_key} books have computed codes. Their counts were checked; whether each code is of its book's"
            " numbers only COUPON_MASTER_KEY tells."
        )
    for text in report.unchecked:
        print(f"NOT CHECKED  {text}")
    for finding in report.findings[:SHOWN_MAX]:
        where = f"shard {finding.shard:02d}" + (f", book {finding.book_id}" if finding.book_id else "")
        print(f"BROKEN       {where}: {finding.what} ({finding.number})")
    if len(report.findings) > SHOWN_MAX:
        print(f"             and {len(report.findings) - SHOWN_MAX} more; see --json")
    print("The promises hold." if report.holds else "The promises are not shown to hold.")
