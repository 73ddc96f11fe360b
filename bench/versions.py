"""This checkout of the service beside another one, loaded in turns: what a change gives on a machine that is never quiet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import uvloop

from bench.figures import BenchError, Figure
from bench.requests import NextRequest, Requests
from bench.stand import make_book
from bench.toll import PROCESSES
from bench.turns import Ledger, open_ledger, take_turn
from coupon_svc.dev.throwaway import throwaway_service
from coupon_svc.load.processes import cpu_s

SETTINGS = [(ack, books) for ack in ("redis", "ledger") for books in (1, 64)]
SHARDS = 16
"""Of `coupon-svc dev`."""
RATE_ASSUMED_MAX = 9_000
TURN_S = 2.0


class Service(NamedTuple):
    """A whole service of one checkout, and what it is loaded with in each setting."""

    port: int
    pids: Mapping[str, list[int]]
    ledger: Ledger
    makers: Mapping[tuple[str, int], NextRequest]


def bench_versions(other: Path, rounds: int, connections: int, say: Callable[[str], None]) -> list[Figure]:
    """What this checkout does and takes, as part of what `other` does: for each of SETTINGS a line for the rate, and one for
    the processor time that an assign takes in each process.

    `other` is the folder of a checkout that this environment can run. Raises BenchError.
    """
    if not (other / "coupon_svc" / "__main__.py").is_file():
        raise BenchError(f"there is no checkout of the service in {other}")
    with throwaway_service("bench", checkout=other) as theirs, throwaway_service("bench") as ours:
        return uvloop.run(_measure(theirs, ours, rounds, connections, say))


async def _measure(
    theirs: Mapping[str, Any], ours: Mapping[str, Any], rounds: int, connections: int, say: Callable[[str], None]
) -> list[Figure]:
    say("making books")
    codes = int((rounds + 1) * TURN_S * RATE_ASSUMED_MAX)
    services = {"theirs": await _prepared(theirs, codes), "ours": await _prepared(ours, codes)}
    taken: dict[tuple[str, int], list[dict[str, float]]] = {setting: [] for setting in SETTINGS}
    try:
        for number in range(rounds + 1):
            for setting in SETTINGS:
                order = ("theirs", "ours") if number % 2 else ("ours", "theirs")
                turns = {whose: await _turn(services[whose], setting, connections) for whose in order}
                if number:  # the blocks of codes that a book is lent grow in the first
                    taken[setting].append(
                        {name: turns["ours"][name] / max(it, 1e-9) for name, it in turns["theirs"].items()}
                    )
            say(f"round {number} of {rounds}")
    finally:
        for service in services.values():
            await service.ledger.close()
    return [
        Figure(
            id=f"versions_{name}_{ack}_{books}",
            what=f"{name}, `ack = {ack}`, {books} book{'s' if books > 1 else ''}",
            samples=[ratios[name] for ratios in taken[ack, books]],
        )
        for ack, books in SETTINGS
        for name in ("assigns a second", *PROCESSES, "all four")
    ]


async def _prepared(told: Mapping[str, Any], codes: int) -> Service:
    port, key = urlsplit(told["base_url"]).port, told["api_key"]
    assert port is not None
    requests = Requests(key)
    makers = {}
    for ack, number in SETTINGS:
        books = [make_book(port, key, ack, codes // number + 100) for _ in range(number)]
        makers[ack, number] = requests.assign_in_turn(books, with_key=True)
    pids = {name: told["pids"][name.lower()] for name in PROCESSES}
    # Without TLS, which it does not speak, lest asyncpg look for certificates in a home it may not read.
    ledger = await open_ledger(f"{told['database_url']}?sslmode=disable", told["redis_url"], SHARDS)
    return Service(port, {name: ids if isinstance(ids, list) else [ids] for name, ids in pids.items()}, ledger, makers)


async def _turn(service: Service, setting: tuple[str, int], connections: int) -> dict[str, float]:
    """Assigns a second, and the processor time of each process for one of them, until the ledger has all."""
    before = cpu_s(service.pids)
    api = service.pids["API"][0]
    turn = await take_turn(service.port, api, service.makers[setting], TURN_S, service.ledger, connections=connections)
    if turn.bad:
        raise BenchError(f"not all answers were good: {dict(turn.bad)}")
    used = cpu_s(service.pids)
    for_one = {name: (used[name] - before[name]) / turn.good for name in PROCESSES}
    return {"assigns a second": turn.rate, **for_one, "all four": sum(for_one.values())}
