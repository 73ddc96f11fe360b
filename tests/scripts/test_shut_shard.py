"""shut_shard: every reply, what is written, and that nothing else is done to a shard that is shut."""

from __future__ import annotations

from coupon_svc.redis.scripts import Scripts
from tests.lint.lua_headers import sender
from tests.scripts.every_script import KEYED, api_requests, owner_requests, recovery_requests, worn
from tests.scripts.runner import CALLER, EPOCH, GENERATION, INSTALLATION, OWNER, RECOVERED, Caller, Owner, Shard


def test_every_script_is_tried_here(shard: Shard) -> None:
    scripts = Scripts()
    senders: dict[str, set[str]] = {"api": set(scripts.operations), "owner": set(), "recoverer": set()}
    for script in scripts:
        if script.contract.name != "call":
            senders[sender(script.contract)].add(script.name)
    assert senders["api"] == set(api_requests(shard, ""))
    assert senders["owner"] == set(owner_requests(shard, ""))
    assert senders["recoverer"] == set(recovery_requests(shard, ""))


def test_every_script_would_go_through_if_the_shard_were_not_shut(shard: Shard) -> None:
    """Else that they are refused would show nothing."""
    for name in (*api_requests(shard, ""), *owner_requests(shard, "")):
        shard.redis.delete(shard.keys.events)
        shard.certify()
        book = worn(shard)
        in_api, in_owner = api_requests(shard, book), owner_requests(shard, book)
        reply = in_api[name](CALLER) if name in in_api else in_owner[name](OWNER)
        assert reply[0] == ("already_yours" if name == "assign_code" else "ok"), name


def test_a_shard_is_shut_and_keeps_all_else(shard: Shard) -> None:
    worn(shard)
    meta = shard.meta()
    with shard.writes("meta"):
        assert shard.shut_shard(GENERATION + 3) == ["ok"]  # 10: compared as a number, not as text
    told = {"generation": str(GENERATION + 3), "recovery": f"{GENERATION + 3}-{RECOVERED}"}
    assert shard.meta() == {**meta, "epoch": "recovering", "was": meta["epoch"], **told}


def test_an_empty_shard_is_shut_too(unopened: Shard) -> None:
    with unopened.writes("meta"):
        assert unopened.shut_shard() == ["ok"]
    assert unopened.meta() == {
        "epoch": "recovering",
        "generation": str(GENERATION),
        "recovery": f"{GENERATION}-{RECOVERED}",
        "installation": INSTALLATION,
    }


def test_keys_of_another_installation_are_neither_shut_nor_opened(shard: Shard) -> None:
    """Whatever the generation and the epoch of who comes with the wrong address."""
    for generation, epoch in ((GENERATION - 1, EPOCH), (GENERATION + 40, EPOCH + 40)):
        with shard.writes_nothing():
            assert shard.shut_shard(generation, epoch, installation="inst-2") == ["foreign", INSTALLATION]
            owner = Owner(epoch, generation)
            assert shard.open_shard(owner, installation="inst-2") == ["foreign", INSTALLATION]


def test_a_torn_meta_is_shut_as_well(shard: Shard) -> None:
    shard.set_meta(generation="x", recovery="x")
    assert shard.shut_shard() == ["ok"]
    assert shard.meta()["generation"] == str(GENERATION)


def test_shutting_a_shard_twice_changes_nothing_more(shard: Shard) -> None:
    shard.shut_shard()
    with shard.writes_nothing():
        assert shard.shut_shard() == ["ok"]


def test_a_shard_in_doubt_is_shut(shard: Shard) -> None:
    shard.doubt_shard()
    assert shard.shut_shard() == ["ok"]
    assert shard.meta()["epoch"] == "recovering"


def test_an_older_owner_is_fenced_whether_or_not_the_shard_is_shut(shard: Shard) -> None:
    for _ in range(2):
        with shard.writes_nothing():
            assert shard.shut_shard(GENERATION - 1) == ["fenced"]
        shard.shut_shard()


def test_a_newer_owner_takes_a_recovery_over(shard: Shard) -> None:
    book = worn(shard)
    shard.shut_shard()
    assert shard.shut_shard(GENERATION + 1) == ["ok"]
    for name, ask in recovery_requests(shard, book).items():
        with shard.writes_nothing():
            assert ask(GENERATION) == ["fenced"], name


def test_an_owners_second_recovery_fences_what_is_left_of_its_first(shard: Shard) -> None:
    """A command that was sent before its connection was given up may arrive when what it drops has been restored."""
    book = worn(shard)
    shard.shut_shard(epoch=RECOVERED)
    assert shard.shut_shard(epoch=RECOVERED + 7) == ["ok"]  # 12: compared as a number, not as text
    for name, ask in recovery_requests(shard, book).items():
        with shard.writes_nothing():
            assert ask(GENERATION) == ["fenced"], name


def test_what_is_left_of_an_owners_first_recovery_shuts_nothing(shard: Shard) -> None:
    shard.shut_shard(epoch=RECOVERED + 7)
    with shard.writes_nothing():
        assert shard.shut_shard(epoch=RECOVERED) == ["fenced"]


def test_no_script_of_the_api_does_anything_in_a_shard_that_is_shut(shard: Shard) -> None:
    book = worn(shard)
    shard.shut_shard()
    callers = [Caller(epoch, seen) for epoch in (0, EPOCH - 1, EPOCH, EPOCH + 1, EPOCH + 2) for seen in (0, 2)]
    for name, ask in api_requests(shard, book).items():
        for caller in (*callers, KEYED, Caller(tenant_id=2)):
            with shard.writes_nothing():
                assert ask(caller) == ["suspect", "epoch"], (name, caller)


def test_no_script_of_an_owner_does_anything_in_a_shard_that_is_shut(shard: Shard) -> None:
    """Neither an older one, nor the one that shut it, nor a newer one that takes it for certified."""
    book = worn(shard)
    shard.shut_shard()
    for name, ask in owner_requests(shard, book).items():
        for epoch in (EPOCH - 1, EPOCH, EPOCH + 1):
            for generation in (GENERATION - 1, GENERATION, GENERATION + 1):
                fenced = name == "open_shard" and generation < GENERATION
                with shard.writes_nothing():
                    assert ask(Owner(epoch, generation)) == (["fenced"] if fenced else ["suspect", "epoch"]), (
                        name,
                        epoch,
                        generation,
                    )


def test_what_is_older_than_a_recovery_does_nothing_after_it_either(shard: Shard) -> None:
    """A request or an owner that was paused meanwhile wakes up in the new epoch."""
    book = worn(shard)
    shard.shut_shard(GENERATION + 1)
    assert shard.certify_shard(Owner(EPOCH + 1, GENERATION + 1)) == ["ok"]
    for name, ask in api_requests(shard, book).items():
        for caller in (CALLER, KEYED, Caller(EPOCH - 1)):
            with shard.writes_nothing():
                assert ask(caller) == ["suspect", "epoch"], (name, caller)
    for name, send in owner_requests(shard, book).items():
        for owner in (OWNER, Owner(EPOCH, GENERATION + 1), Owner(EPOCH + 1, GENERATION)):
            fenced = name == "open_shard" and owner.generation == GENERATION
            suspect = ["suspect", "epoch" if owner.epoch == EPOCH else "owner"]
            with shard.writes_nothing():
                assert send(owner) == (["fenced"] if fenced else suspect), (name, owner)
    for name, step in recovery_requests(shard, book).items():
        with shard.writes_nothing():
            assert step(GENERATION) == ["fenced"], name
