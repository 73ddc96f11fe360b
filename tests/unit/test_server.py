"""Which Redis is fit, by its own words."""

from __future__ import annotations

import pytest

from coupon_svc.redis.errors import ServerUnfit
from coupon_svc.redis.server import Identity, judge, refuses_writes

FIT = {
    "redis_version": "7.2.4",
    "loading": "0",
    "role": "master",
    "maxmemory_policy": "noeviction",
    "aof_enabled": "1",
    "run_id": "r",
    "master_replid": "p",
}


def test_a_fit_server_is_told_by_its_run_and_its_history() -> None:
    assert judge(FIT) == Identity("r", "p")
    assert judge({**FIT, "redis_version": "7.0.0"}) == judge({**FIT, "redis_version": "10.1"}) == Identity("r", "p")


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"redis_version": "6.2.14"}, "6.2.14 is too old"),
        ({"loading": "1"}, "still loading"),
        ({"role": "slave"}, "COUPON_REDIS_URL"),
        ({"maxmemory_policy": "allkeys-lru"}, "maxmemory-policy must be noeviction"),
        ({"aof_enabled": "0"}, "appendonly must be yes"),
    ],
)
def test_an_unfit_server_is_refused_with_what_is_wrong(changed: dict[str, str], reason: str) -> None:
    with pytest.raises(ServerUnfit, match=reason):
        judge({**FIT, **changed})


def test_a_server_whose_disk_is_full_refuses_writes() -> None:
    assert refuses_writes({**FIT, "aof_last_write_status": "err"})
    assert not refuses_writes({**FIT, "aof_last_write_status": "ok"})
    assert not refuses_writes(FIT)
