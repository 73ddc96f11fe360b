"""What README.md takes from elsewhere: `python -m tools.readme` writes its picture and its figures.

The figures are of docs/benchmarks.json, so a new measurement changes them in one place.
"""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

from tests.chaos.suite import FAULTS
from tools.picture import draw

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PICTURE = ROOT / "docs" / "pictures" / "parts.svg"
_FIGURES = re.compile(r"(<!-- figures: [^\n]*-->\n).*?(<!-- /figures -->)", re.DOTALL)


def figures(measured: dict[str, Any]) -> str:
    """The five figures as a table. `measured`: docs/benchmarks.json."""
    redis, ledger = (_expected(measured, f"{ack}, 1 book") for ack in ("redis", "ledger"))
    against = {figure["id"]: statistics.median(figure["samples"]) for figure in measured["table"]}
    machine = measured["table_run"]["machine"]
    rows = [
        ("", "`ack = ledger`", "`ack = redis`", "by"),
        ("---", "---:", "---:", "---"),
        (
            "Assigns per second in one book, 64 callers",
            f"{statistics.median(ledger['rates']):,.0f}",
            f"{statistics.median(redis['rates']):,.0f}",
            "`make bench`",
        ),
        (
            "An assign at 500 per second, p50 and p99",
            *(" and ".join(f"{ms:.1f}" for ms in one["latency_ms"]["500"]) + " ms" for one in (ledger, redis)),
            "`make bench`",
        ),
        (
            "Throughput against Postgres alone (`SKIP LOCKED`), 256 callers",
            f"{against['postgres_ledger']:.1f} ×",
            f"{against['postgres_redis']:.1f} ×",
            "`make bench`",
        ),
        (
            "Redis memory per coupon, and per Idempotency-Key for 24 hours",
            *[f"{measured['sizes']['coupon']:.0f} and {measured['sizes']['record']:.0f} bytes"] * 2,
            "`make bench`",
        ),
        ("Kinds of fault injected under load, without a broken promise", *[str(len(FAULTS))] * 2, "`make chaos`"),
    ]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return (
        f"{table}\n\nOne machine with {machine['cores']} cores ({machine['processor']}) ran everything: the callers, one API"
        " process, one writer, Valkey and Postgres."
    )


def with_figures(text: str, measured: dict[str, Any]) -> str:
    """README.md with its figures as they were measured last."""
    block = figures(measured)
    return _FIGURES.sub(lambda match: f"{match[1]}{block}\n{match[2]}", text)


def read_measured() -> dict[str, Any]:
    measured: dict[str, Any] = json.loads((ROOT / "docs" / "benchmarks.json").read_text())
    return measured


def _expected(measured: dict[str, Any], name: str) -> dict[str, Any]:
    return next(one for one in measured["expected"] if one["name"] == name)


def main() -> None:
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(draw())
    README.write_text(with_figures(README.read_text(), read_measured()))


if __name__ == "__main__":
    main()
