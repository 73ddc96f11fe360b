"""certify_shard: every reply, and what is written."""

from __future__ import annotations

from tests.scripts.every_script import api_requests, owner_requests, worn
from tests.scripts.runner import CALLER, EPOCH, GENERATION, INSTALLATION, OWNER, RECOVERED, Owner, Shard, assert_shut_by

NEXT = Owner(EPOCH + 1, GENERATION)


def test_a_new_shard_is_certified(unopened: Shard) -> None:
    assert unopened.shut_shard() == ["ok"]
    before = unopened.now_ms()
    with unopened.writes("meta"):
        assert unopened.certify_shard(backlog_max=500) == ["ok"]
    meta = unopened.meta()
    assert before <= int(meta.pop("ledger_at_ms")) <= unopened.now_ms()
    assert before <= int(meta.pop("owner_at_ms")) <= unopened.now_ms()
    assert meta == {
        "epoch": str(EPOCH),
        "generation": str(GENERATION),
        "recovery": f"{GENERATION}-{RECOVERED}",
        "seq": "0",
        "committed": "0",
        "format": "2",
        "tip": "",
        "run": "run-1",
        "replid": unopened.server.replid,
        "backlog_max": "500",
        "installation": INSTALLATION,
    }


def test_the_new_epoch_begins_at_one_and_the_older_events_are_dropped(shard: Shard) -> None:
    book = worn(shard)
    shard.publish_position(1)
    shard.shut_shard()
    with shard.writes("meta", "events"):
        assert shard.certify_shard(NEXT, run_id="run-2", backlog_max=9) == ["ok"]
    meta = shard.meta()
    assert (meta["epoch"], meta["seq"], meta["committed"]) == ("5", "0", "0")
    assert (meta["run"], meta["replid"], meta["backlog_max"]) == ("run-2", shard.server.replid, "9")
    assert shard.entries() == []
    shard.keep_ledger_at_hand()
    assert shard.assign_coupon(book, "w", CALLER._replace(epoch=5))[:4:3] == ["ok", "5-1"]
    assert [entry_id for entry_id, _ in shard.entries()] == ["5-1"]


def test_all_older_events_are_dropped_from_a_long_stream(shard: Shard) -> None:
    """An approximate trim would leave whole nodes of a hundred entries."""
    book = shard.new_book(*(f"A-{number}" for number in range(150)))
    for _ in range(150):
        shard.assign_coupon(book, "u")
    shard.shut_shard()
    assert shard.certify_shard(NEXT) == ["ok"]
    assert shard.entries() == []


def test_the_epoch_goes_on_where_the_number_has_more_digits(shard: Shard) -> None:
    """Positions are compared as numbers: 10-1 comes after 9-7."""
    book = shard.new_book("A-1", "B-2", "C-3")
    shard.assign_coupon(book, "u")
    for epoch in (9, 10):
        shard.certify(Owner(epoch, GENERATION))
        assert shard.assign_coupon(book, "u", CALLER._replace(epoch=epoch))[0] == "ok"
        assert [entry_id for entry_id, _ in shard.entries()] == [f"{epoch}-1"]


def test_certifying_twice_changes_nothing_more(shard: Shard) -> None:
    """The second is refused: the shard is not shut any more, and may have decided something by then."""
    book = worn(shard)
    shard.shut_shard()
    shard.certify_shard(NEXT)
    shard.assign_coupon(book, "w", CALLER._replace(epoch=NEXT.epoch))
    with shard.writes_nothing():
        assert shard.certify_shard(NEXT) == ["fenced"]


def test_only_who_shut_the_shard_certifies_it(shard: Shard) -> None:
    worn(shard)
    assert_shut_by(shard, lambda generation: shard.certify_shard(Owner(EPOCH + 1, generation)))


def test_a_certified_shard_decides_for_the_new_epoch_alone(shard: Shard) -> None:
    book = worn(shard)
    shard.certify(NEXT)
    assert shard.assign_coupon(book, "u", CALLER._replace(epoch=NEXT.epoch))[0] == "ok"
    assert shard.load_codes(book, ["D-4"], NEXT) == ["ok", 1, 1]
    for ask in api_requests(shard, book).values():
        assert ask(CALLER) == ["suspect", "epoch"]
    for send in owner_requests(shard, book).values():
        assert send(OWNER) == ["suspect", "epoch"]
