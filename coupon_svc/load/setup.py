"""Before and after a load: is the service there, and the books that the load is played on."""

from __future__ import annotations

import asyncio

import msgspec

from coupon_svc.invariants.answers import Book
from coupon_svc.load.caller import JSON_HEADER, outcome_of
from coupon_svc.load.client import Connections, Reply
from coupon_svc.load.plan import LoadError, Plan
from coupon_svc.load.scenarios import scenario_class

CODES_A_CALL = 100_000
_READY_WAIT_S = 10.0
_ASK_S = 0.25


class _Made(msgspec.Struct, frozen=True):
    book_id: str


async def require_service(connections: Connections, url: str) -> None:
    """Raises LoadError when no service is ready at the address."""
    deadline = asyncio.get_running_loop().time() + _READY_WAIT_S
    while (reply := await connections.send(b"GET", b"/readyz")).status == 503:
        if asyncio.get_running_loop().time() > deadline:
            raise LoadError(f"the service at {url} is not ready: it answers `{outcome_of(reply)}`; see its logs")
        await asyncio.sleep(_ASK_S)
    if reply.status == 0:
        raise LoadError(
            f"nothing answers at {url} ({outcome_of(reply).replace('_', ' ')}); check --url, or leave it out and the load"
            " starts a service of its own"
        )
    if reply.status != 200 or b"ready" not in reply.body:
        raise LoadError(f"what answers at {url} is no coupon service: /readyz gave {reply.status}; check --url")


async def make_books(connections: Connections, key: str, plan: Plan, run_id: str) -> list[Book]:
    """The books of this load, each with its codes. Raises LoadError."""
    kind = scenario_class(plan.scenario)
    books = []
    for number in range(plan.books):
        ack = plan.ack if plan.ack != "both" else ("ledger", "redis")[number % 2]
        pattern = f"{run_id}-{number}-########".upper()
        first = min(plan.codes, CODES_A_CALL)
        rules = {
            "name": f"load {run_id}, {plan.scenario} {number + 1} of {plan.books}",
            "ack": ack,
            "max_codes_per_user": kind.max_codes_per_user,
            "max_redemptions_per_code": kind.max_redemptions_per_code,
            "generate": {"pattern": pattern, "total": first},
        }
        made = msgspec.json.decode(await _post(connections, key, b"/coupons", rules, 201), type=_Made)
        for begin in range(first, plan.codes, CODES_A_CALL):
            more = {"pattern": pattern, "total": min(CODES_A_CALL, plan.codes - begin)}
            await _post(connections, key, b"/coupons/codes", {"book_id": made.book_id, "generate": more}, 200)
        books.append(Book(made.book_id, ack, plan.codes, kind.max_codes_per_user, kind.max_redemptions_per_code))
    return books


async def close_books(connections: Connections, key: str, books: list[Book]) -> int:
    """Close them for good: nobody shall be dealt a code of a load. Returns how many could not be closed."""
    headers = b"authorization: Bearer %b\r\n" % key.encode() + JSON_HEADER
    replies = await asyncio.gather(
        *(
            connections.send(b"PATCH", b"/coupons/" + book.book_id.encode(), headers, b'{"status":"closed"}')
            for book in books
        )
    )
    return sum(reply.status != 200 for reply in replies)


async def _post(connections: Connections, key: str, path: bytes, body: object, status: int) -> bytes:
    headers = b"authorization: Bearer %b\r\n" % key.encode() + JSON_HEADER
    reply = await connections.send(b"POST", path, headers, msgspec.json.encode(body))
    if reply.status != status:
        raise LoadError(_why_no_book(reply))
    return reply.body


def _why_no_book(reply: Reply) -> str:
    outcome = outcome_of(reply)
    if reply.status == 401:
        return "the service does not know this key; give a valid one with --key (see `coupon-svc keys create`)"
    if outcome == "missing_scope":
        return "this key may not make books; the load needs one with all scopes (see `coupon-svc keys create`)"
    return f"the service did not make a book for the load: it answered `{outcome}` ({reply.status})"
