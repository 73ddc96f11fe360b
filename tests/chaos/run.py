"""Clients on one stack, the history of what they asked and were answered, and what must be true of it afterwards."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import msgspec
from redis.asyncio import Redis

from coupon_svc.config import load_settings
from coupon_svc.domain.computed import TOTAL_MIN
from coupon_svc.domain.master_key import MasterKeys
from coupon_svc.invariants.answers import Assigned, Book, Coupon, History, Redeemed
from coupon_svc.invariants.check import Check
from coupon_svc.invariants.kept import compare, read_rows
from coupon_svc.invariants.service import Listed, ServiceCheck, compare_list, same_answer
from coupon_svc.invariants.stores import Verifier
from coupon_svc.postgres.computed.ciphers import Ciphers
from coupon_svc.postgres.database import PATIENT_S, LedgerConnection, open_connection
from tests.harness import MASTER_KEY, START_S, Part, Stack, until
from tests.linearizable import CodeModel, LimitModel, Operation, require_linearizable

WRITERS = APIS = 2
LEASE_CODES_MIN = "20"
CLIENTS = 8
ROAMING = 0.1
"""How likely a client asks another API process than before. After an error it is one half."""
BURST_MAX = 8
"""How many requests of a client are under way at once, so that a call has several operations."""
CODES = 1600
COMPUTED_CODES = TOTAL_MIN
"""So that the books for many codes are computed ones, as large books are."""
"""Of each book."""
CONTENDED = 60
"""Of them, those that clients ask for by name."""
USES = 2
HEAL_S = 40.0


class Attempt(msgspec.Struct):
    """One request of a client, and what became of it: `ok`, `refused`, or `unknown` (it may have happened).

    A list is one for each of its users, with the same path, body and key.
    """

    verb: str
    path: str
    body: dict[str, Any]
    key: str
    book_id: str
    ack: str
    user: str
    outcome: str = "unknown"
    answer: dict[str, Any] = {}
    status: int = 0
    replayed: bool = False
    """The answer is one that was given before, or would have been."""
    in_doubt: bool = False
    """It was unknown at first."""
    invoked_s: float = 0.0
    """When it was first sent, by this process's monotonic clock."""
    returned_s: float = math.inf
    """When its last answer came."""
    asked_at: str = ""
    """The address of the API process that was asked last."""
    keyed: bool = True
    """Whether the key is sent: without it nobody can ask again."""

    @property
    def code(self) -> str:
        """The code that is named or was given; empty when neither."""
        return self.answer.get("code", "") if self.verb == "assign" else self.path.rpartition("/")[2]


class Run:
    """Load on one stack, with a history of its own."""

    def __init__(self, stack: Stack, seed: int) -> None:
        self.stack = stack
        self.random = random.Random(seed)
        self.writers: list[Part] = []
        self.apis: list[Part] = []
        self.history: list[Attempt] = []
        self.books: dict[str, str] = {}
        self.limited: set[str] = set()
        self.epochs: dict[int, int] = {}
        self.loses_records = False
        self.loses_locks = False
        """Locks may be gone before their time. A recovery that rebuilds Redis loses them in any case."""
        self.scripts_fail = False
        """Somebody made it impossible for scripts to end: the answer may be 500, which says that it may have happened."""
        self.two_masters = False
        """Each may have granted a lock of the same code: locks say nothing then (docs/guarantees.md, Exceptions)."""
        self.restored_from_s = self.restored_upto_s = math.inf
        """An operator restored the ledger as it was at the first, and found it so at the second of these times."""
        self.authorization = ""
        self._first_epochs: dict[int, int] = {}
        self._busy_until_s = 0.0
        self._lists: dict[str, list[Attempt]] = {}
        """By key."""
        self._contended: list[tuple[str, str]] = []
        self._held: list[tuple[str, str, str]] = []
        self._locked: list[tuple[str, str, str, str]] = []

    async def start(self) -> None:
        """Start the parts: API processes, and writers that share the shards."""
        self.writers = [self.stack.writer(n, COUPON_LEASE_CODES_MIN=LEASE_CODES_MIN) for n in range(WRITERS)]
        self.apis = [self.stack.api(n) for n in range(APIS)]
        await self.share_shards()
        for api in self.apis:
            await self.stack.ready(api.base_url)

    def start_writer(self, number: int, /, **environment: str) -> None:
        """Start a writer in the place of one that is gone; `environment`, and `dies_at` or `stops_at`, as `Stack.writer`."""
        self.writers[number] = self.stack.writer(number, **{"COUPON_LEASE_CODES_MIN": LEASE_CODES_MIN, **environment})

    async def start_api(self, number: int) -> None:
        """Start an API process in the place of one that is gone, and wait until it is ready."""
        self.apis[number] = self.stack.api(number)
        await self.stack.ready(self.apis[number].base_url)

    async def share_shards(self) -> None:
        """Wait until each writer owns an equal part of the shards."""

        async def shared() -> bool:
            rows = await self.stack.ledger("SELECT owner, count(*) FROM shards GROUP BY owner")
            return {row["count"] for row in rows} == {self.stack.shards // WRITERS} and all(
                row["owner"] for row in rows
            )

        await until(shared, START_S, "the writers should share the shards")

    async def owner_of(self, shard: int) -> int:
        """The number of the writer that owns a shard."""

        async def owner() -> list[int]:
            (row,) = await self.stack.ledger("SELECT owner FROM shards WHERE shard = $1", shard)
            return [n for n, writer in enumerate(self.writers) if row["owner"] and writer.said(row["owner"])]

        return (await until(owner, HEAL_S, "the shard should have an owner"))[0]

    def some(self, parts: list[Part]) -> list[int]:
        """One of the parts, or all of them: their numbers."""
        numbers = list(range(len(parts)))
        return numbers if self.random.random() < 0.5 else [self.random.choice(numbers)]

    async def prepare(self) -> None:
        """Two books of each kind: one for many codes, which are computed, and one with a limit of one code a user, whose
        codes are stored."""
        self.authorization = f"Bearer {await self.stack.key()}"
        async with self.client() as http:
            for ack in ("ledger", "redis"):
                for limit in (None, 1):
                    rules = {"name": ack, "ack": ack, "max_codes_per_user": limit, "max_redemptions_per_code": USES}
                    generate = {
                        "pattern": f"{ack[0]}{limit or 0}-########",
                        "total": CODES if limit else COMPUTED_CODES,
                    }
                    book_id = await new_book(self.stack, http, {**rules, "generate": generate})
                    self.books[book_id] = ack
                    if limit:
                        self.limited.add(book_id)
        for book_id in self.books:
            codes = await self._codes_of(book_id)
            self._contended += [(code, book_id) for code in self.random.sample(codes, CONTENDED)]
        self.epochs = self._first_epochs = await self.epochs_now()

    async def _codes_of(self, book_id: str) -> list[str]:
        """Codes of a book, among them those that are lent first."""
        rows = await self.stack.ledger("SELECT code FROM codes WHERE book_id = $1 ORDER BY code", book_id)
        ranges = await self.stack.ledger(
            "SELECT p.*, begins FROM code_ranges JOIN computed_patterns p USING (pattern_id) WHERE book_id = $1",
            book_id,
        )
        ciphers = Ciphers(MasterKeys.parse(MASTER_KEY))
        computed = [
            code for row in ranges for code in ciphers.of(row).codes(range(row["begins"], row["begins"] + CODES))
        ]
        return [row["code"] for row in rows] or computed

    async def load(
        self, seconds: float, base_url: str = "", pause_s: float = 0.0, stop: asyncio.Event | None = None
    ) -> None:
        """Work of all clients for a while, or until `stop` is set: at one API process, or all over them."""
        deadline = time.monotonic() + seconds
        self._busy_until_s = max(self._busy_until_s, deadline)
        stop = stop or asyncio.Event()
        async with self.client(base_url) as http:
            await asyncio.gather(
                *(self._work(http, number, base_url, deadline, pause_s, stop) for number in range(CLIENTS))
            )

    async def idle(self) -> None:
        """Wait until no client works any more, for a fault that needs silence."""
        await asyncio.sleep(max(0.0, self._busy_until_s + 0.5 - time.monotonic()))

    async def heal(self) -> None:
        """Wait until all books deal again, then ask what is unknown again."""
        async with self.client() as http:
            for book_id, api in itertools.product(self.books, self.apis):

                async def deals(book_id: str = book_id, at: str = api.base_url) -> bool:
                    attempt = self.new_assign(f"healer-{secrets.token_hex(4)}", book_id)
                    await self.send(http, attempt, at=at)
                    await none_is_stopped(self.stack)
                    return attempt.outcome == "ok" or attempt.answer.get("code") == "book_exhausted"

                await until(deals, HEAL_S, "every book should deal again")
            for attempt in self.history:
                if attempt.outcome == "unknown":
                    attempt.in_doubt = True
                    if not attempt.keyed:
                        continue

                    async def known(attempt: Attempt = attempt) -> bool:
                        await self.send(http, attempt, at=self.elsewhere(attempt.asked_at), record=False)
                        return attempt.outcome != "unknown"

                    await until(known, HEAL_S, "an unknown outcome should become known")
        await self.stack.drained()

    async def check(self) -> None:
        """Everything that must hold now, whatever happened."""
        self._check_answers()
        await self._check_order()
        await self._check_replays()
        await self._check_ledger()
        await self._check_lists()
        await self._check_verify()

    # --- load

    def client(self, base_url: str = "") -> httpx.AsyncClient:
        """An HTTP client of one API process, the first unless its address is given."""
        return httpx.AsyncClient(
            base_url=base_url or self.apis[0].base_url,
            headers={"Authorization": self.authorization},
            timeout=15,
            verify=False,  # it is plain HTTP; loading the system's certificates takes 40 ms a client
        )

    def elsewhere(self, address: str) -> str:
        """The address of an API process, another one than this."""
        return self.random.choice([api.base_url for api in self.apis if api.base_url != address])

    def new_assign(self, user: str, book_id: str = "") -> Attempt:
        """A request for any code of a book."""
        book_id = book_id or self.random.choice(list(self.books))
        return self._new("assign", "/coupons/assign", book_id, user, book_id=book_id)

    def _new(self, verb: str, path: str, of_book: str, user: str, /, **body: str | int) -> Attempt:
        if verb != "unlock":
            body["user_id"] = user
        return Attempt(verb, path, body, secrets.token_hex(8), of_book, self.books[of_book], user)

    def _next(self, number: int) -> Attempt:
        """What a client asks for next. Codes and locks are everybody's: clients get into each other's way."""
        draw = self.random.random()
        if draw < 0.3 and self._held:
            code, book_id, user = self._any_of(self._held)
            return self._new("redeem", f"/coupons/redeem/{code}", book_id, user)
        if draw < 0.4 and self._held:
            code, book_id, user = self._any_of(self._held)
            ttl = {"ttl_seconds": 1} if self.random.random() < 0.2 else {}
            return self._new("lock", f"/coupons/lock/{code}", book_id, user, **ttl)
        if draw < 0.5 and self._locked:  # a lock that is not drawn again is abandoned
            code, book_id, user, token = self._locked.pop(self.random.randrange(len(self._locked)))
            verb = self.random.choice(("lock", "unlock", "redeem"))
            return self._new(verb, f"/coupons/{verb}/{code}", book_id, user, lock_token=token)
        if draw < 0.53:
            return self._new_list(number)
        user = f"u{number}-{self.random.randrange(30)}"
        if draw < 0.6:
            code, book_id = self.random.choice(self._contended)
            return self._new("assign_code", f"/coupons/assign/{code}", book_id, user)
        return self.new_assign(user)

    def _new_list(self, number: int) -> Attempt:
        """A request for codes for some users: that of the first. One in three has no key."""
        book_id, key, keyed = self.random.choice(list(self.books)), secrets.token_hex(8), self.random.random() < 2 / 3
        users = [f"u{number}-{user}" for user in self.random.sample(range(30), self.random.randint(2, 5))]
        body = {"book_id": book_id, "user_ids": users}
        self._lists[key] = [
            Attempt("assign", "/coupons/assignments", body, key, book_id, self.books[book_id], user, keyed=keyed)
            for user in users
        ]
        return self._lists[key][0]

    def _any_of(self, held: list[tuple[str, str, str]]) -> tuple[str, str, str]:
        """One of the newest, mostly: those are the ones that others are at."""
        return self.random.choice(held[-20:] if self.random.random() < 0.7 else held)

    async def _work(
        self, http: httpx.AsyncClient, number: int, base_url: str, deadline: float, pause_s: float, stop: asyncio.Event
    ) -> None:
        at = base_url or self.apis[number % APIS].base_url
        while time.monotonic() < deadline and not stop.is_set():
            burst = [self._next(number) for _ in range(self.random.randrange(1, BURST_MAX + 1))]
            await asyncio.gather(*(self.send(http, attempt, at=at) for attempt in burst))
            in_trouble = any(attempt.outcome == "unknown" or attempt.status >= 500 for attempt in burst)
            if not base_url and self.random.random() < (0.5 if in_trouble else ROAMING):
                at = self.elsewhere(at)
            for attempt in burst:
                for one in self._lists.get(attempt.key, [attempt]):
                    self._remember(one)
            in_doubt = any(attempt.outcome == "unknown" for attempt in burst)
            await asyncio.sleep(0.02 if in_doubt else pause_s * len(burst))

    def _remember(self, attempt: Attempt) -> None:
        if attempt.outcome == "ok" and attempt.verb in ("assign", "assign_code"):
            self._held.append((attempt.answer["code"], attempt.book_id, attempt.user))
        if attempt.outcome == "ok" and attempt.verb == "lock":
            self._locked.append((attempt.code, attempt.book_id, attempt.user, attempt.answer["lock_token"]))

    async def send(self, http: httpx.AsyncClient, attempt: Attempt, *, at: str = "", record: bool = True) -> None:
        """Ask, for the first time or again, and note what became of it. `at` is the API process, the client's own unless
        given. Of a list, those of its users who have no code yet are noted, too: a retry judges them anew."""
        together = self._lists.get(attempt.key, [attempt])
        if record:
            self.history += together
        asked = [attempt, *(one for one in together if one is not attempt and one.outcome != "ok")]
        for one in asked:
            one.asked_at = at or str(http.base_url).rstrip("/")
            one.invoked_s = one.invoked_s or time.monotonic()
        try:
            answer = await http.post(
                attempt.asked_at + attempt.path,
                json=attempt.body,
                headers={"Idempotency-Key": attempt.key} if attempt.keyed else {},
            )
        except httpx.HTTPError:
            for one in asked:
                one.outcome = "unknown"
            return
        told = answer.json() if answer.content else {}
        of_user = {result["user_id"]: result for result in told.get("results", ())}
        for one in asked:
            one.replayed = answer.headers.get("idempotent-replayed") == "true"
            if of_user:
                self._note(one, of_user[one.user].pop("status"), of_user[one.user])
            else:
                self._note(one, answer.status_code, told)

    def _note(self, attempt: Attempt, status: int, told: dict[str, Any]) -> None:
        attempt.returned_s = time.monotonic()
        attempt.answer, attempt.status = told, status
        if status in (200, 201, 204):
            attempt.outcome = "ok"
        elif status >= 500:
            in_doubt = told["code"] in ("outcome_unknown", "internal_error")
            attempt.outcome = "unknown" if in_doubt else "refused"
            assert status != 500 or self.scripts_fail, told
        else:
            attempt.outcome = "refused"

    # --- checks

    def _ok(self, *verbs: str) -> list[Attempt]:
        return [attempt for attempt in self.history if attempt.verb in verbs and attempt.outcome == "ok"]

    def _assigned(self) -> list[Attempt]:
        return self._ok("assign", "assign_code")

    def _given_up(self) -> tuple[set[str], set[str]]:
        """(codes, users) of what was asked and answered after the backup that the ledger was restored from: an operator gave
        that up. Of the codes P1 is promised all the same, and nothing else."""
        since = [
            attempt
            for attempt in self.history
            if attempt.returned_s > self.restored_from_s and attempt.invoked_s < self.restored_upto_s
        ]
        return {attempt.code for attempt in since} - {""}, {attempt.user for attempt in since}

    def _answers(self) -> History:
        """All answers, each held against those before it. Of what an operator gave up, only who was given a code: the rest
        counts as unknown."""
        answers = History(random.Random(0))
        asked = {attempt.book_id: attempt.ack for attempt in self.history}  # a fault may bring books of its own
        answers.books = {book_id: Book(book_id, ack, CODES, None, USES) for book_id, ack in asked.items()}
        given_up, _ = self._given_up()
        for attempt in self.history:
            if attempt.verb not in ("assign", "assign_code"):
                continue
            if attempt.outcome != "ok":
                answers.unknown_assigns[attempt.book_id, attempt.user] += 1
                continue
            known = answers.coupons.get(attempt.answer["code"]) if attempt.answer["code"] in given_up else None
            if known is None or known.user_id != attempt.user:
                answer = msgspec.convert(attempt.answer, Assigned)
                answers.assigned(attempt.book_id, attempt.user, answer, f"{attempt.key} {attempt.user}")
        for attempt in self.history:
            if attempt.verb == "redeem" and attempt.outcome == "ok" and attempt.code not in given_up:
                answers.redeemed(msgspec.convert(attempt.answer, Redeemed), attempt.key)
            elif attempt.verb == "redeem":
                answers.unknown_redeems[attempt.code] += 1
        return answers

    def _check_answers(self) -> None:
        broken = self._answers().broken
        assert not broken, _in_words(check for check, _ in broken)
        for attempt in self._ok("assign_code", "lock", "redeem"):
            assert attempt.answer["code"] == attempt.code, "an answer is another request's"
        keys = Counter((attempt.key, attempt.user) for attempt in self.history)
        assert max(keys.values()) == 1
        events = [attempt for attempt in [*self._assigned(), *self._ok("redeem")] if attempt.status == 201]
        positions = Counter(attempt.answer["position"] for attempt in events)
        assert not positions or max(positions.values()) == 1, "two events were answered with one position"

    async def _check_order(self) -> None:
        """There is an order of all requests, true to the times at which they were asked and answered, in which each code
        went through its states one by one, and no user over a book's limit."""
        rebuilt = await self.epochs_now() != self._first_epochs
        by_code: dict[str, list[Operation]] = {}
        by_user: dict[tuple[str, str], list[Operation]] = {}
        books: dict[str, str] = {}
        for attempt in self.history:
            operation = _operation(attempt)
            if self.two_masters:
                if attempt.verb in ("lock", "unlock") or operation.why in ("locked", "lock_not_held"):
                    continue
                operation = operation._replace(shown="")
            if attempt.code and not (attempt.verb == "assign" and attempt.outcome == "refused"):
                by_code.setdefault(attempt.code, []).append(operation)
                books[attempt.code] = attempt.book_id
            if attempt.book_id in self.limited and attempt.verb in ("assign", "assign_code"):
                by_user.setdefault((attempt.book_id, attempt.user), []).append(operation)
        given_up, their_users = self._given_up()
        for code, operations in by_code.items():
            if code in given_up:
                continue
            # A request for any code that was never answered may have been given this one.
            doubtful = [_operation(a) for a in self.history if a.book_id == books[code] and _never_known(a)]
            if rebuilt:
                lost = lost_before_it_was_told(self.history, books[code], code)
                operations = [
                    one for one in operations if not (one.why == "already_assigned" and lost < one.returned_s)
                ]
            model = CodeModel(USES, loses_locks=self.loses_locks or rebuilt, loses_records=self.loses_records)
            require_linearizable([*operations, *doubtful], model, code)
        for (book_id, user), operations in by_user.items():
            if user not in their_users and (self.books[book_id] == "ledger" or not self.loses_records):
                require_linearizable(operations, LimitModel(1, loses_records=self.loses_records), f"{book_id} {user}")

    async def _check_replays(self) -> None:
        """The same Idempotency-Key gives the first answer again, after all that has happened, from another process."""
        answered = [*self._assigned(), *self._ok("redeem")]
        if self.loses_records:  # what only Redis had is gone, and its key with it
            answered = [attempt for attempt in answered if attempt.ack == "ledger"]
        given_up, _ = self._given_up()
        answered = [attempt for attempt in answered if attempt.keyed and attempt.code not in given_up]
        async with self.client() as http:
            for attempt in self.random.sample(answered, min(40, len(answered))):
                again = msgspec.structs.replace(attempt, answer={})

                async def judged(again: Attempt = again, attempt: Attempt = attempt) -> bool:
                    await self.send(http, again, at=self.elsewhere(attempt.asked_at), record=False)
                    return again.status != 503  # which says nothing of the first

                await until(judged, HEAL_S, "a replay should be answered")
                first, second = msgspec.json.encode(attempt.answer), msgspec.json.encode(again.answer)
                check = ServiceCheck.REDEEM_AGAIN if attempt.verb == "redeem" else ServiceCheck.ASSIGN_AGAIN
                assert same_answer(second, first), f"{_in_words([check])}: {first!r}, {second!r}"

    async def _check_ledger(self) -> None:
        answers = self._answers()
        given_up, their_users = self._given_up()
        # A record that was lost and found again counts neither as its request's only one, nor towards the limit.
        found_again = {row["code"] for row in await self.stack.ledger("SELECT code FROM quarantine_decisions")}
        async with self._database() as database:
            for book_id, answered in answers.by_book().items():
                rows = await read_rows(database, book_id, answered)
                theirs = {code for code, row in rows.coupons.items() if row["user_id"] in their_users}
                book = msgspec.structs.replace(
                    answers.books[book_id], max_codes_per_user=1 if book_id in self.limited else None
                )
                compared = compare(answers, book, answered, rows, given_up=given_up, uncounted=found_again | theirs)
                assert not compared.found, _in_words(compared.found)
                assert not compared.lost or self.loses_records, "a record is lost, and the fault does not lose any"

    async def _check_lists(self) -> None:
        """What was answered is in its user's list, unless its record was lost (and then it is in quarantine)."""
        answers = self._answers()
        of_user: dict[str, dict[str, Coupon]] = {}
        for code, coupon in answers.coupons.items():
            of_user.setdefault(coupon.user_id, {})[code] = coupon
        async with self.client() as http:
            for user, answered in of_user.items():

                async def listed(user: str = user) -> httpx.Response | None:
                    url = f"{self.random.choice(self.apis).base_url}/users/{user}/coupons"
                    try:
                        answer = await http.get(url, params={"limit": 1000})
                    except httpx.TransportError:  # a connection that stood idle may have been closed just now
                        return None
                    assert answer.status_code in (200, 503), answer.text
                    return answer if answer.status_code == 200 else None

                answer = await until(listed, HEAL_S, "a user's coupons should be told")
                assert answer is not None
                listed_now = msgspec.convert(answer.json()["coupons"], list[Listed])
                found, missing = compare_list(answers, user, answered, listed_now)
                if not self.loses_records:
                    assert not missing, _in_words([ServiceCheck.LISTED])
                    assert not found, _in_words(check for check, _ in found)

    async def _check_verify(self) -> None:
        settings = load_settings(self.stack.environment)
        redis = Redis.from_url(settings.redis_url, decode_responses=True)
        async with self._database() as database:
            report = await Verifier(settings, database, redis, show_progress=False).verify()
        await redis.aclose()
        assert report.holds, (report.findings, report.unchecked)

    @asynccontextmanager
    async def _database(self) -> AsyncIterator[LedgerConnection]:
        connection = await open_connection(self.stack.database_url, "chaos", PATIENT_S)
        yield connection
        connection.terminate()

    async def epochs_now(self) -> dict[int, int]:
        return {row["shard"]: row["epoch"] for row in await self.stack.ledger("SELECT shard, epoch FROM shards")}

    async def recovered(self, *, all_shards: bool = True) -> None:
        """Wait until shards are in a newer epoch than before the fault: it was seen to bite."""

        async def newer() -> bool:
            now = await self.epochs_now()
            return (all if all_shards else any)(now[shard] > epoch for shard, epoch in self.epochs.items())

        await until(newer, HEAL_S, "the fault should have been followed by a recovery")


async def all_certified(run: Run) -> bool:
    """Whether every shard is certified in its epoch."""
    return not await run.stack.ledger("SELECT FROM shards WHERE certified_epoch < epoch")


async def none_is_stopped(stack: Stack) -> None:
    """A shard that is stopped waits for an operator: nobody need wait for it."""
    stopped = await stack.ledger("SELECT stopped FROM shards WHERE stopped IS NOT NULL")
    assert not stopped, f"a shard was stopped: {stopped[0]['stopped']}"


async def new_book(stack: Stack, http: httpx.AsyncClient, rules: dict[str, Any]) -> str:
    """Make a book, asking again when told to. Returns its id."""
    key = secrets.token_hex(8)

    async def made() -> str:
        answer = await http.post("/coupons", json=rules, headers={"Idempotency-Key": key})
        assert answer.status_code in (201, 409, 503), answer.text  # 409: the first attempt is still under way
        if answer.status_code == 503:
            await none_is_stopped(stack)
        return str(answer.json()["book_id"]) if answer.status_code == 201 else ""

    return await until(made, HEAL_S, "a book should be made")


def _in_words(broken: Iterable[Check]) -> str:
    return "; ".join(f"{check.promise}: {check}" for check in broken)


def _never_known(attempt: Attempt) -> bool:
    """Whether a request for any code may have been given one that nobody was told of."""
    return attempt.verb == "assign" and attempt.outcome != "ok" and (attempt.in_doubt or attempt.outcome == "unknown")


def lost_before_it_was_told(history: Iterable[Attempt], book_id: str, code: str) -> float:
    """From when on somebody may have held the code of whom nobody was told; infinite when nobody may.

    A request for any code was decided, its answer did not come, and Redis lost what it had decided. Repeated, the request
    was given another code. Meanwhile others were told that this one is taken.
    """
    return min(
        (
            one.invoked_s
            for one in history
            if one.verb == "assign" and one.book_id == book_id and one.in_doubt and one.code != code
        ),
        default=math.inf,
    )


def _operation(attempt: Attempt) -> Operation:
    """An attempt as the checker sees it. One that was in doubt and is refused when asked again may have happened, and may
    still happen."""
    outcome = attempt.outcome
    if outcome == "refused" and attempt.in_doubt:
        outcome = "unknown"
    return Operation(
        verb=attempt.verb,
        outcome=outcome,
        invoked_s=attempt.invoked_s,
        returned_s=math.inf if outcome == "unknown" else attempt.returned_s,
        user=attempt.user,
        why=attempt.answer.get("code", "") if outcome == "refused" else "",
        shown=str(attempt.body.get("lock_token", "")),
        token=attempt.answer.get("lock_token", "") if outcome == "ok" else "",
        ttl_s=attempt.answer.get("ttl_seconds", 0) if outcome == "ok" else 0,
        uses=attempt.answer.get("redemptions_used", 0) if outcome == "ok" else 0,
        found=attempt.status == 200,
    )
