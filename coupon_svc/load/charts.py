"""Line charts as SVG, drawn here: nothing is fetched, and nothing runs."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import ceil, floor, log10

_WIDTH, _HEIGHT = 720, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 12, 12, 30
_POINTS_MAX = 600
"""More samples than the chart has pixels are drawn as the greatest of each group, so that no peak is hidden."""

Points = Sequence[tuple[float, float | None]]


def line_chart(title: str, unit: str, lines: dict[str, Points], *, logarithmic: bool = False) -> str:
    """A chart of `lines`, each of (seconds, value or None where it is not known), over the load's seconds.

    Logarithmic: values below the smallest power of ten that is drawn stand on the axis.
    """
    thinned = {name: _thin(points) for name, points in lines.items()}
    known = [(at, value) for points in thinned.values() for at, value in points if value is not None]
    if not known:
        return f"<figure><figcaption>{escape(title)}</figcaption><p>Not known.</p></figure>"
    end = max(at for at, _ in known)
    ticks = _log_ticks([value for _, value in known]) if logarithmic else _ticks(max(value for _, value in known))
    low, high = ticks[0], ticks[-1]

    def x(at: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * at / max(end, 1e-9)

    def y(value: float) -> float:
        if logarithmic:
            part = (log10(max(value, low)) - log10(low)) / (log10(high) - log10(low))
        else:
            part = value / high
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * part

    parts = []
    for tick in ticks:
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{_number(tick)}</text>')
    for tick in _ticks(end):
        if tick <= end * 1.001:
            parts.append(f'<text x="{x(tick):.1f}" y="{_HEIGHT - 10}" text-anchor="middle">{_number(tick)} s</text>')
    for place, (name, points) in enumerate(thinned.items()):
        for run in _runs(points):
            path = " ".join(f"{x(at):.1f},{y(value):.1f}" for at, value in run)
            parts.append(f'<polyline class="line c{place}" points="{path}"/>')
            for at, value in run:
                tip = escape(f"{name} at {at:.1f} s: {_number(value)} {unit}")
                dot = f'<circle class="dot c{place}" cx="{x(at):.1f}" cy="{y(value):.1f}" r="2.5">'
                parts.append(f"{dot}<title>{tip}</title></circle>")
    legend = "".join(f'<span class="key c{place}">{escape(name)}</span>' for place, name in enumerate(thinned))
    return (
        f"<figure><figcaption>{escape(title)} <small>{escape(unit)}</small> {legend}</figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg></figure>'
    )


def _thin(points: Points) -> Points:
    group = ceil(len(points) / _POINTS_MAX)
    if group <= 1:
        return points
    groups = [points[start : start + group] for start in range(0, len(points), group)]
    return [max(some, key=lambda point: -1.0 if point[1] is None else point[1]) for some in groups]


def _runs(points: Points) -> list[list[tuple[float, float]]]:
    """The stretches without a gap."""
    runs: list[list[tuple[float, float]]] = [[]]
    for at, value in points:
        if value is None:
            runs.append([])
        else:
            runs[-1].append((at, value))
    return [run for run in runs if run]


def _ticks(high: float) -> list[float]:
    """Round numbers from 0 to at least `high`."""
    if high <= 0:
        return [0.0, 1.0]
    rough = high / 4
    size = 10.0 ** floor(log10(rough))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= rough)
    return [step * number for number in range(ceil(high / step - 1e-9) + 1)]


def _log_ticks(values: Sequence[float]) -> list[float]:
    """Powers of ten that hold all values; at most five decades."""
    high = ceil(log10(max(max(values), 0.01)))
    low = floor(log10(max(min((value for value in values if value > 0), default=0.01), 10.0 ** (high - 5))))
    return [10.0**power for power in range(low, max(high, low + 1) + 1)]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"
