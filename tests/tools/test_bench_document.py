"""docs/benchmarks.md is what the command writes: from the samples that stand beside it, and the template."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench.document import TEMPLATE, read_results, render, write_results
from bench.figures import Expectation, Figure, GrowthRow, GrowthTable, Results

DOCS = Path(__file__).parents[2] / "docs"
LINES_OF_THE_TOLL, LINES_OF_THE_TABLE = 20, 5


def figure(samples: list[float], **more: object) -> Figure:
    return Figure(id="pair", what="pairs against echoes", samples=samples, goal=0.7, **more)  # type: ignore[arg-type]


def test_the_document_is_as_the_command_wrote_it() -> None:
    assert (DOCS / "benchmarks.md").read_text() == render(read_results(DOCS), TEMPLATE.read_text())


def test_every_line_of_the_table_has_a_sentence_for_when_it_is_not_reached() -> None:
    results = read_results(DOCS)
    assert len(results.toll) == LINES_OF_THE_TOLL
    measured = [line.id for line in results.table]
    assert len(measured) == len(set(measured)) == LINES_OF_THE_TABLE
    sentences = re.findall(r"^- \[(\w+)\]", TEMPLATE.read_text(), re.MULTILINE)
    assert set(sentences) == {line.id for line in (*results.toll, *results.table)}


def test_a_line_tells_its_median_and_its_spread() -> None:
    text = render(Results(table=[figure([0.5, 0.9, 0.6])]), TEMPLATE.read_text())
    assert "| pairs against echoes | 0.60 (0.55 to 0.75), not measurable here | 0.7 | undecided |" in text
    text = render(Results(table=[figure([0.58, 0.6, 0.62])]), TEMPLATE.read_text())
    assert "| pairs against echoes | 0.60 (0.59 to 0.61) | 0.7 | not reached |" in text


def test_the_document_opens_with_what_a_reader_can_expect() -> None:
    one = Expectation(name="ledger, 1 book", rates=[900, 1000, 1100], cores={"API": 0.2}, latency_ms={500: (4.0, 20.0)})
    sizes = {"coupon": 230.0, "record": 180.0, "ledger coupon": 200.0, "ledger event": 150.0}
    text = render(Results(expected=[one], pairs=1000.0, sizes=sizes), TEMPLATE.read_text())
    assert "| `ack = ledger`, 1 book | 1,000 (950 to 1,050) | 4.0 ms and 20.0 ms |" in text
    assert "| `ack = ledger`, 1 book | 0.200 |" in text
    assert "A coupon takes 230 bytes in Redis and 200 in Postgres" in text
    assert "need 16 GB of Redis" in text
    assert "about 500 checkouts a second" in text


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (figure([0.7]), False),
        (figure([0.69]), True),
        (figure([0.8], less_is_better=True), True),
        (figure([0.9], failed="not all answers were good"), True),
    ],
)
def test_what_stands_in_the_way_is_told_of_lines_that_were_not_reached(line: Figure, told: bool) -> None:
    text = render(Results(table=[line]), TEMPLATE.read_text())
    assert ("- **pairs against echoes**: " in text) is told
    assert "[pair]" not in text


def test_a_line_that_failed_shows_no_figure() -> None:
    text = render(Results(table=[figure([0.9], failed="not all answers were good")]), TEMPLATE.read_text())
    assert "failed: not all answers were good" in text
    assert "0.90" not in text


def test_growth_stands_in_one_table_with_a_column_for_each_ack() -> None:
    rows = [
        GrowthRow(ack="redis", setting="1", samples=[1_000.0, 1_200.0, 1_100.0]),
        GrowthRow(ack="ledger", setting="1", samples=[500.0], refused="0.10% refused: 503 refilling"),
    ]
    text = render(Results(growth=[GrowthTable(grows="books", rows=rows)]), TEMPLATE.read_text())
    assert "| books | `ack = redis` | `ack = ledger` |" in text
    assert "| 1 | 1,100 (1,000 to 1,200) | 500 (500 to 500); 0.10% refused: 503 refilling |" in text


def test_one_run_keeps_what_the_other_wrote(tmp_path: Path) -> None:
    write_results(tmp_path, Results(table=[figure([0.5])]))
    results = read_results(tmp_path)
    results.growth = [GrowthTable(grows="books", rows=[GrowthRow(ack="redis", setting="1", samples=[1.0])])]
    write_results(tmp_path, results)
    text = (tmp_path / "benchmarks.md").read_text()
    assert "pairs against echoes" in text
    assert "| books |" in text
