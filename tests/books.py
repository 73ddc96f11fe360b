"""A book as the domain knows it, for tests that need one and no store."""

from __future__ import annotations

import msgspec

from coupon_svc.domain.books import Ack, Book, BookStatus

A_BOOK = Book(
    book_id="bk_00" + "a" * 16,
    tenant_id=1,
    name="b",
    max_codes_per_user=None,
    max_redemptions_per_code=None,
    lock_ttl_seconds=60,
    starts_at_ms=None,
    expires_at_ms=None,
    ack=Ack.REDIS,
    metadata=msgspec.Raw(b"{}"),
    status=BookStatus.ACTIVE,
    created_at_ms=1,
    version=1,
    total=0,
    lent=0,
    quarantined=0,
)
"""Others are made of it with msgspec.structs.replace."""
