"""What can be done with coupons: one function per verb, each one script in Redis. No Postgres, but to find the book of
a code this process has not met, or to lend a code that is named before its turn."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from typing import NamedTuple

import msgspec
from msgspec import UNSET, UnsetType

from coupon_svc.domain.clock import rfc3339
from coupon_svc.domain.codes import normalise_code
from coupon_svc.domain.outcomes import Outcome, Refused
from coupon_svc.domain.receipts import Receipt, check_receipt, make_receipt
from coupon_svc.http.call import Answer, Call
from coupon_svc.http.inputs import check_user_id, decode_cursor, encode_cursor, encode_metadata, invalid
from coupon_svc.http.registration import Registration
from coupon_svc.http.runner import BookRunner, Place
from coupon_svc.http.schemas import (
    AssignAnswer,
    AssignCode,
    AssignCoupon,
    CodeAnswer,
    CodeBookStatus,
    CouponAnswer,
    CouponsPage,
    ListCoupons,
    LockAnswer,
    LockCoupon,
    RedeemAnswer,
    RedeemCoupon,
    UnlockCoupon,
)
from coupon_svc.postgres.database import Database
from coupon_svc.postgres.quarantine import redeem_receipt
from coupon_svc.postgres.resolve import Resolver
from coupon_svc.redis.connection import Reply
from coupon_svc.redis.data_plane import Store

QUARANTINED = "quarantined"
LOOKED_AT_ONCE_MIN = 200


class CodesRead(NamedTuple):
    """What Redis has of some codes of a book.

    `uses_max`: how often each may be redeemed, None without limit. `coupons`: one for each code, None where nobody holds
    it, QUARANTINED where it is not known whether anybody does.
    """

    uses_max: int | None
    book_status: CodeBookStatus
    coupons: list[CouponAnswer | str | None]


_ANSWERED = frozenset({"ok", "replayed", "already_yours", "renewed"})


class Coupons:
    """The data plane. Every method answers one operation; refusals are raised as Refused."""

    def __init__(
        self, store: Store, runner: BookRunner, resolver: Resolver, database: Database, registration: Registration
    ) -> None:
        self._store = store
        self._runner = runner
        self._resolver = resolver
        self._database = database
        self._registration = registration

    # --- assign

    async def assign_coupon(self, call: Call) -> Answer:
        body: AssignCoupon = call.body
        tenant_id = call.key.tenant_id
        place = self._runner.place(body.book_id)
        keys = place.view.keys
        idem_keys, idem, fingerprint = _idempotency(call, place, "/coupons/assign")
        touched = [
            keys.book(body.book_id),
            keys.free(body.book_id),
            keys.holders(body.book_id),
            keys.coupons(tenant_id, body.user_id),
            keys.events,
            *idem_keys,
        ]
        reply = await self._run(
            "assign_coupon", place, tenant_id, touched, [tenant_id, body.book_id, body.user_id, idem, fingerprint]
        )
        return await self._assigned(reply, place, tenant_id, body.user_id)

    async def assign_code(self, call: Call) -> Answer:
        body: AssignCode = call.body
        tenant_id = call.key.tenant_id
        code, place = await self._find(call)
        keys = place.view.keys
        idem_keys, idem, fingerprint = _idempotency(call, place, f"/coupons/assign/{code}")
        touched = [
            keys.book(place.book_id),
            keys.free(place.book_id),
            keys.holders(place.book_id),
            keys.coupons(tenant_id, body.user_id),
            keys.events,
            keys.quarantine(place.book_id),
            *idem_keys,
        ]
        args: list[str | int] = [tenant_id, place.book_id, body.user_id, idem, fingerprint, code]
        reply = await self._run("assign_code", place, tenant_id, touched, args, code=code, receipt=body.receipt)
        return await self._assigned(reply, place, tenant_id, body.user_id)

    async def _assigned(self, reply: Reply, place: Place, tenant_id: int, user_id: str) -> Answer:
        outcome, code, at_ms, position, ack, left, *first = reply
        self._resolver.learn_code(tenant_id, code, place.book_id)
        durable = await self._until_durable(place, position, ack, made=outcome == "ok")
        assigned_position = position.partition("/")[0]
        answer = AssignAnswer(
            code=code,
            book_id=place.book_id,
            user_id=user_id,
            assigned_at=rfc3339(int(at_ms)),
            redemptions_left=int(left) if left else None,
            position=f"{place.shard:02d}:{assigned_position}",
            durable=durable,
            receipt=UNSET
            if ack == "ledger"
            else self._receipt(place, tenant_id, code, user_id, assigned_position, at_ms),
        )
        return Answer(200 if "already_yours" in (outcome, *first) else 201, answer, outcome == "replayed")

    # --- lock, unlock, redeem

    async def lock_coupon(self, call: Call) -> Answer:
        body: LockCoupon = call.body
        tenant_id = call.key.tenant_id
        code, place = await self._find(call)
        keys = place.view.keys
        idem_keys, _, fingerprint = _idempotency(call, place, f"/coupons/lock/{code}")
        touched = [
            keys.book(place.book_id),
            keys.holders(place.book_id),
            keys.lock(place.book_id, code),
            keys.free(place.book_id),
            keys.quarantine(place.book_id),
            *idem_keys,
        ]
        args: list[str | int] = [
            tenant_id,
            code,
            body.user_id or "",
            body.lock_token or "",
            "lk_" + secrets.token_urlsafe(18),
            body.ttl_seconds * 1000 if body.ttl_seconds else "",
            fingerprint,
        ]
        reply = await self._run("lock_coupon", place, tenant_id, touched, args, code=code, receipt=body.receipt)
        outcome, user_id, token, until_ms, ttl_ms, position, ack = reply
        await self._until_durable(place, position, ack)
        answer = LockAnswer(
            code=code,
            book_id=place.book_id,
            user_id=user_id,
            lock_token=token,
            locked_until=rfc3339(int(until_ms)),
            ttl_seconds=max(1, int(ttl_ms) // 1000),
        )
        renewed = outcome == "renewed" or (outcome == "replayed" and token == body.lock_token)
        return Answer(200 if renewed else 201, answer, outcome == "replayed")

    async def unlock_coupon(self, call: Call) -> Answer:
        body: UnlockCoupon = call.body
        tenant_id = call.key.tenant_id
        code, place = await self._find(call)
        keys = place.view.keys
        idem_keys, _, fingerprint = _idempotency(call, place, f"/coupons/unlock/{code}")
        touched = [keys.book(place.book_id), keys.lock(place.book_id, code), *idem_keys]
        reply = await self._run("unlock_coupon", place, tenant_id, touched, [tenant_id, body.lock_token, fingerprint])
        return Answer(204, None, reply[0] == "replayed")

    async def redeem_coupon(self, call: Call) -> Answer:
        body: RedeemCoupon = call.body
        metadata = encode_metadata(body.metadata)
        tenant_id = call.key.tenant_id
        code, place = await self._find(call)
        keys = place.view.keys
        idem_keys, idem, fingerprint = _idempotency(call, place, f"/coupons/redeem/{code}")
        touched = [
            keys.book(place.book_id),
            keys.holders(place.book_id),
            keys.lock(place.book_id, code),
            keys.free(place.book_id),
            keys.events,
            keys.quarantine(place.book_id),
            *idem_keys,
        ]
        args: list[str | int] = [
            tenant_id,
            code,
            body.user_id or "",
            body.lock_token or "",
            place.book_id,
            body.reference or "",
            metadata if body.metadata is not None else "",
            idem,
            fingerprint,
        ]
        reply = await self._run("redeem_coupon", place, tenant_id, touched, args, code=code, receipt=body.receipt)
        outcome, user_id, at_ms, position, uses, left = reply
        await self._until_durable(place, position, "ledger", made=outcome == "ok")
        answer = RedeemAnswer(
            redemption_id=f"rd_{place.shard:02d}_{position.replace('-', '_')}",
            code=code,
            book_id=place.book_id,
            user_id=user_id,
            redeemed_at=rfc3339(int(at_ms)),
            redemptions_used=int(uses),
            redemptions_left=int(left) if left else None,
            position=f"{place.shard:02d}:{position}",
            durable=True,
        )
        return Answer(201, answer, outcome == "replayed")

    # --- reads

    async def read_code(self, call: Call) -> Answer:
        code, place = await self._find(call)
        read = await self._read_codes(place, call.key.tenant_id, [code])
        (coupon,) = read.coupons
        if isinstance(coupon, CouponAnswer):
            return Answer(200, CodeAnswer(**msgspec.structs.asdict(coupon), book_status=read.book_status))
        answer = CodeAnswer(
            code=code,
            book_id=place.book_id,
            status="quarantined" if coupon == QUARANTINED else "available",
            book_status=read.book_status,
            user_id=None,
            assigned_at=None,
            redemptions_used=0,
            redemptions_left=read.uses_max,
            locked_until=None,
        )
        return Answer(200, answer)

    async def list_coupons(self, call: Call) -> Answer:
        user_id = call.path["user_id"]
        tenant_id = call.key.tenant_id
        query: ListCoupons = call.query
        check_user_id(user_id)
        limit, status = query.limit, query.status or None
        book_id = None if query.book_id is UNSET else query.book_id
        after = decode_cursor(query.cursor) if query.cursor else (0, "")
        if book_id is not None and after[1] and not after[1].startswith(f"{book_id}:"):
            raise invalid("/cursor", "this cursor is of another list")
        if book_id is not None:
            place = self._runner.place(book_id)
            keys = place.view.keys
            await self._run_read(
                "read_book", place, tenant_id, [keys.book(book_id), keys.holders(book_id), keys.free(book_id)], []
            )
        # Of many coupons few may be wanted: each look costs a call to every shard, however short the page is.
        looked_at = limit if status is None else max(limit, LOOKED_AT_ONCE_MIN)
        coupons: list[CouponAnswer] = []
        while True:
            members = await self._members(tenant_id, user_id, book_id, after, looked_at + 1)
            states = await self._states(tenant_id, members[:looked_at])
            for number, (shard, member, state) in enumerate(states, 1):
                if status is None or state.status == status:
                    coupons.append(state)
                after = (shard, member)
                if len(coupons) == limit:
                    more = number < len(members)
                    return Answer(200, CouponsPage(coupons, encode_cursor(*after) if more else None))
            if len(members) <= looked_at:
                return Answer(200, CouponsPage(coupons, None))

    async def _members(
        self, tenant_id: int, user_id: str, book_id: str | None, after: tuple[int, str], limit: int
    ) -> list[tuple[int, str]]:
        """The next (shard, `book:code`) of a user, in that order. A user's coupons may be in any shard: all are asked,
        and none of them may be in doubt, or the list would be too short."""
        if book_id is not None:
            shards: Sequence[int] = [self._runner.place(book_id).shard]
        else:
            shards = range(len(self._store.views))

        async def of_shard(shard: int) -> list[tuple[int, str]]:
            low = f"[{book_id}:" if book_id else "-"
            if shard == after[0] and after[1]:
                low = f"({after[1]}"
            high = f"({book_id};" if book_id else "+"
            keys = self._store.views[shard].keys
            reply = await self._store.run(
                "list_coupons", shard, [keys.coupons(tenant_id, user_id)], [low, high, limit], sure=True
            )
            return [(shard, member) for member in reply[1]]

        parts = await asyncio.gather(*(of_shard(shard) for shard in shards if shard >= after[0]))
        return [member for part in parts for member in part][:limit]

    async def _states(self, tenant_id: int, members: list[tuple[int, str]]) -> list[tuple[int, str, CouponAnswer]]:
        """The coupons behind the members, asked book by book and returned in the members' order."""
        by_book: dict[str, list[str]] = {}
        for _, member in members:
            book_id, _, code = member.partition(":")
            by_book.setdefault(book_id, []).append(code)
        answers = await asyncio.gather(
            *(self._read_codes(self._runner.place(book_id), tenant_id, codes) for book_id, codes in by_book.items())
        )
        states = {
            (book_id, code): state
            for (book_id, codes), read in zip(by_book.items(), answers, strict=True)
            for code, state in zip(codes, read.coupons, strict=True)
        }
        listed = []
        for shard, member in members:
            book_id, _, code = member.partition(":")
            state = states[book_id, code]
            if not isinstance(state, CouponAnswer):  # listed, and held by nobody: Redis has been tampered with
                raise Refused(Outcome.RECOVERING)
            listed.append((shard, member, state))
        return listed

    async def _read_codes(self, place: Place, tenant_id: int, codes: list[str]) -> CodesRead:
        """Read some codes of a book. Waits until what it shows is durable."""
        keys = place.view.keys
        touched = [
            keys.book(place.book_id),
            keys.holders(place.book_id),
            keys.free(place.book_id),
            keys.quarantine(place.book_id),
            *(keys.lock(place.book_id, code) for code in codes),
        ]
        reply = await self._run_read("read_codes", place, tenant_id, touched, codes)
        _, now_ms, ack, uses_max, holders, locks, book_status = reply
        shown = [holder.partition(" ")[0].rpartition("/")[2] for holder in holders if holder not in ("", QUARANTINED)]
        if shown:
            # All at once, by the last of them: an epoch may end meanwhile, and what was waited for after that is taken for
            # durable though it was lost.
            last = max(shown, key=lambda position: tuple(map(int, position.split("-"))))
            await self._until_durable(place, last, ack, late=Outcome.LEDGER_BEHIND)
        coupons: list[CouponAnswer | str | None] = []
        for code, holder, lock_ms in zip(codes, holders, locks, strict=True):
            if holder in ("", QUARANTINED):
                coupons.append(holder or None)
                continue
            _, uses, at_ms, user_id = holder.split(" ", 3)
            left = int(uses_max) - int(uses) if uses_max else None
            locked = lock_ms > 0 and left != 0
            coupons.append(
                CouponAnswer(
                    code=code,
                    book_id=place.book_id,
                    user_id=user_id,
                    status="redeemed" if left == 0 else "locked" if locked else "assigned",
                    assigned_at=rfc3339(int(at_ms)),
                    redemptions_used=int(uses),
                    redemptions_left=left,
                    locked_until=rfc3339(int(now_ms) + lock_ms) if locked else None,
                )
            )
        return CodesRead(int(uses_max) if uses_max else None, book_status, coupons)

    # --- what all of them need

    async def _find(self, call: Call) -> tuple[str, Place]:
        """The code in the path, normalised, and where its book lives. Raises Refused(code_not_found)."""
        code = normalise_code(call.path["code"])
        if code is None:
            raise Refused(Outcome.CODE_NOT_FOUND)
        book_id = await self._resolver.book_of_code(call.key.tenant_id, code)
        if book_id is None:
            raise Refused(Outcome.CODE_NOT_FOUND)
        return code, self._runner.place(book_id)

    async def _run_read(
        self, name: str, place: Place, tenant_id: int, keys: list[str], args: Sequence[str | int]
    ) -> Reply:
        reply = await self._runner.run(name, place, tenant_id, keys, [tenant_id, *args], sure=True)
        if reply[0] != "ok":
            raise refusal(reply)
        return reply

    async def _run(
        self,
        name: str,
        place: Place,
        tenant_id: int,
        keys: list[str],
        args: Sequence[str | int],
        *,
        receipt: str | None = None,
        code: str = "",
    ) -> Reply:
        """Run a script of a book; a code in quarantine whose receipt is shown leaves it first. Raises Refused."""
        reply = await self._runner.run(name, place, tenant_id, keys, args, code=code)
        if reply[0] == "code_quarantined" and receipt and await self._restore(place, tenant_id, code, receipt):
            reply = await self._runner.run(name, place, tenant_id, keys, args, code=code)
        if reply[0] not in _ANSWERED:
            raise refusal(reply)
        return reply

    async def _restore(self, place: Place, tenant_id: int, code: str, text: str) -> bool:
        """Bring back the record that a receipt proves: into the ledger first, then to Redis. False for a false receipt."""
        secret = self._registration.receipt_secret
        receipt = check_receipt(secret, tenant_id, place.book_id, code, text) if secret else None
        if receipt is None:
            return False
        async with self._database.connection() as connection, connection.transaction():
            if not await redeem_receipt(connection, place.shard, place.book_id, code, receipt):
                return False
        keys = place.view.keys
        holder = f"{receipt.epoch}-{receipt.seq} 0 {receipt.at_ms} {receipt.user_id}"
        touched = [
            keys.book(place.book_id),
            keys.quarantine(place.book_id),
            keys.holders(place.book_id),
            keys.coupons(tenant_id, receipt.user_id),
        ]
        try:
            await self._store.run("release_coupon", place.shard, touched, [tenant_id, place.book_id, code, holder])
        except Refused:  # which says that nothing was done; the ledger has the record by now
            raise Refused(Outcome.OUTCOME_UNKNOWN) from None
        return True

    def _receipt(
        self, place: Place, tenant_id: int, code: str, user_id: str, position: str, at_ms: str
    ) -> str | UnsetType:
        secret = self._registration.receipt_secret
        if secret is None:
            return UNSET
        epoch, _, seq = position.partition("-")
        return make_receipt(secret, tenant_id, place.book_id, code, Receipt(user_id, int(epoch), int(seq), int(at_ms)))

    async def _until_durable(
        self, place: Place, position: str, ack: str, *, made: bool = False, late: Outcome = Outcome.OUTCOME_UNKNOWN
    ) -> bool:
        """In a book with `ack = ledger`, return once the ledger holds the event at `position`.

        `made`: the event was made by this very request. A record found in a certified Redis, of an older epoch than
        Redis is in, is durable; an event of one's own of an older epoch says nothing.
        """
        epoch, _, seq_text = position.rpartition("/")[2].partition("-")  # of several, the last
        seq, view = int(seq_text), place.view
        if int(epoch) == view.epoch:
            view.seen_seq = max(view.seen_seq, seq)
        elif not made and int(epoch) < view.epoch:
            return True
        if ack != "ledger" and self._store.may_answer_early(view, int(epoch)):
            return False
        try:
            await self._store.positions.wait(place.shard, int(epoch), seq)
        except Refused:
            raise Refused(late) from None
        return True


def refusal(reply: Reply) -> Refused:
    """A script's refusal as the exception it is told by."""
    outcome = Outcome(reply[0])
    if outcome is Outcome.USER_CODE_LIMIT:
        return Refused(outcome, limit=reply[1], held=reply[2])
    if outcome is Outcome.LOCKED:
        return Refused(outcome, retry_after_seconds=max(1, -(-reply[1] // 1000)))
    return Refused(outcome)


def _idempotency(call: Call, place: Place, path: str) -> tuple[list[str], str, str]:
    """(the record's key, the Idempotency-Key, the fingerprint): all empty without an Idempotency-Key."""
    key = call.idempotency_key
    if key is None:
        return [], "", ""
    return [place.view.keys.idem(call.key.tenant_id, place.book_id, key)], key, call.fingerprint(path)
