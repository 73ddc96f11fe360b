"""docs/benchmarks.md: made whole from the samples and a template, so that a run loses no sentence of it."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from bench.figures import Figure, GrowthTable, Results, Run

TEMPLATE = Path(__file__).with_name("benchmarks.template.md")
NOT_MEASURED = "Not measured yet."
_SENTENCE = re.compile(r"^- \[(\w+)\] ((?:.|\n  )*)\n", re.MULTILINE)


def read_results(folder: Path) -> Results:
    """What earlier runs have left; empty when there were none."""
    try:
        return msgspec.json.decode((folder / "benchmarks.json").read_bytes(), type=Results)
    except FileNotFoundError:
        return Results()


def write_results(folder: Path, results: Results) -> None:
    """Write benchmarks.json, and benchmarks.md from it. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "benchmarks.json").write_bytes(msgspec.json.format(msgspec.json.encode(results), indent=1) + b"\n")
    (folder / "benchmarks.md").write_text(render(results, TEMPLATE.read_text()))


def render(results: Results, template: str) -> str:
    """The document. Of the sentences `- [id] …` those remain whose line was not reached, or may not have been."""
    missed: dict[str, list[str]] = {}
    for figure in (*results.toll, *results.table):
        if figure.mark() not in ("reached", ""):
            missed.setdefault(figure.id, []).append(figure.what)

    def sentence(match: re.Match[str]) -> str:
        return f"- **{'; '.join(missed[match[1]])}**: {match[2]}\n" if match[1] in missed else ""

    parts = {
        "expected": render_expected(results),
        "toll": render_table(results.toll),
        "counts": "\n".join(f"- {line}" for line in results.counts),
        "table": render_table(results.table),
        "table_run": _render_run(results.table_run),
        "growth": render_growth(results.growth),
        "growth_run": _render_run(results.growth_run),
    }
    text = _SENTENCE.sub(sentence, template)
    return re.sub(r"\{(\w+)\}", lambda match: parts[match[1]], text)


def render_table(figures: Sequence[Figure]) -> str:
    """One line for each figure."""
    if not figures:
        return NOT_MEASURED
    rows = [["what", "median (quartiles)", "goal", "", "in figures of this machine"]]
    for figure in figures:
        rows.append([figure.what, figure.spread(), figure.target(), figure.mark(), figure.note])
    return _markdown(rows)


def render_expected(results: Results) -> str:
    """What a reader can expect: how many, how long, how many cores, how many bytes."""
    if not results.expected:
        return NOT_MEASURED
    processes = list(results.expected[0].cores)
    stated = list(results.expected[0].latency_ms)
    loads = [["", "assigns a second, at most (quartiles)", *(f"p50 and p99 at {rate:,} a second" for rate in stated)]]
    cores = [["cores for 1,000 assigns a second", *processes]]
    for one in results.expected:
        low, median, high = statistics.quantiles(one.rates, n=4, method="inclusive")
        name = f"`ack = {one.name.replace(',', '`,')}"
        latencies = [" and ".join(f"{ms:.1f} ms" for ms in one.latency_ms[rate]) for rate in stated]
        loads.append([name, f"{median:,.0f} ({low:,.0f} to {high:,.0f})", *latencies])
        cores.append([name, *(f"{one.cores[process]:.3f}" for process in processes)])
    sizes = results.sizes
    day_gb = 1_000 * 86_400 * sizes["record"] / 1e9
    checkouts = 1 / (1 / statistics.median(results.expected[0].rates) + 1 / results.pairs)
    kept = (
        f"A coupon takes {sizes['coupon']:.0f} bytes in Redis and {sizes['ledger coupon']:.0f} in Postgres, its event"
        f" {sizes['ledger event']:.0f} in Postgres; the record of an Idempotency-Key {sizes['record']:.0f} bytes in Redis,"
        f" for 24 hours. So a thousand assigns a second, all day long, need {day_gb:.0f} GB of Redis for their keys.\n\n"
        f"A lock with its redeem: {results.pairs:,.0f} a second at most. So this machine can do about {checkouts:,.0f}"
        " checkouts a second (an assign, a lock and a redeem each), and the load that asks for them."
    )
    return f"{_markdown(loads)}\n\n{_markdown(cores)}\n\n{kept}"


def render_growth(tables: Sequence[GrowthTable]) -> str:
    """One table for each thing that grew."""
    return "\n\n".join(_render_growth(table) for table in tables) or NOT_MEASURED


def _render_growth(table: GrowthTable) -> str:
    acks = list(dict.fromkeys(row.ack for row in table.rows))
    cells = {(row.setting, row.ack): row for row in table.rows}
    rows = [[table.grows, *(f"`ack = {ack}`" for ack in acks)]]
    for setting in dict.fromkeys(row.setting for row in table.rows):
        line = [setting]
        for ack in acks:
            row = cells[setting, ack]
            text = f"{statistics.median(row.samples):,.0f} ({min(row.samples):,.0f} to {max(row.samples):,.0f})"
            line.append(f"{text}; {row.refused}" if row.refused else text)
        rows.append(line)
    return _markdown(rows)


def _render_run(run: Run | None) -> str:
    if run is None:
        return ""

    def listed(pairs: dict[str, str]) -> str:
        return ", ".join(f"{name} {value}" for name, value in pairs.items())

    rows = [
        ["run", ""],
        ["date", run.date],
        ["command", f"`{run.command}`"],
        ["machine", f"{run.machine['cores']} cores, {run.machine['processor']}, {run.machine['system']}"],
        ["versions", listed(run.versions)],
        *([name, value] for name, value in run.settings.items()),
    ]
    median, highest = run.load_share
    if highest:
        rows.append(["the load took", f"{median:.2f} of a core, {highest:.2f} in its highest turn"])
    return _markdown(rows)


def _markdown(rows: Iterable[Sequence[str]]) -> str:
    first, *rest = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in [first, ["---"] * len(first), *rest])
