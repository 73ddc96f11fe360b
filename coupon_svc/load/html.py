"""A result for people, as one page that opens anywhere: nothing in it is fetched from elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from html import escape

from coupon_svc.load.charts import Points, line_chart
from coupon_svc.load.report import describe_verdict, text_report
from coupon_svc.load.run import Result
from coupon_svc.load.watch import Sample

_SHORTEST_S = 0.3
"""What was sampled for a shorter time, such as the last moment, says nothing about a second."""
_STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #667; --rule: #d8dce2; --paper: #fff;
  --c0: #1768ac; --c1: #d1495b; --c2: #6a994e; --c3: #e09f3e; --c4: #7b5ea7; --c5: #3a8d8d; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --soft: #9aa3ad; --rule: #343a42; --paper: #15181c;
  --c0: #6cb2eb; --c1: #ff8a98; --c2: #a7d08c; --c3: #f0c674; --c4: #bfa2e8; --c5: #7fd1d1; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 60rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p.sub { color: var(--soft); margin-top: .25rem; }
.verdict { padding: .6rem 1rem; border-left: 5px solid var(--c2); font-weight: 600; }
.verdict.broken { border-color: var(--c1); } .verdict.open { border-color: var(--c3); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(26rem, 1fr)); gap: 1rem; }
figure { margin: 0; } figcaption { font-weight: 600; } figcaption small { color: var(--soft); font-weight: 400; }
svg { width: 100%; height: auto; } svg text { font-size: 11px; fill: var(--soft); }
.grid { stroke: var(--rule); stroke-width: 1; } .line { fill: none; stroke-width: 1.8; }
.key { font-weight: 400; font-size: .85rem; margin-left: .8rem; }
.key::before { content: ""; display: inline-block; width: .7rem; height: .7rem; margin-right: .3rem; background: var(--c); }
.c0 { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); } .c3 { --c: var(--c3); } .c4 { --c: var(--c4); }
.c5 { --c: var(--c5); } .line { stroke: var(--c); } .dot { fill: var(--c); }
table { border-collapse: collapse; } th, td { text-align: left; padding: .15rem 1rem .15rem 0; vertical-align: top; }
td.n { text-align: right; font-variant-numeric: tabular-nums; } th { color: var(--soft); font-weight: 500; }
tr + tr td, tr + tr th { border-top: 1px solid var(--rule); }
pre { overflow-x: auto; font-size: .8rem; color: var(--soft); }
"""


def html_report(result: Result) -> str:
    """The page."""
    settings = result.settings
    title = f"Load: {settings['scenario']}, {result.per_second:,.0f} answers a second"
    return "\n".join(
        (
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
            f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>",
            f"<h1>{escape(title)}</h1>",
            f'<p class="sub">coupon-svc {escape(result.version)} · {escape(result.began_at)} · {result.seconds:.1f} s'
            f" · run {escape(result.run_id)}</p>",
            _verdict(result),
            f'<div class="charts">{_charts(result)}</div>',
            "<h2>Latency, ms</h2>",
            _table(
                ("", *next(iter(result.latency_ms.values()))),
                ((verb, *figures.values()) for verb, figures in result.latency_ms.items()),
            ),
            "<h2>Answers</h2>",
            _table(
                ("", "outcome", "number"),
                (
                    (verb, outcome, number)
                    for verb, outcomes in result.outcomes.items()
                    for outcome, number in outcomes.items()
                ),
            ),
            "<h2>What was audited</h2>",
            _table(("what", "number"), result.audit.checked.items()),
            "<h2>Settings and machine</h2>",
            _table(("", ""), [*settings.items(), *result.machine.items()]),
            "<h2>As text</h2>",
            f"<pre>{escape(text_report(result))}\n{escape(describe_verdict(result))}</pre>",
            "</body></html>\n",
        )
    )


def _verdict(result: Result) -> str:
    audit = result.audit
    lines = [f"{broken.what} ({broken.number})" for broken in audit.broken] + audit.unchecked
    if audit.broken:
        kind, text = "broken", "A promise is broken."
    elif audit.unchecked:
        kind, text = "open", "The promises are not shown to hold: the audit is not complete."
    else:
        kind, text = "held", "The promises held."
    items = "".join(f"<li>{escape(line)}</li>" for line in [*lines, *result.remarks, *audit.notes])
    return f'<p class="verdict {kind}">{text}</p>' + (f"<ul>{items}</ul>" if items else "")


def _charts(result: Result) -> str:
    ends = [0.0, *(sample.at_s for sample in result.series)]
    whole = [sample for sample, began in zip(result.series, ends, strict=False) if sample.at_s - began >= _SHORTEST_S]

    def points(value: Callable[[Sample], float | None]) -> Points:
        return [(sample.at_s, value(sample)) for sample in whole]

    charts = [
        line_chart(
            "Throughput",
            "a second",
            {"answers": points(lambda s: s.per_second), "done": points(lambda s: s.good_per_second)},
        ),
        line_chart(
            "Latency",
            "ms",
            {"p50": points(lambda s: s.p50_ms), "p99": points(lambda s: s.p99_ms), "max": points(lambda s: s.max_ms)},
            logarithmic=True,
        ),
        line_chart("How far the ledger is behind", "events", {"behind": points(lambda s: s.lag_events)}),
        line_chart(
            "Processor",
            "cores",
            {part: points(lambda s, part=part: s.cpu.get(part)) for part in result.cpu},  # type: ignore[misc]
        ),
    ]
    if any(sample.redis_bytes is not None for sample in whole):
        memory = points(lambda s: None if s.redis_bytes is None else s.redis_bytes / 2**20)
        charts.append(line_chart("Memory of Redis", "MiB", {"used": memory}))
    return "\n".join(charts)


def _table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    def cell(value: object) -> str:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return f'<td class="n">{value:,}</td>'
        return f"<td>{escape('' if value is None else str(value))}</td>"

    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return f"<table><tr>{''.join(f'<th>{escape(name)}</th>' for name in head)}</tr>{body}</table>"
