"""Answers in CSV (RFC 4180), in which a spreadsheet finds no formula."""

from __future__ import annotations

from collections.abc import Iterable

CSV_TYPE = "text/csv; charset=utf-8; header=present"
_FORMULA = frozenset("=+-@\t\r\n＝＋－＠")
"""What a cell may not begin with: spreadsheets would compute it. Some take the full-width forms for the others."""
_QUOTED = frozenset('",;\t\r\n')
"""What puts a cell between quotes. Semicolons and tabs, too: some programs take them for separators."""


def wants_csv(accept: bytes) -> bool:
    """Whether an Accept header names `text/csv`, and JSON by its name no higher. Every other is answered in JSON."""
    weights = dict(map(_weight, accept.decode("latin-1").split(",")))
    csv = weights.get("text/csv", 0.0)
    return csv > 0 and csv >= weights.get("application/json", 0.0)


def _weight(media_range: str) -> tuple[str, float]:
    """A media type, in lower case, and its weight: 1 unless it is given, 0 where it cannot be read."""
    media_type, *parameters = (part.strip().lower() for part in media_range.split(";"))
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            try:
                return media_type, float(value)
            except ValueError:
                return media_type, 0.0
    return media_type, 1.0


def neutralised(text: str) -> str:
    """The text as a cell that no spreadsheet computes: with `'` before what would begin a formula. Our own uploads take the
    `'` off again."""
    return "'" + text if text[:1] in _FORMULA else text


def csv_line(cells: Iterable[str]) -> str:
    """A line of cells, each neutralised, with its end."""
    return ",".join(map(_cell, cells)) + "\r\n"


def _cell(text: str) -> str:
    text = neutralised(text)
    return text if _QUOTED.isdisjoint(text) else '"' + text.replace('"', '""') + '"'
