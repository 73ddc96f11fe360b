"""The safeguards that tests leave out are where tests/unsafe.py says: else a run without one would be a run with it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from coupon_svc.resources import resource_folder
from tests import unsafe

LEFT_OUT = [
    (call.args[0].value, call.args[1].value)
    for call in ast.walk(ast.parse(Path(unsafe.__file__).read_text()))
    if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "_without_text"
    if isinstance(call.args[0], ast.Constant) and isinstance(call.args[1], ast.Constant)
]
"""Those that are spelled out: the file, and what is left out of it."""


@pytest.mark.parametrize(("file", "text"), LEFT_OUT)
def test_a_safeguard_is_where_it_is_left_out(file: str, text: str) -> None:
    assert text in (resource_folder("lua") / f"{file}.lua").read_text()


def test_most_safeguards_are_looked_at() -> None:
    assert len(LEFT_OUT) >= 7
