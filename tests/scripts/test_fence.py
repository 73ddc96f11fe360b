"""What every script of the API and of an owner compares first: see lua/include/fence.lua and lua/include/owner.lua."""

from __future__ import annotations

from tests.scripts.every_script import api_requests, owner_requests, worn
from tests.scripts.runner import CALLER, OWNER, Shard


def test_nothing_is_decided_in_another_history_than_the_certified_one(shard: Shard) -> None:
    """Of one epoch, on one server that never restarted: only the replid tells."""
    book = worn(shard)
    shard.set_meta(replid="f" * 40)
    for name, ask in api_requests(shard, book).items():
        with shard.writes_nothing():
            assert ask(CALLER) == ["suspect"], name
    # The history that ended when this server was promoted is another, too: a stale copy may have been of it.
    shard.set_meta(replid="0" * 40)  # the replid2 of a server that was never promoted
    assert shard.read_book(book) == ["suspect"]
    shard.set_meta(replid=shard.server.replid)
    assert shard.read_book(book)[0] == "ok"


def test_a_shard_whose_certificate_is_gone_is_suspect(shard: Shard) -> None:
    book = worn(shard)
    shard.redis.hdel(shard.keys.meta, "replid")
    with shard.writes_nothing():
        assert shard.assign_coupon(book, "u") == ["suspect"]


def test_an_owner_writes_nothing_in_another_history_either(shard: Shard) -> None:
    book = worn(shard)
    shard.set_meta(replid="f" * 40)
    for name, ask in owner_requests(shard, book).items():
        with shard.writes_nothing():
            assert ask(OWNER) == ["suspect"], name
    shard.set_meta(replid=shard.server.replid)
    for name, ask in owner_requests(shard, book).items():
        assert ask(OWNER)[0] == "ok", name
