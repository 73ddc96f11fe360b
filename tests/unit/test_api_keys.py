"""An API key is drawn, and kept as a hash."""

from __future__ import annotations

from coupon_svc.postgres.keys import hash_key, new_key


def test_keys_are_long_and_differ() -> None:
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert min(map(len, keys)) > 40
    assert all(key.isascii() and key.isprintable() and " " not in key for key in keys)


def test_a_key_has_one_hash_and_another_key_another() -> None:
    key = new_key()
    assert hash_key(key) == hash_key(key)
    assert len(hash_key(key)) == 32
    assert hash_key(key) != hash_key(new_key())
    assert key.encode() not in hash_key(key)
