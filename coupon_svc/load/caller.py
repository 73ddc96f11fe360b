"""The service's verbs as a load calls them: each call is counted with how long it took, and its answer remembered."""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import quote

import msgspec

from coupon_svc.invariants.answers import Assigned, History, Redeemed, Replay
from coupon_svc.load.client import Connections, Reply
from coupon_svc.load.recorder import UNANSWERED, Recorder

JSON_HEADER = b"content-type: application/json\r\n"
PUSHED_BACK = frozenset({0, 429, 500, 502, 503, 504})
"""Statuses of a service that is away or asks for patience; 0 is no answer at all."""


class Locked(msgspec.Struct, frozen=True):
    """An answer to a lock, as far as a load needs it."""

    lock_token: str


class _Problem(msgspec.Struct, frozen=True):
    code: str


class _User(msgspec.Struct, frozen=True):
    book_id: str
    user_id: str


_decode_problem = msgspec.json.Decoder(_Problem).decode
_decode_assigned = msgspec.json.Decoder(Assigned).decode
_decode_locked = msgspec.json.Decoder(Locked).decode
_decode_redeemed = msgspec.json.Decoder(Redeemed).decode
_encode = msgspec.json.Encoder().encode


class Answer(msgspec.Struct, frozen=True):
    """What came of a call: `value` where it was done, and the outcome's word in any case."""

    outcome: str
    value: Any = None
    retry_after_s: float = 0.0
    pushed_back: bool = False
    """The service is away or asks for patience, or what came of the call is not known."""


def path_of(text: str) -> bytes:
    """A user id or a code as a part of a path."""
    return quote(text, safe="").encode()


class Caller:
    """Calls a service with one key. `due` is the moment of the loop's clock from which a call's latency counts."""

    def __init__(self, connections: Connections, key: str, recorder: Recorder, history: History) -> None:
        self._connections = connections
        self._headers = b"authorization: Bearer %b\r\n" % key.encode()
        self._json = self._headers + JSON_HEADER
        self._now = asyncio.get_running_loop().time
        self._recorder = recorder
        self.history = history

    def idempotent(self, key: str | None) -> bytes:
        """The headers of a POST, with an Idempotency-Key where one is given."""
        return self._json if key is None else self._json + b"idempotency-key: %b\r\n" % key.encode()

    async def assign(self, book_id: str, user_id: str, key: str | None = None, due: float | None = None) -> Answer:
        """POST /coupons/assign."""
        body = _encode(_User(book_id, user_id))
        try:
            reply = await self._post("assign", b"/coupons/assign", body, key, due)
        except asyncio.CancelledError:
            self.history.unknown_assigns[book_id, user_id] += 1
            raise
        answer = self._judge(reply, _decode_assigned)
        if answer.value is not None:
            self.history.assigned(book_id, user_id, answer.value, key)
            self._keep("assign", b"/coupons/assign", body, key, reply)
        elif _unknown(answer):
            self.history.unknown_assigns[book_id, user_id] += 1
        return answer

    async def assign_code(self, coupon: Assigned, due: float | None = None) -> Answer:
        """POST /coupons/assign/{code}, of a code that is this user's already."""
        path = b"/coupons/assign/" + path_of(coupon.code)
        reply = await self._post("assign_code", path, _encode({"user_id": coupon.user_id}), None, due)
        answer = self._judge(reply, _decode_assigned)
        if answer.value is not None:
            self.history.assigned(coupon.book_id, coupon.user_id, answer.value)
        return answer

    async def lock(self, coupon: Assigned, ttl_s: int, due: float | None = None) -> Answer:
        """POST /coupons/lock/{code}, without a token."""
        body = _encode({"user_id": coupon.user_id, "ttl_seconds": ttl_s})
        reply = await self._post("lock", b"/coupons/lock/" + path_of(coupon.code), body, None, due)
        return self._judge(reply, _decode_locked)

    async def unlock(self, code: str, token: str, due: float | None = None) -> Answer:
        """POST /coupons/unlock/{code}."""
        path = b"/coupons/unlock/" + path_of(code)
        return self._judge(await self._post("unlock", path, _encode({"lock_token": token}), None, due), None)

    async def redeem(
        self, coupon: Assigned, token: str | None = None, key: str | None = None, due: float | None = None
    ) -> Answer:
        """POST /coupons/redeem/{code}."""
        path = b"/coupons/redeem/" + path_of(coupon.code)
        given = {"user_id": coupon.user_id}
        if token is not None:
            given["lock_token"] = token
        body = _encode(given)
        try:
            reply = await self._post("redeem", path, body, key, due)
        except asyncio.CancelledError:
            self.history.unknown_redeems[coupon.code] += 1
            raise
        answer = self._judge(reply, _decode_redeemed)
        if answer.value is not None:
            self.history.redeemed(answer.value, key)
            self._keep("redeem", path, body, key, reply)
        elif _unknown(answer):
            self.history.unknown_redeems[coupon.code] += 1
        return answer

    async def read(self, verb: str, path: bytes, due: float | None = None) -> Reply:
        """GET of anything; the reply as it is."""
        return await self._ask(verb, b"GET", path, self._headers, b"", due)

    async def _post(self, verb: str, path: bytes, body: bytes, key: str | None, due: float | None) -> Reply:
        return await self._ask(verb, b"POST", path, self.idempotent(key), body, due)

    async def _ask(
        self, verb: str, method: bytes, path: bytes, headers: bytes, body: bytes, due: float | None
    ) -> Reply:
        if due is None:
            due = self._now()
        try:
            reply = await self._connections.send(method, path, headers, body)
        except asyncio.CancelledError:
            self._recorder.count(verb, UNANSWERED, self._now() - due)
            raise
        self._recorder.count(verb, outcome_of(reply), self._now() - due)
        return reply

    def _judge(self, reply: Reply, decode: Any) -> Answer:
        if 200 <= reply.status < 300:
            try:
                return Answer("ok", decode(reply.body) if decode is not None else None)
            except msgspec.DecodeError:
                return Answer("unreadable_answer", pushed_back=True)
        retry_after = reply.header(b"retry-after") if reply.status in (423, 429, 503) else None
        return Answer(
            outcome_of(reply),
            retry_after_s=float(retry_after) if retry_after and retry_after.isdigit() else 0.0,
            pushed_back=reply.status in PUSHED_BACK,
        )

    def _keep(self, verb: str, path: bytes, body: bytes, key: str | None, reply: Reply) -> None:
        if key is not None:
            self.history.keep_for_replay(
                Replay(verb, path, b"idempotency-key: %b\r\n" % key.encode(), body, reply.body)
            )


def outcome_of(reply: Reply) -> str:
    """One word for an answer: `ok`, `replayed`, the problem's code, or why there is none."""
    if reply.failure is not None:
        return reply.failure.value
    if 200 <= reply.status < 300:
        return "replayed" if b"\r\nidempotent-replayed:" in reply.head.lower() else "ok"
    try:
        return _decode_problem(reply.body).code
    except msgspec.DecodeError:
        return f"http_{reply.status}"


_NOTHING_DONE = frozenset(
    {
        "connection_refused",
        "recovering",
        "store_unavailable",
        "refilling",
        "backlog_full",
        "ledger_behind",
        "rate_limited",
        "too_many_unknown_codes",
    }
)


def _unknown(answer: Answer) -> bool:
    """Whether the call may have had its effect, though nobody was told."""
    return answer.pushed_back and answer.outcome not in _NOTHING_DONE
