"""A result for people, as text."""

from __future__ import annotations

from coupon_svc.load.recorder import GOOD
from coupon_svc.load.run import Result

_SHOWN_MAX = 20


def text_report(result: Result) -> str:
    """The figures, without the verdict."""
    settings, arrivals = result.settings, result.arrivals
    how = (
        f"{settings['rate']:,.0f} arrivals a second, {settings['connections']} connections"
        if settings["rate"] is not None
        else f"{settings['connections']} callers at a time"
    )
    lines = [
        "",
        f"{settings['scenario']}: {how}, {settings['books']} books of {settings['codes']:,} codes, ack = {settings['ack']};"
        f" {result.seconds:.1f} s" + (", interrupted" if result.ended == "interrupted" else ""),
        "",
        f"  {result.answers:,} answers, {result.per_second:,.0f} a second; {result.good_per_second:,.0f} a second were done",
    ]
    if settings["rate"] is not None:
        lines.append(f"  {arrivals.due:,} callers were due, {arrivals.started:,} came")
    lines += ["", f"  latency in ms      {'p50':>9} {'p90':>9} {'p99':>9} {'p99.9':>9} {'max':>9}"]
    for verb, figures in result.latency_ms.items():
        lines.append(f"    {verb:16} " + " ".join(f"{figure:9,.1f}" for figure in figures.values()))
    since = "were due" if settings["rate"] is not None else "were sent (closed loop: a stall is seen by few)"
    lines += [f"    counted from when requests {since}; percentiles to within {result.latency_error:.2%}", ""]
    lines.append("  answers")
    for verb, outcomes in result.outcomes.items():
        for outcome, number in sorted(outcomes.items(), key=lambda item: (item[0] not in GOOD, -item[1])):
            lines.append(f"    {verb:16} {outcome:26} {number:9,}")
    lines += ["", f"  processor, in cores: {_cpu(result)}"]
    lags = [sample.lag_events for sample in result.series if sample.lag_events is not None]
    if lags:
        drained = (
            f"; it had everything {result.drained_after_s:.1f} s after the last answer"
            if result.drained_after_s is not None
            else "; it had not caught up 30 s after the last answer"
        )
        lines.append(f"  the ledger was behind by at most {max(lags):,} events{drained}")
    memory = [sample.redis_bytes for sample in result.series if sample.redis_bytes is not None]
    if memory:
        lines.append(
            f"  memory of Redis: {memory[0] / 2**20:,.1f} MiB after a second, {memory[-1] / 2**20:,.1f} at the end"
        )
    lines += [f"  NOTE: {remark}" for remark in result.remarks]
    return "\n".join(lines)


def _cpu(result: Result) -> str:
    return ", ".join(f"{part} {used:.2f}" for part, used in result.cpu.items())


def describe_verdict(result: Result) -> str:
    """What was held against what, and whether it held."""
    verdict = result.audit
    lines = ["", "  audit"]
    lines += [f"    {number:9,}  {what}" for what, number in verdict.checked.items()]
    lines += [f"    NOTE: {note}" for note in verdict.notes]
    lines += [f"    NOT CHECKED: {what}" for what in verdict.unchecked]
    for broken in verdict.broken[:_SHOWN_MAX]:
        where = f"book {broken.book_id}: " if broken.book_id else ""
        lines.append(f"    BROKEN: {where}{broken.what} ({broken.number})")
    if len(verdict.broken) > _SHOWN_MAX:
        lines.append(f"    and {len(verdict.broken) - _SHOWN_MAX} more; see --json")
    if verdict.broken:
        lines.append("A promise is broken.")
    elif verdict.unchecked:
        lines.append("The promises are not shown to hold: the audit is not complete.")
    else:
        lines.append("The promises held.")
    return "\n".join(lines)
