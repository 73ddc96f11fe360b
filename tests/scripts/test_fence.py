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
            assert ask(CALLER) == ["suspect", "server"], name
    # The history that ended when this server was promoted is another, too: a stale copy may have been of it.
    shard.set_meta(replid="0" * 40)  # the replid2 of a server that was never promoted
    assert shard.read_book(book) == ["suspect", "server"]
    shard.set_meta(replid=shard.server.replid)
    assert shard.read_book(book)[0] == "ok"


def test_a_shard_whose_certificate_is_gone_is_suspect(shard: Shard) -> None:
    book = worn(shard)
    for field in ("tip", "replid"):
        kept = shard.redis.hget(shard.keys.meta, field)
        shard.redis.hdel(shard.keys.meta, field)
        with shard.writes_nothing():
            assert shard.assign_coupon(book, "u") == ["suspect", "meta"]
            assert shard.put_book(book, 2, known=True) == ["suspect", "meta"]
        shard.set_meta(**{field: kept})
    for part in ("", shard.server.replid[:20]):
        shard.set_meta(replid=part)
        with shard.writes_nothing():
            assert shard.assign_coupon(book, "u") == ["suspect", "server"]


def test_an_owner_writes_nothing_in_another_history_either(shard: Shard) -> None:
    book = worn(shard)
    shard.set_meta(replid="f" * 40)
    for name, ask in owner_requests(shard, book).items():
        with shard.writes_nothing():
            assert ask(OWNER) == ["suspect", "server"], name
    shard.set_meta(replid=shard.server.replid)
    for name, ask in owner_requests(shard, book).items():
        assert ask(OWNER)[0] == "ok", name


def test_a_number_of_the_meta_that_is_torn_is_suspect_to_everybody(shard: Shard) -> None:
    """What is no number must not end a script in its middle, with a code popped and no event made."""
    book = worn(shard)
    meta = shard.meta()
    for field in ("seq", "committed", "ledger_at_ms", "backlog_max"):
        for torn in ("x", "", "-", "7 "):
            if field != "seq" and torn == "7 ":
                continue  # Lua reads it as 7, and it is only compared
            shard.set_meta(**{field: torn})
            for name, ask in api_requests(shard, book).items():
                with shard.writes_nothing():
                    assert ask(CALLER) == ["suspect", "meta"], (name, field, torn)
            if field != "ledger_at_ms":
                for name, owner_asks in owner_requests(shard, book).items():
                    if name != "open_shard" or field != "backlog_max":  # which it sets anew
                        with shard.writes_nothing():
                            assert owner_asks(OWNER) == ["suspect", "meta"], (name, field, torn)
            shard.set_meta(**{field: meta[field]})


def test_nothing_is_made_by_a_clock_that_went_back(shard: Shard) -> None:
    book = worn(shard)
    shard.set_meta(ledger_at_ms=shard.now_ms() + 70_000)
    for name in ("assign_coupon", "lock_coupon", "redeem_coupon"):
        with shard.writes_nothing():
            assert api_requests(shard, book)[name](CALLER) == ["ledger_behind"], name
