"""publish_position: every reply, what is written, told and trimmed."""

from __future__ import annotations

import secrets
import time

import pytest

from tests.scripts.runner import CHANNEL, EPOCH, Shard, assert_owned


def with_events(shard: Shard, count: int) -> None:
    """Make `count` events."""
    book = shard.new_book(*(f"A-{number}" for number in range(count)))
    for _ in range(count):
        assert shard.assign_coupon(book, "u")[0] == "ok"


def ids(shard: Shard) -> list[str]:
    return [entry_id for entry_id, _ in shard.entries()]


def test_the_position_and_the_time_are_noted(shard: Shard) -> None:
    with_events(shard, 2)
    meta, before = shard.meta(), shard.now_ms()
    with shard.writes("meta"):
        assert shard.publish_position(1) == ["ok", 2]
    after = shard.meta()
    assert before <= int(after.pop("ledger_at_ms")) <= shard.now_ms()
    assert before <= int(after.pop("owner_at_ms")) <= shard.now_ms()
    assert after == {**{name: meta[name] for name in after}, "committed": "1"}
    assert after.keys() == meta.keys() - {"ledger_at_ms", "owner_at_ms"}


def test_while_events_wait_only_a_commit_shows_that_the_ledger_takes_them(shard: Shard) -> None:
    """Of a Postgres that answers, and whose tables are locked, nobody may believe that it is there."""
    with_events(shard, 2)
    shard.set_meta(ledger_at_ms=1, owner_at_ms=1)
    assert shard.publish_position(1, ledger="seen") == ["ok", 2]
    assert (shard.meta()["ledger_at_ms"], shard.meta()["committed"]) == ("1", "1")
    assert int(shard.meta()["owner_at_ms"]) > 1
    assert shard.publish_position(2, ledger="seen") == ["ok", 2]
    assert int(shard.meta()["ledger_at_ms"]) > 1


def test_a_position_with_another_entry_is_suspect(shard: Shard) -> None:
    """Keys of a moment ago were put back, and what was made since has caught up with what is committed."""
    with_events(shard, 2)
    with shard.writes_nothing():
        assert shard.publish_position(2, tip="another", message="no") == ["suspect", "entry"]
    assert shard.publish_position(1, tip="another") == ["ok", 2], "the next entry says what it follows"
    assert shard.publish_position(2) == ["ok", 2]


def test_a_certificate_that_was_changed_by_hand_is_suspect_to_the_owner_too(shard: Shard) -> None:
    """The API opens no such shard; so who can mend it must see it."""
    with_events(shard, 1)
    with shard.writes_nothing():
        assert shard.publish_position(1, run_id="run-2") == ["suspect", "server"]
        assert shard.publish_position(1, installation="inst-2") == ["suspect", "meta"]


@pytest.mark.parametrize("apart_s", [-61, 61])
def test_clocks_that_are_a_minute_apart_are_told(shard: Shard, apart_s: int) -> None:
    with_events(shard, 1)
    now_ms = shard.now_ms()
    with shard.writes_nothing():
        word, told_ms = shard.publish_position(1, ledger_ms=now_ms - 1000 * apart_s)
    assert word == "clock"
    assert now_ms <= int(told_ms) <= shard.now_ms()
    assert shard.publish_position(1, ledger_ms=now_ms - 500 * apart_s) == ["ok", 1]


def test_a_ledger_that_is_away_is_noted_as_never_seen(shard: Shard) -> None:
    with_events(shard, 1)
    assert shard.publish_position(0, ledger="away") == ["ok", 1]
    assert (shard.meta()["committed"], shard.meta()["ledger_at_ms"]) == ("0", "0")


def test_the_same_position_may_be_told_again_but_none_that_goes_back_or_ahead(shard: Shard) -> None:
    with_events(shard, 2)
    assert shard.publish_position(1) == ["ok", 2]
    assert shard.publish_position(1) == ["ok", 2]
    for committed in (0, 3):
        with shard.writes_nothing():
            assert shard.publish_position(committed) == ["suspect", "position"]
    assert shard.publish_position(2) == ["ok", 2]


def test_only_the_owner_publishes(shard: Shard) -> None:
    with_events(shard, 2)
    assert_owned(shard, lambda owner: shard.publish_position(1, owner, trim_seq=1))


def test_who_listens_is_told_what_the_ledger_holds_whatever_becomes_of_this_redis(shard: Shard) -> None:
    told, refused = secrets.token_hex(8), secrets.token_hex(8)
    with shard.server.run.pubsub(ignore_subscribe_messages=True) as listener:
        listener.subscribe(CHANNEL)
        listener.get_message(timeout=5)
        shard.publish_position(0)
        assert shard.publish_position(1, message=refused)[0] == "suspect"
        assert shard.publish_position(0, message=told)[0] == "ok"
        deadline, heard = time.monotonic() + 5, list[tuple[str, str]]()
        while len(heard) < 2:
            assert time.monotonic() < deadline
            if message := listener.get_message(timeout=1):
                heard.append((message["channel"], message["data"]))
        assert heard == [(CHANNEL, refused), (CHANNEL, told)]


def test_events_below_trim_seq_are_dropped(shard: Shard) -> None:
    with_events(shard, 5)
    with shard.writes("meta", "events"):
        assert shard.publish_position(4, trim_seq=3) == ["ok", 5]
    assert ids(shard) == ["4-3", "4-4", "4-5"]


def test_the_trim_is_exact_in_a_long_stream(shard: Shard) -> None:
    """An approximate one would leave whole nodes of a hundred entries."""
    with_events(shard, 150)
    assert shard.publish_position(150, trim_seq=121) == ["ok", 150]
    assert ids(shard) == [f"4-{seq}" for seq in range(121, 151)]


@pytest.mark.parametrize("trim_seq", [0, 4])
def test_nothing_is_trimmed_that_the_ledger_has_not(shard: Shard, trim_seq: int) -> None:
    with_events(shard, 5)
    with shard.writes("meta"):
        assert shard.publish_position(3, trim_seq=trim_seq) == ["ok", 5]
    assert len(shard.events()) == 5


def test_the_last_event_that_the_ledger_has_is_kept(shard: Shard) -> None:
    with_events(shard, 3)
    assert shard.publish_position(3, trim_seq=3) == ["ok", 3]
    assert ids(shard) == ["4-3"]


def test_a_refused_position_trims_nothing(shard: Shard) -> None:
    with_events(shard, 3)
    with shard.writes_nothing():
        assert shard.publish_position(4, trim_seq=2, message="no") == ["suspect", "position"]


def test_a_book_goes_on_at_the_next_position_after_a_trim(shard: Shard) -> None:
    with_events(shard, 2)
    shard.publish_position(2, trim_seq=2)
    shard.redis.delete(shard.keys.events)
    with_events(shard, 1)
    assert ids(shard) == ["4-3"]


def test_big_numbers_stay_exact_text(shard: Shard) -> None:
    seq = 2**53 - 10
    shard.set_meta(seq=seq, committed=seq - 3)
    assert shard.publish_position(seq - 1) == ["ok", seq]
    meta = shard.meta()
    assert meta["committed"] == str(seq - 1)
    assert len(meta["ledger_at_ms"]) == 13
    assert meta["epoch"] == str(EPOCH)
    assert shard.publish_position(seq - 2) == ["suspect", "position"]
    assert shard.publish_position(seq + 1) == ["suspect", "position"]
