"""Counters for Prometheus, of this process alone. No label ever names a tenant, a book, a user or a code."""

from __future__ import annotations

import math
import os
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence

from coupon_svc.service.health import ShardHealth

_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Metrics:
    """Requests by operation and outcome, their duration, and what the process knows of each shard."""

    def __init__(self) -> None:
        self._requests: defaultdict[tuple[str, str], int] = defaultdict(int)
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._buckets: defaultdict[str, list[int]] = defaultdict(lambda: [0] * (len(_BUCKETS_S) + 1))

    def count(self, operation: str, outcome: str, seconds: float) -> None:
        """Count a request that has ended, with its duration."""
        self._requests[operation, outcome] += 1
        self._seconds[operation] += seconds
        self._buckets[operation][bisect_left(_BUCKETS_S, seconds)] += 1

    def render(self, shards: Sequence[ShardHealth]) -> bytes:
        """All of it in Prometheus's text format."""
        process = os.getpid()
        lines = ["# TYPE coupon_requests_total counter"]
        for (operation, outcome), number in sorted(self._requests.items()):
            lines.append(
                f'coupon_requests_total{{process="{process}",operation="{operation}",outcome="{outcome}"}} {number}'
            )
        lines.append("# TYPE coupon_request_seconds histogram")
        for operation, buckets in sorted(self._buckets.items()):
            labels = f'process="{process}",operation="{operation}"'
            total = 0
            for bound, number in zip((*map(str, _BUCKETS_S), "+Inf"), buckets, strict=True):
                total += number
                lines.append(f'coupon_request_seconds_bucket{{{labels},le="{bound}"}} {total}')
            lines.append(f"coupon_request_seconds_sum{{{labels}}} {self._seconds[operation]:.6f}")
            lines.append(f"coupon_request_seconds_count{{{labels}}} {total}")
        lines += ["# TYPE coupon_shard_certified gauge", "# TYPE coupon_shard_backlog_events gauge"]
        lines.append("# TYPE coupon_shard_ledger_unseen_seconds gauge")
        for shard in shards:
            labels = f'process="{process}",shard="{shard.shard:02d}"'
            lines.append(f"coupon_shard_certified{{{labels}}} {int(shard.is_open)}")
            lines.append(f"coupon_shard_backlog_events{{{labels}}} {shard.backlog_events}")
            unseen = "+Inf" if math.isinf(shard.ledger_unseen_s) else f"{shard.ledger_unseen_s:.3f}"
            lines.append(f"coupon_shard_ledger_unseen_seconds{{{labels}}} {unseen}")
        return ("\n".join(lines) + "\n").encode()
