"""The requests that loads are made of, built with as little as can be: whoever sends them shares the machine."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from itertools import count

import msgspec

from coupon_svc.load.client import build_request

NextRequest = Callable[[], bytes]


class Requests:
    """Makes requests with an API key. Users and Idempotency-Keys are never repeated in a run."""

    def __init__(self, key: str) -> None:
        self._headers = b"host: bench\r\nauthorization: Bearer %b\r\ncontent-type: application/json\r\n" % key.encode()
        self._numbers = count()

    def echo(self) -> NextRequest:
        """What an assign without Idempotency-Key sends, to the echo."""
        return self._numbered(b"/echo", "bk_00" + "e" * 16, with_key=False)

    def assign(self, book_id: str, *, with_key: bool) -> NextRequest:
        return self._numbered(b"/coupons/assign", book_id, with_key=with_key)

    def assign_in_turn(self, book_ids: Sequence[str], *, with_key: bool) -> NextRequest:
        """One book after another, and then from the first again."""
        makers = [self.assign(book_id, with_key=with_key) for book_id in book_ids]
        turn = count()
        return lambda: makers[next(turn) % len(makers)]()

    def assign_until_dealt(self, book_ids: Sequence[str], codes: int, *, with_key: bool) -> NextRequest:
        """Every code of a book, then every one of the next. When all are dealt it goes on with the last."""
        dealt = count()
        books = iter(book_ids)
        maker: NextRequest = bytes

        def next_request() -> bytes:
            nonlocal maker
            if next(dealt) % codes == 0:
                maker = self.assign(next(books, book_ids[-1]), with_key=with_key)
            return maker()

        return next_request

    def _numbered(self, path: bytes, book_id: str, *, with_key: bool) -> NextRequest:
        body = b'{"book_id":"%b","user_id":"user-%%012d"}' % book_id.encode()
        more = b"idempotency-key: bench-%012d\r\n" if with_key else b""
        template = build_request(b"POST", path, self._headers + more, body % 0)
        # The length of the body was counted with one number in it, and every number is as long.
        head, _, _ = template.rpartition(b"\r\n\r\n")
        request = head.replace(b"bench-000000000000", b"bench-%012d") + b"\r\n\r\n" + body
        numbers = self._numbers
        if with_key:

            def keyed() -> bytes:
                number = next(numbers)
                return request % (number, number)

            return keyed
        return lambda: request % next(numbers)


class _Assigned(msgspec.Struct):
    code: str
    user_id: str


class _Locked(msgspec.Struct):
    code: str
    user_id: str
    lock_token: str


class Pairs:
    """Locks coupons and redeems each as soon as its lock is answered; `redeemed` counts the pairs that are complete."""

    def __init__(self, requests: Requests, coupons: list[bytes], *, with_key: bool) -> None:
        """`coupons` are the bodies of assign's answers, and are used up."""
        self._coupons = coupons
        self._headers = requests._headers
        self._keys = requests._numbers if with_key else None
        self._redeems: deque[bytes] = deque()
        self._read_assigned = msgspec.json.Decoder(_Assigned).decode
        self._read_locked = msgspec.json.Decoder(_Locked).decode
        self.redeemed = 0
        self.ran_out = False

    def next_request(self) -> bytes:
        if self._redeems:
            return self._redeems.popleft()
        if not self._coupons:
            self.ran_out = True
            return self._post(b"/coupons/lock/NONE", b"{}")
        coupon = self._read_assigned(self._coupons.pop())
        return self._post(b"/coupons/lock/" + coupon.code.encode(), b'{"user_id":"%b"}' % coupon.user_id.encode())

    def take_answer(self, body: bytes) -> None:
        """A good answer: of a lock, then the redeem is next; else a pair is complete."""
        if b'"lock_token"' not in body:
            self.redeemed += 1
            return
        locked = self._read_locked(body)
        self._redeems.append(
            self._post(
                b"/coupons/redeem/" + locked.code.encode(),
                b'{"user_id":"%b","lock_token":"%b"}' % (locked.user_id.encode(), locked.lock_token.encode()),
            )
        )

    def _post(self, path: bytes, body: bytes) -> bytes:
        more = b"idempotency-key: bench-%012d\r\n" % next(self._keys) if self._keys is not None else b""
        return build_request(b"POST", path, self._headers + more, body)
