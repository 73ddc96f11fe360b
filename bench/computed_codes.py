"""How fast codes are computed, and how long the creation of a large book takes: `python -m bench.computed_codes`. With
COUPON_URL and COUPON_KEY set, books are made there too."""

from __future__ import annotations

import json
import os
import statistics
import time
import urllib.request

from coupon_svc.domain.codes import parse_pattern
from coupon_svc.domain.computed import PatternCipher
from coupon_svc.postgres.computed.ciphers import AT_ONCE

PATTERNS = (
    ("SUMMER-####-####", "unambiguous"),
    ("######", "digits"),
    ("############", "unambiguous"),
    ("################", "alphanumeric"),
    ("#" * 24, "AB"),
    ("#" * 64, "alphanumeric"),
)
CODES = 50 * AT_ONCE
BOOKS = 25
PAUSE_S = 0.5
BOOK = {"name": "large", "generate": {"pattern": "BILLION-########", "total": 10**9}}


def codes_per_s(pattern: str, alphabet: str) -> tuple[float, float]:
    """Codes made, and codes read, per second of the processor: as many at a time as lending takes."""
    cipher = PatternCipher(parse_pattern(pattern, alphabet), bytes(range(32)))
    begun = time.process_time()
    codes = [code for start in range(0, CODES, AT_ONCE) for code in cipher.codes(range(start, start + AT_ONCE))]
    made = time.process_time()
    for start in range(0, CODES, AT_ONCE):
        cipher.numbers_of(codes[start : start + AT_ONCE])
    return CODES / (made - begun), CODES / (time.process_time() - made)


def create_seconds(url: str, key: str) -> float:
    """How long the answer to the creation of a book of a billion codes takes where nothing else is done: the median."""
    took = []
    for _ in range(BOOKS):
        time.sleep(PAUSE_S)  # the book before is lent its first block meanwhile
        request = urllib.request.Request(
            f"{url}/coupons",
            json.dumps(BOOK).encode(),
            {"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
        )
        begun = time.monotonic()
        with urllib.request.urlopen(request) as answer:
            answer.read()
        took.append(time.monotonic() - begun)
    return statistics.median(took)


def main() -> None:
    for pattern, alphabet in PATTERNS:
        made, read = codes_per_s(pattern, alphabet)
        print(f"{pattern[:24]:24} {alphabet:13} {made:9,.0f} codes/s made {read:9,.0f} codes/s read")
    url, key = os.environ.get("COUPON_URL"), os.environ.get("COUPON_KEY")
    if url and key:
        print(f"a book of 1,000,000,000 codes: {1000 * create_seconds(url, key):.1f} ms (median of {BOOKS})")


if __name__ == "__main__":
    main()
