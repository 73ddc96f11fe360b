"""The fingerprint of a request with an Idempotency-Key is kept for a day: another version must make the same one."""

from __future__ import annotations

import hashlib

from coupon_svc.domain.api_keys import ApiKey
from coupon_svc.http.call import Call
from coupon_svc.http.schemas import AssignCode
from coupon_svc.service.idempotency import NO_IDEMPOTENCY

KEY = ApiKey("id", 1, "shop", frozenset(), "", None, False)


def test_a_fingerprint_covers_method_path_and_body() -> None:
    call = Call(KEY, "POST", "/coupons/assign/{code}", {"code": "save-10"})
    call.body = AssignCode(user_id="ann")
    assert call.idempotency("SAVE-10") == NO_IDEMPOTENCY
    call.idempotency_key = "k"
    known = hashlib.blake2b(b'POST /coupons/assign/SAVE-10\n{"user_id":"ann","receipt":null}', digest_size=16)
    assert (call.idempotency("SAVE-10").key, call.idempotency("SAVE-10").fingerprint) == ("k", known.hexdigest())
