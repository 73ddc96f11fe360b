"""What CSV is answered to whom, and that no spreadsheet finds a formula in it."""

from __future__ import annotations

import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coupon_svc.domain.codes import normalise_code
from coupon_svc.http.csv_text import csv_line, neutralised, wants_csv

FORMULAS = "=+-@\t\r＝＋－＠"
CODES = st.from_regex(r"[A-Z0-9][A-Z0-9._~+@-]{2,63}", fullmatch=True)
CELLS = st.lists(st.one_of(CODES, st.text(), st.text(alphabet=FORMULAS + "',;\"a\n")), min_size=1)


@given(CELLS)
def test_no_cell_begins_as_a_formula_does(cells: list[str]) -> None:
    (read,) = csv.reader(io.StringIO(csv_line(["A", *cells]), newline=""))
    assert [cell for cell in read if cell[:1] in list(FORMULAS)] == []
    assert read[1:] == [("'" + cell if cell[:1] in list(FORMULAS + "\n") else cell) for cell in cells]


@given(CODES)
def test_a_code_is_read_back_as_it_was(code: str) -> None:
    (read,) = csv.reader(io.StringIO(csv_line([code])))
    assert read == [code]
    assert normalise_code(read[0].removeprefix("'")) == code


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\tx", "＝1"])
def test_a_formula_gets_an_apostrophe(text: str) -> None:
    assert neutralised(text) == "'" + text


def test_what_a_program_may_take_for_a_separator_is_quoted() -> None:
    assert csv_line(["a;b", 'a"b', "a,b", "ab"]) == '"a;b","a""b","a,b",ab\r\n'


@pytest.mark.parametrize(
    ("accept", "wanted"),
    [
        ("", False),
        ("*/*", False),
        ("application/json", False),
        ("text/csv", True),
        ("Text/CSV; charset=utf-8", True),
        ("text/csv, */*", True),
        ("text/csv, application/json", True),
        ("text/csv;q=0.5, application/json;q=0.9", False),
        ("text/csv;q=0", False),
        ("text/csv;q=x", False),
        ("text/*", False),
        (";;,,=", False),
    ],
)
def test_csv_is_answered_to_whom_asks_for_it_by_name(accept: str, wanted: bool) -> None:
    assert wants_csv(accept.encode()) is wanted
