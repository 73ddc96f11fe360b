"""A random code is a fair draw: every code of a book comes first, and comes at any place, alike often, whatever the
order of upload.

Chance enters twice: the place a code gets in its book's order when it is uploaded (`random_places`), by which Postgres
lends, and the score it gets when it is brought to Redis (`load_codes`), by which assign_coupon deals. Both come from
the system's CSPRNG, so these tests cannot be seeded; how seldom they fail by chance is computed instead.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any

import asyncpg
import pytest

from bench.assigning import Assigns
from coupon_svc.dev.servers import EmbeddedRedis
from coupon_svc.domain.books import Ack
from coupon_svc.domain.chain import CHAIN_START
from coupon_svc.domain.codes import parse_pattern
from coupon_svc.domain.master_key import MasterKeys
from coupon_svc.domain.shards import new_book_id
from coupon_svc.postgres.codes import insert_codes
from coupon_svc.postgres.computed.ciphers import Ciphers
from coupon_svc.postgres.computed.ranges import take_range
from coupon_svc.postgres.lend_order import random_places
from coupon_svc.postgres.lending import lease_block
from coupon_svc.postgres.shards import OwnedShard
from coupon_svc.redis.connection import Connection, connect
from coupon_svc.redis.control import ShardControl, Term
from coupon_svc.redis.errors import ReplyError
from coupon_svc.redis.keys import ShardKeys
from coupon_svc.redis.scripts import Scripts
from coupon_svc.redis.server import load_library
from tests.bare_books import insert_bare_book
from tests.harness import MASTER_KEY, fresh_database

FALSE_ALARM = 1e-9
"""How often a fair draw may fail one of these assertions, by the chi-square distribution.

Counts follow it only nearly; the fewest expected in a cell are 12, where its far tail may be wrong by a factor, not by
the thousand that is left to the one in a million we would accept.
"""

SHARD, SHARDS = 96, 97  # no other test on this server has this number
TERM = Term(SHARD, epoch=1, generation=1)
CODES = [f"CODE-{number:02d}" for number in range(12)]

CIPHERS = Ciphers(MasterKeys.parse(MASTER_KEY))
RULES = {
    "tenant_id": "1",
    "status": "active",
    "starts_at_ms": "",
    "expires_at_ms": "",
    "ack": "redis",
    "max_redemptions_per_code": "1",
    "max_codes_per_user": "",
    "lock_ttl_ms": "1000",
    "total": "0",
    "unlent": "0",
    "stored": "{}",
}


# --- the measure


def tail(statistic: float, freedom: int) -> float:
    """The chance of a chi-square variable with `freedom` degrees beyond `statistic`: its exact, finite sum."""
    half = statistic / 2
    if half <= 0:
        return 1.0
    first = 0.5 if freedom % 2 else 0.0
    logs = [(i + first) * math.log(half) - half - math.lgamma(i + first + 1) for i in range(freedom // 2)]
    return min(1.0, (math.erfc(math.sqrt(half)) if freedom % 2 else 0.0) + math.fsum(map(math.exp, logs)))


def threshold(freedom: int) -> float:
    """The statistic that a fair draw exceeds with the chance FALSE_ALARM."""
    low, high = 0.0, 100.0 + 3.0 * freedom
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if tail(middle, freedom) > FALSE_ALARM else (low, middle)
    return high


def unevenness(draws: Iterable[int], cells: int, drawn_together: int = 1) -> float:
    """Pearson's statistic of draws that should hit all cells alike; chi-square with `cells - 1` degrees.

    `drawn_together` draws at a time are without replacement, which makes their counts vary less; it is allowed for.
    """
    counts = Counter(draws)
    expected = counts.total() / cells
    sum_of_squares = sum((counts[cell] - expected) ** 2 for cell in range(cells))
    return sum_of_squares / expected / (cells - drawn_together) * (cells - 1)


def order_unevenness(orders: Sequence[Sequence[int]]) -> float:
    """The same for whole orders of n: does each of n come at each place alike often? Has (n - 1)^2 degrees."""
    size = len(orders[0])
    assert all(sorted(order) == list(range(size)) for order in orders)
    counts = Counter((place, number) for order in orders for place, number in enumerate(order))
    expected = len(orders) / size
    cells = ((place, number) for place in range(size) for number in range(size))
    return sum((counts[cell] - expected) ** 2 for cell in cells) / expected * (size - 1) / size


def test_the_tail_is_that_of_the_tables() -> None:
    for statistic, freedom, chance in ((3.841, 1, 0.05), (19.675, 11, 0.05), (31.264, 11, 0.001), (26.217, 12, 0.01)):
        assert tail(statistic, freedom) == pytest.approx(chance, rel=2e-3)
    assert tail(threshold(11), 11) == pytest.approx(FALSE_ALARM, rel=1e-4)
    assert (round(threshold(11)), round(threshold(121)), round(threshold(999))) == (65, 239, 1291)


def test_fair_draws_pass_and_their_statistic_is_what_it_should_be() -> None:
    chance = random.Random(1)
    single = [unevenness((chance.randrange(12) for _ in range(1200)), 12) for _ in range(300)]
    assert sum(single) / 300 == pytest.approx(11, rel=0.1)
    together = [unevenness((n for _ in range(200) for n in chance.sample(range(12), 6)), 12, 6) for _ in range(300)]
    assert sum(together) / 300 == pytest.approx(11, rel=0.1)
    orders = [order_unevenness([chance.sample(range(6), 6) for _ in range(100)]) for _ in range(300)]
    assert sum(orders) / 300 == pytest.approx(25, rel=0.1)
    assert max(single + together) < threshold(11)
    assert max(orders) < threshold(25)


# --- the measure catches what is unfair


def spop_like(members: int, rounds: int, drawn: int) -> list[int]:
    """What popping from a chained hash table gives: a filled bucket at random, then one of its members."""
    chance = random.Random(2)
    bucket_of = [chance.randrange(1024) for _ in range(members)]
    draws = []
    for _ in range(rounds):
        buckets: dict[int, list[int]] = {}
        for member in range(members):
            buckets.setdefault(bucket_of[member], []).append(member)
        for _ in range(drawn):
            bucket = chance.choice(list(buckets))
            members_left = buckets[bucket]
            draws.append(members_left.pop(chance.randrange(len(members_left))))
            if not members_left:
                del buckets[bucket]
    return draws


def test_a_draw_that_leans_on_how_codes_hash_is_caught() -> None:
    """As SPOP of Redis does. Of Valkey 9.1 it is fair by now, so there is no server here to show it with.

    Measured with the test of a large book below (threshold 1291), in three runs with SPOP in place of our scripts:
    Redis 6.2.14: 1768, 1834, 1715; Valkey 9.1.2: 960, 965, 1024. SRANDMEMBER, 200,000 draws from 1000 members:
    Redis 12,600 to 15,800, some members six times as likely as others; Valkey 1011 to 1066. Of sets as small as the
    book of twelve both are fair (Redis 18, 14, 4; Valkey 10, 10, 12; threshold 65).
    """
    assert unevenness(spop_like(1000, 300, 40), 1000, 40) > threshold(999)


def test_a_code_that_is_twice_as_likely_is_caught() -> None:
    chance = random.Random(3)
    assert unevenness(chance.choices(range(12), [2] + [1] * 11, k=3000), 12) > threshold(11)


def test_an_order_in_which_the_first_uploads_come_first_is_caught() -> None:
    """As when late uploads were put behind all others: even with chance within each half."""
    chance = random.Random(4)
    halves = [chance.sample(range(6), 6) + chance.sample(range(6, 12), 6) for _ in range(250)]
    assert order_unevenness(halves) > threshold(121)
    slightly = [chance.sample(range(12), 12) for _ in range(150)] + halves[:100]
    assert order_unevenness(slightly) > threshold(121)


# --- places in Postgres


def test_places_are_spread_evenly() -> None:
    above, upto = 5_000_000_000, 5_000_000_000 + (1 << 32)
    places = random_places(64_000, above, upto)
    assert all(above < place <= upto for place in places)
    assert unevenness(((place - above - 1) >> 26 for place in places), 64) < threshold(63)


def test_places_in_a_span_of_three_are_any_of_the_three() -> None:
    places = random_places(9_000, 40, 43)
    assert unevenness((place - 41 for place in places), 3) < threshold(2)


# --- dealing from Redis


class Dealer:
    """Loads and deals as the service does: the owner's store, and assign_coupon on a shared connection."""

    def __init__(self, owner: ShardControl, connection: Connection, scripts: Scripts) -> None:
        self._owner = owner
        self._connection = connection
        self._assigns = Assigns(scripts)
        self._keys = ShardKeys(SHARD, SHARDS)

    async def load(self, book_id: str, codes: Sequence[str]) -> None:
        await self._owner.put_book(TERM, book_id, 1, RULES, known=False)
        await self._owner.load_codes(TERM, book_id, codes, 0)

    async def deal(self, book_id: str, count: int) -> list[str]:
        command = self._assigns.command(self._keys, TERM.epoch, 1, book_id, [("u", "")])
        slots = [self._connection.send(*command) for _ in range(count)]
        raw: list[Any] = [await slot for slot in slots]
        assert not any(isinstance(reply, ReplyError) for reply in raw), raw[0]
        replies = [reply for one in raw for reply in self._assigns.replies(one)]
        assert all(reply.outcome == "ok" for reply in replies), replies[0]
        return [reply.code for reply in replies]

    async def deal_blocks(self, book_id: str, blocks: Sequence[Sequence[str]]) -> list[str]:
        """Every code of the blocks in the order dealt; the next block comes when half of one is left, as it does."""
        order: list[str] = []
        for number, block in enumerate(blocks):
            await self.load(book_id, block)
            last = number == len(blocks) - 1
            in_pool = sum(map(len, blocks[: number + 1])) - len(order)
            order += await self.deal(book_id, in_pool if last else in_pool - len(block) // 2)
        return order


@pytest.fixture(scope="module")
async def dealer(plain_redis: EmbeddedRedis) -> AsyncIterator[Dealer]:
    scripts = Scripts()
    owner = ShardControl(plain_redis.url, SHARDS, scripts, "inst-1")
    await owner.shut_shard(TERM)
    await owner.certify_shard(TERM, await owner.connect(), 1_000_000_000)
    connection = await connect(plain_redis.url, "test-fairness")
    await load_library(connection, scripts.library)
    yield Dealer(owner, connection, scripts)
    connection.abort()
    owner.close()


async def test_the_first_code_of_a_small_book_is_any_of_them_alike(dealer: Dealer) -> None:
    async def first_of_a_new_book() -> int:
        book_id = new_book_id(SHARDS)
        await dealer.load(book_id, CODES)
        return CODES.index((await dealer.deal(book_id, 1))[0])

    draws: list[int] = []
    while len(draws) < 3000:
        draws += await asyncio.gather(*(first_of_a_new_book() for _ in range(250)))
    assert unevenness(draws, 12) < threshold(11)


@pytest.mark.chaos
async def test_the_first_forty_of_a_large_book_are_any_of_the_thousand_alike(dealer: Dealer) -> None:
    codes = [f"CODE-{number:03d}" for number in range(1000)]

    async def first_of_a_new_book() -> list[str]:
        book_id = new_book_id(SHARDS)
        await dealer.load(book_id, codes)
        return await dealer.deal(book_id, 40)

    draws: list[str] = []
    while len(draws) < 300 * 40:
        for dealt in await asyncio.gather(*(first_of_a_new_book() for _ in range(20))):
            draws += dealt
    assert unevenness((int(code[-3:]) for code in draws), 1000, 40) < threshold(999)


# --- lent by Postgres, dealt by Redis


class Lender:
    """A database in which this test is the shard's owner."""

    def __init__(self, connection: Any, tenant_id: int) -> None:
        self.connection = connection
        self._tenant_id = tenant_id
        self._owned = OwnedShard(SHARD, epoch=1, generation=1, committed=0, chain=CHAIN_START, tip="")

    async def new_book(self) -> str:
        """A book without codes. Returns its id."""
        book_id = new_book_id(SHARDS)
        await insert_bare_book(self.connection, book_id, shard=SHARD, tenant_id=self._tenant_id, ack=Ack.REDIS)
        return book_id

    async def upload(self, book_id: str, codes: Sequence[str]) -> list[str]:
        """Codes are unique within their tenant: each gets the book's own letters behind it."""
        texts = [f"{code}-{book_id[5:].upper()}" for code in codes]
        _, taken = await insert_codes(self.connection, self._tenant_id, book_id, texts, CIPHERS)
        assert not taken
        return texts

    async def compute(self, book_id: str, pattern: str, count: int) -> None:
        """Give the book computed codes, of a pattern with a key of its own."""
        wanted = parse_pattern(pattern, "digits")
        assert await take_range(self.connection, self._tenant_id, book_id, wanted, count, CIPHERS)

    async def crowd(self, book_id: str, places: int) -> None:
        """Leave the book so many places, over which its codes stand in their order."""
        await self.connection.execute(
            "UPDATE codes SET place = leased_upto + number * $2 / (total - lent) FROM books,"
            " (SELECT code, row_number() OVER (ORDER BY place) AS number FROM codes WHERE book_id = $1) ranked"
            " WHERE codes.book_id = $1 AND books.book_id = $1 AND codes.code = ranked.code",
            book_id,
            places,
        )
        await self.connection.execute(
            "UPDATE books SET places_upto = leased_upto + $2 WHERE book_id = $1", book_id, places
        )

    async def lend(self, book_id: str, count: int) -> list[str]:
        lease = await lease_block(self.connection, "test", self._owned, book_id, count, CIPHERS)
        assert lease is not None
        assert len(lease.codes) == count
        return lease.codes


@pytest.fixture(scope="module")
async def lender(postgres_url: str) -> AsyncIterator[Lender]:
    connection = await asyncpg.connect(await fresh_database(postgres_url, SHARDS))
    tenant_id = await connection.fetchval("INSERT INTO tenants (name) VALUES ('t') RETURNING tenant_id")
    await connection.execute("UPDATE shards SET owner = 'test', generation = 1, epoch = 1 WHERE shard = $1", SHARD)
    await connection.execute("SET synchronous_commit = off")
    yield Lender(connection, tenant_id)
    await connection.close()


def number_of(code: str) -> int:
    return int(code.split("-")[1])


async def test_codes_lent_in_blocks_come_at_any_place_alike(dealer: Dealer, lender: Lender) -> None:
    lent: list[tuple[str, list[list[str]]]] = []
    async with lender.connection.transaction():
        for _ in range(200):
            book_id = await lender.new_book()
            await lender.upload(book_id, CODES)
            lent.append((book_id, [await lender.lend(book_id, 4) for _ in range(3)]))
    dealt = await asyncio.gather(*(dealer.deal_blocks(book_id, blocks) for book_id, blocks in lent))
    orders = [[number_of(code) for code in order] for order in dealt]
    assert unevenness((order[0] for order in orders), 12) < threshold(11)
    assert order_unevenness(orders) < threshold(121)


async def test_computed_and_stored_codes_of_a_book_come_at_any_place_alike(dealer: Dealer, lender: Lender) -> None:
    """Eight computed ones, numbered as their texts are sorted, and four that were uploaded before."""
    connection = lender.connection
    lent: list[tuple[str, list[list[str]]]] = []
    numbers: list[dict[str, int]] = []
    async with connection.transaction():
        for number in range(200):
            name = f"computed-{number}"
            tenant_id = await connection.fetchval("INSERT INTO tenants (name) VALUES ($1) RETURNING tenant_id", name)
            of_tenant = Lender(connection, tenant_id)  # with one pattern, and so one key
            book_id = await of_tenant.new_book()
            stored = await of_tenant.upload(book_id, CODES[:4])
            await of_tenant.compute(book_id, "C-######", 8)
            blocks = [await of_tenant.lend(book_id, 4) for _ in range(3)]
            computed = sorted({code for block in blocks for code in block} - set(stored))
            lent.append((book_id, blocks))
            numbers.append({code: place for place, code in enumerate([*stored, *computed])})
    dealt = await asyncio.gather(*(dealer.deal_blocks(book_id, blocks) for book_id, blocks in lent))
    orders = [[of_book[code] for code in order] for of_book, order in zip(numbers, dealt, strict=True)]
    assert unevenness((order[0] for order in orders), 12) < threshold(11)
    assert order_unevenness(orders) < threshold(121)


async def test_late_uploads_are_mixed_into_what_is_not_lent_yet(dealer: Dealer, lender: Lender) -> None:
    """Six codes are uploaded and four of them lent, then six more are uploaded: the eight that are left come in any
    order alike. They are numbered in the order of upload."""
    lent: list[tuple[str, list[list[str]]]] = []
    async with lender.connection.transaction():
        for _ in range(200):
            book_id = await lender.new_book()
            await lender.upload(book_id, CODES[:6])
            early = await lender.lend(book_id, 4)
            await lender.upload(book_id, CODES[6:])
            left = sorted(set(range(12)) - set(map(number_of, early)))
            blocks = [await lender.lend(book_id, 4) for _ in range(2)]
            assert sorted(number_of(code) for block in blocks for code in block) == left
            lent.append((book_id, blocks))
    dealt = await asyncio.gather(*(dealer.deal_blocks(book_id, blocks) for book_id, blocks in lent))
    orders = [[sorted(map(number_of, order)).index(number_of(code)) for code in order] for order in dealt]
    assert unevenness((order[0] for order in orders), 8) < threshold(7)
    assert order_unevenness(orders) < threshold(49)


async def test_late_uploads_are_mixed_in_where_places_have_become_few(dealer: Dealer, lender: Lender) -> None:
    """As they do in a book that is topped up again and again before it runs dry: what is left of its places halves each
    time. Behind them, new codes would come after all others."""
    lent: list[tuple[str, list[str]]] = []
    async with lender.connection.transaction():
        for _ in range(200):
            book_id = await lender.new_book()
            await lender.upload(book_id, CODES[:6])
            await lender.crowd(book_id, 40)
            await lender.upload(book_id, CODES[6:])
            lent.append((book_id, await lender.lend(book_id, 6)))
    assert unevenness((number_of(code) for _, block in lent for code in block), 12, 6) < threshold(11)
    orders = [list(map(number_of, await dealer.deal_blocks(book_id, [block]))) for book_id, block in lent]
    assert unevenness((order[0] for order in orders), 12) < threshold(11)


async def test_each_block_of_a_book_that_is_topped_up_is_any_of_its_codes_alike(dealer: Dealer, lender: Lender) -> None:
    """The whole way: uploads of several sizes, blocks, and codes that are dealt while the next block is on its way.

    Of the twelve codes that are placed when a block is lent, numbered in the order of upload, each is in the block as often
    as any other, and is as often the first of the block that is dealt.
    """
    lent: list[int] = []
    first: list[int] = []

    async def live(book_id: str) -> None:
        unlent: list[str] = []
        begun: list[dict[str, int]] = []
        for turn in range(10):
            for size in (5, 1) if turn else (7, 4, 1):
                unlent += await lender.upload(book_id, [f"T{turn:02}{size}-{number}" for number in range(size)])
            block = await lender.lend(book_id, 6)
            numbers = {code: unlent.index(code) for code in block}
            lent.extend(numbers.values())
            begun.append(numbers)
            unlent = [code for code in unlent if code not in numbers]
            await dealer.load(book_id, block)
            for code in await dealer.deal(book_id, 6 if turn else 3):
                for block_of in [numbers for numbers in begun if code in numbers]:
                    first.append(block_of[code])
                    begun.remove(block_of)

    for _ in range(40):
        async with lender.connection.transaction():
            await live(await lender.new_book())
    assert len(lent) == 40 * 10 * 6
    assert len(first) > 300
    assert unevenness(lent, 12, 6) < threshold(11)
    assert unevenness(first, 12) < threshold(11)
