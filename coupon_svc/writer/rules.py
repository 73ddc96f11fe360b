"""A book's rules as Redis has them."""

from __future__ import annotations

import msgspec

from coupon_svc.domain.books import Book


def book_fields(book: Book) -> dict[str, str]:
    """A book as the fields of its hash in Redis. What is unlimited or unset is the empty text."""

    def text(value: int | None) -> str:
        return "" if value is None else str(value)

    return {
        "tenant_id": str(book.tenant_id),
        "status": book.status.value,
        "starts_at_ms": text(book.starts_at_ms),
        "expires_at_ms": text(book.expires_at_ms),
        "ack": book.ack.value,
        "max_redemptions_per_code": text(book.max_redemptions_per_code),
        "max_codes_per_user": text(book.max_codes_per_user),
        "lock_ttl_ms": str(book.lock_ttl_seconds * 1000),
        "total": str(book.total),
        "unlent": str(book.unlent),
        "stored": msgspec.json.encode(book).decode(),
    }
