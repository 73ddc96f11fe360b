"""Redis's address is read as redis-py reads it."""

from __future__ import annotations

from typing import Any

import pytest
from redis.connection import parse_url

from coupon_svc.redis.connection import parse_address


@pytest.mark.parametrize(
    "url",
    [
        "redis://localhost",
        "redis://10.0.0.1:7000/3",
        "redis://:secret@h:1/0",
        "redis://us%40er:p%2Fw%25@h:1/2",
        "redis://user@h",
        "redis://h?db=4",
        "redis://h/5?db=4",
        "redis://h/nonsense",
        "redis://[::1]:6380/1",
        "rediss://default:x@redis.example:6390",
        "unix:///run/redis.sock",
        "unix://user:pw@/run/re%20dis.sock?db=2",
    ],
)
def test_an_address_is_read_as_redis_py_reads_it(url: str) -> None:
    theirs: dict[str, Any] = dict(parse_url(url))  # type: ignore[no-untyped-call]
    ours = parse_address(url)
    assert ours.path == theirs.get("path")
    assert ours.host == theirs.get("host", "localhost")
    assert ours.port == theirs.get("port", 6379)
    assert ours.tls == url.startswith("rediss")
    assert ours.username == (theirs.get("username") or "default")
    assert ours.password == theirs.get("password")
    assert ours.database == theirs.get("db", 0)
