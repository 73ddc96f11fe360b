"""What a scrape reads."""

from __future__ import annotations

import math
import re

from coupon_svc.http.metrics import Metrics
from coupon_svc.service.health import ShardHealth


def lines(metrics: Metrics, *shards: ShardHealth) -> dict[str, str]:
    """The value of each line, by the rest of it without the process."""
    text = metrics.render(shards).decode()
    assert text.endswith("\n")
    told = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {re.sub(r'process="\d+",', "", name): value for name, value in told}


def test_requests_are_counted_by_operation_and_outcome() -> None:
    metrics = Metrics()
    for outcome in ("ok", "ok", "locked"):
        metrics.count("redeem_coupon", outcome, 0.003)
    told = lines(metrics)
    assert told['coupon_requests_total{operation="redeem_coupon",outcome="ok"}'] == "2"
    assert told['coupon_requests_total{operation="redeem_coupon",outcome="locked"}'] == "1"


def test_a_bucket_counts_all_that_took_no_longer() -> None:
    metrics = Metrics()
    for seconds in (0.001, 0.0011, 0.3, 60.0):
        metrics.count("assign_coupon", "ok", seconds)
    told = lines(metrics)
    counted = {bound: told[f'coupon_request_seconds_bucket{{operation="assign_coupon",le="{bound}"}}'] for bound in
               ("0.001", "0.0025", "0.25", "0.5", "10.0", "+Inf")}  # fmt: skip
    assert counted == {"0.001": "1", "0.0025": "2", "0.25": "2", "0.5": "3", "10.0": "3", "+Inf": "4"}
    assert told['coupon_request_seconds_count{operation="assign_coupon"}'] == "4"
    assert float(told['coupon_request_seconds_sum{operation="assign_coupon"}']) == 60.3021


def test_each_shard_is_told() -> None:
    told = lines(Metrics(), ShardHealth(0, True, 5, False, 0.25), ShardHealth(7, False, 0, False, math.inf))
    assert told['coupon_shard_certified{shard="00"}'] == "1"
    assert told['coupon_shard_certified{shard="07"}'] == "0"
    assert told['coupon_shard_backlog_events{shard="00"}'] == "5"
    assert told['coupon_shard_ledger_unseen_seconds{shard="00"}'] == "0.250"
    assert told['coupon_shard_ledger_unseen_seconds{shard="07"}'] == "+Inf"
