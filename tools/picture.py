"""The picture of README.md: boxes and arrows as SVG, whose colours follow the reader's light or dark mode."""

from __future__ import annotations

from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 900, 300
BOX_WIDTH, BOX_HEIGHT = 220, 84

_STYLE = """
text { font: 14px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; fill: #1f2328; text-anchor: middle; }
.name { font-weight: 600; font-size: 16px; } .does { font-size: 13px; } .label { font-size: 13px; fill: #59636e; }
rect { fill: #f6f8fa; stroke: #8c959f; } .store rect { fill: #ddf4ff; stroke: #0969da; }
path { fill: none; stroke: #59636e; stroke-width: 1.5; marker-end: url(#tip); } #tip path { fill: #59636e; stroke: none; }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc; } .label { fill: #9198a1; }
  rect { fill: #151b23; stroke: #656c76; } .store rect { fill: #0c2d4d; stroke: #4493f8; }
  path { stroke: #9198a1; } #tip path { fill: #9198a1; }
}
"""


class Box(NamedTuple):
    """`x`, `y`: its upper left corner. `does`: one or two lines."""

    name: str
    does: tuple[str, ...]
    x: int
    y: int
    store: bool = False


class Arrow(NamedTuple):
    """`points`: where it begins, bends and ends. The label is centred on `at`."""

    label: tuple[str, ...]
    at: tuple[int, int]
    points: tuple[tuple[int, int], ...]


BOXES = (
    Box("Your backend", ("checkout, campaigns",), 10, 20),
    Box("API processes", ("who may call, what is valid",), 340, 20),
    Box("Redis or Valkey", ("decides: pool, holders, locks",), 670, 20, store=True),
    Box("Operator", ("verify, rebuild, quarantine",), 10, 196),
    Box("Postgres", ("owns books and codes,", "keeps the ledger"), 340, 196, store=True),
    Box("Writers", ("each shard has one owner",), 670, 196),
)
ARROWS = (
    Arrow(("HTTPS,", "API key"), (285, 50), ((230, 62), (335, 62))),
    Arrow(("one Lua", "script"), (615, 50), ((560, 62), (665, 62))),
    Arrow(("events",), (712, 155), ((740, 104), (740, 191))),
    Arrow(("codes",), (848, 155), ((820, 196), (820, 109))),
    Arrow(("batches",), (615, 217), ((670, 226), (565, 226))),
    Arrow(("lent codes",), (615, 271), ((560, 250), (665, 250))),
    Arrow(("books, uploads, keys",), (527, 155), ((450, 104), (450, 191))),
    Arrow((), (0, 0), ((230, 238), (335, 238))),
)


def draw() -> str:
    """The whole picture."""
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
            ' role="img" aria-label="The parts of the service and what passes between them">',
            f"<style>{_STYLE}</style>",
            '<marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="8" markerHeight="8" orient="auto">'
            '<path d="M0 0L10 5L0 10z"/></marker>',
            *map(_arrow, ARROWS),
            *map(_box, BOXES),
            "</svg>\n",
        )
    )


def _box(box: Box) -> str:
    middle, top = box.x + BOX_WIDTH // 2, box.y + (38 if len(box.does) == 1 else 30)
    lines = "".join(
        f'<text class="does" x="{middle}" y="{top + 22 + 18 * i}">{escape(t)}</text>' for i, t in enumerate(box.does)
    )
    return (
        f"<g{' class=' + chr(34) + 'store' + chr(34) if box.store else ''}>"
        f'<rect x="{box.x}" y="{box.y}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="8"/>'
        f'<text class="name" x="{middle}" y="{top}">{escape(box.name)}</text>{lines}</g>'
    )


def _arrow(arrow: Arrow) -> str:
    x, y = arrow.at
    label = "".join(
        f'<text class="label" x="{x}" y="{y + 30 * i}">{escape(t)}</text>' for i, t in enumerate(arrow.label)
    )
    line = "L".join(f"{x} {y}" for x, y in arrow.points)
    return label + (f'<path d="M{line}"/>' if line else "")
