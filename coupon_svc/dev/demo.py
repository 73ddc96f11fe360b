"""`coupon-svc demo`: the life of a coupon, step by step, on a service of its own that leaves nothing behind.

The service is `coupon-svc dev` as everybody starts it, on a temporary directory and a free port. Every step says what
is asked and what was answered. It is checked, too: a demo that only prints goes on printing when the service is broken.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import sys
from collections import Counter
from email.message import Message
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from coupon_svc.dev.servers import ServerError
from coupon_svc.dev.throwaway import ThrowawayError, signals_raise, throwaway_service
from coupon_svc.domain.errors import CouponError
from coupon_svc.domain.position import Position
from coupon_svc.postgres.database import open_connection
from coupon_svc.postgres.errors import LedgerUnavailable

_VALUE_SHOWN_MAX = 28


class DemoError(CouponError):
    """The service did not do what it promises; the message says what."""


class Reply(NamedTuple):
    """An answer of the service. `body` is {} where there is none."""

    status: int
    headers: Message
    body: dict[str, Any]


class Caller:
    """A shop's backend: numbers its requests, prints each with its answer, and holds the answer to what is expected."""

    def __init__(self, base_url: str, api_key: str) -> None:
        address = urlsplit(base_url)
        assert address.hostname is not None
        self._connection = http.client.HTTPConnection(address.hostname, address.port, timeout=30)
        self._api_key = api_key
        self._steps = 0

    def ask(
        self,
        what: str,
        request: str,
        body: dict[str, object] | None = None,
        *,
        expect: int | tuple[int, str],
        show: str = "",
        key: str | None = None,
        **fields: object,
    ) -> Reply:
        """Sends `request` ("POST /coupons"), with `key` as its Idempotency-Key, and checks and prints the answer.

        `expect` is the status, and for a refusal its outcome; `fields` are what the answer must hold, with `__` where a
        name reaches deeper (`codes__total`). They are shown, and so are those named in `show`.
        """
        self._steps += 1
        print(f"{self._steps:3}. {what}", flush=True)
        reply = self._send(request, body, key)
        refusal = str(reply.body.get("code", "")) if reply.status >= 400 else ""
        marks = [mark for mark in (refusal, "(replayed)" if "Idempotent-Replayed" in reply.headers else "") if mark]
        told = [_shown(name, _reach(reply.body, name)) for name in (*show.split(), *fields)]
        print("    ", request, "->", reply.status, *marks, *([" " + ", ".join(told)] if told else []), flush=True)
        found = (reply.status, refusal) if refusal else reply.status
        self.check("the answer", found, expect)
        for name, wanted in fields.items():
            self.check(f"`{name.replace('__', '.')}`", _reach(reply.body, name), wanted)
        return reply

    def check(self, what: str, found: object, wanted: object) -> None:
        """Raises DemoError unless the latest step brought what was wanted."""
        if found != wanted:
            raise DemoError(f"step {self._steps} went wrong: {what} is {found!r} and should be {wanted!r}")

    def close(self) -> None:
        self._connection.close()

    def _send(self, request: str, body: dict[str, object] | None, key: str | None) -> Reply:
        method, _, path = request.partition(" ")
        headers = {"Authorization": f"Bearer {self._api_key}"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        if key is not None:
            headers["Idempotency-Key"] = key
        try:
            self._connection.request(method, path, json.dumps(body) if body is not None else None, headers)
            response = self._connection.getresponse()
            content = response.read()
            answer = json.loads(content) if content else {}
            return Reply(response.status, response.headers, answer if isinstance(answer, dict) else {})
        except (OSError, http.client.HTTPException, ValueError) as error:
            how = str(error) or type(error).__name__
            raise DemoError(f"step {self._steps} went wrong: {request} brought no answer ({how})") from None


def run_demo() -> int:
    """Plays the life of a few coupons; returns the exit status: 0, or 1 when anything is not as it should be.

    Only the main thread can call it. KeyboardInterrupt, at Ctrl-C, comes out of it when everything is stopped.
    """
    try:
        with signals_raise(), throwaway_service("demo") as told:
            caller = Caller(told["base_url"], told["api_key"])
            with contextlib.closing(caller):
                book = live(caller)
            asyncio.run(_read_ledger(told["database_url"], book))
    except BrokenPipeError:  # whoever read us has gone; Python would complain about that once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (DemoError, ThrowawayError, ServerError, LedgerUnavailable, OSError) as error:
        print(f"coupon-svc demo: {error}", file=sys.stderr)
        return 1
    print("\nAll of it is as it should be. The service is stopped and its data are removed.")
    return 0


# -- the story --------------------------------------------------------------------------------------------------------


def live(caller: Caller) -> dict[str, Any]:
    """The requests of a shop, from an empty service to a coupon that is spent. Returns the book as it stands then."""
    print("\nA book of codes")
    book_id = _make_book(caller)
    print("\nCodes for users")
    code = _assign_coupons(caller, book_id)
    print("\nAlice is at the checkout")
    _lock_and_unlock(caller, code)
    _redeem(caller, code)
    print("\nHow it stands")
    listed = caller.ask("What does alice hold?", "GET /users/alice/coupons", expect=200).body["coupons"]
    states = {coupon["code"]: coupon["status"] for coupon in listed}
    print("     " + ", ".join(f"{held} {status}" for held, status in states.items()))
    caller.check("what alice holds", states, {code: "redeemed", "VIP-2": "assigned"})
    return caller.ask(
        "And the book?",
        f"GET /coupons/{book_id}",
        expect=200,
        codes__total=23,
        codes__available=20,
        codes__assigned=2,
        codes__redeemed=1,
        codes__quarantined=0,
    ).body


def _make_book(caller: Caller) -> str:
    rules = {"name": "Summer", "max_codes_per_user": 2, "max_redemptions_per_code": 1, "lock_ttl_seconds": 120}
    generate = {"pattern": "SUMMER-####-####", "total": 20}
    book_id: str = caller.ask(
        "Make a book of 20 generated codes, at most 2 for each user.",
        "POST /coupons",
        {**rules, "generate": generate},
        expect=201,
        show="book_id",
        codes__available=20,
    ).body["book_id"]
    uploaded = caller.ask(
        "Add codes of our own; one of them stands there twice, and one is none.",
        "POST /coupons/codes",
        {"book_id": book_id, "codes": ["VIP-1", "VIP-2", "vip-1", "not a code!", "VIP-3"]},
        expect=200,
        received=5,
        inserted=3,
        duplicates=1,
        invalid=1,
    ).body
    rejected = [(refused["row"], refused["reason"]) for refused in uploaded["rejected"]]
    print("     " + ", ".join(f"row {row}: {reason}" for row, reason in rejected))
    caller.check("the list of rejected rows", rejected, [(3, "duplicate_in_upload"), (4, "invalid")])
    return book_id


def _assign_coupons(caller: Caller, book_id: str) -> str:
    """Two coupons for alice, one for bob. Returns alice's random code."""
    alice: dict[str, object] = {"book_id": book_id, "user_id": "alice"}
    # The named one first: otherwise chance might deal it to her, or to bob.
    caller.ask(
        "The code VIP-2 for alice.", "POST /coupons/assign/VIP-2", {"user_id": "alice"}, expect=201, code="VIP-2"
    )
    first = caller.ask(
        "And a random one.", "POST /coupons/assign", alice, expect=201, key="order-1", show="code", durable=True
    )
    code: str = first.body["code"]
    again = caller.ask(
        "The answer got lost? The same Idempotency-Key gives it again, not another code.",
        "POST /coupons/assign",
        alice,
        expect=201,
        key="order-1",
        code=code,
    )
    caller.check("the repeated answer", again.body, first.body)
    caller.check("its mark", again.headers.get("Idempotent-Replayed"), "true")
    caller.ask(
        "A third one is refused: the book allows 2.",
        "POST /coupons/assign",
        alice,
        expect=(409, "user_code_limit"),
        limit=2,
        held=2,
    )
    caller.ask(
        "Bob would like VIP-2 as well. It is taken; by whom, he is not told.",
        "POST /coupons/assign/VIP-2",
        {"user_id": "bob"},
        expect=(409, "already_assigned"),
    )
    bobs = caller.ask(
        "So bob gets a random one.", "POST /coupons/assign", {**alice, "user_id": "bob"}, expect=201, show="code"
    )
    caller.check("that bob's code is another than alice's", bobs.body["code"] != code, True)
    return code


def _lock_and_unlock(caller: Caller, code: str) -> None:
    token = caller.ask(
        "Hold her code while she pays.",
        f"POST /coupons/lock/{code}",
        {"user_id": "alice"},
        expect=201,
        show="lock_token",
        ttl_seconds=120,
    ).body["lock_token"]
    second = caller.ask(
        "A second checkout wants it, too.",
        f"POST /coupons/lock/{code}",
        {"user_id": "alice"},
        expect=(423, "locked"),
        show="retry_after_seconds",
    )
    caller.check("that Retry-After is there", "Retry-After" in second.headers, True)
    caller.ask(
        "Nor can it be redeemed without the token.",
        f"POST /coupons/redeem/{code}",
        {"user_id": "alice"},
        expect=(423, "locked"),
        show="retry_after_seconds",
    )
    caller.ask("The card was declined: let go.", f"POST /coupons/unlock/{code}", {"lock_token": token}, expect=204)


def _redeem(caller: Caller, code: str) -> None:
    locked = caller.ask(
        "She takes another card: hold it again.",
        f"POST /coupons/lock/{code}",
        {"user_id": "alice"},
        expect=201,
        show="lock_token",
    )
    payment = {"user_id": "alice", "lock_token": locked.body["lock_token"], "reference": "order-1"}
    redeemed = caller.ask(
        "Paid: redeem it, for good.",
        f"POST /coupons/redeem/{code}",
        payment,
        expect=201,
        key="pay-1",
        show="redemption_id",
        redemptions_left=0,
        durable=True,
    )
    again = caller.ask(
        "The same request once more: the same redemption.",
        f"POST /coupons/redeem/{code}",
        payment,
        expect=201,
        key="pay-1",
        redemption_id=redeemed.body["redemption_id"],
    )
    caller.check("the repeated answer", again.body, redeemed.body)
    caller.ask(
        "Another attempt to redeem it is refused.",
        f"POST /coupons/redeem/{code}",
        {"user_id": "alice"},
        expect=(409, "already_redeemed"),
    )


# -- what the ledger holds --------------------------------------------------------------------------------------------


async def _read_ledger(database_url: str, book: dict[str, Any]) -> None:
    """Prints the rows of the book and raises DemoError unless they say the same as each other and as the API."""
    # Without TLS, which it does not speak, lest asyncpg look for certificates in a home it may not read.
    connection = await open_connection(f"{database_url}?sslmode=disable", "coupon-demo")
    try:
        events, coupons, redemptions = [
            [dict(row) for row in await connection.fetch(statement, book["book_id"])]
            for statement in (
                "SELECT shard, epoch, seq, event, code, user_id, uses FROM events WHERE book_id = $1"
                " ORDER BY epoch, seq",
                "SELECT code, user_id, uses FROM coupons WHERE book_id = $1 ORDER BY epoch, seq",
                "SELECT code, user_id, uses, reference FROM redemptions WHERE book_id = $1 ORDER BY epoch, seq",
            )
        ]
        codes = await connection.fetchval("SELECT count(*) FROM codes WHERE book_id = $1", book["book_id"])
    finally:
        await connection.close()
    print("\nWhat Postgres holds of this book")
    for row in events:
        position = Position(row["epoch"], row["seq"]).in_shard(row["shard"])
        print(f"     event       {position:8} {row['event']:16} {row['code']:17} {row['user_id']}")
    for row in coupons:
        print(f"     coupon      {row['code']:17} of {row['user_id']:6} redeemed {row['uses']} of 1 times")
    for row in redemptions:
        print(f"     redemption  {row['code']:17} of {row['user_id']:6} for {row['reference']}")
    counters = book["codes"]
    redeemed = sum(row["uses"] == book["max_redemptions_per_code"] for row in coupons)
    states = {"available": codes - len(coupons), "assigned": len(coupons) - redeemed, "redeemed": redeemed}
    print("     " + " + ".join(f"{number} {state}" for state, number in states.items()) + f" = {codes} codes")
    _agree("the states and the book's counters", {"total": codes, **states, "quarantined": 0}, counters)
    kinds = Counter(row["event"] for row in events)
    _agree("the assignments and the coupons", kinds["coupon_assigned"], len(coupons))
    _agree("the redemption events and the redemptions", kinds["coupon_redeemed"], len(redemptions))
    _agree("the redemptions and the uses of the coupons", len(redemptions), sum(row["uses"] for row in coupons))
    _agree("the positions and their number", [row["seq"] for row in events], [*range(1, len(events) + 1)])


def _agree(what: str, one: object, other: object) -> None:
    if one != other:
        raise DemoError(f"the ledger is wrong: {what} differ: {one!r} and {other!r}")


# -- showing ----------------------------------------------------------------------------------------------------------


def _reach(body: dict[str, Any], name: str) -> object:
    """A member of the answer, "codes__total" for one of a member; None where there is none."""
    found: Any = body
    for part in name.split("__"):
        found = found.get(part) if isinstance(found, dict) else None
    return found


def _shown(name: str, value: object) -> str:
    text = json.dumps(value) if not isinstance(value, str) else value
    short = text if len(text) <= _VALUE_SHOWN_MAX else text[: _VALUE_SHOWN_MAX - 1] + "…"
    return f"{name.rpartition('__')[2]} {short}"
