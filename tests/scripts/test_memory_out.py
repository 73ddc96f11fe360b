"""When memory is out: nothing new is promised, and what was promised is kept."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from redis.exceptions import OutOfMemoryError

from coupon_svc.dev.servers import EmbeddedRedis
from coupon_svc.redis.scripts import Scripts
from tests.scripts.runner import Caller, Server, Shard

KEYED = Caller(idem="key 1", fingerprint="f1")


@pytest.fixture(scope="module")
def tight_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of these tests' own, since its memory is taken away."""
    with EmbeddedRedis(tmp_path_factory.mktemp("tight")) as embedded, Server(embedded, Scripts()) as server:
        yield server


@pytest.fixture
def shard(tight_server: Server) -> Iterator[Shard]:
    """A certified shard. `out_of_memory` makes it tight; afterwards there is memory again."""
    shard = Shard(tight_server)
    shard.certify()
    yield shard
    shard.redis.config_set("maxmemory", 0)


def out_of_memory(shard: Shard) -> None:
    shard.redis.config_set("maxmemory", 1)


def test_an_assign_is_refused_with_the_code_still_in_the_pool(shard: Shard) -> None:
    book = shard.new_book("A-1", "B-2")
    out_of_memory(shard)
    with shard.writes_nothing():
        with pytest.raises(OutOfMemoryError):
            shard.assign_coupon(book, "u", KEYED)
        with pytest.raises(OutOfMemoryError):
            shard.assign_code(book, "u", "A-1", KEYED)
    shard.redis.config_set("maxmemory", 0)
    assert shard.assign_coupon(book, "u", KEYED)[:2] == ["ok", "A-1"]


def test_no_codes_are_loaded_and_no_lock_is_given(shard: Shard) -> None:
    book = shard.assigned()
    out_of_memory(shard)
    with shard.writes_nothing():
        with pytest.raises(OutOfMemoryError):
            shard.load_codes(book, ["B-2"])
        with pytest.raises(OutOfMemoryError):
            shard.lock_coupon(book, "A-1")


def test_a_redeem_goes_on(shard: Shard) -> None:
    book = shard.assigned(max_redemptions_per_code="2")
    shard.lock_coupon(book, "A-1", new_token="t1")
    out_of_memory(shard)
    first = shard.redeem_coupon(book, "A-1", KEYED, token="t1")
    assert (first[0], first[3:]) == ("ok", ["4-2", "1", "1"])
    assert shard.redeem_coupon(book, "A-1", KEYED, token="t1") == ["replayed", *first[1:]]
    assert [event.event for event in shard.events()] == ["coupon_assigned", "coupon_redeemed"]


def test_an_unlock_goes_on(shard: Shard) -> None:
    book = shard.assigned()
    shard.lock_coupon(book, "A-1", new_token="t1")
    out_of_memory(shard)
    assert shard.unlock_coupon(book, "A-1", "t1", KEYED) == ["ok"]
    assert not shard.redis.exists(shard.keys.lock(book, "A-1"))


def test_the_owner_goes_on_to_publish_and_trim_and_to_open(shard: Shard) -> None:
    """It is the trim that brings memory back."""
    book = shard.new_book("A-1", "B-2")
    shard.assign_coupon(book, "u")
    shard.assign_coupon(book, "u")
    out_of_memory(shard)
    assert shard.publish_position(2, trim_seq=2, message="0 4 2") == ["ok", 2]
    assert len(shard.entries()) == 1
    assert shard.open_shard(committed=2) == ["ok", 2]
    assert shard.put_book(book, 2, known=True, status="paused") == ["ok"]


def test_a_recovery_goes_on_with_all_its_steps(shard: Shard) -> None:
    """A shard that is shut for lack of memory would never be opened again."""
    book = shard.assigned()
    holder = shard.holders(book)["A-1"]
    out_of_memory(shard)
    assert shard.doubt_shard() == ["ok"]
    assert shard.shut_shard() == ["ok"]
    assert shard.wipe_keys([shard.keys.book(book), shard.keys.holders(book), shard.keys.coupons(1, "u")]) == ["ok"]
    assert shard.restore_book(book, lent=1, quarantined=["Q-1"]) == ["ok"]
    assert shard.restore_coupons(book, {"A-1": holder}) == ["ok"]
    assert shard.restore_idem(book, {"key 1": ('["f1"]', 1000)}) == ["ok"]
    assert shard.certify_shard() == ["ok"]
    assert shard.release_coupon(book, "Q-1", "3-9 0 1700000000000 u") == ["ok"]
    assert shard.list_coupons("u") == ["ok", [f"{book}:A-1", f"{book}:Q-1"]]


def test_reads_go_on(shard: Shard) -> None:
    book = shard.assigned()
    out_of_memory(shard)
    assert shard.read_book(book)[0] == "ok"
    assert shard.read_codes(book, ["A-1"])[0] == "ok"
    assert shard.list_coupons("u") == ["ok", [f"{book}:A-1"]]
